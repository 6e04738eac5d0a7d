"""Packs rendered chats into rows of equal length.

A row is `{tokens, targets, positions}`, int64 [seq_len] each, and `used`: documents one after the other, `positions` counting
from 0 in each, `targets[i]` the token to be predicted at i or IGNORE. The first `used` tokens are theirs; what is left of a row
is a document of padding without targets.
"""

import random
from bisect import bisect_left, insort

import torch

IGNORE = -100


def split_long(documents, seq_len):
    """Documents (ids, mask) of at most seq_len tokens: a longer one is cut into pieces, each a document of its own.

    Returns (documents, how many were cut). A piece without a token under loss, such as the first of a long prompt, is left out,
    since it would teach nothing; nothing else is lost but the prediction of each later piece's first token.
    """
    pieces, cut = [], 0
    for ids, mask in documents:
        if len(ids) <= seq_len:
            pieces.append((ids, mask))
            continue
        cut += 1
        starts = range(0, len(ids), seq_len)
        pieces += [(ids[i : i + seq_len], mask[i : i + seq_len]) for i in starts if any(mask[i + 1 : i + seq_len])]
    return pieces, cut


def pack(documents, seq_len, seed=0):
    """Rows of documents (ids, mask), best fit: longest first, each into the fullest row that still takes it.

    The order of rows, and of documents in a row, is shuffled by the seed. No document is split here.
    """
    by_length = sorted(range(len(documents)), key=lambda i: (-len(documents[i][0]), i))
    rows, space = [], []  # space: sorted (room left, row number)
    for i in by_length:
        length = len(documents[i][0])
        if length > seq_len:
            raise ValueError(f"document of {length} tokens in rows of {seq_len}; split_long first")
        at = bisect_left(space, (length, -1))
        if at == len(space):
            rows.append([])
            room, row = seq_len, len(rows) - 1
        else:
            room, row = space.pop(at)
        rows[row].append(i)
        insort(space, (room - length, row))
    rng = random.Random(seed)
    for row in rows:
        rng.shuffle(row)
    rng.shuffle(rows)
    return [make_row([documents[i] for i in row], seq_len) for row in rows]


def make_row(documents, seq_len):
    """One row as tensors, int64: `used` [], the others [seq_len]."""
    tokens, targets, positions = [], [], []
    for ids, mask in documents:
        tokens += ids
        targets += [token if own else IGNORE for token, own in zip(ids[1:], mask[1:], strict=True)] + [IGNORE]
        positions += range(len(ids))
    padding = seq_len - len(tokens)
    tokens += [0] * padding
    targets += [IGNORE] * padding
    positions += range(padding)
    row = {"tokens": tokens, "targets": targets, "positions": positions, "used": seq_len - padding}
    return {name: torch.tensor(value) for name, value in row.items()}
