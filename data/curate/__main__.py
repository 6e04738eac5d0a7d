"""Makes CoSER data from raw novels: plots, conversations, profiles, held-out plots and books, test scenes.

    python -m data.curate BOOK.txt --model openai:gpt-4o --out out/curated          one book
    python -m data.curate BOOKS.jsonl --model M --out DIR --resume                  {title, author, content} a line
    python -m data.curate BOOKS.jsonl --dry-run                                     calls and tokens, no more
    python -m data.curate BOOKS.jsonl --model M --out DIR --report King-Lear.json   the release's book beside ours

--out gets books/ for train.py --data, books-ood/ (held-out books), test.json for simulate.py --scene, report.json,
what each step made of each book (steps/), and every reply (replies.jsonl): --resume asks for none again.
"""

import itertools
import time
from pathlib import Path

from common import terminal
from common.files import UsageError, make_dir, read_json, write_json, write_lines
from data.curate.ask import PROMPTS, run_all
from data.curate.assemble import HELD_OUT, choose_scenes, curate
from data.curate.chunks import cut, read_books
from data.curate.fidelity import COUNTS, SHARES, measure, row
from data.records import Report
from data.scenes import load_book, straighten, to_test_scene
from evals.report import show, table
from evals.rubric import digest
from evals.runner import resumable
from llm import open_model
from llm.endpoint import CONCURRENCY
from play.perform import Journal
from play.transcripts import ANSWERS, REPLIES, claim, locked
from tokenizer import STAGE_TOKENIZER, load_tokenizer

# of the published books, for --dry-run: per 1,000 tokens of a book (771 books of some 140,000 tokens)
PLOTS, PEOPLE, WRITTEN = 0.28, 0.17, 320  # plots with a conversation, characters, tokens of extracted plots


