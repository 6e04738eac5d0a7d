"""Attention in Triton: FlashAttention-2 (Dao 2023) over ranges of keys, forward and backward.

Query m sees one range of keys, first[m] <= j < stop[m], from the start of its document or window to itself.
Both bounds grow with m, so one kernel does causal masks, packed documents, windows and selected queries: a
block of queries needs the blocks of keys from the `first` of its first query to the `stop` of its last, and
those that every query of the block sees in full need no mask. Likewise key j is seen by the queries
begin[j] <= m < end[j].

    forward      s = q k' / sqrt(D),  p = exp(s - lse),  out = p v,         lse = log sum exp(s), kept
    backward     delta = sum(grad * out),  dp = grad v',  ds = p * (dp - delta),
                 dq = ds k / sqrt(D),  dk = ds' q / sqrt(D),  dv = p' grad

M queries, N keys, H query heads, K key/value heads, D head size. Operations for each of H heads and each pair
of a query and a key it sees: 4 D forward (two products), 14 D backward (seven: s and dp are recomputed for dk
and dv). Bytes: q, k, v and out once, 2 (H + K) D values a token; with documents of 1,600 tokens about 1,300
operations a byte in bf16, far above the 200 or so from which a GPU is compute-bound. Nothing of size M N is
written. No atomics: one program sums each result, in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def tuned(*configs, key, fp32=None):
    """Autotunes over (block sizes, warps, stages). fp32: the only configuration for fp32, with its larger
    elements. The interpreter always gets blocks of 32 and 16."""
    if INTERPRETED:
        configs = [({name: 32 if name == "BLOCK_M" else 16 for name in configs[0][0]}, 1, 1)]
    elif fp32:
        configs = (*configs, fp32)
    configs = [triton.Config(sizes, num_warps=warps, num_stages=stages) for sizes, warps, stages in configs]

    def fit(configs, args, **_):
        return configs if not fp32 else configs[-1:] if args["q"].dtype == torch.float32 else configs[:-1]

    return triton.autotune(configs, key=key, prune_configs_by={"early_config_prune": fit})


@triton.jit
def dot(a, b):
    """a @ b in fp32; fp32 factors as three tf32 products, which keep their precision. The interpreter has no
    bf16 products."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def load_rows(base, rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of D values, `stride` apart, as [rows, BLOCK_D] padded with zeros."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    if BLOCK_D == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=d[None, :] < D, other=0.0)


