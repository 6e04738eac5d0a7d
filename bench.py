"""Measurements: ours against a peer in the same run, or against what the machine can do.

    python bench.py NAME [--peer transformers] [--rounds N] [--json FILE]

What is compared is interleaved, ours and the peer's in turn, and medians are taken, since machines are noisy. A table goes to
stdout; its last line is the same as JSON, with the command that reproduces it.
"""

import functools
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

import cli
import kernels
from cli import UsageError


def seconds(run, sync=lambda: None):
    """How long run() takes, in seconds."""
    sync()
    begun = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - begun


def interleave(runs, rounds=5, sync=lambda: None):
    """Median seconds of each of {name: function}, run in turn for so many rounds after one that is not counted."""
    times = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            took = seconds(run, sync)
            if number:
                times[name].append(took)
    return {name: statistics.median(taken) for name, taken in times.items()}


def machine_limits(device="cpu", dtype=torch.float32):
    """(bytes a second of a large copy, operations a second of a large matrix product), the best of several tries each."""
    sync = torch.cuda.synchronize if device != "cpu" else lambda: None
    big = 2**28 if device != "cpu" else 2**25
    source, target = torch.ones(big, device=device), torch.empty(big, device=device)
    n = 8192 if device != "cpu" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    copy = min(seconds(lambda: target.copy_(source), sync) for _ in range(5))
    product = min(seconds(lambda: a @ b, sync) for _ in range(5))
    return 2 * source.nbytes / copy, 2 * n**3 / product


def report(title, rows, path=None):
    """Prints rows (dicts with the same keys) as a table, then as one line of JSON with the command; also to a file."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{value:,.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    cli.stdout.print(table, width=None if cli.stdout.is_terminal else 120, crop=False)
    line = json.dumps({"benchmark": title, "command": f"python {' '.join(sys.argv)}", "torch": torch.__version__, "rows": rows})
    print(line)
    if path:
        with cli.write_whole(path) as file:
            file.write(line + "\n")


def kernel_cases(device, dtype):
    """What `kernels` measures: (kernel, shape, operations forward or None, bytes forward, and backward as a multiple of that,
    {version: function}, inputs that take gradients). Sizes for a GPU, or such that a CPU is done in a minute."""
    cuda = device == "cuda"
    H, K, D, C = (32, 8, 128, 4096) if cuda else (8, 2, 64, 1024)
    backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION} | ({"sdpa cudnn": SDPBackend.CUDNN_ATTENTION} if cuda else {})
    # documents of a packed row as in CoSER: 1,640 tokens on average, the longest 4,319; on a CPU an eighth
    documents = [n // (1 if cuda else 8) for n in (2032, 1003, 4319, 1689, 640, 1217, 2711, 500, 1451, 822)]

    def random(*shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def sdpa(backend, q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)

    for B, lengths, size in ((4, [4096 if cuda else 512], D), (4, [4096 if cuda else 512], D // 2), (1, documents, D)):
        inputs = q, k, v = [random(B, sum(lengths), heads, size) for heads in (H, K, K)]
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None] if len(lengths) > 1 else None
        pairs, shape = B * sum(n * (n + 1) / 2 for n in lengths), f"{B} x {sum(lengths)} x {H}/{K} x {size}"
        versions = {"ours": functools.partial(kernels.attention, *inputs, positions)}
        versions |= {f"{name}{' dense' * (B == 1)}": functools.partial(sdpa, b, *inputs) for name, b in backends.items()}
        name = "attention, packed" if B == 1 else "attention"
        yield name, shape, 4 * pairs * H * size, None, 2.5, versions, inputs

    S, length, page = (128, 1792, 64) if cuda else (16, 512, 64)
    q, pages = random(S, 1, H, D).detach(), random(2, S * length // page, page, K, D).detach()
    table = torch.randperm(S * length // page, device=device).view(S, -1).int()
    k, v = pages.view(2, S, length, K, D).transpose(2, 3)
    for s in (1, S):
        lengths = torch.full((s,), length, dtype=torch.int32, device=device)
        versions = {
            "ours": functools.partial(kernels.decode_attention, q[:s], *pages, table[:s], lengths),
            "sdpa, not paged": functools.partial(
                F.scaled_dot_product_attention, q[:s].transpose(1, 2), k[:s], v[:s], enable_gqa=True
            ),
        }
        yield "decode attention", f"{s} x {length} x {H}/{K} x {D}", None, k[:s].nbytes * 2, None, versions, []

    x, residual, weight = random(8192, C), random(8192, C), random(C)
    versions = {"ours": lambda: kernels.rms_norm(x, weight), "F.rms_norm": lambda: F.rms_norm(x, (C,), weight, 1e-5)}
    yield "RMSNorm", f"8192 x {C}", None, 2 * x.nbytes, 1.5, versions, [x, weight]
    versions = {
        "ours": lambda: kernels.rms_norm(x, weight, 1e-5, residual),
        "F.rms_norm": lambda: (F.rms_norm(total := x + residual, (C,), weight, 1e-5), total),
    }
    yield "RMSNorm, residual", f"8192 x {C}", None, 4 * x.nbytes, 1, versions, [x, weight, residual]


def bench_kernels(args):
    """Each kernel forward and backward against torch; on a CPU the twins. Backward is both passes less the forward one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bytes_limit, operations_limit = machine_limits(device, dtype)
    clock = seconds
    if device == "cuda":  # the time on the GPU alone: launched as one CUDA graph
        from triton.testing import do_bench_cudagraph

        clock = lambda run: do_bench_cudagraph(run, rep=50, return_mode="median") / 1e3  # noqa: E731
    rows = []
    for kernel, shape, operations, moved, factor, versions, inputs in kernel_cases(device, dtype):
        runs = {}
        for version, run in versions.items():
            runs[version, "forward"] = torch.no_grad()(run)
            if inputs:

                def both(run=run, inputs=inputs):
                    out = run()
                    out = out if isinstance(out, tuple) else (out,)
                    torch.autograd.grad(out, inputs, out)

                runs[version, "backward"] = both
        times = [{name: clock(run) for name, run in runs.items()} for _ in range(args.rounds + 1)][1:]
        medians = {name: statistics.median(taken[name] for taken in times) for name in runs}
        for (version, way), took in medians.items():
            took -= medians[version, "forward"] if way == "backward" else 0
            work = (operations or moved) * (factor if way == "backward" else 1)
            rate, unit, scale = work / took, "TFLOP/s" if operations else "GB/s", 1e12 if operations else 1e9
            row = dict(kernel=kernel, shape=shape, version=version, way=way, ms=took * 1e3, rate=rate / scale, unit=unit)
            rows.append(row | {"of the limit": rate / (operations_limit if operations else bytes_limit)})
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, the twins"
    limits = f"{operations_limit / 1e12:.3g} TFLOP/s, {bytes_limit / 1e9:.4g} GB/s"
    report(f"kernels, {name}, {str(dtype)[6:]}; limits measured: {limits}", rows, args.json)


BENCHMARKS = {"kernels": bench_kernels}  # name: function of the arguments


def main():
    parser = cli.Parser(__doc__, "python bench.py kernels")
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--peer", choices=["transformers"], help="measure it in the same run")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, interleaved (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write the last line to a file as well")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UsageError(f"--rounds is at least 1, not {args.rounds}")
    BENCHMARKS[args.name](args)


if __name__ == "__main__":
    cli.run(main)
