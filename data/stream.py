"""The endless stream of packed rows that training reads, from books and general data tokenised once.

    stream = Stream(["books/"], tokenizer, seq_len=8192, mix=[("general.jsonl", 0.5)])
    rows = stream.take(48)[rank::world]        # the rows of this rank, made only now
    stream.load(json.loads(saved))             # saved: json.dumps(stream.state())

Tokens lie in a cache of memory-mapped files, `cache/KEY/`: KEY is a hash of the files' bytes, the tokenizer, the settings and
the code that makes chats, so what is found there is never stale; a directory is renamed into place when it is whole. Of
processes that want the same one, the first builds it and the others wait. Any part of the cache may be deleted at any time.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from common import files, terminal
from common.files import UsageError, make_dir, read_json, write_whole
from data.channels import label
from data.chats import scene_to_chats
from data.general import read_general
from data.packing import CHANNELS, best_fit, make_row, split_long
from data.scenes import Report, data_files, read_scenes

SHIFT = 28  # a token as it is kept: its id, and above these bits its channel
INDEXED = 1 + len(
    CHANNELS
)  # numbers kept of a document: where it ends, its supervised tokens of each channel
HELD_OUT = 2**31  # a source
LONGEST_ROW = 2**24  # tokens
MOST_READINGS = 100  # of a file of general data in one epoch; more would teach it by heart
USEFUL = 0.98  # below this share of an epoch's places, the emptiest row waits for the next epoch
CODE = (
    "../tokenizer.py",
    "brackets.py",
    "channels.py",
    "chats.py",
    "general.py",
    "prompts.py",
    "scenes.py",
    "stream.py",
)


class Store:
    """Tokenised documents in the cache. offsets: int64 [documents + 1]; counts: int64 [documents, channels], supervised tokens;
    tokens: uint32 [offsets[-1]], read as they are used."""

    def __init__(self, path):
        self.report = read_json(path / "report.json")
        index = np.fromfile(path / "index", np.int64)
        index = index[: len(index) // INDEXED * INDEXED].reshape(-1, INDEXED)
        self.offsets, self.counts = np.append(0, index[:, 0]), index[:, 1:]
        self.lengths = np.diff(self.offsets)
        if (path / "tokens").stat().st_size != 4 * self.offsets[-1]:
            raise UsageError(f"{path}: damaged; remove it, and it is made anew")
        empty = not self.offsets[-1]
        self.tokens = (
            np.zeros(0, np.uint32)
            if empty
            else np.memmap(path / "tokens", np.uint32, "r", shape=self.offsets[-1])
        )

    def read(self, document, start=0, end=None):
        """(ids, channels) of a part of a document."""
        begin, stop = self.offsets[document : document + 2]
        words = self.tokens[begin + start : stop if end is None else begin + end]
        return words & (2**SHIFT - 1), (words >> SHIFT).astype(np.int8)


def open_store(cache, key, items, tokenise, what, strict):
    """The Store of a key. Where it is not there, items(report) yields (share done, item) to build it from, and tokenise(item)
    gives documents (ids, channels)."""
    path, making = make_dir(cache) / key, Path(cache) / f"{key}.tmp"
    if path.is_dir():
        return Store(path)
    with open(path.with_name(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system however this process ends
        if not path.is_dir():
            shutil.rmtree(making, ignore_errors=True)  # of a build that was killed
            making.mkdir()
            try:
                build_store(making, items, tokenise, what, Report(strict))
                os.rename(making, path)
            finally:
                shutil.rmtree(making, ignore_errors=True)
    return Store(path)


def build_store(path, items, tokenise, what, report):
    index, tokens = array("q"), 0
    begun = said = time.monotonic()
    _work.tokenise = tokenise
    # forking is not safe elsewhere: there this process does the work
    fork = multiprocessing.get_context("fork") if sys.platform == "linux" else None
    workers = fork and fork.Pool(min(16, os.cpu_count()), _start_worker)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with (
        open(path / "tokens", "wb") as file,
        terminal.progress(*columns) as bar,
        workers or contextlib.nullcontext(),
    ):
        task = bar.add_task(f"tokenising {what}", total=1.0)
        for done, documents in (
            workers.imap(_work, items(report), chunksize=8) if workers else map(_work, items(report))
        ):
            for words in documents:
                file.write(words.tobytes())
                tokens += len(words)
                index.extend([tokens, *np.bincount(words >> SHIFT, minlength=INDEXED)[1:].tolist()])
            bar.update(task, completed=done)
            if bar.disable and time.monotonic() - said > 10:
                said = time.monotonic()
                terminal.note(
                    f"tokenising {what}: {done:.0%}, {len(index) // INDEXED:,} chats in {said - begun:,.0f} s"
                )
        file.flush()
        os.fsync(file.fileno())
    with write_whole(path / "index", "wb") as file:
        index.tofile(file)
    with write_whole(path / "report.json") as file:
        json.dump({"counts": report, "examples": report.examples}, file)


def _start_worker():
    """A worker leaves signals to its parent: those that torchrun or a terminal send to a whole group of processes do not reach
    it. It holds the lock too, but where the parent dies its pipes end, and it does."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how the pool ends it


