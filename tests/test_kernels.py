"""The kernels against plain formulas: attention against an explicit softmax, RMSNorm against torch's own."""

import random

import pytest
import torch
import torch.nn.functional as F

import kernels


def explicit_attention(q, k, v, positions, window):
    """Attention one query and head at a time, straight from its definition."""
    B, T, H, D = q.shape
    out, group = torch.zeros_like(q), H // k.shape[2]
    for b in range(B):
        start = 0
        for i in range(T):
            if positions is not None and positions[b, i] == 0:
                start = i
            first = start if window is None else max(start, i - window + 1)
            for h in range(H):
                keys, values = k[b, first : i + 1, h // group], v[b, first : i + 1, h // group]
                weights = torch.softmax((keys @ q[b, i, h]) / D**0.5, dim=0)
                out[b, i, h] = weights @ values
    return out


def random_case(seed, dtype=torch.float64):
    """q, k, v and positions of packed rows with odd sizes, drawn from a seed; a document of one token is among them."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    B, T, K, D = rng.randrange(1, 4), rng.randrange(5, 14), rng.choice([1, 2, 3]), rng.choice([1, 4, 7])
    q, k, v = (torch.randn(B, T, heads, D, generator=generator, dtype=dtype) for heads in (K * rng.choice([1, 2, 3]), K, K))
    rows = []
    for _ in range(B):
        row = [0] if rng.random() < 0.5 else [0, 1, 0, 1]
        while len(row) < T:
            row += range(min(rng.randrange(1, 6), T - len(row)))
        rows.append(row)
    return q, k, v, torch.tensor(rows)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_attention_is_the_explicit_softmax(seed, packed, window):
    """Causal, within each document, within the window, each group of query heads on its own key head."""
    q, k, v, positions = random_case(seed)
    positions = positions if packed else None
    expected = explicit_attention(q, k, v, positions, window)
    torch.testing.assert_close(kernels.attention(q, k, v, positions, window), expected)


def test_documents_of_one_token_return_their_value():
    """Where every document has one token there is nothing to average."""
    q, k, v, positions = random_case(3)
    out = kernels.attention(q, k, v, torch.zeros_like(positions))
    torch.testing.assert_close(out, v.repeat_interleave(q.shape[2] // v.shape[2], dim=2))


def test_a_row_may_begin_in_the_middle_of_a_document():
    """Rows whose first position is not 0 stay apart from the row before."""
    q, k, v, _ = random_case(1)
    B, T = q.shape[:2]
    positions = torch.arange(7, 7 + T).expand(B, T).clone()
    given = positions.clone()
    torch.testing.assert_close(kernels.attention(q, k, v, positions), explicit_attention(q, k, v, None, None))
    assert torch.equal(positions, given)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("seed", range(3))
def test_attention_gradients_are_finite_differences(seed, window):
    """The backward pass agrees with finite differences, with packed documents and windows."""
    *inputs, positions = random_case(seed)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda q, k, v: kernels.attention(q, k, v, positions, window), inputs, fast_mode=True)


@pytest.mark.parametrize("wrong", ["q", "k", "v", "positions"])
@pytest.mark.parametrize("how", ["time", "heads", "dimensions"])
def test_attention_refuses_shapes_that_do_not_fit(wrong, how):
    """A tensor of another shape is refused, and the message tells that shape."""
    tensors = {"q": (2, 5, 4, 6), "k": (2, 5, 2, 6), "v": (2, 5, 2, 6), "positions": (2, 5)}
    shape = list(tensors[wrong])
    if how == "time":
        shape[1] += 1
    elif how == "heads":
        shape[min(2, len(shape) - 1)] += 1
    else:
        shape.pop()
    tensors[wrong] = shape
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the message is looked at below)
        kernels.attention(*(torch.zeros(s, dtype=torch.int64 if n == "positions" else None) for n, s in tensors.items()))
    assert str(shape) in str(refusal.value)


@pytest.mark.parametrize("shape", [(7,), (3, 8), (2, 3, 33)])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rms_norm_is_the_one_of_torch(shape, eps):
    """Value and gradients equal F.rms_norm's; small inputs make eps count."""
    generator = torch.Generator().manual_seed(len(shape))
    x = 0.1 * torch.randn(shape, generator=generator)
    weight, upstream = torch.randn(shape[-1:], generator=generator), torch.randn(shape, generator=generator)
    results = []
    for norm in (lambda x, w: kernels.rms_norm(x, w, eps), lambda x, w: F.rms_norm(x, w.shape, w, eps)):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = norm(*inputs)
        out.backward(upstream)
        results.append([out.detach(), *(i.grad for i in inputs)])
    torch.testing.assert_close(*results)


def test_rms_norm_with_a_residual():
    """With a residual it is the sum that is normalised, and returned beside."""
    x, residual = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 2, 16)
    normed, total = kernels.rms_norm(x, weight, residual=residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, F.rms_norm(x + residual, (16,), weight, 1e-5))


def test_rms_norm_takes_the_mean_in_fp32():
    """In bf16 the result is what fp32 gives, to the two roundings it ends with; values are large enough to swamp a bf16 sum."""
    x = (100 + torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))).bfloat16()
    weight = torch.ones(4096, dtype=torch.bfloat16)
    out = kernels.rms_norm(x, weight)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), F.rms_norm(x.float(), (4096,)), rtol=2**-8, atol=0)


def test_rms_norm_refuses_shapes_that_do_not_fit():
    """A weight or residual of another shape is refused, and the message tells that shape."""
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"\[7\]"):
        kernels.rms_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"\[2, 1, 8\]"):
        kernels.rms_norm(x, torch.ones(8), residual=torch.zeros(2, 1, 8))


def test_kernels_are_chosen_by_name():
    """`use` takes the names there are and refuses another, listing them."""
    with pytest.raises(ValueError, match=r"'cuda12'.*torch"):
        kernels.use("cuda12")
    kernels.use("torch")