def parse_args():
    parser = terminal.Parser(__doc__, "python -m data.curate BOOK.txt --model openai:gpt-4o --out out/curated")
    add = parser.add_argument
    add("books", metavar="BOOKS", help="a text, or JSON lines {title, author, content}")
    add("--model", metavar="M", help="checkpoint directory or openai:MODEL")
    add("--out", metavar="DIR", help="directory for books, steps and replies")
    add("--resume", action="store_true", help="go on in a directory that holds a run")
    add("--dry-run", action="store_true", help="say how many calls and tokens it takes, and stop")
    add("--report", nargs="+", default=[], metavar="FILE", help="books to measure beside ours, with the same titles")
    add("--limit", type=int, metavar="N", help="only the first N chunks of each book")
    add("--chunk-tokens", type=int, default=8192, metavar="N", help="of a chunk (default: 8192)")
    add("--max-tokens", type=int, default=8192, metavar="N", help="of an answer (default: 8192)")
    add("--min-messages", type=int, default=10, metavar="N", help="of a conversation that is kept (default: 10)")
    add("--drop-flagged", type=int, metavar="1-3", help="leave out conversations flagged this severe, or not checked")
    add("--test-scenes", type=int, default=100, metavar="N", help="of held-out plots, and of held-out books (100)")
    add("--tokenizer", metavar="DIR", help="to count tokens (default: the checkpoint's; for an endpoint the stage's)")
    add("--concurrency", type=int, default=CONCURRENCY, metavar="N", help="requests at once (default: 8)")
    add("--requests-per-minute", type=float, metavar="N", help="to an endpoint (default: no limit)")
    add("--chat-format", metavar="NAME", help="of a checkpoint (default: its own)")
    add("--dtype", help="of a checkpoint (default: bfloat16 on a GPU, else float32)")
    add("--seed", type=int, default=0, help="of tries after the first, and of the test scenes (default: 0)")
    args = parser.parse_args()
    if not args.dry_run and not args.report and not args.model:
        raise UsageError("name a model with --model, or --dry-run, or books to measure with --report")
    if bool(args.model) != bool(args.out) and not args.dry_run:
        raise UsageError("--model and --out go together")
    for name in ("chunk_tokens", "max_tokens", "min_messages", "test_scenes", "concurrency", "limit", "drop_flagged"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return args


def estimate(books, chunks, count):
    """Rows of --dry-run: what each step asks of the model, from the rates of the published books."""
    tokens, passages = sum(c.tokens for own in chunks for c in own), sum(map(len, chunks))
    plots, people = (max(1, round(tokens / 1000 * rate)) for rate in (PLOTS, PEOPLE))
    written, talk = tokens / 1000 * WRITTEN, tokens / 1000 * WRITTEN / plots
    steps = [("plots and conversations", passages, tokens + passages * count(PROMPTS["extract"]), written)]
    steps += [("safety", plots, plots * (count(PROMPTS["safety"]) + talk), plots * 20)]
    steps += [("names", 2 * len(books), 2 * len(books) * count(PROMPTS["names"]) + people * 60, people * 40)]
    steps += [("profiles", people, people * (count(PROMPTS["profile"]) + 4 * talk), people * 450)]
    return [*steps, ("all", *(sum(step[i] for step in steps) for i in (1, 2, 3)))]


def run(args, books, chunks, model, count):
    """Curates all books and writes them; returns [{title, figures, notes, ...}], the lines of the report."""
    out = make_dir(args.out)
    settings = {name: getattr(args, name) for name in ("chunk_tokens", "max_tokens", "limit", "seed")}
    settings |= {"model": model.name, "model_identity": model.identity, "prompts": digest(PROMPTS)}
    settings |= {"books": digest([(book.title, book.author, book.text) for book in books])}

    def story(book, own):
        folder = make_dir(out / "steps" / book.slug)
        return curate(book, own, count, args, lambda step, values: write_lines(folder / f"{step}.jsonl", values))

    stories = [story(book, own) for book, own in zip(books, chunks, strict=True)]
    with locked(out):
        claim(out, settings, args.resume)
        with resumable(out):
            journal, say = Journal(out / REPLIES), rounds(max(map(len, chunks)) + 4)
            results = run_all(stories, model, journal, args.seed, say)
        return write_all(args, out, books, results)


def rounds(total):
    """say() of `run_all`: the number of the round, and the time left at the pace so far."""
    begun, numbers = time.monotonic(), itertools.count(1)

    def say():
        number = next(numbers)
        minutes = (time.monotonic() - begun) / 60 * (total - number + 1) / max(1, number - 1)
        return f"round {number} of {total}" + f", about {minutes:.0f} min left" * (number > 1)

    return say


def write_all(args, out, books, results):
    """Writes books, test scenes and report; returns the lines of the report."""
    ood, scenes, lines = books[len(books) - int(HELD_OUT * len(books)) :], {"id": [], "ood": []}, []
    for name in ("books", "books-ood"):
        for old in make_dir(out / name).glob("*.json"):
            old.unlink()
    for book, (value, line) in zip(books, results, strict=True):
        lines.append(line | {"figures": measure(value, book.text)})
        if not value["plots"]:
            continue
        tag = "ood" if book in ood else "id"
        file = out / ("books-ood" if tag == "ood" else "books") / f"{book.slug}.json"
        write_json(file, value)
        held_out = [scene for scene in load_book(file, Report(strict=True)) if scene.tag == "id"]
        for scene in held_out:
            scene.tag = tag
        scenes[tag] += held_out
    by_title = {value["title"]: value for value, _ in results}
    chosen = [s for own in scenes.values() for s in choose_scenes(by_title, own, args.test_scenes, args.seed)]
    write_json(out / "test.json", [to_test_scene(scene) for scene in chosen])
    write_json(out / "report.json", lines)
    return lines


def report(args, books, lines):
    """Prints the figures of our books and of those of --report, then what was repaired, dropped and lost."""
    rows, texts = [row(line["title"], line["figures"]) for line in lines], {book.title: book.text for book in books}
    for file in args.report:
        value = read_json(file)
        title = straighten(value.get("title") or Path(file).stem)
        if title not in texts:
            raise UsageError(f"{file}: no book called {title} in {args.books}, whose text it could be held against")
        rows.append(row(f"{file}", measure(value, texts[title])))
    show([table(["book", *COUNTS, *SHARES], rows)])
    for line in lines:
        details = [f"{n} {note}" for note, n in line["notes"].items()]
        details += [f"chunk {f['chunk'] + 1} failed: {f['error']}" for f in line["failures"]]
        show([f"{line['title']}: {line['missing']:.1%} of the text in failed chunks", *details])


def main():
    args = parse_args()
    books = read_books(args.books, found := Report())
    for line in found.lines():
        terminal.note(line)
    model = None
    if args.model and not args.dry_run:
        options = {name: getattr(args, name) for name in ("chat_format", "dtype") if getattr(args, name)}
        options |= {"concurrency": args.concurrency, "per_minute": args.requests_per_minute}
        model = open_model(args.model, answers=Path(args.out) / ANSWERS, **options)
    own = model.tokenizer if model and model.local and not args.tokenizer else None
    tokenizer = own or load_tokenizer(args.tokenizer or STAGE_TOKENIZER)
    lines = []
    if args.model or args.dry_run:
        cutting = ((book, cut(book.text, args.chunk_tokens, lambda text: len(tokenizer.encode(text)))) for book in books)
        chunks = [own[: args.limit] for _, own in cutting]
    if args.dry_run:
        rows = estimate(books, chunks, lambda text: len(tokenizer.encode(text)))
        show([table(["step", "calls", "tokens in", "tokens out"], [[n, *(f"{x:,.0f}" for x in xs)] for n, *xs in rows])])
        return
    if model:
        lines = run(args, books, chunks, model, lambda text: len(tokenizer.encode(text)))
    report(args, books, lines)
    return int(bool(model) and not any(line["figures"]["plots"] for line in lines))


if __name__ == "__main__":
    terminal.run(main)
