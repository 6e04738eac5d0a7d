"""RMSNorm in Triton, forward and backward, each one pass over the rows.

    forward      s = x + residual,  r = 1 / sqrt(mean(s^2) + eps),  y = s r w            (r kept, fp32 a row)
    backward     g = dy w,  n = s r,  ds = r (g - n mean(g n)) + ds',  dw = sum over rows of dy n

where ds' is the gradient of the returned sum. x and the residual both get ds. Values moved for each element:
forward 2 (x, y), 4 with a residual (x, residual, y, s); backward 3 (dy, s, ds), 4 with a residual. About ten
operations an element: memory-bound. dw is summed without atomics: each program keeps the sum over its rows in
registers and writes it once, and torch adds these.
"""

import torch
import triton
import triton.language as tl

from kernels.attention_triton import INTERPRETED


@triton.jit
def _forward(
    x, residual, weight, y, total, scales, N, C, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    at, inside = n.to(tl.int64)[:, None] * C + c[None, :], (n < N)[:, None] & (c < C)[None, :]
    s = tl.load(x + at, mask=inside, other=0.0)  # [BLOCK_N, BLOCK_C]
    if HAS_RESIDUAL:
        added = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        s = (s.to(tl.float32) + added).to(x.dtype.element_ty)
        tl.store(total + at, s, mask=inside)
    s = s.to(tl.float32)
    r = tl.rsqrt(tl.sum(s * s, 1) / C + eps)
    tl.store(scales + n, r, mask=n < N)
    w = tl.load(weight + c[None, :], mask=(c < C)[None, :], other=0.0).to(tl.float32)
    normed = (s * r[:, None]).to(x.dtype.element_ty).to(tl.float32)  # rounded where rms_norm_torch rounds
    tl.store(y + at, (normed * w).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, dtotal, s, weight, scales, ds, partial, N, C, rows_each,
    HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`rows_each` rows, a tile at a time; their sum for dw goes to one row of partial [programs, C]."""
    first, c = tl.program_id(0) * rows_each, tl.arange(0, BLOCK_C)
    w = tl.load(weight + c[None, :], mask=(c < C)[None, :], other=0.0)
    dw = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    end = tl.minimum(first + rows_each, N)
    for start in range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at, inside = n.to(tl.int64)[:, None] * C + c[None, :], (n < end)[:, None] & (c < C)[None, :]
        normed = tl.load(s + at, mask=inside, other=0.0)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        result = tl.zeros_like(dw)
        if HAS_RESIDUAL:
            result = tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(scales + n, mask=n < end, other=0.0)[:, None]
        normed = normed.to(tl.float32) * r
        dw += g * normed
        g *= w.to(tl.float32)
        result += r * (g - normed * (tl.sum(g * normed, 1) / C)[:, None])
        tl.store(ds + at, result.to(ds.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0) * C + c, tl.sum(dw, 0), mask=c < C)


def rms_norm_triton(x, weight, eps=1e-5, residual=None):
    """As `rms_norm.rms_norm_torch`, for rows of at most 16,384 in fp16, bf16 or fp32; else a ValueError."""
    if x.shape[-1] > 16_384 or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        limit = "the triton kernel normalises rows of up to 16,384 in fp16, bf16 or fp32"
        raise ValueError(f"{limit}; got {list(x.shape)} {x.dtype}")
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"the triton kernel adds a residual of x's dtype; got {residual.dtype} to {x.dtype}")
    normed, total, _ = norm(x, weight, eps, residual)
    return normed if residual is None else (normed, total)


@torch.library.custom_op("coser::norm", mutates_args=())
def norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., C] -> normed, x + residual (or empty), both like x, and the rows' scales, fp32 [...]."""
    normed, total, scales = _norm_shapes(x, weight, eps, residual)
    x, residual = x.contiguous(), x if residual is None else residual.contiguous()
    N, C = scales.numel(), x.shape[-1]
    if x.numel():
        block_n, block_c, warps = _blocks(C)
        sizes = dict(HAS_RESIDUAL=total.numel() > 0, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=warps)
        _forward[triton.cdiv(N, block_n),](
            x, residual, weight.contiguous(), normed, total, scales, N, C, eps, **sizes
        )
    return normed, total, scales


@norm.register_fake
def _norm_shapes(x, weight, eps, residual):
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("coser::norm_backward", mutates_args=())
def norm_backward(
    grad: torch.Tensor, grad_total: torch.Tensor | None, total: torch.Tensor,
    weight: torch.Tensor, scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x (the residual has the same) and of the weight. total [..., C]: what was normalised."""
    dx, dw = _norm_backward_shapes(grad, grad_total, total, weight, scales)
    N, C = scales.numel(), total.shape[-1]
    if not total.numel():
        return dx, dw.zero_()
    block_n, block_c, warps = _blocks(C)
    programs = 4 if INTERPRETED else 2 * torch.cuda.get_device_properties(total.device).multi_processor_count
    rows_each = triton.cdiv(triton.cdiv(N, programs), block_n) * block_n
    programs = triton.cdiv(N, rows_each)
    partial = torch.empty(programs, C, dtype=torch.float32, device=total.device)
    has_residual, grad = grad_total is not None, grad.contiguous()
    grad_total = grad_total.contiguous() if has_residual else grad
    sizes = dict(HAS_RESIDUAL=has_residual, BLOCK_N=block_n, BLOCK_C=block_c, num_warps=warps)
    tensors = grad, grad_total, total.contiguous(), weight.contiguous(), scales, dx, partial
    _backward[programs,](*tensors, N, C, rows_each, **sizes)
    return dx, partial.sum(0).to(weight.dtype)


@norm_backward.register_fake
def _norm_backward_shapes(grad, grad_total, total, weight, scales):
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


def _blocks(C):
    """(rows, columns, warps) of a tile: whole rows, 2,048 elements or more, 8 a thread (16 bytes in bf16)."""
    block_c = triton.next_power_of_2(C)
    block_n = max(1, 2048 // block_c)
    return block_n, block_c, min(32, block_n * block_c // 256)


def _setup(ctx, inputs, output):
    x, weight, _, residual = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight, output[2])


def _backward_of_norm(ctx, grad, grad_total, _):
    dx, dw = norm_backward(grad, grad_total if ctx.has_residual else None, *ctx.saved_tensors)
    return dx, dw, None, dx if ctx.has_residual else None


norm.register_autograd(_backward_of_norm, setup_context=_setup)
