"""The kernels: the twins against plain formulas, the Triton ones against fp64 and no worse than the twins.

Where there is a GPU the Triton kernels run on it, else on the CPU under Triton's interpreter; the tests are
the same.
"""

import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERSIONS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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
    """q, k, v and positions of packed rows with odd sizes, drawn from a seed; a document of one token is
    among them."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    B, T, K, D = rng.randrange(1, 4), rng.randrange(5, 14), rng.choice([1, 2, 3]), rng.choice([1, 4, 7])
    q, k, v = (
        torch.randn(B, T, heads, D, generator=generator, dtype=dtype)
        for heads in (K * rng.choice([1, 2, 3]), K, K)
    )
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
    assert torch.autograd.gradcheck(
        lambda q, k, v: kernels.attention(q, k, v, positions, window), inputs, fast_mode=True
    )


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
        kernels.attention(
            *(torch.zeros(s, dtype=torch.int64 if n == "positions" else None) for n, s in tensors.items())
        )
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
    """In bf16 the result is what fp32 gives, to the two roundings it ends with; values are large enough to
    swamp a bf16 sum."""
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


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_selected_rows_are_those_of_the_whole(seed, window):
    """With `rows` only those queries are computed, with the same values and gradients; none and repeated
    ones included."""
    q, k, v, positions = random_case(seed)
    count = random.Random(seed).randrange(0, 9) if seed else 0
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, positions.numel(), (count,), generator=generator).sort().values
    for packed in (None, positions, positions.int()):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        whole = kernels.attention(*inputs, packed, window).flatten(0, 1)[rows]
        expected = torch.autograd.grad(whole.square().sum(), inputs)
        out = kernels.attention(inputs[0].flatten(0, 1)[rows], *inputs[1:], packed, window, rows)
        torch.testing.assert_close(out, whole)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), inputs), expected)


def paged_case(seed, dtype, queries, group=4, D=64, lengths=(0, 1, 5, 123), kv_heads=2, page_size=16):
    """What decode_attention takes: sequences of these lengths in pages that lie anywhere, unused ones full
    of NaN."""
    generator = torch.Generator().manual_seed(seed)
    max_pages = max(lengths) // page_size + 2
    table = torch.randperm(len(lengths) * max_pages, generator=generator).view(len(lengths), max_pages).int()
    pages = torch.randn(2, table.numel(), page_size, kv_heads, D, generator=generator)
    for row, length in zip(table.long(), lengths, strict=True):
        flat = pages[:, row].flatten(1, 2)
        flat[:, length:] = torch.nan  # what lies behind the last token is not to be looked at
        pages[:, row] = flat.view(2, max_pages, page_size, kv_heads, D)
    q = torch.randn(len(lengths), queries, kv_heads * group, D, generator=generator)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return [x.to(DEVICE) for x in (q.to(dtype), *pages.to(dtype), table, lengths)]


def decode_reference(q, key_pages, value_pages, block_table, lengths, window=None):
    """Decode attention in fp64 as attention over each whole sequence, of which the last rows are taken."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for s, length in enumerate(lengths.tolist()):
        pages, seen = block_table[s].long(), min(length, q.shape[1])
        keys, values = (x[pages].flatten(0, 1)[None, :length] for x in (key_pages, value_pages))
        rows = torch.arange(length - seen, length, device=q.device)
        out[s, q.shape[1] - seen :] = reference(q[s, q.shape[1] - seen :], keys, values, None, window, rows)
    return out


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("queries", [1, 3, 32])
@pytest.mark.parametrize("group", [1, 4])
def test_decode_attention_is_attention_over_pages(queries, group, window):
    """The twin gives what whole attention gives for the last tokens; sequences shorter than the queries get
    zeros before."""
    case = paged_case(0, torch.float32, queries, group)
    torch.testing.assert_close(
        kernels.decode_attention(*case, window), decode_reference(*case, window).float()
    )


