"""Measurements: ours against a peer in the same run, or against what the machine can do.

    python bench.py NAME [--peer transformers] [--rounds N] [--json FILE]

What is compared is interleaved, ours and the peer's in turn, and medians are taken, since machines are noisy. A table goes to
stdout; its last line is the same as JSON, with the command that reproduces it.
"""

import json
import statistics
import sys
import time

import torch
from rich.table import Table

import cli
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
    cli.stdout.print(table)
    line = json.dumps({"benchmark": title, "command": f"python {' '.join(sys.argv)}", "torch": torch.__version__, "rows": rows})
    print(line)
    if path:
        with cli.write_whole(path) as file:
            file.write(line + "\n")


BENCHMARKS = {}  # name: function of the arguments


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
