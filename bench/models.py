"""The sides of a benchmark: a model in our engine, in transformers, in llama.cpp.

Each has `prefill(prompts, new)`, which also decodes one token, `decode(new)`, which decodes `new` more, and
for the bytes that a step reads `weights` (bytes) and `itemsize` (bytes of a key or value).
"""

import os
from pathlib import Path

import httpx
import torch

import checkpoint
from common.files import UsageError
from engine.cpu import PackedTransformer
from engine.engine import Engine
from engine.params import SamplingParams
from model import PRESETS, ModelConfig

SMALL = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, head_dim=64, vocab_size=49_152)
SMALL |= dict(num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
TOY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, head_dim=16)
TOY |= dict(num_attention_heads=4, num_key_value_heads=2)
SHAPES = {
    "135m": SMALL | {"max_position_embeddings": 8192},
    "stage": PRESETS["stage"] | {"vocab_size": 4096},
    "8b": PRESETS["llama-3.1-8b"] | {"vocab_size": 128_256},
}


def config_of(args, **changes):
    return ModelConfig(**SHAPES[args.model] | (TOY if args.toy else {}) | changes)


@torch.no_grad()
def randomise(model):
    """Fills a model in place: matrices normal with deviation 0.02, vectors with ones."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # an FSDP shard
        local.normal_(0, 0.02, generator=generator) if local.ndim > 1 else local.fill_(1)
    return model


def open_model(args, dtype):
    """The Transformer of --model, random or loaded, in eval mode."""
    if args.model in SHAPES:
        return randomise(checkpoint.build_model(config_of(args), args.device, dtype)).eval()
    return checkpoint.load_model(checkpoint.find_model(args.model), args.device, dtype)


def in_transformers(model, directory, tokenizer=None):
    """The same weights in transformers, in the same dtype on the same device, by way of a directory."""
    from transformers import AutoModelForCausalLM

    checkpoint.save_model(model, directory, tokenizer)
    like = next(model.parameters())
    return AutoModelForCausalLM.from_pretrained(directory, dtype=like.dtype).to(like.device).eval()


def ours_in(model, dtype):
    """The model for our side: as it is, or in int8."""
    return PackedTransformer(model.config, model.get_parameter, torch.int8) if dtype == "int8" else model


def bytes_read(model):
    """Bytes of weights that a decode step reads: all but an embedding table that is not also the head."""
    if isinstance(model, PackedTransformer):
        return model.bytes_read()
    config, weights = model.config, sum(parameter.nbytes for parameter in model.parameters())
    table = config.vocab_size * config.hidden_size * next(model.parameters()).itemsize
    return weights if config.tie_word_embeddings else weights - table


class Ours:
    """Our engine, one token a sequence and step: without speculation."""

    def __init__(self, model):
        self.engine = Engine(model, max_batch=256)
        self.weights, self.itemsize = bytes_read(model), self.engine.kv.itemsize

    def prefill(self, prompts, new):
        params = SamplingParams(0, max_tokens=new + 1)
        sequences = [self.engine.add(prompt, params)[0] for prompt in prompts]
        while any(len(sequence.ids) == sequence.prompt_tokens for sequence in sequences):
            self.engine.step()

    def decode(self, new):
        for _ in range(new):
            self.engine.step()


class Transformers:
    """transformers, greedily, with its static or its dynamic cache."""

    def __init__(self, model, static):
        self.model, self.static = model, static
        self.weights, self.itemsize = bytes_read(model), model.dtype.itemsize

    def prefill(self, prompts, new):
        from transformers import DynamicCache, StaticCache

        config, length = self.model.config, len(prompts[0]) + new
        self.cache = StaticCache(config, max_cache_len=length) if self.static else DynamicCache(config=config)
        self.tokens = torch.tensor(prompts, device=self.model.device)
        self.decode(1)

    @torch.inference_mode()
    def decode(self, new):
        for _ in range(new):
            output = self.model(self.tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.tokens = output.logits[:, -1].argmax(-1, keepdim=True)


class LlamaCpp:
    """llama.cpp's server (package xllamacpp) in this process, with as many threads as torch uses.

    slots: sequences decoded in parallel, each of at most `context` tokens; a slot has a prefix cache.
    """

    def __init__(self, args, slots, context):
        file = args.peer_model or args.model
        if not str(file).endswith(".gguf") or not Path(file).is_file():
            raise UsageError(f"--peer llama.cpp needs a GGUF file, not {file}: name one with --peer-model")
        try:
            import xllamacpp
        except ImportError:
            raise UsageError("--peer llama.cpp needs xllamacpp: pip install -e .[bench]") from None
        params = xllamacpp.CommonParams()
        params.model.path, params.n_parallel, params.n_ctx = str(file), slots, slots * context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.warmup, params.verbosity = False, -1
        self.server, self.weights, self.itemsize = xllamacpp.Server(params), os.path.getsize(file), 2

    def complete(self, prompts, new, **options):
        """The server's answers to concurrent prompts (token ids): greedy, at most `new` tokens each."""
        request = dict(prompt=prompts, n_predict=new, temperature=0, return_tokens=True, **options)
        response = httpx.post(f"{self.server.listening_address}/completion", json=request, timeout=None)
        if response.status_code != 200:
            raise UsageError(f"llama.cpp: {response.text[:300]}")
        answer = response.json()
        return answer if isinstance(answer, list) else [answer]

    def prefill(self, prompts, new):
        self.prompts = prompts
        self.complete(prompts, 1, ignore_eos=True)

    def decode(self, new):
        self.complete(self.prompts, new, ignore_eos=True)  # prefills only the last token of a prompt again
