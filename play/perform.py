"""Plays many scenes concurrently and keeps a journal of every reply."""

import queue
import threading
import time
from dataclasses import asdict, dataclass

from common.files import append_line, read_lines, write_lines
from data.scenes import Scene
from llm.reply import Reply
from play.protocol import Call, SceneFailed, play

SIDE_BY_SIDE = 32  # scenes


@dataclass(eq=False)
class Live:
    """A scene on stage: its coroutine, the call it waits for, what has been said, when it began."""

    scene: Scene
    coroutine: object
    said: list
    begun: float
    call: Call | None = None


class Journal:
    """The replies of a run as they came, so that none is asked for again. path None: nothing is kept.

    run: the number of this run, from 1; each time a run is resumed it is one more.
    """

    def __init__(self, path=None):
        self.path = path
        lines = read_lines(path, ()) if path else []
        self.replies = {key: kept for line in lines for key, kept in line.items()}
        self.run = 1 + max((run for run, _ in self.replies.values()), default=0)
        if lines:
            write_lines(path, lines)  # without the torn line a kill may have left

    def take(self, scene, call):
        """(the Reply to a call of a scene, the run in which it came), None where there was none."""
        run, reply = self.replies.pop(f"{scene.key}|{call.occasion}", (0, None))
        return (Reply(**reply), run) if reply else None

    def keep(self, answered, errors=False):
        """Puts the replies to [(Live, Reply)] on the disk, those of a step all or none. errors: these too, if plays go on."""
        kept = [(live, reply) for live, reply in answered if errors or reply.error is None]
        if self.path and kept:
            append_line(
                self.path,
                {f"{it.scene.key}|{it.call.occasion}": (self.run, asdict(reply)) for it, reply in kept},
            )


def _nothing(*_):
    pass


def perform(scenes, models, protocol, on_message=_nothing, on_end=_nothing, on_failure=_nothing, on_reply=_nothing,
            on_text=None, journal=None, side_by_side=SIDE_BY_SIDE):  # fmt: skip
    """Plays scenes, so many side by side: as one leaves, the next enters, and each goes on as soon as its own reply is there.

    What scenes ask of a local model runs in one batch, step by step; endpoints are asked by a thread each. models: {role:
    model}. on_message(scene, message) at each thing said; on_end(scene, messages, stats, seconds) or on_failure(scene,
    messages so far, error) once for each; on_reply(reply) at each reply of a model; on_text(call, text) with what has been
    spoken of a turn by a local model, as it grows.
    """
    journal = journal or Journal()
    scenes, live, arrived = iter(scenes), [], queue.Queue()
    ready, waiting = [], []  # (Live, what to send it); Live with a call to ask
    inside, out = set(), 0  # Live with a call at a local model; calls at endpoints
    local = {id(model): model for model in models.values() if model.local}.values()

    def advance(it, sent):
        """Lets a scene go on until it waits for a reply that is not in the journal, or has ended."""
        try:
            while True:
                asked = it.coroutine.send(sent)
                sent = None
                if isinstance(asked, Call):
                    it.call = asked
                    sent = journal.take(it.scene, asked)
                    if sent is None:
                        return waiting.append(it)
                else:
                    it.said.append(asked)
                    on_message(it.scene, asked)
        except StopIteration as end:
            on_end(it.scene, *end.value, time.perf_counter() - it.begun)
        except SceneFailed as error:
            on_failure(it.scene, it.said, str(error))
        live.remove(it)

    def answered(pairs):
        journal.keep(pairs, errors=not protocol.silence_passes)
        inside.difference_update(it for it, _ in pairs)
        for it, reply in pairs:
            on_reply(reply)
            ready.append((it, (reply, journal.run)))

    def fetch(it, model):
        try:
            arrived.put((it, model.chat([it.call.messages], [it.call.params], [it.call.opening])[0]))
        except BaseException as error:
            arrived.put((it, error))

    try:
        while True:
            while ready or len(live) < side_by_side:
                if not ready:
                    if (scene := next(scenes, None)) is None:
                        break
                    live.append(Live(scene, play(scene, protocol), [], time.perf_counter()))
                    ready.append((live[-1], None))
                advance(*ready.pop(0))
            if not live:
                return
            asked, waiting = waiting, []
            for it in asked:
                model = models[it.call.role]
                if model.local:
                    model.ask(it, it.call.messages, it.call.params, it.call.opening)
                    inside.add(it)
                else:  # a daemon, so that Ctrl-C need not wait for it
                    threading.Thread(target=fetch, args=(it, model), daemon=True).start()
                    out += 1
            while not ready:
                for model in local:
                    answered(model.step())
                for it in inside if on_text else ():
                    if it.call.role != "next_speaker":
                        on_text(it.call, models[it.call.role].spoken(it))
                while out and not (arrived.empty() and (ready or inside)):
                    it, reply = arrived.get()
                    out -= 1
                    if isinstance(reply, BaseException):
                        raise reply
                    answered([(it, reply)])
    finally:  # Ctrl-C leaves nothing behind
        for model in local:
            model.drop()