def _work(item):
    """Documents of an item as the store keeps them."""
    done, item = item
    return done, [ids | channels.astype(np.uint32) << SHIFT for ids, channels in _work.tokenise(item)]


def digest(*parts):
    """A hash of strings and of files (paths), names and bytes."""
    made = hashlib.sha256()
    for part in parts:
        made.update(f"{part.name if isinstance(part, Path) else part}\0".encode())
        if isinstance(part, Path):
            with open(part, "rb") as file:
                made.update(hashlib.file_digest(file, "sha256").digest())
    return made.hexdigest()


def parse_mix(text):
    """FILE:SHARE as --mix takes it: (path, share)."""
    path, _, share = text.rpartition(":")
    try:
        return path, float(share)
    except ValueError:
        raise UsageError(f"--mix {text}: give FILE:SHARE, for example general.jsonl:0.5") from None


def add_data_flags(parser):
    """The flags that say what is learnt from the data, for `open_stream`."""
    add = parser.add_argument
    add("--without-thoughts", action="store_true", help="the ablation: no inner thoughts in what is learnt")
    add("--variants", choices=["draw", "all"], default="draw", help="chats of a character in a scene: one, drawn anew in each "
        "epoch (the paper's), or the release's four (default: draw)")  # fmt: skip
    add("--mix", action="append", type=parse_mix, default=[], metavar="FILE:SHARE", help="general SFT data (ShareGPT or "
        "`messages`) and its share of all tokens; half in the paper")  # fmt: skip
    add(
        "--held-out-books",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the books to hold out whole (default: 0)",
    )
    add(
        "--strict",
        action="store_true",
        help="stop at the first thing that reading the data would repair or drop",
    )
    add(
        "--cache", default=files.OUT / "cache", help="directory of tokenised data; may be deleted at any time"
    )
    add("--seed", type=int, default=0)


def open_stream(args, paths, tokenizer):
    """The Stream of a command line with these flags and `--seq-len`."""
    same = {
        name: getattr(args, name) for name in ("seed", "variants", "mix", "cache", "held_out_books", "strict")
    }
    return Stream(paths, tokenizer, args.seq_len, thoughts=not args.without_thoughts, **same)


class Batch(Sequence):
    """Rows of the stream; a row is made when it is taken out, a slice is a list of made rows."""

    def __init__(self, stream, rows):
        self.stream, self.rows = stream, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self.stream.make(row) for row in self.rows[i]]
        return self.stream.make(self.rows[i])


def row_lengths(pieces):
    """Tokens of each piece (source, document, context start, context end, start, end)."""
    return pieces[..., 3] - pieces[..., 2] + pieces[..., 5] - pieces[..., 4]


