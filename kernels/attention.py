"""Attention over packed documents: softmax(q k' / sqrt(D)) v, causal, each document by itself.

The torch twin. Shapes: B batch, T time, H query heads, K key/value heads (H a multiple of K), D head size; a packed row
holds documents one after the other, and a position of 0 starts one. A document of n tokens costs 2 H D n^2 multiply-adds
forward (q k' and p v, of which the causal half is needed), against 2 H D T^2 for the row: documents in CoSER rows of 8,192
tokens average 1,600, so going document by document leaves about a fifth of the work.
"""

import torch
import torch.nn.functional as F


def attention_torch(q, k, v, positions=None, window=None):
    """q [B, T, H, D], k and v [B, T, K, D], positions int [B, T] or None (each row is one document) -> [B, T, H, D].

    Query i sees keys j <= i of its own document, and with a window w only those with i - w < j.
    """
    B, T, H, D = q.shape
    if positions is None:
        return _causal(q, k, v, window)
    lengths = document_lengths(positions)
    parts = zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True)  # each [n, heads, D]
    out = [_causal(*(x[None] for x in part), window)[0] for part in parts]
    return torch.cat(out).view(B, T, H, D)


def document_lengths(positions):
    """Lengths of the documents of positions int [B, T], rows one after the other: a list that sums to B * T."""
    starts = positions == 0
    starts[:, 0] = True
    starts = starts.flatten().nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([positions.numel()])).tolist()


def _causal(q, k, v, window):
    """One document a row: q [B, n, H, D] -> [B, n, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, n, D]
    n, mask = q.shape[2], None
    if window is not None and n > window:
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)
