"""The packed model of a CPU: the same logits, the same bits of a row in any batch."""

import copy

import pytest
import torch
from conftest import random_config, random_model
from engines import (
    alone,
    greedy,
    random_prompts,
)

from engine.cpu import PackedLinear
from generate import Engine


@pytest.mark.parametrize(
    "shape", [(512, 256), (256, 704), (960, 576), (1408, 256), (1536, 576), (576, 1536), (70, 3000)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_any_batch(shape, threads):
    """However many rows are multiplied at once, one alone included, and whatever the number of inputs."""
    layer = torch.nn.Linear(*reversed(shape), bias=False).requires_grad_(False)
    if not PackedLinear(layer).blocked:
        pytest.skip("without oneDNN a row's bits depend on the number of rows")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, w = torch.randn(64, shape[1]), layer.weight.double()
        together = PackedLinear(layer)(x)
        # whatever the order of adding up: n terms in fp32 are off by at most n eps sum |x_i w_i| (Higham
        # 2002, 3.5)
        exact, sizes = (a @ b.T for a, b in ((x.double(), w), (x.double().abs(), w.abs())))
        assert ((together - exact).abs() <= x.shape[1] * 2**-24 * 1.001 * sizes).all()
        for n in (1, 2, 3, 4, 5, 16, 33):
            assert torch.equal(PackedLinear(layer)(x[:n]), together[:n])
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


def test_a_model_that_is_consumed():
    """Its weights are let go as they are packed, and the text is the same."""
    for seed, family in enumerate(["llama", "llama", "mixtral", "qwen2"]):
        model, prompt = random_model(random_config(seed, family)), [3, 1, 4]
        expected = alone(copy.deepcopy(model), prompt, greedy(20)).ids
        assert alone(model, prompt, greedy(20), consume=True).ids == expected
        assert not list(model.parameters())
