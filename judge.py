"""Scores performances: BLEU and ROUGE-L against the original, and the flaws that a judge model finds.

    python judge.py out/plays/DIR                                       BLEU, ROUGE-L, figures of the plays
    python judge.py out/plays/DIR --judge openai:gpt-4o --html r.html   flaws in four dimensions, and a report
    python judge.py out/plays/DIR --versus out/plays/OTHER              the same scenes, played by another
    python judge.py --table out/plays/*                                 leaderboard, for every length weight
    python judge.py gpt-4o.simulation.json --scenes test.json           a simulation file of the CoSER release
    python judge.py --rescore gpt-4o.evaluation.json                    recorded verdicts, scores recomputed
    python judge.py --calibrate gca --scenes test.json --judge DIR      a judge against recorded verdicts

Penalty scoring (CoSER paper, section 4.3): for each dimension the judge lists flaws, each with a severity of
1 to 5; the score, computed from the flaws, is 100 - 5 * (sum of severities - 0.3 * turns), at least 0. An
invalid reply is asked for again; one that stays invalid is counted and in no mean. An endpoint's answers are
kept in `answers` beside the verdicts, so that none is paid for twice.
"""

import json
import math
from pathlib import Path

from common import files, terminal
from common.files import UsageError, make_dir, write_whole
from evals import page, report
from evals.calibrate import calibrate, calibration_text
from evals.judging import ANSWERS, judge_run, open_judge
from evals.metrics import LENGTH_WEIGHT, bleu, rouge_l, score_flaws  # noqa: F401 (judge.bleu and so on)
from evals.plays import play_figures
from evals.rubric import digest, load_rubric
from evals.verdicts import VERDICTS, read_performances, read_verdicts, rescore

EXAMPLE = "python simulate.py --scene the-last-ferry/1 --out out/play; python judge.py out/play"


def parse_args():
    parser = terminal.Parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("performances", nargs="?", metavar="DIR", help="of simulate.py, or a simulation file of the release")
    add("--judge", metavar="M", help="checkpoint directory or openai:MODEL (default: none, metrics only)")
    add("--html", metavar="FILE", help="report for the browser, with flaws beside the lines they quote")
    add("--versus", metavar="DIR", help="compare with this judged directory, scene by scene")
    add("--table", nargs="+", metavar="DIR", help="leaderboard of judged directories and published results")
    add("--rescore", metavar="FILE", help="recompute the scores of recorded verdicts")
    add("--calibrate", metavar="DIR", help="compare --judge with verdicts recorded in DIR; needs --scenes")
    add("--scenes", metavar="FILE", help="test file with the originals of the release's simulations")
    add("--rubric", metavar="FILE", help="JSON: template, dimensions {name: {brief, criteria}}, severity")
    add("--length-weight", type=float, default=LENGTH_WEIGHT, help="severity forgiven per message (0.3)")
    add("--repeats", type=int, default=1, help="verdicts per dimension, with different seeds (default: 1)")
    add("--temperature", type=float, default=0.0, help="of the judge's first try (default: 0)")
    add("--chat-format", metavar="NAME", help="of a checkpoint that judges (default: its own)")
    add("--dtype", help="of a checkpoint that judges (default: as fits; int8 is fast on a CPU)")
    add("--concurrency", type=int, default=8, help="concurrent requests to an endpoint (default: 8)")
    add("--requests-per-minute", type=float, metavar="N", help="to an endpoint (default: no limit)")
    add("--limit", type=int, metavar="N", help="only the first N scenes")
    add("--out", help=f"file of verdicts (default: {VERDICTS} in DIR); with --calibrate a directory")
    add("--json", action="store_true", help="print the summary as JSON")
    add("--seed", type=int, default=0, help="of the judge (default: 0)")
    args = parser.parse_args()
    if sum(map(bool, (args.performances, args.rescore, args.table, args.calibrate))) != 1:
        raise UsageError("give a directory of performances, or one of --rescore, --table and --calibrate")
    if (args.html or args.versus) and not args.performances:
        raise UsageError("--html and --versus need a directory of performances")
    if args.calibrate and not (args.judge and args.scenes):
        raise UsageError("--calibrate needs --judge MODEL and the originals, --scenes FILE")
    if (args.chat_format or args.dtype) and (args.judge or "openai:").startswith("openai:"):
        raise UsageError("--chat-format and --dtype need a checkpoint directory as --judge")
    if min(args.repeats, args.concurrency, args.limit or 1) < 1 or args.limit == 0:
        raise UsageError("--repeats, --concurrency and --limit must be at least 1")
    if args.requests_per_minute is not None and not args.requests_per_minute > 0:
        raise UsageError("--requests-per-minute must be above 0")
    if not (0 <= args.temperature < math.inf and 0 <= args.length_weight < math.inf):
        raise UsageError("--temperature and --length-weight must be at least 0")
    return args


def judge_performances(args):
    """Judges one directory or file; writes the verdicts and the report, and returns the summary."""
    path = Path(args.performances)
    performances = read_performances(path, args.scenes)[: args.limit]
    elsewhere = files.OUT / "verdicts" / f"{path.stem}.{digest(str(path.resolve()))[:8]}.jsonl"
    out = Path(args.out) if args.out else path / VERDICTS if path.is_dir() else elsewhere
    others = read_verdicts(args.versus, args.length_weight) if args.versus else None
    model, rubric = open_judge(args, out.parent), load_rubric(args.rubric)
    if model and others:  # before anything is asked
        report.require_same_judge([{"judge": model.name, "rubric": rubric["name"]}], others)
    if args.html:
        make_dir(Path(args.html).parent)
    lines = judge_run(performances, out, args, model, rubric)
    summary = report.summarise(lines) | {"plays": play_figures(performances), "out": str(out)}
    if others:
        summary["versus"] = {"name": args.versus, "rows": report.compare_runs(lines, others)}
    if args.html:
        with write_whole(args.html) as file:
            file.write(page.html(lines, performances, summary))
        terminal.note(f"the report is in {args.html}")
    return summary


def main():
    args, text = parse_args(), report.summary_text
    if args.rescore:
        lines, same, total = rescore(args.rescore, args.length_weight)
        exact = f"{same} of {total} recorded dimension scores recomputed exactly (to 1e-9)"
        summary = report.summarise(lines) | {"recomputed": exact}
    elif args.table:
        runs = {path: read_verdicts(path, args.length_weight) for path in args.table}
        summary, text = report.leaderboard(runs), report.leaderboard_text
    elif args.calibrate:
        summary, text = calibrate(args), calibration_text
    else:
        summary = judge_performances(args)
    report.show([json.dumps(summary)] if args.json else text(summary))
    return conclude(args, summary) if "out" in summary else 0


def conclude(args, summary):
    """Says where the verdicts are and how many are invalid; the exit code, 1 if all are."""
    out, invalid, total = Path(summary["out"]), summary["invalid"], summary["verdicts"]
    answers = (out if args.calibrate else out.parent) / ANSWERS
    terminal.note(f"verdicts are in {out}" + f", the endpoint's answers in {answers}" * answers.is_dir())
    if invalid:
        count = f"{invalid} verdict(s) never became valid" if invalid < total else "no verdict is valid"
        terminal.note(f"{count}; the first reason: {summary['first_error']}; judge again to retry")
    if not summary["judge"]:
        terminal.note("to score flaws name a judge: --judge openai:MODEL or --judge DIR")
    return int(0 < total == invalid)


if __name__ == "__main__":
    terminal.run(main)
