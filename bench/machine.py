"""What the machine can do: bytes a second of a copy, operations a second of a matrix product."""

import platform
from pathlib import Path

import torch

from bench.figures import seconds

INSTRUCTIONS = ["avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"]
INSTRUCTIONS += ["asimd", "i8mm", "bf16", "sve"]  # of Arm


def describe(device):
    """The processor's name, threads in use and vector instruction sets, or the GPU's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").split("\n\n")[0].splitlines() if info.exists() else []
    fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = f"{fields.get('flags', '')} {fields.get('Features', '')}".split()
    return f"{name}, {torch.get_num_threads()} thread(s), {' '.join(x for x in INSTRUCTIONS if x in flags)}"


def copy_rate(device, toy):
    """Bytes read and written a second by a copy too large for the caches, the best of five."""
    source = torch.ones(2**20 if toy else 2**30 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device) for _ in range(5))


def product_rate(device, toy, dtype):
    """Operations (two a multiply-add) a second of a square matrix product, the best of five."""
    n = 256 if toy else 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


def measure(args):
    """Copy, and products of each dtype; on a CPU with 1, 2, 4 ... threads up to all of them."""
    available = torch.get_num_threads()
    powers = {2**i for i in range(available.bit_length())} if args.device == "cpu" else set()
    counts = sorted(powers | {available})
    for number in range(args.rounds + 1):
        for threads in counts:
            torch.set_num_threads(threads)
            case = {"threads": threads, "of": "copy", "unit": "GB/s"}
            yield number, case, {"rate": copy_rate(args.device, args.toy) / 1e9}
            for dtype in (torch.float32, torch.bfloat16):
                case = {"threads": threads, "of": f"product, {str(dtype)[6:]}", "unit": "GFLOP/s"}
                yield number, case, {"rate": product_rate(args.device, args.toy, dtype) / 1e9}