def test_kernels_are_chosen_by_name_or_device(monkeypatch):
    """`use` takes the names there are and refuses another; without it CUDA tensors get Triton and others
    the twin."""
    with pytest.raises(ValueError, match=r"'cuda12'.*torch"):
        kernels.use("cuda12")
    ran = []
    for version in ("attention_triton.attention_triton", "attention_torch"):
        monkeypatch.setattr(f"kernels.{version}", lambda *args, version=version: ran.append(version[-6:]))
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            q, k = torch.empty(1, 3, 4, 16, device=device), torch.empty(1, 3, 2, 16, device=device)
            for name in ("torch", "triton", None):
                kernels.use(name)
                kernels.attention(q, k, k)
    assert ran == ["_torch", "triton", "_torch", "_torch", "triton", "triton"]


def test_importing_the_kernels_leaves_triton_alone():
    """Triton is not on every platform; it is imported when one of its kernels first runs."""
    subprocess.run(
        [sys.executable, "-c", "import sys, kernels; assert 'triton' not in sys.modules"], check=True
    )


# ---- Triton against fp64
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def triton_runs(monkeypatch):
    """Memory that is not yet written holds NaN; the interpreter rounds to bf16 as a GPU does (it cuts the
    digits off)."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        from triton.runtime import interpreter

        original = interpreter._convert_float

        def rounding(data, source, target, mode):
            if (source.name, target.name) != ("fp32", "bf16"):
                return original(data, source, target, mode)
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()

        monkeypatch.setattr(interpreter, "_convert_float", rounding)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    kernels.use(None)


def visible(B, T, positions, window, rows):
    """Which keys a query sees, bool [B * T or N, B * T], from documents numbered by counting their starts."""
    starts = torch.zeros(B, T, dtype=torch.bool) if positions is None else positions.cpu() == 0
    starts[:, :1] = True
    document, index = starts.flatten().cumsum(0), torch.arange(B * T)
    seen = (document[:, None] == document) & (index[:, None] >= index)
    if window is not None:
        seen &= index[:, None] - index < window
    return seen if rows is None else seen[rows.cpu()]


def reference(q, k, v, positions=None, window=None, rows=None):
    """Attention in fp64 by a mask over all pairs."""
    B, T = k.shape[:2]
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.flatten(0, 1).repeat_interleave(q.shape[-2] // k.shape[2], dim=1) for x in (k, v))
    scores = torch.einsum("mhd,nhd->hmn", q.flatten(0, -3), k) / q.shape[-1] ** 0.5
    mask = visible(B, T, positions, window, rows).to(q.device)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hmn,nhd->mhd", weights, v).view(q.shape)


def no_worse(run, inputs, exact, upstream):
    """Runs a kernel by the twin, by Triton and by a formula in fp64: values and gradients of Triton's are
    at most 3 times
    as far from the exact ones as the twin's, at the worst and in the mean; or off by one rounding of the
    largest, or by one in
    fp32 of a product of two vectors (up to 32 here): differences of those are what gradients of scores
    are."""
    results = []
    for name in (None, "torch", "triton"):
        leaves = [(x.double() if name is None else x.clone()).detach().requires_grad_() for x in inputs]
        kernels.use(name)
        out = exact(*leaves) if name is None else run(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        given = [u.to(o.dtype) for u, o in zip(upstream, out, strict=True)]
        results.append([*out, *torch.autograd.grad(out, leaves, given)])
    for right, twin, ours in zip(*results, strict=True):
        assert ours.dtype == twin.dtype and ours.shape == twin.shape
        rounding = max(torch.finfo(ours.dtype).eps * right.abs().max(), 32 * torch.finfo(torch.float32).eps)
        twin, ours = (twin.double() - right).abs(), (ours.double() - right).abs()
        assert ours.max() <= max(3 * twin.max(), rounding), (ours.max(), twin.max())
        assert ours.mean() <= max(3 * twin.mean(), rounding / 4), (ours.mean(), twin.mean())


def packed(*rows):
    """positions of rows of documents of these lengths."""
    return torch.tensor([[i for n in lengths for i in range(n)] for lengths in rows], device=DEVICE)


ATTENTION = [  # B, T, K, group, D, positions, window, rows
    (1, 1, 2, 4, 64, None, None, None),
    (2, 5, 2, 1, 128, None, None, None),
    (2, 5, 1, 8, 64, packed([1, 3, 1], [5]), None, None),
    (1, 123, 1, 4, 64, packed([1, 40, 1, 1, 80]), None, None),
    (1, 123, 2, 1, 128, packed([123]).int(), 17, None),
    (2, 61, 1, 2, 20, packed([1, 59, 1], [30, 31]), 50, None),
    (1, 123, 1, 8, 16, packed([33, 90]), None, [0, 0, 31, 32, 33, 99, 122]),
    (3, 41, 1, 1, 32, None, 7, list(range(3, 120, 3))),
    (2, 41, 1, 1, 32, None, None, []),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTION)
def test_triton_attention_is_no_worse_than_its_twin(case, dtype, triton_runs):
    """Odd lengths, groups, head sizes, documents of one token, windows, selected rows; every element is
    written."""
    B, T, K, group, D, positions, window, rows = case
    generator = torch.Generator().manual_seed(T)
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int64, device=DEVICE)
    shape = (B, T, K * group, D) if rows is None else (len(rows), K * group, D)
    q, k, v, upstream = (
        torch.randn(s, generator=generator) for s in (shape, (B, T, K, D), (B, T, K, D), shape)
    )
    q, k, v, upstream = (x.to(DEVICE, dtype) for x in (q, k, v, upstream))

    def run(*inputs):
        return kernels.attention(*inputs, positions, window, rows)

    if rows is not None and not len(rows):
        inputs = [x.requires_grad_() for x in (q, k, v)]
        kernels.use("triton")
        assert [x.abs().sum() for x in torch.autograd.grad(run(*inputs).sum(), inputs)] == [0, 0, 0]
        return
    no_worse(run, [q, k, v], lambda *inputs: reference(*inputs, positions, window, rows), [upstream])


def test_triton_attention_takes_views(triton_runs):
    """q, k and v cut out of one projection, and an upstream gradient that is expanded, give what copies
    give."""
    fused = torch.randn(2, 35, 8, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    kernels.use("triton")
    results = []
    for inputs in (fused.split([4, 2, 2], dim=2), fused.mT.contiguous().mT.split([4, 2, 2], dim=2)):
        for cut in (lambda x: x, torch.clone):
            leaves = [cut(x).detach().requires_grad_() for x in inputs]
            out = kernels.attention(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("window", [None, 6])
def test_triton_attention_gradients_are_finite_differences(window, triton_runs):
    """In fp32, along random directions through all three inputs at once."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 21, 2, 16), (1, 21, 1, 16), (1, 21, 1, 16)
    inputs, directions = ([torch.randn(s, generator=generator).to(DEVICE) for s in shapes] for _ in range(2))
    upstream = torch.randn(shapes[0], generator=generator).to(DEVICE)
    kernels.use("triton")

    def value(step):
        moved = (x + step * d for x, d in zip(inputs, directions, strict=True))
        return (kernels.attention(*moved, packed([1, 13, 7]), window).double() * upstream).sum().item()

    leaves = [x.requires_grad_() for x in inputs]
    grads = torch.autograd.grad(kernels.attention(*leaves, packed([1, 13, 7]), window), leaves, upstream)
    slope = sum((g * d).sum().item() for g, d in zip(grads, directions, strict=True))
    assert slope == pytest.approx((value(5e-3) - value(-5e-3)) / 1e-2, rel=1e-3)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("chosen", [None, slice(3, None, 3)])
