"""What the benchmarks share: questions asked of models, and replies kept."""

import contextlib
import json
from collections import deque
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path

from common import terminal
from common.files import UsageError, checksum
from evals import benchmark_prompts
from evals.rubric import digest
from llm import open_model
from llm.reply import Reply
from play.perform import SIDE_BY_SIDE
from play.protocol import Call
from play.transcripts import ANSWERS, REPLIES

GENERATION, LIKELIHOOD = "generation", "likelihood"  # ways to answer a multiple-choice question


@dataclass(eq=False)
class Ask:
    """A call in the form that the Journal of `play.perform` takes. key: of its question."""

    key: str
    call: Call

    @property
    def scene(self):  # the journal reads `scene.key`
        return self


def make_ask(key, occasion, role, messages, params):
    """An Ask. occasion: tells the calls about one question apart."""
    return Ask(key, Call(role, role, occasion, messages, params))


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
                    running[model.submit(one.call.messages, one.call.params, one.call.opening)] = one
                model.step()
                done = list(wait(running, 0 if model.local else 1, FIRST_COMPLETED).done)
                # one at a time from an endpoint: a kill loses the calls in flight, not kept replies
                done = done if model.local else done[:1]
                answered = [(running.pop(future), future.result()) for future in done]
                journal.keep(answered)
                replies.update(answered)
                update(len(replies), what)
    finally:
        for future in running:
            future.cancel()
    return [replies[one] for one in asks]


def compute_all(asks, compute, journal, what):
    """As `ask_all`, for what is not a chat: `compute(ask)` returns a JSON value or raises UsageError.

    Returns Replies whose text is the value as JSON.
    """
    replies = []
    with terminal.reporting(len(asks), "questions") as update:
        for one in asks:
            kept = journal.take(one, one.call)
            reply = kept[0] if kept else None
            if reply is None:
                try:
                    reply = Reply(json.dumps(compute(one)), "stop")
                except UsageError as error:
                    reply = Reply("", "error", error=str(error))
                journal.keep([(one, reply)])
            replies.append(reply)
            update(len(replies), what)
    return replies


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
