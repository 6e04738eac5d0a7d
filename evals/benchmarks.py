"""What the benchmarks share: a run and its settings, replies asked for and kept, results reported."""

import contextlib
import json
import shlex
from collections import deque
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path

from common import terminal
from common.files import UsageError, checksum, write_json, write_lines, write_whole
from evals import benchmark_prompts, page
from evals.metrics import bootstrap
from evals.report import interval, number, short, show, table
from evals.rubric import digest
from llm import open_model
from play.perform import SIDE_BY_SIDE
from play.protocol import Call
from play.transcripts import ANSWERS, REPLIES

RESULTS, QUESTIONS = "results.json", "questions.jsonl"
GENERATION, LIKELIHOOD = "generation", "likelihood"  # ways to answer a multiple-choice question


# ---- a run -------------------------------------------------------------------------------------------------


def open_models(args):
    """{"actor": model, "judge": model}, None for one that is not asked.

    args.by becomes the ways that the actor allows: an endpoint gives no likelihoods.
    """
    options = dict(answers=Path(args.out) / ANSWERS, concurrency=args.concurrency)
    options |= dict(per_minute=args.requests_per_minute, chat_format=args.chat_format, dtype=args.dtype)
    specs = [spec for spec in dict.fromkeys([args.actor, args.judge]) if spec]
    if (args.chat_format or args.dtype) and all(spec.startswith("openai:") for spec in specs):
        raise UsageError("--chat-format and --dtype are for checkpoints; an endpoint applies its own")
    opened = {spec: open_model(spec, **options) for spec in specs}
    actor = opened.get(args.actor)
    if actor and not actor.local and args.benchmark != "incharacter":
        if LIKELIHOOD in (args.by or ()):
            raise UsageError("--by likelihood needs a local model; an endpoint gives no likelihoods of texts")
        if args.by is None:
            terminal.note("by generation only: likelihoods need a local model, and this one is an endpoint")
        args.by = [GENERATION]
    args.by = args.by or [LIKELIHOOD, GENERATION]
    return {"actor": actor, "judge": opened.get(args.judge)}


def settings_of(args, models, data):
    """All that decides the replies of a run, for `claim`. data: the files it reads.

    A judge is not among them, since the journal keeps the replies of different judges apart.
    """
    prompts = {name: value for name, value in vars(benchmark_prompts).items() if name.isupper()}
    settings = {"benchmark": args.benchmark, "seed": args.seed, "max_tokens": args.max_tokens}
    settings |= {"prompts": digest(prompts), "data": [checksum(file)[:16] for file in data]}
    if actor := models["actor"]:
        settings |= {"actor": actor.name, "actor_identity": actor.identity}
    return settings


@contextlib.contextmanager
def resumable(out):
    """Says, when a run stops before its end, how to go on."""
    try:
        yield
    except (KeyboardInterrupt, UsageError) as error:
        if not (out / REPLIES).exists():
            raise
        reason = f"{error}. " if str(error) else ""
        hint = f"the replies so far are in {out}; the same command with --resume asks for the others"
        raise type(error)(reason + hint) from None


# ---- replies -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Ask:
    """A call in the form that the Journal of `play.perform` takes.

    key: of its question. occasion: tells the calls about one question apart.
    """

    key: str
    occasion: str
    role: str
    messages: list
    params: object

    @property
    def call(self):
        return Call(self.role, self.role, self.occasion, self.messages, self.params)

    @property
    def scene(self):  # the journal reads `scene.key`
        return self


def ask_all(asks, model, journal, what):
    """The Replies to calls in order, from the journal or from the model, SIDE_BY_SIDE of them at a time.

    A reply with an `error` is not kept, so a resumed run asks again. what: for the progress bar.
    """
    replies, waiting, running = {}, deque(), {}  # {Future: Ask}
    for one in asks:
        if kept := journal.take(one, one.call):
            replies[one] = kept[0]
        else:
            waiting.append(one)
    try:
        with terminal.reporting(len(asks), "answers") as update:
            while waiting or running:
                while waiting and len(running) < SIDE_BY_SIDE:
                    one = waiting.popleft()
                    running[model.submit(one.messages, one.params)] = one
                model.step()
                done = list(wait(running, 0 if model.local else 1, FIRST_COMPLETED).done)
                # one at a time from an endpoint: a kill loses the calls in flight, not kept replies
                done = done if model.local else done[:1]
                answered = [(running.pop(future), future.result()) for future in done]
                journal.keep(answered)
                replies.update(answered)
                update(len(replies), what)
    finally:
        for future in reversed(running):
            future.cancel()
    return [replies[one] for one in asks]


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


# ---- results -----------------------------------------------------------------------------------------------


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


def published(columns):
    """Rows of the published table. columns: {column: (key of published_results.json, the column of its number
    of questions)}.

    The number, KEY_of, is known where a share of it, rounded or truncated, is the published figure; elsewhere
    the figure is a mean over runs, or leaves failures out.
    """
    models = json.loads(Path(__file__).with_name("published_results.json").read_text(encoding="utf-8"))
    for model in models["benchmarks"]:
        row = {"": f"{model['model']} (published)"}
        for column, (key, number_of) in columns.items():
            row |= {column: model[key], number_of: model.get(f"{key}_of")}
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
