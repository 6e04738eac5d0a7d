"""One play as a value: a scene, the messages so far, and the character that a person plays.

Nothing else is kept between two steps, so to retry a line, to edit one, to undo and to branch are the same
thing: to go on from other messages.
"""

import re
import sys
from collections import Counter
from concurrent.futures import wait
from dataclasses import dataclass, replace

from common import terminal
from common.files import UsageError
from data.chats import NEXT_SPEAKER
from data.scenes import ENVIRONMENT, Scene
from llm.reply import Reply
from play.perform import TokenCounts
from play.protocol import HUMAN, Call, NobodySpoke, Performance, Protocol, SceneFailed
from play.replies import meant_by

COMMANDS = "an empty line says nothing; /retry: the others again; /edit TEXT: your last line; Ctrl-D ends"


@dataclass(frozen=True)
class Session:
    """A play that can go on. messages: as in a transcript. human: the character a person plays, or None.
    seed: of what follows; None is the protocol's. After a retry it is another, which each message records.

    `human` may be a form of the name. UsageError for names that are not in the scene.
    """

    scene: Scene
    protocol: Protocol
    messages: tuple | list = ()
    human: str | None = None
    seed: int | None = None

    def __post_init__(self):
        cast = list(dict.fromkeys([*self.scene.speaking_characters, ENVIRONMENT]))
        if self.human is not None and self.human not in cast:
            meant = meant_by(self.human, cast)
            if len(meant) != 1:
                raise UsageError(f"{self.human}: not in this scene; choose from {', '.join(cast)}")
            object.__setattr__(self, "human", meant[0])
        if strangers := {message["role"] for message in self.messages} - {*cast, NEXT_SPEAKER}:
            raise UsageError(f"{min(strangers)}: speaks, but is not in this scene")

    def performance(self):
        """A Performance that goes on from the messages."""
        return Performance(self.scene, self.protocol, messages=self.messages, seed=self.seed)

    def is_asked(self, step):
        """Whether a step of the Performance is a Call for the person's line; answer with `line`."""
        return isinstance(step, Call) and step.role != "next_speaker" and step.agent == self.human

    def retried(self):
        """The play right after the person's last line, with another seed for what follows."""
        ends = [i for i, message in enumerate(self.messages, 1) if message.get("human")]
        seed = (self.protocol.seed if self.seed is None else self.seed) + 1
        return replace(self, seed=seed, messages=self.messages[: max(ends, default=0)])

    def edited(self, text):
        """The play right after the person's last line, which becomes this text (empty: right before it)."""
        *before, line = self.retried().messages or [None]
        if line is None:
            raise UsageError("there is no line of yours to edit yet")
        return replace(self, messages=[*before, {**line, "content": text}] if text else before)


def line(text):
    """The Reply that a person's line is; without a word it is silence, which is passed over."""
    return Reply(text, HUMAN)


def play(session, models, stage, lines):
    """Plays a session on the terminal until the scene, the person's lines or Ctrl-C end it.

    models: {role: model}. lines: an iterator of what the person types. Returns (messages, stats, error or
    None). Stats count all that was played, retried turns too.
    """
    totals, error, following = Counter(), None, session
    while following:
        performance, tokens = following.performance(), TokenCounts()
        session, following = following, None
        try:
            following = go_on(session, performance, tokens, models, stage, lines)
        except KeyboardInterrupt:
            terminal.put("\n")
        except NobodySpoke:
            pass
        except SceneFailed as failure:
            error = str(failure)
        totals.update({**tokens.stats(), **performance.stats})
    return performance.messages, dict(totals), error


def go_on(session, performance, tokens, models, stage, lines):
    """Plays until a command of the person makes it another Session, which is returned, or to the end."""
    coroutine, reply = performance.play(), None
    while True:
        try:
            step = coroutine.send(reply)
        except StopIteration:
            return None
        reply = None
        if session.is_asked(step):
            text = person_says(step.agent, lines)
            if text is None:
                return None
            command, _, rest = text.partition(" ")
            played = replace(session, messages=list(performance.messages))
            try:
                if command == "/retry":
                    return played.retried()
                if command == "/edit":
                    return played.edited(rest.strip())
                if re.fullmatch("/[a-z]+", command):  # a slip: nobody is to hear it as a line
                    raise UsageError(f"{command}: not a command ({COMMANDS})")
            except UsageError as problem:
                terminal.note(str(problem))
                return played
            reply = line(text)
        elif isinstance(step, Call):
            reply = answer(models[step.role], step, stage)
            tokens.add(step, reply, 1)
        elif not (step.get("human") and sys.stdin.isatty() and terminal.stdout.is_terminal):  # it was typed
            stage.on_message(step)


def person_says(name, lines):
    """What the person types as a character's line; None at the end of the input."""
    if sys.stdin.isatty():
        terminal.stderr.print(f"({COMMANDS})", style="dim", markup=False)
        terminal.stderr.print(terminal.plain(f"{name}: "), style="bold", end="", markup=False)
    text = next(lines, None)
    if sys.stdin.isatty():
        terminal.stderr.print()
    return text


def answer(model, call, stage):
    """The Reply of a model, shown on the stage while it is generated."""
    future = model.submit(call.messages, call.params, call.opening)
    try:
        while not future.done():
            model.step()
            if not model.local:
                wait([future], 1)  # a Ctrl-C is noticed after it
            elif not future.done() and call.role != "next_speaker":
                stage.on_text(call, model.spoken(future))
        return future.result()
    finally:
        future.cancel()
