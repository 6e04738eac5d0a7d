"""Paged attention in Triton: the keys of a sequence are split over many programs, whose results are then
combined (flash-decoding, Dao et al. 2023).

A step is memory-bound: it reads 2 K D values for each token of context and does 4 operations with each for
every query head of a group. A program takes one sequence, one key head and one part of its keys, with all
queries and heads of the group, so that a key is read once and not once a head. There are enough parts for a
single sequence to use the whole memory bandwidth. Each part has a partial result and its log-sum-exp:

    out = sum over parts of out_part * exp(lse_part - lse),    lse = log sum exp(lse_part)

The number of parts depends on shapes only, not on lengths: no synchronisation with the GPU, and a CUDA graph
can capture it.

Prefill uses the same kernel: a prompt is split into blocks of Q queries, each a row of the batch with its own
length and the block table of its sequence (engine/cache.py). With so many rows the keys are not split.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.attention_triton import INTERPRETED, check, dot, tuned
from kernels.decode import MAX_TILE_ROWS


# enough keys in flight to hide memory latency, few enough registers for several programs a processor
@tuned(
    ({"BLOCK_N": 64}, 4, 3),
    ({"BLOCK_N": 128}, 4, 2),
    ({"BLOCK_N": 32}, 2, 4),
    ({"BLOCK_N": 64}, 8, 2),  # for the many rows of a prefill
    key=["D", "ROWS"],
)
@triton.jit
def _part(
    q, key_pages, value_pages, block_table, lengths, parts, lse, Q, max_pages, window, scale,
    q_s, q_q, q_h, k_p, k_n, k_h, v_p, v_n, v_h,
    PAGE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one sequence and key head; the rows of a tile are (query, head of group)."""
    part, key_head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts_of, key_heads = tl.num_programs(0), tl.num_programs(1)
    length = tl.load(lengths + s)
    row, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    query, head = row // GROUP, key_head * GROUP + row % GROUP
    last = length - Q + query  # [ROWS], the token each query is
    pointers = q + s.to(tl.int64) * q_s + (query * q_q + head * q_h)[:, None] + d[None, :]
    queries = tl.load(pointers, mask=(query < Q)[:, None] & (d < D)[None, :], other=0.0)  # [ROWS, BLOCK_D]
    begin = tl.maximum(length - Q + 1 - window, 0)  # no query sees further back
    size = tl.cdiv(tl.cdiv(length - begin, parts_of), BLOCK_N) * BLOCK_N
    begin += part * size
    end = tl.minimum(begin + size, length)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < end
        page = tl.load(block_table + s.to(tl.int64) * max_pages + n // PAGE, mask=inside, other=0)
        page = page.to(tl.int64)
        here = inside[:, None] & (d < D)[None, :]
        keys_at = (page * k_p + n % PAGE * k_n + key_head * k_h)[:, None] + d[None, :]
        values_at = (page * v_p + n % PAGE * v_n + key_head * v_h)[:, None] + d[None, :]
        keys = tl.load(key_pages + keys_at, mask=here, other=0.0)
        values = tl.load(value_pages + values_at, mask=here, other=0.0)
        seen = inside[None, :] & (n[None, :] <= last[:, None]) & (n[None, :] > last[:, None] - window)
        scores = tl.where(seen, dot(queries, tl.trans(keys)), float("-inf"))  # [ROWS, BLOCK_N]
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores * scale - level[:, None])
        shrink = tl.exp2(top - level)
        acc = acc * shrink[:, None] + dot(p.to(values.dtype), values)
        total = total * shrink + tl.sum(p, 1)
        top = higher
    at = ((s * key_heads + key_head) * parts_of + part).to(tl.int64) * ROWS + row
    acc /= tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(parts + at[:, None] * D + d[None, :], acc, mask=(d < D)[None, :])
    tl.store(lse + at, top + tl.log2(total))  # -inf where nothing was seen


@triton.jit
def _join(
    parts, lse, out, Q, parts_of,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One query of one head: its parts, weighted by their log-sum-exps."""
    head, query, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(0)
    part, d = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    at = ((s * (heads // GROUP) + head // GROUP) * parts_of + part).to(tl.int64) * ROWS
    at += query * GROUP + head % GROUP
    lse_part = tl.load(lse + at, mask=part < parts_of, other=float("-inf"))
    top = tl.max(lse_part, 0)
    weights = tl.exp2(lse_part - tl.where(top == float("-inf"), 0.0, top))  # [PARTS]
    weights /= tl.where(top == float("-inf"), 1.0, tl.sum(weights, 0))
    here = (part < parts_of)[:, None] & (d < D)[None, :]
    tile = tl.load(parts + at[:, None] * D + d[None, :], mask=here, other=0.0)
    joined = tl.sum(weights[:, None] * tile, 0).to(out.dtype.element_ty)
    tl.store(out + ((s.to(tl.int64) * Q + query) * heads + head) * D + d, joined, mask=d < D)


def decode_attention_triton(q, key_pages, value_pages, block_table, lengths, window=None):
    """As `decode.decode_attention_torch`, for head sizes and Q H / K up to 128; else a ValueError."""
    check(q, key_pages, value_pages)
    if q.shape[1] * q.shape[2] // key_pages.shape[2] > MAX_TILE_ROWS:
        limit = f"the triton kernel takes at most {MAX_TILE_ROWS} queries times heads of a group at once"
        raise ValueError(f"{limit}; got q [S, Q, H, D] {list(q.shape)} with {key_pages.shape[2]} key heads")
    return decode(q, key_pages, value_pages, block_table.int(), lengths.int(), window or 2**30)


@torch.library.custom_op("coser::decode", mutates_args=())
def decode(
    q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor,
    block_table: torch.Tensor, lengths: torch.Tensor, window: int,
) -> torch.Tensor:  # fmt: skip
    """Shapes as in `decode_attention_torch`; a window larger than any length stands for none."""
    out = _decode_shape(q, key_pages, value_pages, block_table, lengths, window)
    if not q.numel():
        return out
    q, key_pages, value_pages = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, key_pages, value_pages)
    )
    (S, Q, H, D), (_, page_size, K, _), max_pages = q.shape, key_pages.shape, block_table.shape[1]
    processors = 32 if INTERPRETED else torch.cuda.get_device_properties(q.device).multi_processor_count
    # two programs a processor, but at least 64 keys a part
    parts_of = max(1, min(2 * processors // (S * K), max_pages * page_size // 64, 64))
    rows = max(16, triton.next_power_of_2(Q * H // K))  # a tensor core's tile has at least 16
    parts = torch.empty(S, K, parts_of, rows, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(S, K, parts_of, rows, dtype=torch.float32, device=q.device)
    sizes = dict(GROUP=H // K, D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), ROWS=rows)
    strides = (x.stride(i) for x in (q, key_pages, value_pages) for i in range(3))
    scale = math.log2(math.e) / math.sqrt(D)
    tensors = q, key_pages, value_pages, block_table.contiguous(), lengths.contiguous(), parts, lse
    _part[parts_of, K, S](*tensors, Q, max_pages, window, scale, *strides, PAGE=page_size, **sizes)
    _join[H, Q, S](parts, lse, out, Q, parts_of, PARTS=triton.next_power_of_2(parts_of), **sizes)
    return out


@decode.register_fake
def _decode_shape(q, key_pages, value_pages, block_table, lengths, window):
    return q.new_empty(q.shape)