@triton.jit
def store_rows(base, rows, stride, count, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the rows below `count` of a tile [rows, BLOCK_D], in the dtype of `base`."""
    d = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(rows[:, None] < count) & (d[None, :] < D))


@triton.jit
def runs(lower, upper, at, end, SIZE: tl.constexpr):
    """The blocks of keys that queries `at` to `end` - 1 need, from their bounds lower <= key < upper (or, the
    other way round, of queries that keys need).

    Returns (start of the first block, number of blocks, index of the first block that needs no mask, number
    of such blocks).
    """
    start = tl.load(lower + at)
    count = tl.cdiv(tl.load(upper + end - 1) - start, SIZE)
    first_whole = tl.cdiv(tl.load(lower + end - 1) - start, SIZE)
    wholes = (tl.load(upper + at) - start) // SIZE - first_whole
    return start, count, first_whole, tl.maximum(wholes, 0)


CONFIGS = [  # the largest tiles without register spills in the loop; the last fits twice on a processor
    ({"BLOCK_M": 128, "BLOCK_N": 128}, 8, 2),
    ({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
    ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2),
]
FP32 = ({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 2)


@tuned(*CONFIGS, key=["D", "GROUP"], fp32=FP32)
@triton.jit
def _forward(
    q, k, v, first, stop, out, lse, M, N, q_m, q_h, k_n, k_h, v_n, v_h, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: a loop over its keys, with online softmax (running maximum, sum)."""
    at = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the last queries see most: they go first
    head, heads = tl.program_id(1), tl.num_programs(1)
    m = at + tl.arange(0, BLOCK_M)
    rows = tl.minimum(m, M - 1)  # rows beyond the end repeat the last one and are not stored
    queries = load_rows(q + head * q_h, rows, q_m, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    lower, upper = tl.load(first + rows), tl.load(stop + rows)
    k += head // GROUP * k_h
    v += head // GROUP * v_h
    start, count, first_whole, wholes = runs(first, stop, at, tl.minimum(at + BLOCK_M, M), BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for phase in tl.static_range(2):  # first the masked blocks at both ends, then those between them
        for i in range(count - wholes if phase == 0 else wholes):
            block = i + tl.where(i >= first_whole, wholes, 0) if phase == 0 else i + first_whole
            n = start + block * BLOCK_N + tl.arange(0, BLOCK_N)
            cols = tl.minimum(n, N - 1) if phase == 0 else n
            keys = load_rows(k, cols, k_n, D, BLOCK_D)
            s = dot(queries, tl.trans(keys))  # [BLOCK_M, BLOCK_N]
            if phase == 0:
                s = tl.where((lower[:, None] <= n[None, :]) & (n[None, :] < upper[:, None]), s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1) * scale)  # to base 2, like everything below
            level = (
                tl.where(higher == float("-inf"), 0.0, higher) if phase == 0 else higher
            )  # no key seen yet
            p = tl.exp2(s * scale - level[:, None])
            shrink = tl.exp2(top - level)
            values = load_rows(v, cols, v_n, D, BLOCK_D)
            acc = acc * shrink[:, None] + dot(p.to(values.dtype), values)
            total = total * shrink + tl.sum(p, 1)
            top = higher
    store_rows(out + head * D, m, heads * D, M, acc / total[:, None], D, BLOCK_D)
    tl.store(lse + head * M + m, top + tl.log2(total), mask=m < M)


@tuned(*CONFIGS, key=["D", "GROUP"], fp32=FP32)
@triton.jit
def _backward_queries(
    q, k, v, first, stop, out, lse, grad, delta, dq, M, N, q_m, q_h, k_n, k_h, v_n, v_h, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries of one head, looping over keys as forward; delta for `_backward_keys`."""
    at = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, heads = tl.program_id(1), tl.num_programs(1)
    m = at + tl.arange(0, BLOCK_M)
    rows = tl.minimum(m, M - 1)
    queries = load_rows(q + head * q_h, rows, q_m, D, BLOCK_D)
    grads = load_rows(grad + head * D, rows, heads * D, D, BLOCK_D)
    outs = load_rows(out + head * D, rows, heads * D, D, BLOCK_D)
    delta_m = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)  # [BLOCK_M]
    tl.store(delta + head * M + m, delta_m, mask=m < M)
    lse_m = tl.load(lse + head * M + rows)
    lower, upper = tl.load(first + rows), tl.load(stop + rows)
    k += head // GROUP * k_h
    v += head // GROUP * v_h
    start, count, first_whole, wholes = runs(first, stop, at, tl.minimum(at + BLOCK_M, M), BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for phase in tl.static_range(2):
        for i in range(count - wholes if phase == 0 else wholes):
            block = i + tl.where(i >= first_whole, wholes, 0) if phase == 0 else i + first_whole
            n = start + block * BLOCK_N + tl.arange(0, BLOCK_N)
            cols = tl.minimum(n, N - 1) if phase == 0 else n
            keys, values = load_rows(k, cols, k_n, D, BLOCK_D), load_rows(v, cols, v_n, D, BLOCK_D)
            p = tl.exp2(dot(queries, tl.trans(keys)) * scale - lse_m[:, None])  # [BLOCK_M, BLOCK_N]
            if phase == 0:
                p = tl.where((lower[:, None] <= n[None, :]) & (n[None, :] < upper[:, None]), p, 0.0)
            ds = p * (dot(grads, tl.trans(values)) - delta_m[:, None])
            acc += dot(ds.to(keys.dtype), keys)
    store_rows(dq + head * D, m, heads * D, M, acc * (scale * 0.6931471805599453), D, BLOCK_D)


@tuned(  # by the same rule; with two accumulators fewer queries fit
    ({"BLOCK_M": 64, "BLOCK_N": 128}, 8, 2),
    ({"BLOCK_M": 32, "BLOCK_N": 128}, 8, 3),
    ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2),
    key=["D", "GROUP"],
    fp32=FP32,
)
@triton.jit
def _backward_keys(
    q, k, v, begin, end, lse, grad, delta, dk, dv, M, N, q_m, q_h, k_n, k_h, v_n, v_h, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key head, looping over the queries of its group that see it."""
    at = tl.program_id(0) * BLOCK_N
    key_head, key_heads = tl.program_id(1), tl.num_programs(1)
    n = at + tl.arange(0, BLOCK_N)
    cols = tl.minimum(n, N - 1)
    keys = load_rows(k + key_head * k_h, cols, k_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    values = load_rows(v + key_head * v_h, cols, v_n, D, BLOCK_D)
    lower, upper = tl.load(begin + cols), tl.load(end + cols)
    start, count, first_whole, wholes = runs(begin, end, at, tl.minimum(at + BLOCK_N, N), BLOCK_M)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for head in range(key_head * GROUP, (key_head + 1) * GROUP):
        for phase in tl.static_range(2):
            for i in range(count - wholes if phase == 0 else wholes):
                block = i + tl.where(i >= first_whole, wholes, 0) if phase == 0 else i + first_whole
                m = start + block * BLOCK_M + tl.arange(0, BLOCK_M)
                rows = tl.minimum(m, M - 1) if phase == 0 else m
                queries = load_rows(q + head * q_h, rows, q_m, D, BLOCK_D)
                grads = load_rows(grad + head * D, rows, key_heads * GROUP * D, D, BLOCK_D)
                lse_m, delta_m = tl.load(lse + head * M + rows), tl.load(delta + head * M + rows)
                p = tl.exp2(dot(keys, tl.trans(queries)) * scale - lse_m[None, :])  # [BLOCK_N, BLOCK_M]
                if phase == 0:
                    p = tl.where((lower[:, None] <= m[None, :]) & (m[None, :] < upper[:, None]), p, 0.0)
                dv_acc += dot(p.to(grads.dtype), grads)
                ds = p * (dot(values, tl.trans(grads)) - delta_m[None, :])
                dk_acc += dot(ds.to(queries.dtype), queries)
    store_rows(dk + key_head * D, n, key_heads * D, N, dk_acc * (scale * 0.6931471805599453), D, BLOCK_D)
    store_rows(dv + key_head * D, n, key_heads * D, N, dv_acc, D, BLOCK_D)


# ---- the operators -----------------------------------------------------------------------------------------


def attention_triton(q, k, v, positions=None, window=None, rows=None):
    """As `attention.attention_torch`, for head sizes up to 128 in fp16, bf16 or fp32; else a ValueError."""
    check(q, k, v)
    first, stop = key_range(*k.shape[:2], positions, window, rows, k.device)
    flat = q if rows is not None else q.flatten(0, 1)  # [M, H, D]
    out, _ = attend(flat, k.flatten(0, 1), v.flatten(0, 1), first, stop)
    return out.view(q.shape)


def check(q, k, v):
    """ValueError, with shapes and dtypes, for what the kernels do not support."""
    if (
        q.shape[-1] > 128
        or q.dtype not in (torch.float16, torch.bfloat16, torch.float32)
        or not q.dtype == k.dtype == v.dtype
    ):
        got = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in dict(q=q, k=k, v=v).items())
        raise ValueError(
            f"the triton kernels attend in fp16, bf16 or fp32, all the same, head sizes up to 128; got {got}"
        )


def key_range(B, T, positions, window, rows, device):
    """(first, stop) of the keys each query sees, as indices into the flattened [B * T]: int32 [M], sorted."""
    index = torch.arange(B * T, device=device)
    starts = index % T == 0
    if positions is not None:
        starts = starts | (positions.flatten() == 0)
    first, stop = torch.where(starts, index, 0).cummax(0).values, index + 1
    if window is not None:
        first = torch.maximum(first, stop - window)
    if rows is not None:
        first, stop = first[rows], stop[rows]
    return first.int(), stop.int()


@torch.library.custom_op("coser::attend", mutates_args=())
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, stop: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [M, H, D], k and v [N, K, D], first, stop int32 [M] -> out [M, H, D], log2-sum-exp fp32 [H, M]."""
    out, lse = _attend_shapes(q, k, v, first, stop)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    M, H, D = q.shape
    if q.numel():
        _forward[_grid(M, "BLOCK_M", H)](
            q, k, v, first, stop, out, lse, M, len(k), *_strides(q, k, v), **_sizes(q, k)
        )
    return out, lse


@attend.register_fake
def _attend_shapes(q, k, v, first, stop):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("coser::attend_backward", mutates_args=())
def attend_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    first: torch.Tensor, stop: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of `attend`, like q, k and v, from that of its output."""
    dq, dk, dv = _attend_backward_shapes(grad, q, k, v, first, stop, out, lse)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (M, H, _), (N, K, _) = q.shape, k.shape
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    grad, delta = grad.contiguous(), torch.empty_like(lse)
    keys = torch.arange(N, dtype=torch.int32, device=q.device)
    begin = torch.searchsorted(stop, keys, right=True, out_int32=True)  # the first query with stop > key
    end = torch.searchsorted(first, keys, right=True, out_int32=True)  # the first with first > key
    sizes, strides = _sizes(q, k), _strides(q, k, v)
    _backward_queries[_grid(M, "BLOCK_M", H)](
        q, k, v, first, stop, out, lse, grad, delta, dq, M, N, *strides, **sizes
    )
    _backward_keys[_grid(N, "BLOCK_N", K)](
        q, k, v, begin, end, lse, grad, delta, dk, dv, M, N, *strides, **sizes
    )
    return dq, dk, dv


@attend_backward.register_fake
def _attend_backward_shapes(grad, q, k, v, first, stop, out, lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _strides(q, k, v):
    """Arguments of the kernels after the sizes: strides of tokens and heads, the base-2 scale of scores."""
    return *(x.stride(i) for x in (q, k, v) for i in (0, 1)), math.log2(math.e) / math.sqrt(q.shape[-1])


def _grid(tokens, block, heads):
    """One program for each block of tokens and each head."""
    return lambda sizes: (triton.cdiv(tokens, sizes[block]), heads)


def _sizes(q, k):
    D = q.shape[-1]
    return dict(GROUP=q.shape[1] // k.shape[1], D=D, BLOCK_D=max(16, triton.next_power_of_2(D)))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad, _):
    return *attend_backward(grad, *ctx.saved_tensors), None, None


attend.register_autograd(_backward, setup_context=_setup)
