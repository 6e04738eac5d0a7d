"""The cache of tokenised documents: builds a store in one process or several, and reads it memory-mapped.

The documents of a source lie in `cache/KEY/`. KEY is a hash of the files' bytes, the tokenizer, the settings
and the code that makes chats, so a store is never stale. It is built in `KEY.tmp/`, which is renamed when it
is complete: a build that is stopped leaves nothing that counts. Of several processes that want a store one
builds it and the others wait for it. Any part of the cache may be deleted at any time.

Large sources are tokenised by several spawned processes, and `prepare` builds a store ahead of time in a
spawned process. None of them outlives the process that started it. Spawned, since a process that runs CUDA
and NCCL threads must not fork.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from common import terminal
from common.files import UsageError, make_dir, read_json, write_whole
from data.brackets import CHANNELS
from data.channels import label
from data.chats import scene_to_chats
from data.general import read_general
from data.records import Report
from data.scenes import read_scenes
from tokenizer import load_tokenizer

SHIFT = 28  # a stored token is its id, with its channel above these bits
# numbers in the index of a store: where a document ends, its supervised tokens of each channel
INDEXED = 1 + len(CHANNELS)
PROCESSES = 16  # at most
BYTES_PER_PROCESS = 2**24  # of source files: 2 to 6 s of work, about what starting a process costs
CODE = ("brackets", "channels", "chats", "general", "prompts", "records", "scenes", "store", "../tokenizer")


# ---- what is tokenised -------------------------------------------------------------------------------------


@dataclass
class SceneSource:
    """The training chats of one epoch, or of the held-out scenes. options: of `scene_to_chats`."""

    files: list
    epoch: int
    held_out: bool
    held_out_books: float
    options: dict

    @property
    def name(self):
        return "held-out scenes" if self.held_out else f"the scenes of epoch {self.epoch}"

    def items(self, tokenizer, report):
        """Yields (share of the files read, item)."""
        for scene, done in read_scenes(self.files, report, self.held_out_books):
            if (scene.tag != "train") == self.held_out:
                yield done, scene

    def documents(self, tokenizer, scene):
        """The documents (ids, channels) of an item."""
        chats = scene_to_chats(scene, self.epoch, **self.options)
        return [label(tokenizer, chat.messages, chat.character, chat.parts) for chat in chats]


@dataclass
class GeneralSource:
    """A file of general data, with the methods of SceneSource."""

    files: list

    @property
    def name(self):
        return self.files[0].name

    def items(self, tokenizer, report):
        for messages, where, done in read_general(self.files[0], report):
            try:
                [*tokenizer.format.segments(messages, False)]
            except ValueError as error:
                report.note(f"dropped: row that the chat format cannot express ({error})", where)
            else:
                yield done, messages

    def documents(self, tokenizer, messages):
        return [label(tokenizer, messages)]


def size(source):
    return sum(os.path.getsize(file) for file in source.files)


def digest(*parts):
    """A hash of strings, and of files (paths), names and bytes."""
    total = hashlib.sha256()
    for part in parts:
        total.update(f"{part.name if isinstance(part, Path) else part}\0".encode())
        if isinstance(part, Path):
            with open(part, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def code_digest():
    """A hash of the code that decides what the documents of a source are."""
    return digest(*(Path(__file__).parent / f"{name}.py" for name in CODE))


# ---- a store -----------------------------------------------------------------------------------------------


class Store:
    """Tokenised documents. offsets: int64 [documents + 1]; counts: int64 [documents, channels], supervised
    tokens; tokens: uint32 [offsets[-1]], read when they are used; report: `counts` and `examples` of the
    Report."""

    def __init__(self, path):
        self.report = read_json(path / "report.json")
        index = np.fromfile(path / "index", np.int64)
        index = index[: len(index) // INDEXED * INDEXED].reshape(-1, INDEXED)
        self.offsets, self.counts = np.append(0, index[:, 0]), index[:, 1:]
        self.lengths = np.diff(self.offsets)
        if (path / "tokens").stat().st_size != 4 * self.offsets[-1]:
            raise UsageError(f"{path}: damaged; delete it, and it is built again")
        self.tokens = np.zeros(0, np.uint32)
        if self.offsets[-1]:
            self.tokens = np.memmap(path / "tokens", np.uint32, "r", shape=self.offsets[-1])

    def read(self, document, start=0, end=None):
        """(ids, channels) of a part of a document."""
        first, last = self.offsets[document : document + 2]
        tokens = self.tokens[first + start : last if end is None else first + end]
        return tokens & (2**SHIFT - 1), (tokens >> SHIFT).astype(np.int8)


def open_store(cache, key, source, tokenizer, strict=False, background=False):
    """The Store of a source, built if it is not there. background: by this process alone, showing nothing."""
    path, partial = make_dir(cache) / key, Path(cache) / f"{key}.tmp"
    while not path.is_dir():
        with _lock(partial) as locked:
            if not locked:  # its builder has finished or given up
                continue
            try:
                if not path.is_dir():
                    build_store(partial, source, tokenizer, Report(strict), background)
                    os.rename(partial, path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return Store(path)


@contextlib.contextmanager
def _lock(partial):
    """Waits for the lock on a directory that is being built. Yields False if that directory is gone by then.

    The lock is on `tokens` in it; the system releases it however this process ends.
    """
    partial.mkdir(exist_ok=True)
    file = partial / "tokens"
    with contextlib.ExitStack() as stack:
        locked = False
        with contextlib.suppress(FileNotFoundError):
            handle = stack.enter_context(open(file, "ab"))
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = os.path.samestat(os.stat(file), os.fstat(handle.fileno()))
        yield locked


def build_store(path, source, tokenizer, report, background=False):
    """Tokenises a source into the files of a store. The bytes do not depend on the number of processes."""
    processes = 1 if background else min(PROCESSES, os.cpu_count() or 1, size(source) // BYTES_PER_PROCESS)
    results = _tokenise(source, tokenizer, report)
    if processes > 1:
        results = _tokenise_in_processes(processes, source, tokenizer, report)
    if not background:
        results = _with_progress(results, source.name)
    index, total = array("q"), 0
    with contextlib.closing(results), open(path / "tokens", "wb") as file:
        for _, documents in results:
            for tokens in documents:
                file.write(tokens.tobytes())
                total += len(tokens)
                index.extend([total, *np.bincount(tokens >> SHIFT, minlength=INDEXED)[1:].tolist()])
        file.flush()
        os.fsync(file.fileno())
    with write_whole(path / "index", "wb") as file:
        index.tofile(file)
    with write_whole(path / "report.json") as file:
        json.dump({"counts": report, "examples": report.examples}, file)


def _tokenise(source, tokenizer, report, first=0, step=1):
    """Yields (share done, stored documents) for every `step`-th item of a source, from `first` on."""
    for done, item in itertools.islice(source.items(tokenizer, report), first, None, step):
        documents = source.documents(tokenizer, item)
        yield done, [ids | channels.astype(np.uint32) << SHIFT for ids, channels in documents]


def _with_progress(results, name):
    """Passes results on and shows the share that is done: a bar on a terminal, else a line now and then."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    started = last = time.monotonic()
    with contextlib.closing(results), terminal.progress(*columns) as bar:
        task = bar.add_task(f"tokenising {name}", total=1.0)
        for done, documents in results:
            yield done, documents
            bar.update(task, completed=done)
            if bar.disable and time.monotonic() - last > terminal.EVERY:
                last = time.monotonic()
                terminal.note(f"tokenising {name}: {done:.0%} in {last - started:,.0f} s")


