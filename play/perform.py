"""Plays many scenes concurrently and keeps a journal of every reply."""

import time
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass, field

from common.files import append_line, read_lines, write_lines
from data.scenes import Scene
from llm.reply import Reply
from play.protocol import Call, NobodySpoke, Performance, SceneFailed

SIDE_BY_SIDE = 32  # scenes


class TokenCounts:
    """The token counts of one scene, over all calls of its agents.

    prefilled: prompt tokens computed for this scene. cached: prompt tokens found in the cache, at most those
    that the agent's own last call left there, so the counts do not depend on other scenes; a resumed run
    counts what the interrupted one would have found. decoded: tokens sampled. least: the minimum to prefill:
    of each agent's chat at its last call, all tokens that the model had not sampled itself.
    """

    def __init__(self):
        self.prefilled = self.decoded = self.cached = 0
        self.last_calls = {}  # agent: (its last Reply, the run in which it came, the Call)

    def add(self, call, reply, run, changing=None):
        """Counts the reply to a call, which came in this run (Journal.run).

        changing: the model, if chats do not only grow at their end (see Performance.remind).
        """
        if reply.error is not None:
            return
        before, run_before, call_before = self.last_calls.get(call.agent, (None, run, None))
        cached = cached_tokens(reply, run, before, run_before)
        if changing and run != run_before and reply.ids is not None:
            cached = min(cached, tokens_in_common(changing, call_before, before, call))
        self.last_calls[call.agent] = reply, run, call
        self.prefilled += reply.prompt_tokens - cached
        self.cached += cached
        self.decoded += reply.completion_tokens

    def stats(self):
        least = sum(reply.prompt_tokens - reply.own_tokens for reply, *_ in self.last_calls.values())
        return dict(prefilled=self.prefilled, decoded=self.decoded, cached=self.cached, least=least)


def cached_tokens(reply, run, before, run_before):
    """The prompt tokens of a reply that the agent's call before had left in the cache: no more than were
    measured, unless that call came in an earlier run, whose cache is gone."""
    if reply.ids is None:  # an endpoint: its own count
        return reply.cached_tokens
    left = 0
    if before is not None:
        kept = reply.own_tokens - before.own_tokens  # tokens of the reply before that stand as sampled
        # the last token of a reply cut at max_tokens was sampled, but never an input
        not_computed = kept == len(before.ids) and before.finish_reason == "length"
        left = min(before.prompt_tokens + kept - not_computed, reply.prompt_tokens - 1)
    return left if run != run_before else min(reply.cached_tokens, left)


def tokens_in_common(model, call_before, reply_before, call):
    """How many tokens the prompt of a call begins with that an earlier call and its reply began with too."""
    left = model.prompt(call_before.messages, call_before.opening)[0] + reply_before.ids
    pairs = zip(left, model.prompt(call.messages, call.opening)[0], strict=False)
    return next((i for i, (old, new) in enumerate(pairs) if old != new), len(left))


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
        """(the Reply to a call of a scene, the run in which it came), or None."""
        run, reply = self.replies.pop(f"{scene.key}|{call.occasion}", (0, None))
        return (Reply(**reply), run) if reply else None

    def keep(self, answered, errors=False):
        """Writes the replies to [(LiveScene, Reply)], all or none; failed ones only with `errors`."""
        entries = {
            f"{live.scene.key}|{live.call.occasion}": (self.run, asdict(reply))
            for live, reply in answered
            if errors or reply.error is None
        }
        if self.path and entries:
            append_line(self.path, entries)

    def forget(self, scene):
        """Drops the replies to a scene, so that a resumed run asks for all of them again."""
        if self.path:
            append_line(self.path, {scene.key: None})


def _nothing(*_):
    pass


def perform(scenes, models, protocol, on_message=_nothing, on_end=_nothing, on_failure=_nothing,
            on_reply=_nothing, on_text=None, journal=None, side_by_side=SIDE_BY_SIDE,
            retrieval=None):  # fmt: skip
    """Plays scenes, at most side_by_side at once; each goes on as soon as its own reply has come.

    models: {role: model}. on_message(scene, message) at each spoken message; on_end(scene, messages, stats,
    seconds) or on_failure(scene, messages so far, error) once for each scene; on_reply(reply) at each reply
    of a model; on_text(call, text) with the growing text of a turn by a local model. retrieval: a Retrieval.
    """
    scenes, journal, calls = iter(scenes), journal or Journal(), {}  # {Future: LiveScene}

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
                        future = models[step.role].submit(step.messages, step.params, step.opening)
                        calls[future] = live
                        return
                    reply, run = kept
                    live.tokens.add(step, reply, run, retrieval and models[step.role])
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

    def wait_for_replies():
        """[(LiveScene, Reply)]: of local models all that a step answers, else of an endpoint one or none."""
        for model in dict.fromkeys(models.values()):
            model.step()
        at_local_models = [future for future, live in calls.items() if models[live.call.role].local]
        done = wait(calls, 0 if at_local_models else 1, FIRST_COMPLETED).done  # Ctrl-C is noticed after it
        for future in at_local_models if on_text else ():
            call = calls[future].call
            if future not in done and call.role != "next_speaker":
                on_text(call, models[call.role].spoken(future))
        answered = [future for future in at_local_models if future in done] or list(done)[:1]
        return [(calls.pop(future), future.result()) for future in answered]

    try:
        while True:
            while len(calls) < side_by_side and (scene := next(scenes, None)):
                advance(LiveScene(scene, Performance(scene, protocol, retrieval).play()), None)
            if not calls:
                return
            replies = wait_for_replies()
            journal.keep(replies, errors=not protocol.silence_passes)
            for live, reply in replies:
                on_reply(reply)
                live.tokens.add(live.call, reply, journal.run, retrieval and models[live.call.role])
            for answered in replies:
                advance(*answered)
    finally:  # the latest first: they may be waiting for an earlier one's place
        for future in reversed(calls):
            future.cancel()
