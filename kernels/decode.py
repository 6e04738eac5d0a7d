"""Paged attention: the last tokens of each sequence against all its keys, which lie in pages.

The torch twin; the kernel is in decode_triton.py. Shapes: S sequences, Q queries each (their last Q tokens),
H query heads, K key/value heads, D head size, P pages of `page_size` tokens. A step reads every key and value
once, 2 K D values a token, and makes 2 H D multiply-adds with them: with H/K = 4 in bf16 that is 4 operations
a byte, where a GPU makes some 200 in the time of reading one. So it is bound by memory, and all that counts
is to read each key once, with the whole machine reading.
"""

import torch

from kernels.attention import _selected

MAX_TILE_ROWS = 128  # queries times query heads of a group that the kernel takes at once


def decode_attention_torch(q, key_pages, value_pages, block_table, lengths, window=None):
    """q [S, Q, H, D], pages [P, page_size, K, D], block_table int32 [S, max_pages], lengths int32 [S] -> [S,
    Q, H, D].

    Token j of sequence s is in page block_table[s, j // page_size], at j % page_size. `lengths` counts the
    keys, those of the Q queries included: query i is token lengths[s] - Q + i and sees the keys up to itself,
    with a window w the last w of them. A query before the first token (a sequence shorter than Q, an empty
    slot of a batch) gets zeros.
    """
    out, page_size, Q = torch.zeros_like(q), key_pages.shape[1], q.shape[1]
    for s, length in enumerate(lengths.tolist()):
        if length:
            pages = block_table[s, : -(-length // page_size)]
            keys, values = (
                x[pages].flatten(0, 1)[:length] for x in (key_pages, value_pages)
            )  # [length, K, D]
            seen = min(Q, length)
            at = torch.arange(length - seen, length, device=q.device)
            out[s, Q - seen :] = _selected(q[s, Q - seen :], keys, values, at, window)
    return out
