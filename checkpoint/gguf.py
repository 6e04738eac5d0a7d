"""Reads a GGUF file as if it were a Hugging Face directory: its config.json, and its tensors by those names
and row orders."""

import math
import re
from dataclasses import replace

import numpy as np
import torch

from checkpoint.weights import Weights
from common import terminal
from common.files import UsageError
from common.gguf import read_gguf
from model import ModelConfig, RopeScaling, rope_frequencies

# tensor names in a GGUF -> in a Hugging Face directory
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "ffn_gate_inp": "block_sparse_moe.gate",
}
EXPERT = {"gate": "w1", "down": "w2", "up": "w3"}


class GGUFWeights(Weights):
    """The tensors of a GGUF with the names, shapes and row order of a Hugging Face directory."""

    described_by = "the metadata"

    def __init__(self, path):
        self.directory, self.files, file = path, {}, read_gguf(path)
        for name, tensor in file.tensors.items():
            for new, part in _renamed(name, tensor, file):
                if new in self.files:
                    raise UsageError(f"{path}: {new} is there twice; download the file again")
                self.files[new] = part
        self.shapes = {name: list(tensor.shape) for name, tensor in self.files.items()}
        self.dtypes = dict.fromkeys(self.files, "F32")

    def __getitem__(self, name):
        return self.files[name]

    def order(self, names):
        return sorted(names, key=lambda name: (self.files[name].path, self.files[name].offset))


def _renamed(name, tensor, file):
    """The (name, Tensor) pairs that a tensor is in a Hugging Face directory. An unknown one keeps its
    name."""
    stem, _, suffix = name.rpartition(".")
    if name == "rope_freqs.weight":
        return
    if stem in TOP:
        yield f"{TOP[stem]}.{suffix}", tensor
        return
    block, _, kind = stem.removeprefix("blk.").partition(".")
    layer, experts = f"model.layers.{block}", re.fullmatch(r"ffn_(gate|up|down)(_exps|\.\d+)", kind)
    if kind in BLOCK:
        arch = file.metadata.get("general.architecture")
        heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(kind) if arch == "llama" else None
        heads = heads and _number(file, f"attention.{heads}", _number(file, "attention.head_count"))
        if heads and tensor.shape[0] % (2 * heads):
            raise UsageError(f"{file.path}: tensor {name} of {tensor.shape[0]} rows for {heads} heads")
        yield f"{layer}.{BLOCK[kind]}.{suffix}", replace(tensor, heads=heads or 0)
    elif experts and experts[2] == "_exps":
        one = math.prod(tensor.shape[1:-1]) * replace(tensor, shape=tensor.shape[-2:]).row_bytes
        for e in range(tensor.shape[0]):
            part = replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + e * one)
            yield f"{layer}.block_sparse_moe.experts.{e}.{EXPERT[experts[1]]}.{suffix}", part
    elif experts:
        yield f"{layer}.block_sparse_moe.experts{experts[2]}.{EXPERT[experts[1]]}.{suffix}", tensor
    else:
        yield name, tensor


def _number(file, key, default=None, kind=int):
    """A positive number of the metadata. UsageError if it is not one, KeyError if it is missing."""
    key = f"{file.metadata['general.architecture']}.{key}"
    value = file.metadata.get(key, default)
    if value is None:
        raise KeyError(key)
    if type(value) not in (int, kind) or not 0 < value < math.inf:
        raise UsageError(f"{file.path}: {key} {value!r} is not a number above 0")
    return value if kind is int else float(str(np.float32(value)))  # a float32: 1e-5, not 9.999999747e-06


def config_dict(path):
    """The config.json of the same model in a Hugging Face directory. KeyError if a value is missing."""
    file = read_gguf(path)
    metadata, tensors, arch = file.metadata, file.tensors, file.metadata["general.architecture"]
    if arch not in ("llama", "qwen2"):
        raise UsageError(f"{path}: architecture {arch!r} is not supported (only 'llama' and 'qwen2')")
    hidden, heads = _number(file, "embedding_length"), _number(file, "attention.head_count")
    head_dim = _number(file, "attention.key_length", hidden // heads)
    experts = metadata.get(f"{arch}.expert_count", 0) and _number(file, "expert_count")
    window = metadata.get(f"{arch}.attention.sliding_window", 0) and _number(file, "attention.sliding_window")
    hf = {
        "model_type": "mixtral" if experts else "mistral" if window else arch,
        "hidden_act": "silu",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": _number(file, "feed_forward_length"),
        "num_hidden_layers": _number(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _number(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon", kind=float),
        "rope_theta": _number(file, "rope.freq_base", 10_000.0, float),
        "max_position_embeddings": _number(file, "context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "sliding_window": window or None,
        "num_local_experts": experts,
        "num_experts_per_tok": _number(file, "expert_used_count", 2),
    }
    only = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "rope.scaling.type": "none"}
    for key, supported in only.items():
        if (found := metadata.get(f"{arch}.{key}", supported)) != supported:
            raise UsageError(f"{path}: {arch}.{key} {found!r} is not supported (only {supported!r})")
    largest = max(max(tensor.shape) for tensor in tensors.values())
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        if hf[key] > largest:
            problem = f"{key} is {hf[key]:,}, but no tensor has more than {largest:,} rows or columns"
            raise UsageError(f"{path}: {problem}")
    blocks = len({name.split(".")[1] for name in tensors if name.startswith("blk.")})
    router = tensors.get("blk.0.ffn_gate_inp.weight")
    routed = router.shape[0] if router else 0
    if (hf["num_hidden_layers"], experts) != (blocks, routed):
        found = f"tensors of {blocks} of {routed}"
        raise UsageError(f"{path}: {hf['num_hidden_layers']} blocks of {experts} experts, but {found}")
    if "rope_freqs.weight" in tensors:
        hf["rope_scaling"] = _rope_scaling(path, hf, tensors["rope_freqs.weight"][:])
    elif arch == "llama" and hf["rope_theta"] == 500_000 and hf["max_position_embeddings"] > 8192:
        terminal.note(
            f"{path}: no rope_freqs.weight; a Llama 3.1 converted without it is wrong on long texts"
        )
    return hf


def _rope_scaling(path, hf, divisors):
    """The LLaMA 3.1 scaling that divides the rotary frequencies by `divisors` [D/2]; None if all are 1."""
    factor, plain = divisors.max().item(), _frequencies(hf, None)
    for original in (8192, *(2**n for n in range(3, 20))):  # not stored in the file
        scaling = RopeScaling(factor=factor, original_max_position_embeddings=original)
        expected = plain / _frequencies(hf, scaling)
        if divisors.shape == expected.shape and torch.allclose(divisors, expected, rtol=1e-5, atol=0):
            return {"rope_type": "llama3", **vars(scaling)} if factor != 1 else None
    raise UsageError(f"{path}: rope_freqs.weight is not the scaling of Llama 3.1, and no other is supported")


def _frequencies(hf, scaling):
    fields = {name: hf[name] for name in ModelConfig.__dataclass_fields__ if name in hf}
    return rope_frequencies(ModelConfig(**{**fields, "rope_scaling": scaling}), "cpu")
