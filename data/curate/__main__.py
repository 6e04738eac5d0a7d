"""Makes CoSER data from raw novels: plots, conversations, profiles, held-out plots and books, test scenes.

    python -m data.curate BOOK.txt --model openai:gpt-4o --out out/curated    one book
    python -m data.curate BOOKS.jsonl --model M --out DIR --resume            {title, author, content} a line
    python -m data.curate BOOKS.jsonl --dry-run                               calls and tokens, no more
    python -m data.curate BOOKS.jsonl --report King-Lear.json                 books against their texts

--out gets books/ for train.py --data, books-ood/ (held-out books), test.json for simulate.py --scene, the
report (report.json), what each step made of each book (steps/), and every reply (replies.jsonl).
"""

from dataclasses import replace
from pathlib import Path

from common import terminal
from common.files import UsageError, make_dir, read_json, write_json, write_lines
from data.curate.ask import PROMPTS, run_all
from data.curate.assemble import HELD_OUT, choose_scenes, curate
from data.curate.chunks import cut, read_books
from data.curate.fidelity import COUNTS, FEWEST, SHARES, measure, row
from data.records import Report
from data.scenes import load_book, straighten, to_test_scene
from evals.benchmarks import resumable
from evals.report import show, table
from llm import open_model
from llm.endpoint import CONCURRENCY
from play.perform import Journal
from play.transcripts import ANSWERS, REPLIES, claim, locked
from tokenizer import STAGE_TOKENIZER, load_tokenizer

# for --dry-run: what 1,000 tokens of a book hold; a published one has 39 plots and 23 characters in 140,000
PLOTS, PEOPLE, WRITTEN = 0.28, 0.17, 320
TEST_SCENES = 100  # of held-out plots, and of held-out books


