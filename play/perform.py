"""Plays many scenes concurrently and keeps a journal of every reply."""

import queue
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field

from common.files import append_line, read_lines, write_lines
from data.scenes import Scene
from llm.reply import Reply
from play.accounting import TokenCounts
from play.protocol import Call, NobodySpoke, SceneFailed, play

SIDE_BY_SIDE = 32  # scenes


@dataclass(eq=False)
class LiveScene:
    """A scene being played: its coroutine, its messages so far, and the call it waits for."""

    scene: Scene
    coroutine: object
    messages: list = field(default_factory=list)
    tokens: TokenCounts = field(default_factory=TokenCounts)
    started: float = field(default_factory=time.perf_counter)
    call: Call | None = None


class Journal:
    """The replies of a run, on disk as they come, so that a resumed run asks for none of them again.

    path None: nothing is kept. run: the number of this run, from 1; each resumption is one more.
    """

    def __init__(self, path=None):
        self.path, self.replies = path, {}
        lines = read_lines(path, ()) if path else []
        for key, entry in (item for line in lines for item in line.items()):
            if entry is None:  # see `forget`
                self.replies = {k: v for k, v in self.replies.items() if not k.startswith(f"{key}|")}
            else:
                self.replies[key] = entry
        self.run = 1 + max((run for run, _ in self.replies.values()), default=0)
        if path and path.exists():
            write_lines(path, lines)  # without the torn line a kill may have left

    def take(self, scene, call):
        """(the Reply to a call of a scene, the number of the run in which it came), or None."""
        run, reply = self.replies.pop(f"{scene.key}|{call.occasion}", (0, None))
        return (Reply(**reply), run) if reply else None

    def keep(self, answered, errors=False):
        """Writes the replies to [(LiveScene, Reply)], all or none. errors: failed ones too, as the scenes go
        on with them."""
        kept = [(live, reply) for live, reply in answered if errors or reply.error is None]
        if self.path and kept:
            keys = [f"{live.scene.key}|{live.call.occasion}" for live, _ in kept]
            entries = [(self.run, asdict(reply)) for _, reply in kept]
            append_line(self.path, dict(zip(keys, entries, strict=True)))

    def forget(self, scene):
        """Drops the replies to a scene, so that a resumed run asks for all of them again."""
        if self.path:
            append_line(self.path, {scene.key: None})


class Dispatcher:
    """Sends calls to the models of the roles: a local model batches its calls, step by step; an endpoint's
    get a thread each."""

    def __init__(self, models):
        self.models = models
        self.local_models = {id(model): model for model in models.values() if model.local}.values()
        self.at_local_models, self.at_endpoints = set(), 0  # LiveScenes; number of calls
        self.arrived = queue.Queue()  # (LiveScene, Reply or exception) from endpoints

    def submit(self, live):
        call, model = live.call, self.models[live.call.role]
        if model.local:
            model.ask(live, call.messages, call.params, call.opening)
            self.at_local_models.add(live)
        else:  # a daemon thread, so that Ctrl-C need not wait for it
            threading.Thread(target=self._fetch, args=(live, model), daemon=True).start()
            self.at_endpoints += 1

    def _fetch(self, live, model):
        call = live.call
        try:
            self.arrived.put((live, model.chat([call.messages], [call.params], [call.opening])[0]))
        except BaseException as error:
            self.arrived.put((live, error))

    def collect(self):
        """Yields [(LiveScene, Reply)]: of each local model after a step, and of endpoints what has arrived;
        if nothing else can come, it waits for one."""
        idle = not self.at_local_models
        for model in self.local_models:
            if replies := model.step():
                self.at_local_models.difference_update(live for live, _ in replies)
                yield replies
        while self.at_endpoints and (idle or not self.arrived.empty()):
            live, reply = self.arrived.get()
            self.at_endpoints, idle = self.at_endpoints - 1, False
            if isinstance(reply, BaseException):
                raise reply
            yield [(live, reply)]

    def partial_replies(self):
        """(Call, its text so far) of each call at a local model."""
        return [(live.call, self.models[live.call.role].spoken(live)) for live in self.at_local_models]

    def close(self):
        for model in self.local_models:
            model.drop()


def _nothing(*_):
    pass


def perform(scenes, models, protocol, on_message=_nothing, on_end=_nothing, on_failure=_nothing,
            on_reply=_nothing, on_text=None, journal=None, side_by_side=SIDE_BY_SIDE):  # fmt: skip
    """Plays scenes, at most side_by_side at once; each goes on as soon as its own reply has come.

    models: {role: model}. on_message(scene, message) at each spoken message; on_end(scene, messages, stats,
    seconds) or on_failure(scene, messages so far, error) once for each scene; on_reply(reply) at each reply
    of a model; on_text(call, text) with the growing text of a turn by a local model.
    """
    journal, dispatcher = journal or Journal(), Dispatcher(models)
    scenes, live_scenes, ready = iter(scenes), set(), deque()  # ready: (LiveScene, the reply it waited for)

    def advance(live, reply):
        """Plays a scene on to its next call that the journal has no reply to, or to its end."""
        try:
            while True:
                step = live.coroutine.send(reply)
                reply = None
                if isinstance(step, Call):
                    live.call = step
                    kept = journal.take(live.scene, step)
                    if kept is None:
                        return dispatcher.submit(live)
                    reply, run = kept
                    live.tokens.add(step.agent, reply, run)
                else:
                    live.messages.append(step)
                    on_message(live.scene, step)
        except StopIteration as end:
            messages, stats = end.value
            stats = {**live.tokens.stats(), **stats}
            on_end(live.scene, messages, stats, time.perf_counter() - live.started)
        except SceneFailed as error:
            if isinstance(error, NobodySpoke):
                journal.forget(live.scene)
            on_failure(live.scene, live.messages, str(error))
        live_scenes.remove(live)

    try:
        while True:
            while ready:
                advance(*ready.popleft())
            while len(live_scenes) < side_by_side and (scene := next(scenes, None)):
                live = LiveScene(scene, play(scene, protocol))
                live_scenes.add(live)
                advance(live, None)
            if not live_scenes:
                return
            while not ready:
                for replies in dispatcher.collect():
                    journal.keep(replies, errors=not protocol.silence_passes)
                    for live, reply in replies:
                        on_reply(reply)
                        live.tokens.add(live.call.agent, reply, journal.run)
                        ready.append((live, reply))
                for call, text in dispatcher.partial_replies() if on_text else ():
                    if call.role != "next_speaker":
                        on_text(call, text)
    finally:
        dispatcher.close()
