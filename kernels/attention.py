"""Attention over packed documents: softmax(q k' / sqrt(D)) v, causal, each document by itself.

The torch reference of attention_triton.py. Shapes: B batch, T time, H query heads, K key/value heads (H a
multiple of K), D head size, N selected queries. A packed row holds documents one after the other; position 0
starts one. A document of n tokens costs 2 H D n^2 multiply-adds forward (q k' and p v; the causal half is
needed), the whole row 2 H D T^2. Documents in CoSER rows of 8,192 tokens average 1,600, so one document at a
time is about a fifth of the work.
"""

import torch
import torch.nn.functional as F


def attention_torch(q, k, v, positions=None, window=None, rows=None):
    """q [B, T, H, D], k and v [B, T, K, D], positions int [B, T] or None (a row is one document) -> like q.

    Query i sees keys j <= i of its own document, and with a window w only those with i - w < j. With `rows`
    (int64 [N], sorted, indices into B * T tokens) q and the result are [N, H, D]: those rows only.
    """
    B, T, K, D = k.shape
    if positions is None and rows is None:
        return _document(q, k, v, window)
    lengths = [T] * B if positions is None else document_lengths(positions)
    if rows is None:
        parts = zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True)  # each [n, heads, D]
        return torch.cat([_document(*(x[None] for x in part), window)[0] for part in parts]).view(q.shape)
    ends = torch.tensor(lengths).cumsum(0)
    counts = torch.diff(torch.searchsorted(rows, ends.to(rows.device)), prepend=rows.new_zeros(1)).tolist()
    selected = q.split(counts), rows.split(counts)
    keys_and_values = (x.flatten(0, 1).split(lengths) for x in (k, v))
    out = []
    for end, queries, own, keys, values in zip(ends.tolist(), *selected, *keys_and_values, strict=True):
        if len(queries) or not len(rows):  # without any rows too, so that k and v get (zero) gradients
            at = own - (end - len(keys))  # [n], places of the queries in their document
            out.append(_selected(queries, keys, values, at, window))
    return torch.cat(out)


def document_lengths(positions):
    """Lengths of the documents in positions int [B, T], row after row: a list that sums to B * T."""
    starts = positions == 0
    starts[:, 0] = True
    starts = starts.flatten().nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([positions.numel()])).tolist()


def _document(q, k, v, window):
    """Rows that are one document each: q [B, n, H, D] -> [B, n, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, n, D]
    n, mask = q.shape[2], None
    if window is not None and n > window:
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _selected(q, k, v, at, window=None):
    """Queries q [N, H, D] at places `at` [N] among keys k and v [n, K, D] -> [N, H, D]; zeros where no key is
    seen. The query heads of a group share one product with their key head, which is faster on a CPU.
    """
    N, H, D = q.shape
    n, K, _ = k.shape
    keys = torch.arange(n, device=q.device)
    mask = keys <= at[:, None]  # [N, n]
    if window is not None:
        mask &= keys > at[:, None] - window
    q = q.view(N, K, H // K, D).transpose(0, 1).flatten(1, 2)  # [K, N * H/K, D]
    mask = mask.repeat_interleave(H // K, dim=0)  # [N * H/K, n]
    out = F.scaled_dot_product_attention(q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], mask)[0]
    return out.view(K, N, H // K, D).transpose(0, 1).reshape(N, H, D)
