"""The endless stream of packed rows that training reads.

    stream = Stream(["books/"], tokenizer, seq_len=8192, mix=[("general.jsonl", 0.5)])
    rows = stream.take(48)[rank::world]        # the rows of this rank, made only now
    stream.load(json.loads(saved))             # saved: json.dumps(stream.state())

Documents come from the cache of tokenised data (data/store.py).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import files
from common.files import UsageError
from data.brackets import CHANNELS
from data.packing import best_fit, make_row, split_long
from data.records import Report
from data.scenes import data_files
from data.store import CODE, GeneralSource, SceneSource, digest, open_store

HELD_OUT = 2**31  # the number of the held-out scenes as a source
LONGEST_ROW = 2**24  # tokens
MOST_READINGS = 100  # of a general file in one epoch; more would be memorised
USEFUL = 0.98  # if less of an epoch's rows is filled, the emptiest row is carried into the next epoch


def parse_mix(text):
    """(path, share) of a FILE:SHARE, as --mix takes it."""
    path, _, share = text.rpartition(":")
    try:
        return path, float(share)
    except ValueError:
        raise UsageError(f"--mix {text}: give FILE:SHARE, for example general.jsonl:0.5") from None


def add_data_flags(parser):
    """Adds the flags that `open_stream` reads, except --seq-len."""
    add = parser.add_argument
    add("--without-thoughts", action="store_true", help="train without inner thoughts (the paper's ablation)")
    text = "chats a character and scene: one, drawn each epoch (default; the paper's), or the release's four"
    add("--variants", choices=["draw", "all"], default="draw", help=text)
    text = "general SFT data (ShareGPT or `messages`) and its share of all tokens; half in the paper"
    add("--mix", action="append", type=parse_mix, default=[], metavar="FILE:SHARE", help=text)
    text = "share of whole books to hold out (default: 0)"
    add("--held-out-books", type=float, default=0.0, metavar="SHARE", help=text)
    add("--strict", action="store_true", help="stop at the first data that would be repaired or dropped")
    text = "directory of tokenised data (default: out/cache); may be deleted at any time"
    add("--cache", default=files.OUT / "cache", help=text)
    add("--seed", type=int, default=0, help="of all random draws (default: 0)")


def open_stream(args, paths, tokenizer, training=True):
    """The Stream of a command line."""
    names = ("seed", "variants", "mix", "cache", "held_out_books", "strict")
    options = {name: getattr(args, name) for name in names} | {"training": training}
    return Stream(paths, tokenizer, args.seq_len, thoughts=not args.without_thoughts, **options)


class Batch(Sequence):
    """Rows of a stream. A row is made when it is indexed; a slice is a list of made rows."""

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
    """The rows of epoch 0, then of epoch 1, and so on, each with its own draw of prompts and its own order.

    paths: books, test files, directories. Of general data (`mix`: (file, share of all tokens) pairs) an epoch
    reads as much as it needs, shuffled, and the next epoch goes on from there. The other options are those of
    `add_data_flags`. Training scenes are read here, held-out ones by `held_out`; these alone if not
    `training`.

    If less than 98% of an epoch's rows is filled, the documents of the emptiest row are packed with those of
    the next epoch instead. An epoch of a single row is used as it is.

    Of the current epoch: `documents`, `tokens`, `supervised` ({channel: tokens}), `rows`, `cut` (documents
    longer than a row), `without` (pieces left out, having no token under loss). `report`: what reading
    repaired and dropped. Documents have a source and a number; a source is an epoch of the scenes, HELD_OUT,
    or -1, -2, ... for the files of general data.
    """

    def __init__(
        self, paths, tokenizer, seq_len, seed=0, thoughts=True, variants="draw", mix=(),
        cache=files.OUT / "cache", held_out_books=0.0, strict=False, training=True,
    ):  # fmt: skip
        if not 0 <= held_out_books <= 1:
            raise UsageError(f"--held-out-books is a share from 0 to 1, not {held_out_books}")
        if not 2 <= seq_len <= LONGEST_ROW:
            raise UsageError(f"--seq-len is a number of tokens from 2 to {LONGEST_ROW:,}, not {seq_len:,}")
        self.mix, self.shares = [Path(path) for path, _ in mix], [share for _, share in mix]
        if not (all(share > 0 for share in self.shares) and sum(self.shares) < 1):
            shares = ", ".join(map(str, self.shares))
            raise UsageError(f"--mix: shares must be above 0 and together below 1, not {shares}")
        if missing := next((path for path in self.mix if not path.is_file()), None):
            raise UsageError(f"{missing}: no such file")
        self.files, self.held_out_books = data_files(paths), held_out_books
        self.tokenizer, self.seq_len, self.seed = tokenizer, seq_len, seed
        self.cache, self.strict = cache, strict
        self.options = {"seed": seed, "thoughts": thoughts, "variants": variants}
        self.maker = digest(*CODE, tokenizer.file, tokenizer.chat_format)
        self.content = digest(*self.files)
        # of all that is read, whatever the code
        self.identity = digest(self.content, *self.mix, tokenizer.file, tokenizer.chat_format)
        self.stores, self.report = {}, Report()
        if not training:
            return
        for source in range(0, -1 - len(mix), -1):
            store = self.store(source)
            self.report.update(store.report["counts"])
            self.report.examples |= store.report["examples"]
            if source < 0 and not len(store.lengths):
                problem = f"the chat format {tokenizer.chat_format} cannot express any of its rows"
                raise UsageError(f"{self.mix[-1 - source]}: {problem}")
        if strict and self.report:
            what, where = next(iter(self.report.examples.items()))
            raise UsageError(f"{where}: {what} (--strict stops here)")
        if not len(self.store(0).lengths):
            raise UsageError(f"{paths[0]}: no training scene in it (all are held out); give a book as well")
        self.begin({"epoch": 0, "carried": [], "tokens": 0, "mixed": [[0, 0] for _ in mix]})

    # ---- documents ----

    def source(self, number):
        """(key in the cache, what to tokenise) of a source."""
        if number < 0:
            path = self.mix[-1 - number]
            return digest(self.maker, path), GeneralSource([path])
        held_out = number == HELD_OUT
        epoch = 0 if held_out or self.options["variants"] == "all" else number
        settings = json.dumps([self.options, self.held_out_books, epoch, held_out])
        scenes = SceneSource(self.files, epoch, held_out, self.held_out_books, self.options)
        return digest(self.maker, self.content, settings), scenes

    def store(self, source):
        """The tokenised documents of a source."""
        if source not in self.stores:
            self.stores[source] = open_store(self.cache, *self.source(source), self.tokenizer, self.strict)
        return self.stores[source]

    def held_out(self):
        """The rows of the held-out scenes, with the draw of epoch 0: what to evaluate on."""
        pieces, *_ = self.pieces(HELD_OUT, np.arange(len(self.store(HELD_OUT).lengths)))
        return Batch(self, [pieces[row] for row in best_fit(row_lengths(pieces), self.seq_len)])

    def pieces(self, source, documents):
        """(documents as pieces, int64 [N, 6]; how many were cut; how many pieces were left out)."""
        store, split, without = self.store(source), [], 0
        lengths = store.lengths[documents]
        whole = documents[lengths <= self.seq_len]
        pieces = np.zeros((len(whole), 6), np.int64)
        pieces[:, 0], pieces[:, 1], pieces[:, 5] = source, whole, store.lengths[whole]
        for document in documents[lengths > self.seq_len].tolist():
            found, left_out = split_long(store.read(document)[1], self.seq_len)
            split += [(source, document, *piece) for piece in found]
            without += left_out
        pieces = np.concatenate([pieces, np.array(split, np.int64).reshape(-1, 6)])
        return pieces, len(documents) - len(whole), without

    def make(self, row):
        """A row of pieces as tensors."""
        documents = []
        for source, document, context_start, context_end, start, end in row.tolist():
            context, unlearnt = self.store(source).read(document, context_start, context_end)
            ids, channels = self.store(source).read(document, start, end)
            documents.append((np.append(context, ids), np.append(np.zeros_like(unlearnt), channels)))
        return make_row(documents, self.seq_len)

    # ---- epochs ----

    def begin(self, start):
        """Chooses and packs the documents of an epoch.

        start: its number, the pieces carried into it, and what was read before it: tokens of scenes, and
        (documents, tokens) of each general file.
        """
        self.start, self.at, epoch = start, 0, start["epoch"]
        self.chosen = {epoch: np.arange(len(self.store(epoch).lengths))}
        tokens, mixed = start["tokens"] + int(self.store(epoch).lengths.sum()), []
        for i, (documents_before, tokens_before) in enumerate(start["mixed"]):
            source = -1 - i
            wanted = tokens * self.shares[i] / (1 - sum(self.shares)) - tokens_before
            chosen = self.chosen[source] = self.next_general(source, documents_before, wanted)
            taken = int(self.store(source).lengths[chosen].sum())
            mixed.append([documents_before + len(chosen), tokens_before + taken])
        pieces = [np.array(start["carried"], np.int64).reshape(-1, 6)]
        self.documents = self.tokens = self.cut = self.without = supervised = 0
        for source, documents in self.chosen.items():
            found, cut, without = self.pieces(source, documents)
            pieces.append(found)
            self.cut += cut
            self.without += without
            self.documents += len(documents)
            self.tokens += int(self.store(source).lengths[documents].sum())
            supervised += self.store(source).counts[documents].sum(0)
        self.supervised = dict(zip(CHANNELS, supervised.tolist(), strict=True))
        carried = self.pack(np.concatenate(pieces), f"{self.seed}|{epoch}")
        self.next = {"epoch": epoch + 1, "carried": carried, "tokens": tokens, "mixed": mixed}

    def pack(self, pieces, seed):
        """Sets `rows`; returns the pieces that are carried into the next epoch, as lists."""
        lengths = row_lengths(pieces)
        self.rows = [pieces[row] for row in best_fit(lengths, self.seq_len, seed)]
        if len(self.rows) == 1 or lengths.sum() >= USEFUL * self.seq_len * len(self.rows):
            return []
        emptiest = min(range(len(self.rows)), key=lambda i: row_lengths(self.rows[i]).sum())
        return self.rows.pop(emptiest).tolist()

    def next_general(self, source, taken, wanted):
        """The next documents of a general file, after `taken` ones, with at least `wanted` tokens."""
        lengths, chosen = self.store(source).lengths, []
        if wanted > MOST_READINGS * lengths.sum():
            file, share = self.mix[-1 - source], self.shares[-1 - source]
            raise UsageError(
                f"--mix {file}:{share}: an epoch would read its {lengths.sum():,} tokens "
                f"{wanted / lengths.sum():,.0f} times; give a larger file or a smaller share"
            )
        while wanted > 0:
            times, at = divmod(taken, len(lengths))
            order = np.random.default_rng([self.seed % 2**64, -source, times]).permutation(len(lengths))[at:]
            enough = np.searchsorted(np.cumsum(lengths[order]), wanted) + 1
            chosen.append(order[:enough])
            taken, wanted = taken + len(chosen[-1]), wanted - lengths[chosen[-1]].sum()
        return np.concatenate([np.zeros(0, np.int64), *chosen])

    def take(self, number):
        """The next rows, a Batch. Every rank takes all and makes its share, so their order is the same."""
        taken = []
        while len(taken) < number:
            if self.at == len(self.rows):
                self.begin(self.next)
            taken.append(self.rows[self.at])
            self.at += 1
        return Batch(self, taken)

    def state(self):
        """Where the stream is, as JSON takes it."""
        return {**self.start, "at": self.at}

    def load(self, state):
        """Goes to where `state()` was taken. That the files and settings are the same is up to the caller."""
        start = {name: value for name, value in state.items() if name != "at"}
        if start != self.start:
            self.begin(start)
        self.at = state["at"]
