"""Each kernel, forward and backward, against torch's own; on a CPU the torch twins."""

import functools
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from bench import machine
from bench.figures import seconds


def cases(args, dtype):
    """Yields (kernel, shape, unit, forward work, backward's multiple, {side: function}, inputs).

    Work is in operations for TFLOP/s, in bytes for GB/s. Packed documents have the lengths of CoSER's chats.
    """
    scale = 1 if args.device == "cuda" else 256 if args.toy else 8  # a minute on a CPU
    H, K, D, C = (32, 8, 128, 4096) if scale == 1 else (8, 2, 64, 1024) if scale == 8 else (2, 1, 16, 64)
    backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION}
    if args.device == "cuda":
        backends["sdpa cudnn"] = SDPBackend.CUDNN_ATTENTION
    documents = [max(1, n // scale) for n in (2032, 1003, 4319, 1689, 640, 1217, 2711, 500, 1451, 822)]

    def random(*shape):
        return torch.randn(shape, device=args.device).to(dtype).requires_grad_()

    def sdpa(backend, *qkv, causal=True):
        with sdpa_kernel(backend) if backend else nullcontext():
            q, k, v = (x.transpose(1, 2) for x in qkv)
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    for B, lengths, size in ((4, [4096 // scale], D), (4, [4096 // scale], D // 2), (1, documents, D)):
        packed, T = len(lengths) > 1, sum(lengths)
        inputs = [random(B, T, heads, size) for heads in (H, K, K)]
        places = torch.cat([torch.arange(n, device=args.device) for n in lengths])
        positions = places[None] if packed else None
        operations = 4 * B * sum(n * (n + 1) / 2 for n in lengths) * H * size
        sides = {"ours": functools.partial(kernels.attention, *inputs, positions)}
        for name, backend in backends.items():
            sides[f"{name}{', dense' * packed}"] = functools.partial(sdpa, backend, *inputs)
        name, shape = f"attention{', packed' * packed}", f"{B} x {T} x {H}/{K} x {size}"
        yield name, shape, "TFLOP/s", operations, 2.5, sides, inputs

    S, length, page = {1: (128, 1792, 64), 8: (16, 512, 64)}.get(scale, (2, 64, 16))
    q, pages = random(S, 1, H, D).detach(), random(2, S * length // page, page, K, D).detach()
    table = torch.randperm(S * length // page, device=args.device).view(S, -1).int()
    k, v = pages.view(2, S, length, K, D)
    for s in (1, S):
        lengths = torch.full((s,), length, dtype=torch.int32, device=args.device)
        sides = {
            "ours": functools.partial(kernels.decode_attention, q[:s], *pages, table[:s], lengths),
            "sdpa, not paged": functools.partial(sdpa, None, q[:s], k[:s], v[:s], causal=False),
        }
        yield "decode attention", f"{s} x {length} x {H}/{K} x {D}", "GB/s", 2 * k[:s].nbytes, 0, sides, []

    rows = 8192 if not args.toy else 64
    x, residual, weight = random(rows, C), random(rows, C), random(C)
    sides = {
        "ours": lambda: kernels.rms_norm(x, weight),
        "F.rms_norm": lambda: F.rms_norm(x, (C,), weight, 1e-5),
    }
    yield "RMSNorm", f"{rows} x {C}", "GB/s", 2 * x.nbytes, 1.5, sides, [x, weight]
    sides = {
        "ours": lambda: kernels.rms_norm(x, weight, 1e-5, residual),
        "F.rms_norm": lambda: (F.rms_norm(total := x + residual, (C,), weight, 1e-5), total),
    }
    yield "RMSNorm, residual", f"{rows} x {C}", "GB/s", 4 * x.nbytes, 1, sides, [x, weight, residual]


def measure(args):
    """Rates of each kernel and direction; backward takes the time of both passes less that of the forward."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    limits = {"GB/s": machine.copy_rate(args.device, args.toy)}
    limits["TFLOP/s"] = machine.product_rate(args.device, args.toy, dtype)
    clock = seconds
    if args.device == "cuda":  # as a CUDA graph, so that launches do not count
        from triton.testing import do_bench_cudagraph

        clock = lambda run: do_bench_cudagraph(run, rep=50, return_mode="median") / 1e3  # noqa: E731

    for kernel, shape, unit, work, backward, sides, inputs in cases(args, dtype):
        for number in range(args.rounds + 1):
            for side, run in sides.items():
                forward = clock(torch.no_grad()(run))
                times = {"forward": (forward, work)}
                if inputs:
                    both = clock(functools.partial(run_both, run, inputs))
                    times["backward"] = max(both - forward, 1e-9), work * backward
                for direction, (took, done) in times.items():
                    case = dict(kernel=kernel, shape=shape, direction=direction, side=side, unit=unit)
                    rate = done / took
                    figures = {"rate": rate / (1e9 if unit == "GB/s" else 1e12), "ms": took * 1e3}
                    yield number, case, figures | {"of the limit": rate / limits[unit]}


def run_both(run, inputs):
    """A forward and a backward pass, the outputs as their own gradients."""
    outputs = run()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, inputs, outputs)
