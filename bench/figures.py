"""Figures of a benchmark: printed as they come, then as a table of medians and one line of JSON."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from common import terminal
from common.files import UsageError, write_whole


def seconds(run, device="cpu"):
    """Seconds that run() takes, work queued on a GPU included."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - start


def collect(measurements):
    """Notes each measurement on stderr -> (rows, what ended them early: Ctrl-C, a UsageError or None).

    A measurement is (round, case, figures); a case is a dict of labels. A row is a case with the medians of
    its figures over its counted rounds; `rounds` is 0 where only the warm-up, round 0, is known. Of cases
    that differ in `side` alone the first is ours; beside the others, `ours / this` compares the first figure.
    """
    samples, stopped = {}, None
    try:
        for number, case, figures in measurements:
            samples.setdefault(tuple(case.items()), []).append((number, figures))
            known = ", ".join(f"{name} {shown(value)}" for name, value in (case | figures).items())
            terminal.note(f"{f'round {number}' if number else 'warm-up'}: {known}")
    except (KeyboardInterrupt, UsageError) as error:
        stopped = error
    rows, ours = [], {}
    for case, rounds in samples.items():
        counted = [figures for number, figures in rounds if number]
        known = counted or [figures for _, figures in rounds]
        medians = {name: statistics.median(figures[name] for figures in known) for name in known[0]}
        rows.append(dict(case) | medians | {"rounds": len(counted)})
        rate = next(iter(medians.values()))
        other_labels = tuple(label for label in case if label[0] != "side")
        if other_labels in ours:
            rows[-1]["ours / this"] = ours[other_labels] / rate
        ours.setdefault(other_labels, rate)
    return rows, stopped


def shown(value):
    if type(value) is float:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def report(args, rows, processor):
    """Prints rows as a table and as a line of JSON with the command; with --json also to that file."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    title = [args.name, Path(args.model or "").name, "· toy shapes, not to be compared" * args.toy]
    table = Table(*names, title=f"{' '.join(filter(None, title))} · {processor}")
    for row in rows:
        table.add_row(*(shown(row.get(name, "")) for name in names))
    (terminal.stdout if terminal.stdout.is_terminal else Console(width=140)).print(table)
    run = {"benchmark": args.name, "command": f"python {' '.join(sys.argv)}", "processor": processor}
    line = json.dumps(run | {"torch": torch.__version__, "rows": rows})
    print(line, flush=True)
    if args.json:
        with write_whole(args.json) as file:
            file.write(line + "\n")
