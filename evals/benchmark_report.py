"""What the benchmarks report: what failed, rows with intervals, published rows, files and the page."""

import json
import shlex
from pathlib import Path

from common import terminal
from common.files import UsageError, write_json, write_lines, write_whole
from evals import page
from evals.metrics import bootstrap
from evals.report import interval, number, short, show, table

RESULTS, QUESTIONS = "results.json", "questions.jsonl"


def note_errors(replies, what):
    """Says how many calls failed and why the first did. UsageError if all failed."""
    errors = [reply.error for reply in replies if reply.error is not None]
    if errors and len(errors) == len(replies):
        raise UsageError(f"none of {len(errors)} {what} came; the first error: {errors[0]}")
    if errors:
        first = (
            f"{len(errors)} of {len(replies)} {what} failed, and count as not right; the first: {errors[0]}"
        )
        terminal.note(f"{first}; --resume asks for these again")


def note_left_out(left_out, total, what):
    """Names what is left out of a data file, [(name, reason)]. UsageError if nothing remains."""
    if left_out:
        names = "; ".join(f"{name}: {reason}" for name, reason in left_out[:5])
        more = f"; and {len(left_out) - 5} more, see {RESULTS}" if len(left_out) > 5 else ""
        terminal.note(f"{len(left_out)} of {total} {what} left out ({names}{more})")
    if len(left_out) == total:
        raise UsageError(
            f"no {what} to ask" + (f"; the first left out: {left_out[0][1]}" if left_out else "")
        )


def percent(values, groups):
    """(mean in percent, its 95% interval) of values from 0 to 1; whole groups are drawn."""
    mean, low, high = bootstrap([100 * float(value) for value in values], scenes=groups)
    return mean, None if low is None else [low, high]


def published(keys, totals):
    """Rows of the published table, with the number of questions where it is known.

    keys: {column: key of published_results.json}. totals: {column: (number of questions, their column)}. The
    number is given where some share of it, rounded or truncated, is the published figure; elsewhere it is a
    mean over runs, or leaves failures out.
    """
    models = json.loads(Path(__file__).with_name("published_results.json").read_text(encoding="utf-8"))
    for model in models["benchmarks"]:
        row = {"": f"{model['model']} (published)"} | {column: model[key] for column, key in keys.items()}
        for column, (total, name) in totals.items():
            hundredths = round(100 * row[column])
            shares = (10_000 * k / total for k in range(total + 1))
            fits = any(hundredths in (int(share + 0.5), int(share)) for share in shares)
            row[name] = total if fits else None
        yield row


def cell(value):
    """A value of a row as text: a number, an interval [low, high], a count, or a name."""
    if isinstance(value, list):
        return interval({"low": value[0], "high": value[1]}, ".1f")
    return number(value) if value is None or isinstance(value, float) else str(value)


def report(out, results, items, html, arguments):
    """Prints and writes the results of a benchmark.

    results: {title, notes, rows: [{column: value}], left_out}. items: what the page shows of each question
    (see benchmark.html), `wrong` ones first. arguments: of the command line.
    """
    own = [argument for argument in arguments if argument != "--resume"]
    results |= {"command": shlex.join(["python", "benchmark.py", *own])}
    write_lines(out / QUESTIONS, items)
    write_json(out / RESULTS, results)
    columns = list(dict.fromkeys(name for row in results["rows"] for name in row))
    cells = [[cell(row.get(name)) for name in columns] for row in results["rows"]]
    show([results["title"], table(columns, cells), *results["notes"], f"command: {results['command']}"])
    if html:
        items = sorted(items, key=lambda item: not item["wrong"])
        shown = {"command": shlex.join(["python", "benchmark.py", *map(short, own)])}
        with write_whole(html) as file:
            file.write(
                page.render("benchmark.html", **results | shown, columns=columns, cells=cells, items=items)
            )
        terminal.note(f"the page is in {html}")
    terminal.note(f"results are in {out / RESULTS}, every question in {out / QUESTIONS}")
