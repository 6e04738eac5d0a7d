"""The cache of tokenised documents: builds a store in one process or several, and reads it memory-mapped.

The documents of a source are in `cache/KEY/`. KEY is a hash of the files' bytes, the tokenizer, the settings
and the code, so a store is never stale. It is built in `KEY.tmp/` and renamed when complete; of several
processes that need it one builds and the others wait. Any part of the cache may be deleted at any time.

Worker processes tokenise large sources: all of CoSER's books (277 MB) take 44 s of one core, once an epoch.
They are spawned, since a process with CUDA and NCCL threads must not fork.
"""

import contextlib
import fcntl
import hashlib
import itertools
import multiprocessing
import os
import shutil
import signal
import threading
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from common import terminal
from common.files import ROOT, UsageError, make_dir, read_json, write_json, write_whole
from data.brackets import CHANNELS
from data.channels import label
from data.chats import scene_to_chats
from data.general import read_general
from data.records import Report
from data.scenes import read_scenes
from tokenizer import load_tokenizer

SHIFT = 28  # a stored token is its id, with its channel above these bits
INDEXED = 1 + len(CHANNELS)  # numbers for each document: where it ends, its supervised tokens of each channel
PROCESSES = 16  # at most
BYTES_PER_PROCESS = 2**24  # of source files: 3 to 6 s of work, about what starting a process costs
# what decides which tokens a source gives
CODE = (*sorted(ROOT.glob("data/*.py")), *sorted(ROOT.glob("text/*.py")), ROOT / "tokenizer.py")
SPAWN = multiprocessing.get_context("spawn")


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
        """[(ids, channels)] of an item."""
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
    """SHA-256 of strings and of the names and bytes of files (Path)."""
    total = hashlib.sha256()
    for part in parts:
        total.update(f"{part.name if isinstance(part, Path) else part}\0".encode())
        if isinstance(part, Path):
            with open(part, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


# ---- a store -----------------------------------------------------------------------------------------------


class Store:
    """Tokenised documents. lengths: int64 [documents]; counts: int64 [documents, channels], supervised ones;
    tokens: uint32 [total]; report: `counts` and `examples` of the Report."""

    def __init__(self, path):
        self.report = read_json(path / "report.json")
        index = np.fromfile(path / "index", np.int64)
        index = index[: len(index) // INDEXED * INDEXED].reshape(-1, INDEXED)
        self.offsets, self.counts = np.append(0, index[:, 0]), index[:, 1:]
        self.lengths = np.diff(self.offsets)
        file, total = path / "tokens", self.offsets[-1]
        if file.stat().st_size != 4 * total:
            raise UsageError(f"{path}: damaged; delete it, and it is built again")
        self.tokens = np.memmap(file, np.uint32, "r", shape=total) if total else np.zeros(0, np.uint32)

    def read(self, document, start=0, end=None):
        """(ids, channels) of a part of a document."""
        first, last = self.offsets[document : document + 2]
        tokens = self.tokens[first + start : last if end is None else first + end]
        return tokens & (2**SHIFT - 1), (tokens >> SHIFT).astype(np.int8)


def open_store(cache, key, source, tokenizer, strict=False):
    """The Store of a source, built if it is absent."""
    path, partial = make_dir(cache) / key, Path(cache) / f"{key}.tmp"
    while not path.is_dir():
        with _lock(partial) as locked:
            if locked:
                try:
                    if not path.is_dir():
                        build_store(partial, source, tokenizer, Report(strict))
                        os.rename(partial, path)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return Store(path)


@contextlib.contextmanager
def _lock(partial):
    """Waits for the lock on `tokens` in a directory being built; yields whether the file is still the same.

    The system releases the lock however this process ends.
    """
    partial.mkdir(exist_ok=True)
    file, locked = partial / "tokens", False
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            handle = stack.enter_context(open(file, "ab"))
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = os.path.samestat(os.stat(file), os.fstat(handle.fileno()))
        yield locked


def build_store(path, source, tokenizer, report):
    """Tokenises a source into the files of a store. The bytes do not depend on the number of processes."""
    processes = min(PROCESSES, os.cpu_count() or 1, size(source) // BYTES_PER_PROCESS)
    if processes > 1:
        results = _tokenise_in_processes(processes, source, tokenizer, report)
    else:
        items = source.items(tokenizer, report)
        results = ((done, _stored_documents(source, tokenizer, item)) for done, item in items)
    description = TextColumn("{task.description}", markup=False)
    columns = description, BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    progress, index, total = terminal.reporting(100, "percent", *columns), array("q"), 0
    with contextlib.closing(results), progress as update, open(path / "tokens", "wb") as file:
        for done, documents in results:
            for tokens in documents:
                file.write(tokens.tobytes())
                total += len(tokens)
                index.extend([total, *np.bincount(tokens >> SHIFT, minlength=INDEXED)[1:].tolist()])
            update(round(100 * done), f"tokenising {source.name}")
        file.flush()
        os.fsync(file.fileno())
    with write_whole(path / "index", "wb") as file:
        index.tofile(file)
    write_json(path / "report.json", {"counts": report, "examples": report.examples})


def _stored_documents(source, tokenizer, item):
    """The documents of an item in the form in which a store keeps them, uint32 [tokens] each."""
    return [ids | channels.astype(np.uint32) << SHIFT for ids, channels in source.documents(tokenizer, item)]


# ---- worker processes --------------------------------------------------------------------------------------


def _tokenise_in_processes(number, source, tokenizer, report):
    """Yields (share done, stored documents) of each item, in order. This process reads, workers tokenise."""
    pool = ProcessPoolExecutor(number, SPAWN, _start_worker, (source, tokenizer.file, tokenizer.chat_format))
    items, waiting, others = source.items(tokenizer, report), deque(), {*multiprocessing.active_children()}
    try:
        while True:
            for done, item in itertools.islice(items, 4 * number - len(waiting)):
                with _signals_blocked():  # this may start a process
                    waiting.append((done, pool.submit(_work, item)))
            if not waiting:
                return
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        problem = f"tokenising {source.name}: a process ended early (out of memory?); try again"
        raise UsageError(problem) from None
    finally:
        for process in {*multiprocessing.active_children()} - others:
            process.kill()  # a broken pool would send SIGTERM, which is blocked, and wait
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _signals_blocked():
    """Blocks SIGINT and SIGTERM, in processes started meanwhile for good: torchrun and terminals signal the
    whole process group, but only this process decides what to do."""
    resource_tracker.ensure_running()  # the first start would do it, and that unblocks both (Python 3.11)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


_worker = None  # in a worker process: (source, tokenizer)


def _start_worker(source, *reopen):
    """Begins a worker process, which ends with the process that started it, even if that is killed."""
    global _worker

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _worker = source, load_tokenizer(*reopen)


def _work(item):
    return _stored_documents(*_worker, item)
