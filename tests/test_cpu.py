"""The packed model of a CPU: the same logits, the same bits of a row in any batch."""

import os
import weakref

import pytest
import torch
from conftest import random_config, random_model
from engines import (
    alone,
    greedy,
    random_prompts,
)

import checkpoint
from common.files import UsageError
from engine import int8
from engine.cpu import DTYPES, PackedLinear, PackedTransformer
from engine.int8 import Int8Linear, quantise
from generate import Engine
from llm import local


@pytest.mark.parametrize(
    "shape", [(512, 256), (256, 704), (960, 576), (1408, 256), (1536, 576), (576, 1536), (70, 3000)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_any_batch(shape, threads):
    """However many rows are multiplied at once, one alone included, and whatever the number of inputs."""
    weight = torch.nn.Linear(*reversed(shape), bias=False).weight.detach()
    if not PackedLinear([weight]).blocked:
        pytest.skip("without oneDNN a row's bits depend on the number of rows")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, w = torch.randn(64, shape[1]), weight.double()
        together = PackedLinear([weight])(x)
        # whatever the order of adding up: n terms in fp32 are off by at most n eps sum |x_i w_i| (Higham
        # 2002, 3.5)
        exact, sizes = (a @ b.T for a, b in ((x.double(), w), (x.double().abs(), w.abs())))
        assert ((together - exact).abs() <= x.shape[1] * 2**-24 * 1.001 * sizes).all()
        for n in (1, 2, 3, 4, 5, 16, 33):
            assert torch.equal(PackedLinear([weight])(x[:n]), together[:n])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_the_packed_twin(family, dtype):
    """It gives the model's logits, each row's the same bits among any number of rows, and leaves the model as
    it was."""
    model = random_model(
        random_config(5, family, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    )
    model = model.to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine, prompt = Engine(model), random_prompts(model, 0, [33])[0]
    assert engine.model is not model and model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    logits, run = [], engine.run
    engine.run = lambda batch: logits.append(run(batch)) or logits[-1]
    engine.generate([prompt], greedy(1))
    expected = model(torch.tensor([prompt]))[0, -1].float()
    assert (logits[0][0].float() - expected).abs().max() < (
        1e-4 if dtype == torch.float32 else 0.1
    ) * expected.std()
    layers = engine.model.model["layers"][0].self_attn.qkv, engine.model.packed_head
    if dtype == torch.float32 and not layers[0].blocked:
        pytest.skip("without oneDNN a row's bits depend on the number of rows")
    for n in (1, 2, 5, 16, 17):
        rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(n)).to(dtype)
        for layer in layers:
            assert torch.equal(layer(rows[:n]), layer(rows)[:n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_weights_are_read_one_after_the_other(dtype):
    """No tensor that was read outlives its layer, except the embeddings and norms of float32, and the text is
    the model's."""
    for seed, family in enumerate(["llama", "llama", "mixtral", "qwen2"]):
        model, prompt, seen, most = random_model(random_config(seed, family)), [3, 1, 4], [], 0

        def read(name):
            nonlocal most
            alive = [tensor() for tensor in seen if tensor() is not None]  # noqa: B023
            most = max(most, sum(tensor.ndim > 1 for tensor in alive))
            tensor = model.get_parameter(name).detach().clone()  # noqa: B023
            seen.append(weakref.ref(tensor))  # noqa: B023
            return tensor

        packed = PackedTransformer(model.config, read, dtype)
        assert most <= (
            4 if dtype == torch.float32 else 1
        )  # embeddings, and q, k and v; a single one in int8
        assert len(seen) == len(list(model.parameters()))
        ids = alone(packed, prompt, greedy(20)).ids
        if dtype == torch.float32:
            assert ids == alone(model, prompt, greedy(20)).ids
            assert ids == alone(packed, prompt, greedy(20)).ids


def exact(x, q, scale):
    """What an int8 layer computes, in float64: x and weights rounded to whole numbers of their scales."""
    step = x.abs().amax(-1, keepdim=True).double() / 127
    return (x.double() / step).round() @ q.double().T * scale.double() * step


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shape", [(512, 256), (576, 1536), (70, 3000), (33, 37), (128, 9000)])
def test_int8_rows_have_the_same_bits_in_any_batch(shape, native, monkeypatch):
    """In fbgemm as in the twin, in any batch, among the largest values possible, and near the exact sums."""
    q, scale = quantise(weight := torch.randn(shape))
    weight[0], bias = 63.0, torch.randn(shape[0])
    q, scale = quantise(weight)
    layers = [Int8Linear([weight], bias)]
    monkeypatch.setattr(int8, "has_fbgemm", lambda: False)
    layers.append(Int8Linear([weight[: shape[0] // 2], weight[shape[0] // 2 :]], bias))
    x = torch.randn(64, shape[1]) * torch.rand(64, 1) * 9
    x[3], x[4], x[5] = 1e4, 0, -1
    layer, together = layers[not native], layers[1](x)
    assert layers[1].packed is None and q.abs().max() == 63
    assert (together - bias - exact(x, q, scale).nan_to_num()).abs().max() < 1e-3 * together.std()
    for n in (1, 2, 3, 4, 5, 16, 33, 64):
        assert torch.equal(layer(x[:n]), together[:n])


@pytest.mark.parametrize("native", [True, False])
def test_int8_of_what_is_no_number(native, monkeypatch):
    """A row with a NaN or inf has no finite result, an output with a NaN in its weights is NaN, and all else
    is as without them; no rows, rows of zeros and huge numbers are allowed."""
    if not native:
        monkeypatch.setattr(int8, "has_fbgemm", lambda: False)
    weight, x = torch.randn(50, 64), torch.randn(6, 64)
    weight[3], x[2] = 0, 0
    clean = Int8Linear([weight])(x)
    weight[5, 9], x[0, 7], x[1, 7], x[4, 7] = torch.nan, torch.nan, -torch.inf, 3e37
    layer = Int8Linear([weight])
    out, others = layer(x), [i for i in range(50) if i != 5]
    assert not out[:2].isfinite().any() and out[:, 5].isnan().all()
    assert torch.equal(out[[2, 3, 5]][:, others], clean[[2, 3, 5]][:, others]) and not out[2, others].any()
    assert (out[4, others] / 3e37 - weight[others, 7]).abs().max() < 0.5001 * weight[others].abs().max() / 63
    assert layer(x[:0]).shape == (0, 50)


def test_weights_in_int8():
    """Off by at most half a step, a step being a 63rd of the row's largest; zeros stay zeros."""
    weight = torch.randn(3000, 577) * torch.rand(3000, 1)
    weight[7] = 0
    q, scale = quantise(weight)
    step = weight.abs().amax(1, keepdim=True) / 63
    assert ((q * scale[:, None] - weight).abs() <= 0.5001 * step).all() and not q[7].any()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_a_model_in_int8(family):
    """Near the model's logits; a text is the same alone and among others, to the token."""
    config = random_config(
        5, family, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    model = random_model(config)
    packed = PackedTransformer(config, model.get_parameter, torch.int8)
    engine, prompts = Engine(packed), random_prompts(model, 0, [33, 1, 20, 5])
    logits, run = [], engine.run
    engine.run = lambda batch: logits.append(run(batch)) or logits[-1]
    together = engine.generate(prompts, greedy(12))
    expected = model(torch.tensor([prompts[1]]))[0, -1]  # single tokens come first in a batch
    assert (logits[0][0] - expected).abs().max() < 0.2 * expected.std()
    assert engine.dtype == torch.int8 and engine.kv.dtype == torch.float32
    assert [c.ids for c in together] == [alone(packed, prompt, greedy(12)).ids for prompt in prompts]


@pytest.mark.parametrize(
    ("free", "native", "dtype"),
    [(9, True, "float32"), (5, True, "bfloat16"), (5, False, "int8"), (2, True, "int8")],
)
def test_the_dtype_that_fits(free, native, dtype, tiny_actor, monkeypatch, capfd):
    """By the memory that is free in bytes a weight; what is not float32 is said in one line. Text in int8 is
    that of the same model packed by hand."""
    config = checkpoint.load_config(tiny_actor)
    monkeypatch.setattr(local, "free_memory", lambda: free * config.num_parameters())
    monkeypatch.setattr(local, "native_bf16", lambda: native)
    engine = local.load_engine(tiny_actor)
    assert engine.dtype == DTYPES[dtype]
    lines = [line for line in capfd.readouterr().err.splitlines() if "--dtype" in line]
    assert len(lines) == (dtype != "float32") and all(dtype in line for line in lines)
    if dtype == "int8":
        model = checkpoint.load_model(tiny_actor)
        packed = PackedTransformer(config, model.get_parameter, torch.int8)
        assert engine.generate([[5, 6, 7]], greedy(20))[0].ids == alone(packed, [5, 6, 7], greedy(20)).ids


def test_memory_of_a_container(tmp_path, monkeypatch):
    """The smaller of what is available and the container's limit, in bytes; without a limit, or where the
    system does not say, what is there."""
    memory, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(local, "MEMINFO", memory)
    monkeypatch.setattr(local, "CGROUP", limit)
    whole = local.free_memory()
    assert whole == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory.write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:    3000 kB\n")
    for text, free in ("max\n", 3000 * 1024), ("2000000\n", 2_000_000), ("99999999999999\n", 3000 * 1024):
        limit.write_text(text)
        assert local.free_memory() == free


def test_unknown_dtypes_are_refused(tiny_actor, monkeypatch):
    with pytest.raises(UsageError, match="int4: on a CPU one of .*int8"):
        local.load_engine(tiny_actor, "int4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match="int8: on a GPU one of [^8]*float32[^8]*$"):
        local.load_engine(tiny_actor, "int8")