def test_blocks_a_mask_empties_are_not_visited(window, chosen, triton_runs):
    """The blocks that hold a visible pair are counted, for each block of the other side; all else is NaN,
    and nothing changes:
    so those are all that is visited. Block by block, for the output, dq, dk and dv."""
    from kernels import attention_triton as kernel

    scale = 1 if DEVICE == "cpu" else 8
    positions = packed([scale * n for n in (40, 1, 33, 66, 20)])
    T = positions.numel()
    rows = torch.arange(T, device=DEVICE)[slice(None) if chosen is None else chosen]
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(n, 1, 16, generator=generator).to(DEVICE) for n in (len(rows), T, T, len(rows))
    )
    seen = visible(1, T, positions, window, rows).to(DEVICE)
    first, stop = kernel.key_range(1, T, positions, window, rows, DEVICE)
    out, lse = kernel.attend(q, k, v, first, stop)
    dq, dk, dv = kernel.attend_backward(grad, q, k, v, first, stop, out, lse)

    def forward(v):
        return kernel.attend(q, k, v, first, stop)[:1]

    def backward(v=v, grad=grad):
        return kernel.attend_backward(grad, q, k, v, first, stop, out, lse)

    for version, run, right, pairs, given in [
        (kernel._forward, forward, [out], seen, v),
        (kernel._backward_queries, lambda v: backward(v=v)[:1], [dq], seen, v),
        (kernel._backward_keys, lambda grad: backward(grad=grad)[1:], [dk, dv], seen.T, grad),
    ]:
        sizes = [version.best_config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N")]
        own, other = sizes if given is v else reversed(sizes)
        visited = 0
        for at in range(0, len(pairs), own):
            needed = pairs[at : at + own].any(0).nonzero().flatten().tolist()
            blocks = -(-(needed[-1] + 1 - needed[0]) // other) if needed else 0
            poisoned = torch.full_like(given, torch.nan)
            if needed:
                part = slice(needed[0], needed[0] + blocks * other)
                poisoned[part] = given[part]
            for got, expected in zip(run(poisoned), right, strict=True):
                assert torch.equal(got[at : at + own], expected[at : at + own])
            visited += blocks
        dense = visible(1, T, None, None, rows) if given is v else visible(1, T, None, None, rows).T
        assert visited < 0.8 * sum(
            -(-block.any(0).sum().item() // other) for block in dense.split(own)
        )  # causal alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "group", "window"),
    [(1, 1, None), (1, 4, 20), (3, 8, None), (2, 4, 1), (32, 4, None), (29, 3, 20), (128, 1, 7)],
)
def test_triton_decode_attention_is_no_worse_than_its_twin(queries, group, window, dtype, triton_runs):
    """Ragged lengths over scattered pages, several parts each, parts without keys; what lies behind the
    last token is NaN."""
    case = paged_case(queries, dtype, queries, group, D=20 if group == 1 else 64, lengths=(0, 1, 5, 123, 300))
    exact, (twin, ours) = (
        decode_reference(*case, window),
        (kernels.use(n) or kernels.decode_attention(*case, window) for n in VERSIONS),
    )
    assert ours.dtype == twin.dtype == dtype
    twin, ours, rounding = (
        (twin - exact).abs(),
        (ours - exact).abs(),
        torch.finfo(dtype).eps * exact.abs().max(),
    )
    assert ours.max() <= max(3 * twin.max(), rounding) and ours.mean() <= max(3 * twin.mean(), rounding / 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5, 123), (2, 3, 64), (37, 1000), (3, 4100)])
