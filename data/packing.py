"""Packs tokenised chats into rows of equal length, on their lengths alone; a row is made when it is asked for.

A row is `{tokens, targets, positions}`, int64 [seq_len] each, `channels`, int8 [seq_len], and `used`: documents one after the
other, `positions` counting from 0 in each, `targets[i]` the token to be predicted at i or IGNORE, `channels[i]` what kind of
token that is (CHANNELS, counted from 1; 0 where none). The first `used` tokens are theirs; what is left of a row is a document
of padding without targets.

A document longer than a row is cut into pieces (doc, context start, context end, start, end): the tokens of the context are
read only, those from start to end are under loss where they were.
"""

import random
from bisect import bisect_left, insort

import numpy as np
import torch

IGNORE = -100
CHANNELS = ("speech", "action", "thought", "general")  # 1, 2, 3, 4 in a row's `channels`


def split_long(channels, seq_len):
    """Pieces (context start, context end, start, end) of a document longer than a row, and how many were left out.

    channels: int8 [length], 0 where a token is not under loss. A piece ends after the last supervised turn that it has room
    for, and the next begins with the turn behind it; there the context is the document's beginning up to and with its first
    supervised turn (prompt, opening, one answer), if that takes no more than half a row. Where it takes more, or a turn is too
    long and is cut inside, the context is the half row just before. A piece without a token under loss teaches nothing: it is
    left out. So every supervised token but a document's very first is the target of one piece.
    """
    learnt = channels != 0
    ends = np.flatnonzero(learnt & ~np.append(learnt[1:], False)) + 1  # where supervised turns end
    head = ends[0] if len(ends) and ends[0] <= seq_len // 2 else 0
    pieces, without, start, context = [], 0, 0, (0, 0)
    while start < len(channels):
        limit = start + seq_len - (context[1] - context[0])
        if limit >= len(channels):
            end = limit = len(channels)
        else:
            at = np.searchsorted(ends, limit, side="right") - 1
            end = int(ends[at]) if at >= 0 and ends[at] > start else limit
        if learnt[start:end].any():
            pieces.append((*context, start, end))
        else:
            without += 1
        start = end
        between = bool(head) and (end in ends)
        context = (0, int(head)) if between else (max(0, end - seq_len // 2), end)
    return pieces, without


def best_fit(lengths, seq_len, seed=0):
    """Rows as lists of document numbers, best fit: longest first, each into the fullest row that still takes it.

    The order of rows, and of documents in a row, is shuffled by the seed. No document is split here.
    """
    by_length = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    rows, space = [], []  # space: sorted (room left, row number)
    for i in by_length:
        length = int(lengths[i])
        if length > seq_len:
            raise ValueError(f"document of {length} tokens in rows of {seq_len}; split_long first")
        at = bisect_left(space, (length, -1))
        if at == len(space):
            rows.append([])
            room, row = seq_len, len(rows) - 1
        else:
            room, row = space.pop(at)
        rows[row].append(i)
        if room > length:
            insort(space, (room - length, row))
    rng = random.Random(seed)
    for row in rows:
        rng.shuffle(row)
    rng.shuffle(rows)
    return rows


def pack(documents, seq_len, seed=0):
    """Rows, made, of documents (ids, channels) or (ids, mask) that are no longer than a row."""
    rows = best_fit([len(ids) for ids, _ in documents], seq_len, seed)
    return [make_row([documents[i] for i in row], seq_len) for row in rows]


def make_row(documents, seq_len):
    """One row of documents (ids, channels), sequences of ints; `used` is int64 []."""
    row = {
        "tokens": np.zeros(seq_len, np.int64),
        "targets": np.full(seq_len, IGNORE),
        "positions": np.zeros(seq_len, np.int64),
    }
    row["channels"], used = np.zeros(seq_len, np.int8), 0
    for ids, channels in documents:
        ids, learnt, end = np.asarray(ids, np.int64), np.asarray(channels)[1:], used + len(ids)
        row["tokens"][used:end] = ids
        row["targets"][used : end - 1] = np.where(learnt != 0, ids[1:], IGNORE)
        row["channels"][used : end - 1] = learnt
        row["positions"][used:end] = np.arange(len(ids))
        used = end
    row["positions"][used:] = np.arange(seq_len - used)  # padding
    return {name: torch.from_numpy(value) for name, value in row.items()} | {"used": torch.tensor(used)}
