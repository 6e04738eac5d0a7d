"""The forward pass: equal to transformers' LlamaForCausalLM, on packed rows to the documents alone, in bf16
no worse."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import random_config, random_model
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

import checkpoint
import model as model_module
from model import PRESETS, ModelConfig, RopeScaling, Transformer

logging.disable_progress_bar()


def crossed_config(seed):
    """Seeds 0 to 7 cross grouped or multi-head, scaled or plain rope, tied or not; the sizes are drawn."""
    kv_heads = random.Random(seed).choice([1, 2, 3])
    heads = kv_heads * (random.Random(seed).choice([2, 4]) if seed & 1 else 1)
    config = random_config(
        seed,
        num_key_value_heads=kv_heads,
        num_attention_heads=heads,
        rope_scaling=RopeScaling(original_max_position_embeddings=32) if seed & 2 else None,
        tie_word_embeddings=bool(seed & 4),
        max_position_embeddings=2048,
    )
    return dataclasses.replace(
        config, hidden_size=-(-config.hidden_size // heads) * heads
    )  # transformers asks for a multiple


def pair(seed, directory):
    """A random model, and the same one as transformers opens it from what save_model wrote."""
    ours = random_model(crossed_config(seed), seed)
    checkpoint.save_model(ours, directory)
    return ours, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def random_tokens(model, seed, *shape):
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_logits_equal_those_of_transformers(seed, tmp_path):
    """fp32 logits are within 1e-5 of transformers' on the checkpoint we wrote."""
    ours, theirs = pair(seed, tmp_path / "model")
    tokens = random_tokens(ours, seed, 2, 61)
    expected = theirs(tokens).logits
    assert expected.std() > 0.5  # an answer that depends on the input
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [1, 3])
@torch.no_grad()
def test_logits_stay_equal_far_into_the_context(seed, tmp_path):
    """Nor do they drift apart as positions grow."""
    ours, theirs = pair(seed, tmp_path / "model")
    tokens = random_tokens(ours, seed, 1, 1500)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", ["stage", "llama-3.1-8b"])
def test_angles_equal_those_of_transformers(preset, tmp_path):
    """cos and sin at the very end of the context, where an error in a frequency counts most, are
    transformers' own."""
    config = ModelConfig(vocab_size=128, **PRESETS[preset])
    small = dataclasses.replace(
        config, num_hidden_layers=1, hidden_size=config.num_attention_heads, intermediate_size=2
    )
    checkpoint.save_model(random_model(small), tmp_path / "model")
    theirs = LlamaRotaryEmbedding(AutoModelForCausalLM.from_pretrained(tmp_path / "model").config)
    end = config.max_position_embeddings
    positions = torch.tensor([[0, 1, 100, end // 2, end - 2, end - 1]])
    cos, sin = theirs(torch.zeros(1), positions)
    sin = torch.cat((-sin.chunk(2, -1)[0], sin.chunk(2, -1)[1]), -1)  # theirs turns the sign with the vector
    for got, expected in zip(model_module.rotary(positions, config), (cos, sin), strict=True):
        torch.testing.assert_close(got[:, :, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(0, 8, 2))
def test_gradients_equal_those_of_transformers(seed, tmp_path):
    """A training step would move every parameter as it would in transformers."""
    ours, theirs = pair(seed, tmp_path / "model")
    tokens = random_tokens(ours, seed, 2, 20)
    for model in (lambda x: theirs(x).logits, ours):
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_bf16_is_no_worse_than_transformers(seed, tmp_path):
    """In bf16 the error against fp32 logits is at most twice transformers' own, in the mean and at its
    worst."""
    ours, theirs = pair(seed, tmp_path / "model")
    tokens = random_tokens(ours, seed, 2, 300)
    exact = theirs(tokens).logits
    error = (checkpoint.load_model(tmp_path / "model", dtype=torch.bfloat16)(tokens).float() - exact).abs()
    allowed = 2 * (theirs.to(torch.bfloat16)(tokens).logits.float() - exact).abs()
    assert error.mean() <= allowed.mean() and error.max() <= allowed.max()
    cast = ours.to(torch.bfloat16)(tokens)  # a cast in memory must not reach the rotary angles either
    assert cast.dtype == torch.bfloat16 and (cast.float() - exact).abs().mean() <= allowed.mean()


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(seed):
    """Each document of a packed row gets the logits it gets alone, documents of one token included."""
    model, rng = random_model(crossed_config(seed), seed), random.Random(seed)
    rows = []
    for _ in range(2):
        lengths = [1, rng.randrange(1, 15), 1, rng.randrange(1, 15)]
        rng.shuffle(lengths)
        rows.append([*lengths, 40 - sum(lengths)])
    tokens = random_tokens(model, seed, 2, 40)
    positions = torch.tensor([[i for n in lengths for i in range(n)] for lengths in rows])
    packed = model(tokens, positions)
    for row, lengths in enumerate(rows):
        for document, logits in zip(tokens[row].split(lengths), packed[row].split(lengths), strict=True):
            torch.testing.assert_close(logits, model(document[None])[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_rows_select_from_the_logits(seed):
    """`rows` gives the logits of those rows of the flattened batch, whatever the last layer leaves out for
    it."""
    model = random_model(crossed_config(seed))
    tokens = random_tokens(model, 0, 3, 10)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 0]] * 3)
    rows = torch.tensor([0, 7, 13, 14, 29])
    expected = model(tokens, positions).flatten(0, 1)[rows]
    torch.testing.assert_close(model(tokens, positions, rows=rows), expected, rtol=1e-5, atol=1e-5)
    assert model(tokens, rows=rows[:0]).shape == (0, model.config.vocab_size)


@pytest.mark.parametrize("seed", range(8))
def test_parameters_are_counted_from_the_shapes(seed):
    """num_parameters agrees with the parameters there are."""
    config = crossed_config(seed)
    assert config.num_parameters() == sum(p.numel() for p in random_model(config).parameters())


@pytest.mark.parametrize(
    ("preset", "published"), [("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496)]
)
def test_presets_have_the_published_sizes(preset, published):
    """The large presets have exactly as many parameters as the published models."""
    config = ModelConfig(vocab_size=128_256, **PRESETS[preset])
    with torch.device("meta"):
        assert (
            sum(p.numel() for p in Transformer(config).parameters()) == config.num_parameters() == published
        )
