"""What tests share: a tiny real model, the stage's tokenizer, the real data where it is at hand, the scripts
as functions."""

import importlib
import os
import random
import sys
from pathlib import Path

import pytest
import torch

if (
    not torch.cuda.is_available()
):  # before anything imports triton: its kernels then run on the CPU, interpreted
    os.environ["TRITON_INTERPRET"] = "1"

import checkpoint
import tokenizer
from common import terminal
from data.packing import best_fit, make_row
from data.scenes import load_stage
from engine.engine import Engine
from engine.params import SamplingParams
from model import ModelConfig, RopeScaling

torch.set_num_threads(1)  # small models: more threads only wait for each other

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared():
    """The real data: a path, or a skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real data not found at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def stage():
    return load_stage()


@pytest.fixture(scope="session")
def stage_tokenizer():
    return tokenizer.load_tokenizer(tokenizer.STAGE_TOKENIZER)


def random_config(seed, family="llama", **changes):
    """A small config of odd sizes, drawn from a seed; of another family, with what is its own: biases,
    windows, experts."""
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 4])
    fields = dict(
        vocab_size=rng.randrange(50, 130),
        hidden_size=heads * rng.randrange(5, 12),  # transformers wants a multiple of the heads
        intermediate_size=rng.randrange(17, 90),
        num_hidden_layers=rng.randrange(1, 4),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * rng.randrange(2, 9),
        rms_norm_eps=rng.choice([1e-5, 1e-6]),
        rope_theta=rng.choice([1e4, 5e5]),
        rope_scaling=rng.choice([None, RopeScaling(original_max_position_embeddings=rng.choice([8, 32]))]),
        max_position_embeddings=256,
        tie_word_embeddings=rng.random() < 0.5,
    )
    own = {"mistral": dict(sliding_window=rng.choice([None, 1, 2, 7, 20]))}
    own["mixtral"] = dict(**own["mistral"], num_local_experts=rng.choice([2, 3, 8]))
    own["qwen2"] = dict(qkv_bias=True, head_dim=fields["hidden_size"] // heads * 2)
    if family == "qwen2":  # its config knows no head_dim: hidden size / heads, which has to be even
        fields["hidden_size"], fields["head_dim"] = heads * own["qwen2"]["head_dim"], own["qwen2"]["head_dim"]
    if family != "llama":
        fields |= dict(model_type=family)
    return ModelConfig(**{**fields, **own.get(family, {}), **changes})


def random_model(config, seed=0):
    """A Transformer whose weights are large enough for its answers to differ from token to token."""
    model = checkpoint.build_model(config, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_actor(tmp_path_factory, stage_tokenizer):
    """A checkpoint directory with random weights and the stage's tokenizer: fast, real, and talks
    nonsense."""
    config = random_config(
        1,
        vocab_size=stage_tokenizer.vocab_size,
        hidden_size=32,
        head_dim=8,
        max_position_embeddings=8192,
        num_hidden_layers=2,
    )
    directory = tmp_path_factory.mktemp("actor") / "tiny"
    checkpoint.save_model(random_model(config), directory, stage_tokenizer)
    return directory


def pack_rows(documents, seq_len, seed=0):
    """Rows of documents (ids, channels) or (ids, mask), none longer than a row."""
    rows = best_fit([len(ids) for ids, _ in documents], seq_len, seed)
    return [make_row([documents[i] for i in row], seq_len) for row in rows]


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script's command line in this process: script("judge", "--rescore", file) -> (exit code, stdout,
    stderr)."""

    def run(name, *args):

        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            terminal.run(importlib.import_module(name).main)
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    return run


def usage_error(result):
    """Asserts exit code 2 and one line on stderr that begins with `error:`; returns the line."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line]
    assert code == 2, (code, out, err)
    assert len(lines) == 1 and lines[0].startswith("error:"), err
    return lines[0]


@pytest.fixture(scope="module")
def chatter(tiny_actor):
    """The tiny actor's model and tokenizer, a prompt, and 60 tokens it says greedily."""
    model, own_tokenizer = checkpoint.load_model(tiny_actor), tokenizer.load_tokenizer(tiny_actor)
    prompt = own_tokenizer.encode("The ferry leaves at")
    ids = Engine(model).generate([prompt], SamplingParams(temperature=0, max_tokens=60))[0].ids
    assert len(set(ids)) > 20
    return model, own_tokenizer, prompt, ids


@pytest.fixture(params=["stage", "llama3"])
def any_tokenizer(request):
    """The stage's tokenizer, then LLaMA 3's where the real data is at hand."""
    if request.param == "stage":
        return request.getfixturevalue("stage_tokenizer")
    return tokenizer.load_tokenizer(request.getfixturevalue("shared") / "tokenizers" / "llama3")