def test_triton_rms_norm_is_no_worse_than_its_twin(shape, residual, dtype, triton_runs):
    """Odd sizes, rows that share a tile and rows that fill several; gradients of what is normalised and of
    the sum."""
    generator = torch.Generator().manual_seed(len(shape))
    x, other, dy, dtotal = torch.randn(4, *shape, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(shape[-1], generator=generator).to(DEVICE, dtype)

    def exact(x, weight, other=0):
        total = x + other
        normed = F.rms_norm(total, weight.shape, weight, 1e-5)
        return (normed, total) if residual else normed

    def run(x, weight, other=None):
        return kernels.rms_norm(x, weight, 1e-5, other)

    no_worse(run, [x, weight, other] if residual else [x, weight], exact, [dy, dtotal] if residual else [dy])


def test_triton_rms_norm_gradients_are_finite_differences(triton_runs):
    """In fp32, along a random direction through x, residual and weight at once."""
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 33), (33,), (5, 33)
    inputs, directions = ([torch.randn(s, generator=generator).to(DEVICE) for s in shapes] for _ in range(2))
    upstream = torch.randn(2, 5, 33, generator=generator).to(DEVICE)
    kernels.use("triton")

    def value(inputs):
        x, weight, residual = inputs
        normed, total = kernels.rms_norm(x, weight, 1e-5, residual)
        return (normed.double() * upstream[0] + total.double() * upstream[1]).sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    slope = sum(
        (g * d).sum() for g, d in zip(torch.autograd.grad(value(leaves), leaves), directions, strict=True)
    ).item()
    ahead, behind = (
        value([x + step * d for x, d in zip(inputs, directions, strict=True)]).item()
        for step in (5e-3, -5e-3)
    )
    assert slope == pytest.approx((ahead - behind) / 1e-2, rel=1e-3)


