"""The one thread that owns the models: it runs their engines' steps for the requests of all clients."""

import queue
import threading
from concurrent.futures import Future

from common import terminal


class Busy(Exception):
    """As many requests as the server accepts are in progress."""


class Job(Future):
    """The Future of a Reply or a Completion; `cancel()` takes its request out of the engine and frees pages.

    progress: the text so far, in whole characters, without reasoning and without what may begin a stop
    string; and how many generated tokens that text takes. Replaced as a whole, so any thread may read it.
    request: the llm.local.Request; None before it has started, and for an endpoint.
    """

    progress, request = ("", 0), None

    @property
    def text(self):
        return self.progress[0]


class Worker:
    """Models by name, called from any thread. capacity: jobs in progress at once; further ones raise Busy.

    A model that serves under several names is loaded and stepped once. A step that fails ends the requests of
    its model with an error, and no others.
    """

    def __init__(self, models, capacity=64):
        self.models, self.capacity = models, capacity
        self.local = [model for model in dict.fromkeys(models.values()) if model.local]
        self.calls = queue.SimpleQueue()  # functions to call on the thread
        self.jobs, self.watched, self.lock = set(), {}, threading.Lock()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, name, messages, params, opening="", on_text=None):
        """The Job of a model's Reply, as in Model.submit.

        on_text(job) must not raise; the worker's thread calls it when the job has started, and after each
        step that changed its progress.
        """
        model = self.models[name]
        return self.start(model, lambda: model.submit(messages, params, opening), on_text)

    def complete(self, name, ids, params, on_text=None, continuation=None):
        """The Job of a local model's Completion of token ids; see Local.complete."""
        model = self.models[name]
        return self.start(model, lambda: model.complete(ids, params, continuation), on_text)

    def start(self, model, ask, on_text):
        """A Job for the Future that ask() returns on the worker's thread."""
        job = Job()
        with self.lock:
            if len(self.jobs) >= self.capacity:
                raise Busy
            self.jobs.add(job)

        def begin():
            if job.cancelled():
                return
            try:
                inner = ask()
            except Exception as error:  # a prompt or a schema that the model cannot take
                return settle(job, error)
            if model.local:
                job.request = model.running.get(inner)
                self.watched[job] = model, inner, on_text
            inner.add_done_callback(lambda inner: self.end(job, inner))
            if on_text and not inner.done():
                on_text(job)
            job.add_done_callback(lambda job: self.calls.put(inner.cancel))

        job.add_done_callback(self.forget)
        self.calls.put(begin)
        return job

    def forget(self, job):
        with self.lock:
            self.jobs.discard(job)

    def end(self, job, inner):
        """Gives a job the outcome of its model's future."""
        self.watched.pop(job, None)
        if not inner.cancelled():
            settle(job, inner.exception() or inner.result())

    def run(self):
        while True:
            busy = [model for model in self.local if model.running]
            try:
                self.calls.get(block=not busy)()
                continue  # all calls come before a step
            except queue.Empty:
                pass
            for model in busy:
                try:
                    model.step()
                    self.publish(model)
                except Exception as error:  # one model's fault must not end the server
                    terminal.note(f"{model.name}: a step failed ({type(error).__name__}: {error})")
                    for future in list(model.running):
                        future.set_exception(RuntimeError(f"a step failed: {type(error).__name__}"))

    def publish(self, model):
        """Brings the progress of a model's jobs up to date."""
        for job, (owner, inner, on_text) in list(self.watched.items()):
            if owner is model:
                text, sequence = model.spoken(inner), job.request.sequences[0]
                count = len(sequence.generated) if sequence.text == text else job.progress[1]
                if (text, count) != job.progress:
                    job.progress = text, count
                    if on_text:
                        on_text(job)


class Served:
    """A served model that may be asked from any thread, as by the judge of plays. Busy as Worker.submit."""

    def __init__(self, worker, name):
        self.worker, self.name, self.local = worker, name, worker.models[name].local

    def chat(self, conversations, params, on_reply=lambda: None):
        """The Replies to conversations, as of Model.chat."""
        jobs = []
        try:
            for pair in zip(conversations, params, strict=True):
                jobs.append(self.worker.submit(self.name, *pair))
            return [job.result() for job in jobs]
        finally:
            for job in jobs:
                job.cancel()


def settle(job, outcome):
    """Ends a job with a result or an error, unless it was cancelled meanwhile."""
    if job.set_running_or_notify_cancel():
        job.set_exception(outcome) if isinstance(outcome, Exception) else job.set_result(outcome)