# ---- other processes ---------------------------------------------------------------------------------------


def _start(target, *args):
    """Starts a spawned process with SIGINT and SIGTERM blocked: torchrun and terminals send them to our whole
    process group, but what to do about them is decided in this process."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=args, daemon=True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return process


def _end_with_parent(end):
    """Calls `end` when the process that started this one is gone, even if it was killed."""

    def wait():
        multiprocessing.parent_process().join()
        end()

    threading.Thread(target=wait, daemon=True).start()


def _tokenise_in_processes(number, source, tokenizer, report):
    """`_tokenise`, by processes that each read the whole source and tokenise every `number`-th item."""
    pipe = multiprocessing.get_context("spawn").Pipe
    receivers, processes = [], []
    try:
        for first in range(number):
            receiver, sender = pipe(duplex=False)
            reopen = tokenizer.file, tokenizer.chat_format
            processes.append(_start(_worker, sender, source, reopen, report.strict, first, number))
            receivers.append(receiver)
            sender.close()
        for receiver in itertools.cycle(receivers):
            try:
                done, documents = receiver.recv()
            except EOFError:
                problem = f"tokenising {source.name}: a process ended early (out of memory?); try again"
                raise UsageError(problem) from None
            if isinstance(done, UsageError):
                raise done
            if done is None:
                counts, report.examples = documents
                report.update(counts)
                return
            yield done, documents
    finally:
        for process in processes:
            process.kill()
            process.join()


def _worker(sender, source, reopen, strict, first, step):
    """Sends the results of `_tokenise`, then (None, the report) or (a UsageError, None)."""
    _end_with_parent(lambda: os._exit(1))
    report = Report(strict)
    try:
        for result in _tokenise(source, load_tokenizer(*reopen), report, first, step):
            sender.send(result)
        sender.send((None, (dict(report), report.examples)))
    except UsageError as error:
        sender.send((error, None))


def prepare(cache, key, source, tokenizer, strict):
    """Starts building a store in a background process, unless it is there or its source is small.

    Whoever opens the store before it is complete waits for it. If the process fails or is stopped, the store
    is built where it is opened.
    """
    if size(source) >= BYTES_PER_PROCESS and not (Path(cache) / key).is_dir():
        _start(_prepare, cache, key, source, (tokenizer.file, tokenizer.chat_format), strict)


def _prepare(cache, key, source, reopen, strict):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # removes what is half built
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _end_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    os.nice(10)
    with contextlib.suppress(UsageError, OSError):  # they are reported where the store is opened
        open_store(cache, key, source, load_tokenizer(*reopen), strict, background=True)
