"""Benchmarks of ours, alone or against a peer in the same run, and of the machine itself.

    python bench.py machine                              copy GB/s and GFLOP/s: the limits of all the others
    python bench.py decode --peer transformers           the same weights in transformers
    python bench.py prefill --model DIR --peer llama.cpp --peer-model FILE.gguf
    python bench.py train --data BOOKS --tokenizer DIR --peer transformers

Sides take turns within a round, since machines are noisy. Each figure is printed on stderr as soon as it is
known; medians over the rounds follow on stdout, as a table and as one line of JSON, also after Ctrl-C.
"""

import signal

import torch

from bench import figures, generation, kernels, machine, simulation, training
from bench.models import SHAPES
from common import terminal
from common.files import UsageError

BENCHMARKS = dict(machine=machine, kernels=kernels, train=training)
BENCHMARKS |= dict(decode=generation, prefill=generation, simulate=simulation)


def parse_args():
    parser = terminal.Parser(__doc__, "python bench.py decode --peer transformers --rounds 3")
    add = parser.add_argument
    add("name", choices=BENCHMARKS, help="what to measure")
    add("--peer", choices=["transformers", "llama.cpp"], help="measured in the same run")
    add("--peer-model", metavar="GGUF", help="llama.cpp's weights (default: --model, if that is a GGUF file)")
    add("--rounds", type=int, default=5, help="counted rounds, after a warm-up (default: 5)")
    named = f"a checkpoint, or random weights: {', '.join(SHAPES)} (default: 8b on a GPU; on a CPU 135m, "
    add("--model", help=named + "to train stage, to simulate the bundled actor)")
    dtypes = "default: bfloat16 on a GPU, else float32; int8: ours, beside a peer in float32"
    add("--dtype", choices=["float32", "bfloat16", "int8"], help=dtypes)
    add("--batch", type=int, nargs="+", help="decode, prefill: prompts at once")
    add("--prompt", type=int, nargs="+", help="decode, prefill: tokens in each prompt")
    add("--new", type=int, default=32, help="decode: tokens generated for each prompt (default: 32)")
    add("--scenes", type=int, default=16, help="simulate: number of scenes (default: 16)")
    add("--peer-scenes", type=int, help="simulate: how many are also played one by one (default: all)")
    add("--max-rounds", type=int, default=20, help="simulate: rounds of a scene (default: 20)")
    add("--turn", type=int, help="simulate: tokens of a turn at most (default: 512; random weights: 60)")
    add("--data", help="train: books; simulate: a test file (default: the bundled scenes)")
    add("--tokenizer", help="train: a tokenizer's directory (default: the bundled one, 4k tokens)")
    add("--seq-len", type=int, default=8192, help="train: tokens in a packed row (default: 8192)")
    add("--rows", type=int, default=1, help="train: packed rows in a step (default: 1)")
    add("--lora", type=int, metavar="RANK", help="train: adapters alone, the peer's by PEFT")
    add("--compile", action="store_true", help="train: compile each block of ours")
    add("--toy", action="store_true", help="tiny shapes: to try the benchmark, not to measure")
    add("--json", metavar="FILE", help="write the line of JSON to a file too")
    args = parser.parse_args()
    if args.dtype == "int8" and args.name not in ("decode", "prefill", "simulate"):
        raise UsageError(f"--dtype int8 is for decode, prefill and simulate, not for {args.name}")
    for name, value in vars(args).items():
        if any(type(n) is int and n < 1 for n in (value if isinstance(value, list) else [value])):
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return args


def main():
    args = parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "int8" and args.device == "cuda":
        raise UsageError("--dtype int8 is for a CPU only")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` also gets a table
    if args.toy:
        torch.set_num_threads(1)  # more would only wait for each other
    rows, stopped = figures.collect(BENCHMARKS[args.name].measure(args))
    if rows:
        figures.report(args, rows, machine.describe(args.device))
    if stopped:
        raise stopped


if __name__ == "__main__":
    terminal.run(main)
