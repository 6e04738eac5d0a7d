"""Says how true a performance was: BLEU and ROUGE-L against the original, and the flaws a judge finds.

    python judge.py out/plays/DIR                                    BLEU and ROUGE-L
    python judge.py out/plays/DIR --judge openai:gpt-4o --html r.html     the four dimensions, judged, and a report to show
    python judge.py out/plays/DIR --versus out/plays/OTHER           who played the same scenes better, and how sure that is
    python judge.py --table out/plays/*                              a leaderboard, and where its ranking turns
    python judge.py gpt-4o.simulation.json --scenes test.json        what the CoSER release acted
    python judge.py --rescore gpt-4o.evaluation.json                 scores from recorded verdicts, recomputed
    python judge.py --calibrate --judge DIR                          can this judge be trusted? against recorded verdicts

Penalty scoring (coser paper, section 4.3): for each dimension the judge lists flaws with a severity of 1 to 5, and the score is
100 - 5 * (sum of severities - 0.3 * turns), not below 0. It is computed here, from the flaws, never by the judge. A reply that
is no valid verdict is asked for again; one that stays invalid is left out of the means, and counted. Answers of an endpoint are
kept in `answers` beside the verdicts, so that none is paid for twice.
"""

import json
import math
from pathlib import Path

from common import files, terminal
from common.files import ROOT, UsageError, make_dir, write_whole
from evals import page, report
from evals.calibrate import calibrate
from evals.judging import judge_run, open_judge
from evals.metrics import LENGTH_WEIGHT, bleu, rouge_l, score_flaws  # noqa: F401 (judge.bleu and so on are contracts)
from evals.rubric import digest, load_rubric
from evals.verdicts import VERDICTS, read_performances, read_verdicts, rescore


def parse_args():
    parser = terminal.Parser(
        __doc__, "python simulate.py --scene the-last-ferry/1 --out out/play; python judge.py out/play"
    )
    add = parser.add_argument
    add(
        "performances",
        nargs="?",
        metavar="DIR",
        help="directory of simulate.py, or a simulation file of the release",
    )
    add("--judge", help="checkpoint directory or openai:MODEL; without one there are no new flaw scores")
    add(
        "--html",
        metavar="FILE",
        help="a report to open in a browser: scores, and every flaw beside the lines it quotes",
    )
    add("--versus", metavar="DIR", help="compare with this judged directory, scene by scene")
    add(
        "--table",
        nargs="+",
        metavar="DIR",
        help="leaderboard of judged directories, beside the published results",
    )
    add("--rescore", metavar="FILE", help="recompute the scores of recorded verdicts")
    default = ROOT.parent / "shared" / "data" / "coser" / "gca"
    add(
        "--calibrate",
        nargs="?",
        const=default,
        metavar="DIR",
        help="compare --judge with the verdicts recorded in DIR",
    )
    add("--scenes", help="test file with the originals, for simulation files of the release")
    add(
        "--rubric",
        metavar="FILE",
        help="JSON with template, system, dimensions {name: {brief, criteria}}, severity [1, 5]",
    )
    add(
        "--length-weight",
        type=float,
        default=LENGTH_WEIGHT,
        help="severity points forgiven a message (default: 0.3)",
    )
    add("--repeats", type=int, default=1, help="judge so many times, with other seeds (default: 1)")
    add("--temperature", type=float, default=0.0, help="of the judge's first try (default: 0)")
    add("--concurrency", type=int, default=8, help="requests to an endpoint at once (default: 8)")
    add(
        "--requests-per-minute",
        type=float,
        metavar="N",
        help="requests to an endpoint a minute (default: any number)",
    )
    add("--limit", type=int, metavar="N", help="only the first N scenes")
    add(
        "--out",
        help=f"file for the verdicts (default: {VERDICTS} beside the transcripts); of --calibrate, a directory",
    )
    add("--json", action="store_true", help="the summary as JSON")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if sum(map(bool, (args.performances, args.rescore, args.table, args.calibrate))) != 1:
        raise UsageError(
            "give a directory of performances, or one of --rescore FILE, --table DIR..., --calibrate"
        )
    if (args.html or args.versus) and not args.performances:
        raise UsageError("--html and --versus go with a directory of performances")
    if args.calibrate and not args.judge:
        raise UsageError("--calibrate: which judge? name it with --judge")
    if (
        min(args.repeats, args.concurrency, 1 if args.limit is None else args.limit) < 1
        or (args.requests_per_minute or 1) <= 0
    ):
        raise UsageError(
            "--repeats, --concurrency and --limit are at least 1, --requests-per-minute is more than 0"
        )
    if not (0 <= args.temperature < math.inf and 0 <= args.length_weight < math.inf):
        raise UsageError("--temperature and --length-weight are at least 0")
    return args


def main():
    args = parse_args()
    if args.rescore:
        lines, same, of = rescore(args.rescore, args.length_weight)
        summary = report.summarise(lines) | {
            "recomputed": f"{same} of {of} recorded dimension scores recomputed exactly (to 1e-9)"
        }
    elif args.table:
        summary = report.leaderboard({path: read_verdicts(path, args.length_weight) for path in args.table})
    elif args.calibrate:
        summary = calibrate(args)
    else:
        path = Path(args.performances)
        performances = read_performances(path, args.scenes)[: args.limit]
        elsewhere = files.OUT / "verdicts" / f"{path.stem}.{digest(str(path.resolve()))[:8]}.jsonl"
        out = Path(args.out) if args.out else path / VERDICTS if path.is_dir() else elsewhere
        theirs = read_verdicts(args.versus, args.length_weight) if args.versus else None
        model = open_judge(args, out.parent)
        if model and theirs:  # before anything is asked
            report.same_judge([{"judge": model.name, "rubric": load_rubric(args.rubric)["name"]}], theirs)
        if args.html:
            make_dir(Path(args.html).parent)
        lines = judge_run(performances, out, args, model)
        summary = report.summarise(lines)
        if theirs:
            summary["versus"] = {"name": args.versus, "rows": report.compare(lines, theirs)}
        if args.html:
            with write_whole(args.html) as file:
                file.write(page.html(lines, performances, summary))
            terminal.note(f"the report is in {args.html}")
        terminal.note(f"verdicts are in {out}")
        if summary["invalid"]:
            terminal.note(
                f"{summary['invalid']} verdict(s) never became valid and are in no mean; judge again to retry them"
            )
        if not any(line["judge"] for line in lines):
            terminal.note("flaw scores need a judge: add --judge openai:MODEL or --judge DIR")
    for part in [json.dumps(summary)] if args.json else report.text(summary):
        line = isinstance(part, str)
        terminal.stdout.print(terminal.plain(part) if line else part, markup=False, soft_wrap=line)


if __name__ == "__main__":
    terminal.run(main)