def parse_args():
    parser = terminal.Parser(
        __doc__, "python -m data.curate BOOK.txt --model openai:gpt-4o --out out/curated"
    )
    add = parser.add_argument
    add("books", metavar="BOOKS", help="a text, or JSON lines {title, author, content}")
    add("--model", metavar="M", help="checkpoint directory or openai:MODEL")
    add("--out", metavar="DIR", help="directory for books, steps and replies")
    add("--resume", action="store_true", help="go on in a directory that holds a run")
    add("--dry-run", action="store_true", help="say how many calls and tokens it takes, and stop")
    add("--report", nargs="+", default=[], metavar="FILE", help="measure these too, against texts in BOOKS")
    add("--limit", type=int, metavar="N", help="only the first N chunks of each book")
    add("--chunk-tokens", type=int, default=8192, metavar="N", help="of a chunk (default: 8192)")
    add("--max-tokens", type=int, default=8192, metavar="N", help="of an answer (default: 8192)")
    add("--min-messages", type=int, default=FEWEST, metavar="N", help="of a conversation that is kept (10)")
    add("--drop-flagged", type=int, choices=[1, 2, 3], help="drop conversations flagged so, or not checked")
    add("--concurrency", type=int, default=CONCURRENCY, metavar="N", help="requests at once (%(default)s)")
    add("--requests-per-minute", type=float, metavar="N", help="to an endpoint (default: no limit)")
    add("--chat-format", metavar="NAME", help="of a checkpoint (default: its own)")
    add("--dtype", help="of a checkpoint (default: as fits; int8 is fast on a CPU)")
    add("--seed", type=int, default=0, help="of second and third tries, and of test.json (default: 0)")
    args = parser.parse_args()
    if not (args.dry_run or args.report or args.model):
        raise UsageError("name a model with --model, or --dry-run, or books to measure with --report")
    if bool(args.model) != bool(args.out) and not args.dry_run:
        raise UsageError("--model and --out go together")
    for name in ("limit", "chunk_tokens", "max_tokens", "min_messages", "concurrency", "requests_per_minute"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be more than 0, not {value}")
    return args


def estimate(books, chunks, count):
    """Rows of --dry-run: about what each step asks of a model, retries and passages carried over aside."""
    passages, tokens = sum(map(len, chunks)), sum(chunk.tokens for own in chunks for chunk in own)
    plots, people = (max(1, round(tokens / 1000 * rate)) for rate in (PLOTS, PEOPLE))
    written, once = tokens / 1000 * WRITTEN, {name: count(prompt) for name, prompt in PROMPTS.items()}
    rows = [("plots and conversations", passages, tokens + passages * once["extract"], written)]
    rows += [("safety", plots, plots * once["safety"] + written, plots * 20)]
    rows += [("names", 2 * len(books), 2 * len(books) * once["names"] + people * 60, people * 40)]
    rows += [("profiles", people, people * once["profile"] + 4 * written, people * 450)]
    return [*rows, ("all", *(sum(row[i] for row in rows) for i in (1, 2, 3)))]


def run(args, books, chunks, model, count):
    """Curates all books; returns [(book in the CoSER format, its line of the report)]."""
    out = make_dir(args.out)

    def story(book, own):
        folder = make_dir(out / "steps" / book.slug)
        return curate(book, own, count, args, lambda step, made: write_lines(folder / f"{step}.jsonl", made))

    with locked(out):
        # replies are known by what was asked, so all else may change
        claim(out, {"model": model.name, "model_identity": model.identity}, args.resume)
        with resumable(out):
            stories, journal = list(map(story, books, chunks)), Journal(out / REPLIES)
            results = run_all(stories, model, journal, args.seed, max(map(len, chunks)) + 4)
        write_all(out, books, results, args.seed)
    return results


def write_all(out, books, results, seed):
    """Writes the books, the test scenes and the report, to whose lines the figures are added."""
    scenes, first_held_out = {"id": [], "ood": []}, len(books) - int(HELD_OUT * len(books))
    folders = {"id": make_dir(out / "books"), "ood": make_dir(out / "books-ood")}
    for old in [file for folder in folders.values() for file in folder.glob("*.json")]:
        old.unlink()
    for number, (book, (made, line)) in enumerate(zip(books, results, strict=True)):
        line["figures"], tag = measure(made, book.text), "ood" if number >= first_held_out else "id"
        if made["plots"]:
            write_json(file := folders[tag] / f"{book.slug}.json", made)
            held_out = [scene for scene in load_book(file, Report(strict=True)) if scene.tag == "id"]
            scenes[tag] += [replace(scene, tag=tag) for scene in held_out]
    by_title = {made["title"]: made for made, _ in results}
    chosen = [scene for own in scenes.values() for scene in choose_scenes(by_title, own, TEST_SCENES, seed)]
    write_json(out / "test.json", [to_test_scene(scene) for scene in chosen])
    write_json(out / "report.json", [line for _, line in results])


def report(args, books, lines):
    """Prints the figures of our books and of those of --report, then what was repaired, dropped and lost."""
    rows = [row(line["title"], line["figures"]) for line in lines]
    texts = {book.title: book.text for book in books}
    for file in args.report:
        title = straighten((made := read_json(file)).get("title") or Path(file).stem)
        if title not in texts:
            raise UsageError(f"{file}: {args.books} has no book called {title}, to measure it against")
        try:
            rows.append(row(file, measure(made, texts[title])))
        except (LookupError, TypeError, AttributeError) as error:
            raise UsageError(f"{file}: not a book in the CoSER format ({error!r})") from None
    show([table(["book", *COUNTS, *SHARES], rows)])
    for line in lines:
        notes = [f"  {n} {what}" for what, n in line["notes"].items()]
        notes += [f"  chunk {lost['chunk'] + 1} failed: {lost['error']}" for lost in line["failures"]]
        lost = f"{line['missing']:.1%} of the text in chunks that failed, {line['in_no_plot']:.1%} in no plot"
        show([f"{line['title']}: {lost}", *notes])


def main():
    args, model, lines = parse_args(), None, []
    books = read_books(args.books, found := Report())
    for line in found.lines():
        terminal.note(line)
    if args.model and not args.dry_run:
        options = {name: getattr(args, name) for name in ("chat_format", "dtype") if getattr(args, name)}
        options |= {"concurrency": args.concurrency, "per_minute": args.requests_per_minute}
        model = open_model(args.model, answers=Path(args.out) / ANSWERS, **options)
    encode = (model.tokenizer if model and model.local else load_tokenizer(STAGE_TOKENIZER)).encode

    def count(text):
        return len(encode(text))

    if model or args.dry_run:
        chunks = [cut(book.text, args.chunk_tokens, count)[: args.limit] for book in books]
    if args.dry_run:
        rows = estimate(books, chunks, count)
        rows = [[name, *(f"{number:,.0f}" for number in numbers)] for name, *numbers in rows]
        show([table(["step", "calls", "tokens in", "tokens out"], rows)])
        return 0
    if model:
        lines = [line for _, line in run(args, books, chunks, model, count)]
    report(args, books, lines)
    return int(bool(model) and not any(line["figures"]["plots"] for line in lines))


if __name__ == "__main__":
    terminal.run(main)
