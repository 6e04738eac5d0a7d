"""The chunked loss against the plain one; operations and bytes, as counted from shapes, against those that
PyTorch counts."""

import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import pack_rows, random_config, random_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import RandomWeights, fill
from data.packing import IGNORE
from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy
from model import PRESETS, ModelConfig
from training import costs
from training.lora import FreshAdapters, add_adapters
from training.parallel import shard_model
from training.step import loss_sum, stack, tally


@pytest.mark.parametrize("chunk", [1, 300, 10**6])
@pytest.mark.parametrize("n", [0, 1, 5, 64])
def test_loss_in_chunks_is_the_plain_loss(n, chunk, monkeypatch):
    """Sum, single losses and gradients equal those of whole logits, whatever the chunk; without a gradient,
    none is made."""
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(n)
    x, weight = torch.randn(n, 24, generator=generator), torch.randn(101, 24, generator=generator)
    targets = torch.randint(101, (n,), generator=generator)
    ours, theirs = ([each.clone().requires_grad_() for each in (x, weight)] for _ in range(2))
    total, losses = linear_cross_entropy(*ours, targets)
    expected = F.cross_entropy(theirs[0] @ theirs[1].T, targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=1e-5)
    for result in (total, expected.sum()):
        (result * 0.3).backward()
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*ours, targets)[0], total)


def test_loss_in_bf16_is_no_worse_than_the_plain_one():
    """Its gradients are at most twice as far from fp32 as those of whole bf16 logits."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 32, generator=generator), torch.randn(500, 32, generator=generator)
    targets = torch.randint(500, (64,), generator=generator)

    def gradients(loss, dtype):
        leaves = [each.to(dtype, copy=True).requires_grad_() for each in (x, weight)]
        loss(*leaves).backward()
        return [leaf.grad.float() for leaf in leaves]

    def plain(x, weight):
        return F.cross_entropy((x @ weight.T).float(), targets, reduction="sum")

    exact, theirs = gradients(plain, torch.float32), gradients(plain, torch.bfloat16)
    ours = gradients(lambda x, weight: linear_cross_entropy(x, weight, targets)[0], torch.bfloat16)
    for want, peer, got in zip(exact, theirs, ours, strict=True):
        assert (got - want).norm() <= 2 * (peer - want).norm()


def test_loss_in_bf16_does_not_depend_on_the_chunks(monkeypatch):
    """The head's gradient is added up in fp32 and rounded once: 64 chunks give what one chunk gives."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 32, generator=generator), torch.randn(500, 32, generator=generator)
    targets, found = torch.randint(500, (256,), generator=generator), []
    for rows in (256, 4):
        monkeypatch.setattr(cross_entropy, "CHUNK", 500 * rows)
        head = weight.bfloat16().requires_grad_()
        (linear_cross_entropy(x.bfloat16(), head, targets)[0] * 0.37).backward()
        assert head.grad.dtype == torch.bfloat16
        found.append(head.grad.float())
    assert (found[1] - found[0]).norm() < 3e-4 * found[0].norm()  # a rounding to bf16 is about 2e-3


def test_loss_never_holds_all_logits(monkeypatch):
    """No tensor of forward or backward is larger than a chunk of logits, or than the weight."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 4000)
    x, weight = torch.randn(200, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            self.elements = max(
                [self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))]
            )
            return out

    with Largest() as largest:
        linear_cross_entropy(x, weight, torch.randint(1000, (200,)))[0].backward()
    assert largest.elements == weight.numel() == 8000 > cross_entropy.CHUNK


def packed(config, seq_len):
    """One full row of random documents, as a batch."""
    generator = torch.Generator().manual_seed(0)
    documents = [
        (
            torch.randint(config.vocab_size, (n,), generator=generator).tolist(),
            (torch.rand(n, generator=generator) < 0.2).int(),
        )
        for n in (seq_len // 2, seq_len // 4, seq_len // 4)
    ]
    return stack(pack_rows(documents, seq_len), "cpu")


@pytest.mark.parametrize(
    ("family", "rank"), [("llama", None), ("mixtral", None), ("llama", 3), ("mixtral", 3)]
)
def test_model_flops_are_those_of_the_products(family, rank):
    """PyTorch's counter finds as many in the matrix products of forward and backward; attention is counted by
    hand."""
    config = random_config(4, family, num_hidden_layers=3, sliding_window=None)
    model, batch = random_model(config).train(), packed(config, 64)
    if rank:
        add_adapters(model, rank, rank)
        assert costs.adapter_parameters(config, rank) == sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )
    in_place = {
        torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]
    }  # the one it does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss_sum(model, batch)[0].backward()
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for operation, count in counts.items() if "attention" not in operation)
    learnt = (batch["targets"] != IGNORE).sum().item()
    if rank:  # the first block's input needs no gradient; what that spares is in the plan
        C, D = config.hidden_size, config.head_dim
        sizes = (
            config.num_attention_heads * D,
            config.num_key_value_heads * D,
            config.num_key_value_heads * D,
        )
        products += 2 * 64 * sum(C * size + rank * C for size in sizes)
    assert costs.model_flops(config, 64, learnt, 0, 0, rank) == products
    pairs = sum(
        n * (n + 1) // 2 for n in (32, 16, 16)
    )  # query and key: H heads, D multiply-adds for q k' and as many for p v
    each = 3 * 2 * 2 * config.num_attention_heads * config.head_dim
    with_attention = costs.model_flops(config, 64, learnt, pairs, 10, rank)
    assert with_attention - products == each * (
        2 * pairs + 10
    )  # the last layer needs those of supervised queries alone
    assert tally([batch], None).tolist()[:2] == [64, pairs]


@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_activations_take_what_the_plan_says(how, rank):
    """Bytes that autograd keeps for the backward pass are within a quarter of the plan's."""
    config = ModelConfig(vocab_size=4096, **{**PRESETS["stage"], "num_hidden_layers": 6})
    args = types.SimpleNamespace(
        recompute=how, compile=False, dtype="float32", shard_ranks=None, lora=rank, lora_alpha=rank
    )
    model = shard_model(config, torch.device("cpu"), args)
    weights = RandomWeights(model, 0)
    fill(model, FreshAdapters(weights, model, 0) if rank else weights)
    batch, made = packed(config, 512), []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            made.extend(
                weakref.ref(t.untyped_storage()) for t in tree_leaves(out) if isinstance(t, torch.Tensor)
            )
            return out

    with Made():
        loss = loss_sum(model, batch)  # noqa: F841 (holds what the backward pass needs)
    alive = {storage.data_ptr(): storage.nbytes() for ref in made if (storage := ref()) is not None}
    for parameter in model.parameters():
        alive.pop(parameter.data_ptr(), None)
    if not rank:
        heads = alive.pop(max(alive, key=alive.get))  # the head's gradient, a gradient
        assert heads == 4 * config.vocab_size * config.hidden_size
    plans = {name: costs.memory_plan(config, 512, 4, name, 1, rank)["activations"] for name in (how, "none")}
    plans = {name: plan - 4 * config.vocab_size * 512 for name, plan in plans.items()}  # no logits are left
    block = (
        0 if how == "none" else (plans["none"] - 4 * 512 * 3 * 256) / 5
    )  # the one that is recomputed is not there yet
    assert sum(alive.values()) == pytest.approx(plans[how] - block, rel=0.25)
