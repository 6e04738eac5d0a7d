"""Packs tokenised documents into rows of equal length. Packing looks at lengths only; a row is made when it
is needed.

A row holds documents one after the other: `tokens`, `targets`, `positions`, int64 [seq_len] each, `channels`,
int8 [seq_len], and `used`, the number of tokens that belong to documents. Positions count from 0 in each
document; `targets[i]` is the token to predict at i, or IGNORE; `channels[i]` is the channel of that target
(data/brackets.py), 0 where there is none. The remaining places form a last document of padding without
targets.

A document longer than a row is split into pieces (document, context start, context end, start, end): the
context is only read, the tokens from start to end are under loss where they were.
"""

import random
from bisect import bisect_left, insort

import numpy as np
import torch

IGNORE = -100


def split_long(channels, seq_len):
    """Splits a document: pieces (context start, context end, start, end), and how many pieces without loss
    were left out.

    channels: int8 [length], 0 where a token is not under loss. A piece ends after the last supervised turn
    that fits, and the next one starts with the turn behind it. Its context is the beginning of the document
    up to and including the first supervised turn (prompt, opening, one answer) if that takes at most half a
    row. If it takes more, or if a turn is too long for a row and is cut inside, the context is the half row
    just before. Every supervised token but the document's very first one is the target of exactly one piece.
    """
    supervised = channels != 0
    ends = np.flatnonzero(supervised & ~np.append(supervised[1:], False)) + 1  # of the supervised turns
    head = int(ends[0]) if len(ends) and ends[0] <= seq_len // 2 else 0
    pieces, without_loss, start, context = [], 0, 0, (0, 0)
    while start < len(channels):
        end = limit = start + seq_len - (context[1] - context[0])
        if limit >= len(channels):
            end = len(channels)
        else:
            last = np.searchsorted(ends, limit, side="right") - 1
            if last >= 0 and ends[last] > start:
                end = int(ends[last])
        if supervised[start:end].any():
            pieces.append((*context, start, end))
        else:
            without_loss += 1
        start = end
        context = (0, head) if head and end in ends else (max(0, end - seq_len // 2), end)
    return pieces, without_loss


def best_fit(lengths, seq_len, seed=0):
    """Best-fit decreasing: rows as lists of document numbers, the longest document first, each into the
    fullest row it fits.

    The seed shuffles the rows and the documents within each row. Documents are not split here.
    """
    by_length = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    rows, free = [], []  # free: sorted (free places, row number)
    for document in by_length:
        length = int(lengths[document])
        if length > seq_len:
            raise ValueError(f"document of {length} tokens in rows of {seq_len}; split_long first")
        at = bisect_left(free, (length, -1))
        if at == len(free):
            rows.append([])
            space, row = seq_len, len(rows) - 1
        else:
            space, row = free.pop(at)
        rows[row].append(document)
        if space > length:
            insort(free, (space - length, row))
    rng = random.Random(seed)
    for row in rows:
        rng.shuffle(row)
    rng.shuffle(rows)
    return rows


def make_row(documents, seq_len):
    """One row of documents (ids, channels), as described above; `used` is int64 []."""
    tokens, positions = np.zeros((2, seq_len), np.int64)
    targets, row_channels, used = np.full(seq_len, IGNORE), np.zeros(seq_len, np.int8), 0
    for ids, channels in documents:
        ids, channels, end = np.asarray(ids, np.int64), np.asarray(channels)[1:], used + len(ids)
        tokens[used:end] = ids
        positions[used:end] = np.arange(len(ids))
        targets[used : end - 1] = np.where(channels != 0, ids[1:], IGNORE)
        row_channels[used : end - 1] = channels
        used = end
    positions[used:] = np.arange(seq_len - used)  # padding
    row = {"tokens": tokens, "targets": targets, "positions": positions, "channels": row_channels}
    return {name: torch.from_numpy(value) for name, value in row.items()} | {"used": torch.tensor(used)}