def test_triton_results_do_not_change_from_run_to_run(triton_runs):
    """Bit by bit, gradients included: no sum depends on which program comes first."""
    kernels.use("triton")
    generator = torch.Generator().manual_seed(0)
    q, k, weight = (
        torch.randn(s, generator=generator).to(DEVICE).requires_grad_()
        for s in ((1, 90, 4, 16), (1, 90, 2, 16), (16,))
    )
    results = []
    for _ in range(2):
        out = kernels.rms_norm(kernels.attention(q, k, k), weight)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, weight))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_triton_operators_are_well_formed(triton_runs):
    """torch's own check of an operator: schema, fake implementation, autograd, and all of it under a
    compiler's tracing."""
    from kernels.attention_triton import attend, attend_backward, key_range
    from kernels.decode_triton import decode
    from kernels.rms_norm_triton import norm, norm_backward

    q, k = (torch.randn(9, heads, 16, device=DEVICE, requires_grad=True) for heads in (2, 1))
    ranges = key_range(1, 9, None, 4, None, DEVICE)
    torch.library.opcheck(attend, (q, k, k.detach().clone().requires_grad_(), *ranges))
    q, k = q.detach(), k.detach()
    torch.library.opcheck(attend_backward, (torch.ones_like(q), q, k, k, *ranges, *attend(q, k, k, *ranges)))
    torch.library.opcheck(decode, (*paged_case(0, torch.float32, 1, lengths=(3, 20)), 2**30))
    x, residual = torch.randn(2, 3, 8, device=DEVICE).requires_grad_().unbind()
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    for other in (None, residual):
        torch.library.opcheck(norm, (x, weight, 1e-5, other))
    torch.library.opcheck(
        norm_backward, (*torch.ones(3, 3, 8, device=DEVICE), weight.detach(), torch.ones(3, device=DEVICE))
    )


def test_triton_kernels_run_under_a_compiler(triton_runs):
    """A graph without a break, forward and backward, gives what runs without a compiler; rows of another
    length are fine."""
    kernels.use("triton")

    def block(x, q, k, weight, positions, rows):
        normed, total = kernels.rms_norm(x, weight, residual=x)
        out = kernels.attention(q[rows], k[None], k[None], positions, 8, rows)
        return normed.sum() + total.square().sum() + out.square().sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (20, 33):
        leaves = [
            torch.randn(s, device=DEVICE).requires_grad_() for s in ((4, 8), (T, 2, 16), (T, 1, 16), (8,))
        ]
        rows = torch.arange(1, T, 4, device=DEVICE)
        results = [
            (out := run(*leaves, packed([7, T - 7]), rows), *torch.autograd.grad(out, leaves))
            for run in (block, compiled)
        ]
        torch.testing.assert_close(*results)


def test_triton_kernels_refuse_what_they_cannot_do(triton_runs):
    """Head sizes, rows and groups too large, and dtypes they do not know: a ValueError that names them."""
    kernels.use("triton")
    wide, double, half = (
        torch.zeros(1, 2, 1, 136),
        torch.zeros(1, 2, 1, 16).double(),
        torch.zeros(1, 2, 1, 16).half(),
    )
    with pytest.raises(ValueError, match=r"\[1, 2, 1, 136\]"):
        kernels.attention(wide, wide, wide)
    with pytest.raises(ValueError, match="float64"):
        kernels.attention(double, double, double)
    with pytest.raises(ValueError, match=r"float16.*float32"):
        kernels.attention(half, half.float(), half.float())
    q, _, _, *paged = paged_case(0, torch.float32, 33, lengths=(3,))
    with pytest.raises(ValueError, match=r"\[1, 33, 8, 64\]"):
        kernels.decode_attention(q, *torch.zeros(2, 4, 16, 2, 64), *paged)
    with pytest.raises(ValueError, match=r"\[2, 16385\]"):
        kernels.rms_norm(torch.zeros(2, 16_385), torch.zeros(16_385))
