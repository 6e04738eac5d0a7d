"""Packs tokenised documents into rows of equal length. Packing needs only lengths; a row is made when used.

A row holds documents one after the other: `tokens`, `targets`, `positions`, int64 [seq_len] each, `channels`,
int8 [seq_len], and `used`, the number of tokens that belong to documents. Positions count from 0 in each
document; `targets[i]` is the token to predict at i, or IGNORE; `channels[i]` is the channel of that target,
or 0. Padding is a last document without targets.
"""

import random
from bisect import bisect_left, insort

import numpy as np
import torch

IGNORE = -100


def split_long(channels, seq_len):
    """Splits a document into pieces (context start, context end, start, end); also how many pieces without
    loss were left out. A piece's context is only read; from start to end the loss is as it was.

    channels: int8 [length], 0 where a token is not under loss. A piece ends after the last supervised turn
    that fits. The context is the document up to and including its first supervised turn if that takes at most
    half a row; if it takes more, or if a turn had to be cut, it is the half row just before. Every supervised
    token but the document's first is the target of exactly one piece.
    """
    supervised = channels != 0
    ends = np.flatnonzero(supervised & ~np.append(supervised[1:], False)) + 1  # of the supervised turns
    head = int(ends[0]) if len(ends) and ends[0] <= seq_len // 2 else 0
    pieces, without_loss, start, context = [], 0, 0, (0, 0)
    while start < len(channels):
        end = min(len(channels), start + seq_len - (context[1] - context[0]))
        turn_ends = ends[(start < ends) & (ends <= end)]
        if end < len(channels) and len(turn_ends):
            end = int(turn_ends[-1])
        if supervised[start:end].any():
            pieces.append((*context, start, end))
        else:
            without_loss += 1
        start = end
        context = (0, head) if head and end in ends else (max(0, end - seq_len // 2), end)
    return pieces, without_loss


def best_fit(lengths, seq_len, seed=0):
    """Best-fit decreasing: the longest document first, each into the fullest row it fits. Rows are lists of
    document numbers; the seed shuffles them and the documents within each.
    """
    rows, free = [], []  # free: sorted (free places, row number)
    for document in np.argsort(-np.asarray(lengths), kind="stable").tolist():
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
    """One row of documents (ids, channels), as described at the top; `used` is int64 []."""
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