class Stream:
    """Rows of epoch 0, then of epoch 1, and so on, each with its own draw of prompts and order.

    paths: books, test files, directories; their training scenes are read here, their held-out ones by `held_out`.
    variants: `draw` (one chat of a character and scene in each epoch) or `all` (the release's four, the same every epoch).
    mix: (file, share) pairs of general data, share of all tokens; each goes through its file in a shuffled order, as far as
    an epoch needs, and on from there in the next. thoughts=False: the ablation without inner thoughts. held_out_books: share
    of books that are held out whole. strict: UsageError at the first thing that reading would repair or drop.

    Where an epoch's rows are less than 98% useful, its emptiest row is not given out, and its documents are packed with those
    of the next epoch; an epoch of one row is given out as it is.

    Of the present epoch: `documents`, `tokens`, `supervised` ({channel: tokens}), `rows`, `cut` (documents longer than a row),
    `without` (pieces of them without a token under loss, left out). `report`: what reading found.
    """

    def __init__(
        self,
        paths,
        tokenizer,
        seq_len,
        seed=0,
        thoughts=True,
        variants="draw",
        mix=(),
        cache=files.OUT / "cache",
        held_out_books=0.0,
        strict=False,
    ):
        if not 0 <= held_out_books <= 1:
            raise UsageError(f"--held-out-books is a share between 0 and 1, not {held_out_books}")
        if not 2 <= seq_len <= LONGEST_ROW:
            raise UsageError(
                f"--seq-len is a number of tokens between 2 and {LONGEST_ROW:,}, not {seq_len:,}"
            )
        self.files = data_files(paths)
        self.tokenizer, self.seq_len, self.seed, self.cache, self.strict = (
            tokenizer,
            seq_len,
            seed,
            cache,
            strict,
        )
        self.options, self.held_out_books = (
            {"seed": seed, "thoughts": thoughts, "variants": variants},
            held_out_books,
        )
        self.mix, self.shares = [Path(path) for path, _ in mix], [share for _, share in mix]
        if not (all(share > 0 for share in self.shares) and sum(self.shares) < 1):
            raise UsageError(
                f"--mix: shares are above 0 and together below 1, not {', '.join(map(str, self.shares))}"
            )
        here = Path(__file__).parent
        self.maker = digest(*(here / name for name in CODE), tokenizer.file, tokenizer.chat_format)
        self.content = digest(*self.files)
        self.identity = digest(
            self.content, *self.mix, tokenizer.file, tokenizer.chat_format
        )  # of all that is read
        self.stores = {}
        self.report = Report()
        for source in (0, *(-1 - i for i in range(len(self.mix)))):
            self.report.update(self.store(source).report["counts"])
            self.report.examples |= self.store(source).report["examples"]
            if not len(self.store(source).lengths) and source < 0:
                raise UsageError(
                    f"{mix[-1 - source][0]}: no row that the chat format {tokenizer.chat_format} has a form for"
                )
        if strict and self.report:
            what, where = next(iter(self.report.examples.items()))
            raise UsageError(f"{where}: {what} (--strict)")
        if not len(self.store(0).lengths):
            raise UsageError(f"{paths[0]}: no training scene in it (all are held out); give a book as well")
        self.begin({"epoch": 0, "carried": [], "tokens": 0, "mixed": [[0, 0] for _ in mix]})

    # ---- documents: (source, document), a source being an epoch of the scenes, or -1, -2, ... for general data ----

    def store(self, source):
        """Tokenised documents of a source."""
        if source not in self.stores:
            self.stores[source] = (
                self.general_store(self.mix[-1 - source]) if source < 0 else self.scene_store(source)
            )
        return self.stores[source]

    def general_store(self, path):
        def rows(report):
            for messages, where, done in read_general(path, report):
                try:
                    [*self.tokenizer.format.segments(messages, False)]
                except ValueError as error:
                    report.note(f"dropped: row whose turns the tokenizer has no form for ({error})", where)
                else:
                    yield done, messages

        key = digest(self.maker, path)
        return open_store(
            self.cache, key, rows, lambda row: [label(self.tokenizer, row)], path.name, self.strict
        )

    def scene_store(self, epoch, held_out=False):
        epoch = epoch if self.options["variants"] == "draw" else 0

        def scenes(report):
            for scene, done in read_scenes(self.files, report, self.held_out_books):
                if (scene.tag != "train") == held_out:
                    yield done, scene

        def tokenise(scene):
            chats = scene_to_chats(scene, epoch, **self.options)
            return [label(self.tokenizer, chat.messages, chat.character) for chat in chats]

        key = digest(
            self.maker, self.content, json.dumps([self.options, self.held_out_books, epoch, held_out])
        )
        what = "held-out scenes" if held_out else f"the scenes of epoch {epoch}"
        return open_store(self.cache, key, scenes, tokenise, what, self.strict)

    def held_out(self):
        """The rows of the held-out scenes, with the draw of epoch 0: what to evaluate on."""
        self.stores[HELD_OUT] = self.scene_store(0, held_out=True)
        pieces, *_ = self.pieces(HELD_OUT, np.arange(len(self.stores[HELD_OUT].lengths)))
        return Batch(self, [pieces[row] for row in best_fit(row_lengths(pieces), self.seq_len)])

    def pieces(self, source, documents):
        """Documents of a source as pieces, int64 [N, 6]; how many were cut; how many pieces were left out."""
        store, long, without = self.store(source), [], 0
        lengths = store.lengths[documents]
        whole = documents[lengths <= self.seq_len]
        pieces = np.zeros((len(whole), 6), np.int64)
        pieces[:, 0], pieces[:, 1], pieces[:, 5] = source, whole, store.lengths[whole]
        for document in documents[lengths > self.seq_len].tolist():
            cut, left_out = split_long(store.read(document)[1], self.seq_len)
            long += [(source, document, *piece) for piece in cut]
            without += left_out
        return (
            np.concatenate([pieces, np.array(long, np.int64).reshape(-1, 6)]),
            len(documents) - len(whole),
            without,
        )

    def make(self, row):
        """A row of pieces as tensors."""
        documents = []
        for source, document, context_start, context_end, start, end in row.tolist():
            ids, channels = self.store(source).read(document, start, end)
            if context_end > context_start:
                before, _ = self.store(source).read(document, context_start, context_end)
                ids = np.concatenate([before, ids])
                channels = np.concatenate([np.zeros(len(before), np.int8), channels])
            documents.append((ids, channels))
        return make_row(documents, self.seq_len)

    # ---- epochs ----

    def begin(self, start):
        """Packs the epoch that begins here. start: its number, the pieces carried into it, and how many tokens of scenes, and
        documents and tokens of general data, came before it."""
        self.start, self.at, epoch = start, 0, start["epoch"]
        self.chosen = {epoch: np.arange(len(self.store(epoch).lengths))}
        tokens, mixed = start["tokens"] + int(self.store(epoch).lengths.sum()), []
        for i, (taken, had) in enumerate(start["mixed"]):
            wanted = tokens * self.shares[i] / (1 - sum(self.shares)) - had
            more = self.chosen[-1 - i] = self.next_general(-1 - i, taken, wanted)
            mixed.append([taken + len(more), had + int(self.store(-1 - i).lengths[more].sum())])
        found = [self.pieces(source, documents) for source, documents in self.chosen.items()]
        pieces = np.concatenate(
            [np.array(start["carried"], np.int64).reshape(-1, 6), *(pieces for pieces, *_ in found)]
        )
        lengths = row_lengths(pieces)
        self.rows = [pieces[row] for row in best_fit(lengths, self.seq_len, f"{self.seed}|{epoch}")]
        carried = []
        if len(self.rows) > 1 and lengths.sum() < USEFUL * self.seq_len * len(self.rows):
            emptiest = min(range(len(self.rows)), key=lambda i: row_lengths(self.rows[i]).sum())
            carried = self.rows.pop(emptiest).tolist()
        self.cut, self.without = sum(cut for _, cut, _ in found), sum(without for *_, without in found)
        self.documents = sum(map(len, self.chosen.values()))
        self.tokens = sum(
            int(self.store(source).lengths[documents].sum()) for source, documents in self.chosen.items()
        )
        counts = sum(self.store(source).counts[documents].sum(0) for source, documents in self.chosen.items())
        self.supervised = dict(zip(CHANNELS, counts.tolist(), strict=True))
        self.next = {"epoch": epoch + 1, "carried": carried, "tokens": tokens, "mixed": mixed}

    def next_general(self, source, taken, wanted):
        """Numbers of the documents that come next in a file of general data, after so many, until there are enough tokens."""
        lengths, chosen = self.store(source).lengths, []
        if wanted > MOST_READINGS * lengths.sum():
            file, share = self.mix[-1 - source], self.shares[-1 - source]
            raise UsageError(
                f"--mix {file}:{share}: an epoch would read its {lengths.sum():,} tokens {wanted / lengths.sum():,.0f} times; "
                "give a larger file or a smaller share"
            )
        while wanted > 0:
            times, at = divmod(taken, len(lengths))
            order = np.random.default_rng([self.seed % 2**64, -source, times]).permutation(len(lengths))[at:]
            enough = np.searchsorted(np.cumsum(lengths[order]), wanted) + 1
            chosen.append(order[:enough])
            taken, wanted = taken + len(chosen[-1]), wanted - lengths[chosen[-1]].sum()
        return np.concatenate([np.zeros(0, np.int64), *chosen])

    def take(self, number):
        """The next rows, a Batch. Every rank takes them all and makes its share, so the order is the same on any number."""
        taken = []
        while len(taken) < number:
            if self.at == len(self.rows):
                self.begin(self.next)
            taken.append(self.rows[self.at])
            self.at += 1
        return Batch(self, taken)

    def state(self):
        """Where the stream stands, as JSON takes it."""
        return {**self.start, "at": self.at}

    def load(self, state):
        """Goes where `state()` was taken; the same files and settings are the caller's part."""
        start = {name: value for name, value in state.items() if name != "at"}
        if start != self.start:
            self.begin(start)
        self.at = state["at"]
