"""Paged attention: the last tokens of each sequence against all its keys, which are stored in pages.

The torch reference of decode_triton.py. Shapes: S sequences, Q queries each (their last Q tokens), H query
heads, K key/value heads, D head size, P pages of `page_size` tokens. A step reads every key and value once, 2
K D values a token, and makes 2 H D multiply-adds with them: 4 operations a byte for H/K = 4 in bf16, against
the 200 or so at which a GPU's arithmetic is the limit. So memory bandwidth is the limit: each key must be
read only once, by all processors together.
"""

import torch

from kernels.attention import _selected

MAX_TILE_ROWS = 128  # the largest product of queries and query heads of a group that the Triton kernel takes


def decode_attention_torch(q, key_pages, value_pages, block_table, lengths, window=None):
    """q [S, Q, H, D], pages [P, page_size, K, D], block_table int32 [S, n], lengths int32 [S] -> like q.

    Token j of sequence s is in page block_table[s, j // page_size], at j % page_size. `lengths` counts all
    keys, the queries' own included: query i is token lengths[s] - Q + i and sees the keys up to itself, with
    a window w the last w of them. A query before the first token (of a sequence shorter than Q or an empty
    slot of the batch) gets zeros.
    """
    out, page_size, Q = torch.zeros_like(q), key_pages.shape[1], q.shape[1]
    for s, length in enumerate(lengths.tolist()):
        if length:
            pages = block_table[s, : -(-length // page_size)]
            # [length, K, D]
            keys, values = (x[pages].flatten(0, 1)[:length] for x in (key_pages, value_pages))
            seen = min(Q, length)
            at = torch.arange(length - seen, length, device=q.device)
            out[s, Q - seen :] = _selected(q[s, Q - seen :], keys, values, at, window)
    return out
