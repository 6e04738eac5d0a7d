"""Runs the model card's other benchmarks: InCharacter, LifeChoice and CroSS motivation recognition.

    python benchmark.py cross-mr --data DIR --actor DIR --out out/cross        by likelihood and by generation
    python benchmark.py lifechoice --data data.json --actor openai:gpt-4o --out out/life
    python benchmark.py incharacter --data DIR --actor DIR --judge DIR --out out/bfi    interview, then rating
    python benchmark.py incharacter --data DIR --interview out/bfi/interview.jsonl --judge DIR --out out/again

--out gets every reply as it comes (replies.jsonl), then the table (results.json) and every question with its
answers (questions.jsonl). --resume goes on with an interrupted run, with a larger --limit, other ways, other
profiles, another judge or other labels, and asks for no reply again.
"""

import sys
from pathlib import Path

from common import terminal
from common.files import UsageError, make_dir
from evals import cross_mr, in_character, life_choice
from evals.benchmarks import GENERATION, LIKELIHOOD, open_models, report, resumable, settings_of
from evals.in_character import METHODS
from llm.endpoint import CONCURRENCY
from play.perform import Journal
from play.transcripts import REPLIES, claim, locked

BENCHMARKS = {"incharacter": in_character, "lifechoice": life_choice, "cross-mr": cross_mr}


def parse_args():
    example = "python benchmark.py cross-mr --data DIR --actor out/actor --out out/cross --limit 40"
    parser = terminal.Parser(__doc__, example)
    add = parser.add_argument
    add("benchmark", choices=BENCHMARKS)
    add("--data", required=True, metavar="PATH", help="of the benchmark's files (lifechoice: data.json)")
    add("--actor", metavar="M", help="a checkpoint, adapter or GGUF, openai:MODEL or openai:MODEL@URL")
    add("--out", required=True, metavar="DIR", help="directory for replies and results")
    add("--resume", action="store_true", help="go on in a directory that holds a run")
    add("--limit", type=int, metavar="N", help="only the first N questions (incharacter: characters)")
    add("--html", metavar="FILE", help="a page with every question and its answers, wrong ones first")
    ways = "multiple choice: ways to ask (default: both; an endpoint has only generation)"
    add("--by", nargs="+", choices=[LIKELIHOOD, GENERATION], help=ways)
    profile = "multiple choice: profile given to the actor (default: gold)"
    add("--profile", choices=["gold", "none", "both"], default="gold", help=profile)
    add("--judge", metavar="M", help="incharacter: who rates the interview (default: it is not rated)")
    add("--interview", metavar="FILE", help="incharacter: rate this interview.jsonl; no actor is asked")
    add("--rating", choices=METHODS, default="groups", help="incharacter: (default: groups)")
    labels = "incharacter: (default: pdb, as published)"
    add("--labels", choices=["pdb", "annotation"], default="pdb", help=labels)
    add("--as-published", action="store_true", help="incharacter: a missing rating counts as 3")
    add("--seed", type=int, default=0, help="of the order of options and of retries (default: 0)")
    add("--max-tokens", type=int, default=512, metavar="N", help="of a reply (default: 512)")
    add("--chat-format", metavar="NAME", help="of checkpoints (default: what each says)")
    add("--dtype", help="of checkpoints (default: as fits; int8 is fast on a CPU)")
    add("--concurrency", type=int, default=CONCURRENCY, metavar="N", help="requests at once (default: 8)")
    add("--requests-per-minute", type=float, metavar="N", help="to an endpoint (default: no limit)")
    args = parser.parse_args()
    in_character_only = args.judge or args.interview or args.as_published
    if in_character_only and args.benchmark != "incharacter":
        raise UsageError("--judge, --interview and --as-published are for incharacter")
    if bool(args.actor) == bool(args.interview):
        raise UsageError("name a model with --actor, or (incharacter) an interview with --interview")
    if args.interview and not args.judge:
        raise UsageError("--interview needs --judge M, who rates it")
    for name in ("limit", "max_tokens", "concurrency", "requests_per_minute"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be more than 0, not {value}")
    return args


def main():
    args = parse_args()
    benchmark = BENCHMARKS[args.benchmark]
    questions, left_out = benchmark.load(args)
    if args.html:
        make_dir(Path(args.html).parent)
    models = open_models(args)
    settings = settings_of(args, models, benchmark.files(args))
    out = make_dir(args.out)
    with locked(out):
        claim(out, settings, args.resume)
        with resumable(out):
            journal = Journal(out / REPLIES)
            results, items = benchmark.run(questions[: args.limit], models, journal, args)
        if results:
            results |= {"settings": settings, "left_out": left_out}
            report(out, results, items, args.html, sys.argv[1:])


if __name__ == "__main__":
    terminal.run(main)
