"""Keys and values: the memory they are kept in, and the attention of one forward pass over it.

All new tokens of a step lie one after the other in a single row of N, sequence by sequence. In shapes, K is
key/value heads, H query heads, D head size, S sequences.
"""

import mmap
import os
import sys

import torch
import torch.nn.functional as F

import kernels
from engine.pages import contiguous
from kernels.decode import MAX_TILE_ROWS

GPU_SHARE = 0.85  # of a GPU's free memory
CPU_SHARE, CPU_BYTES = 0.25, 2**33  # of the machine's memory, and at most 8 GiB
# memory that is taken page by page as it is written, and not counted before; Python names MAP_NORESERVE from
# 3.13 on
LAZY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
LAZY |= getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0


def allocate_cache(config, dtype, device, page_size, cache_tokens=None):
    """Memory for the keys and values of `cache_tokens` tokens, by default as many as fit: [2 layers, P,
    page_size, K, D]."""
    layers, K, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    page_bytes = 2 * layers * page_size * K * D * dtype.itemsize
    if cache_tokens is None:
        if device.type == "cuda":
            memory = torch.cuda.mem_get_info(device)[0] * GPU_SHARE
        else:
            memory = min(CPU_BYTES, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_SHARE)
        cache_tokens = int(memory // page_bytes) * page_size
    shape = 2 * layers, cache_tokens // page_size, page_size, K, D
    if device.type == "cuda":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, shape[1] * page_bytes, flags=LAZY), dtype=dtype).view(shape)


class StepCache:
    """The cache of one forward pass, for Transformer's `cache`: writes new keys and values to their pages,
    then attends.

    kv: what `allocate_cache` returned. batch: [(sequence, number of its tokens to run)], single tokens first.
    """

    def __init__(self, kv, batch, window):
        self.kv, self.window, page_size = kv, window, kv.shape[2]
        positions = [(s, position) for s, n in batch for position in range(s.cached, s.cached + n)]
        slots = [s.block_table[p // page_size] * page_size + p % page_size for s, p in positions]
        self.positions = torch.tensor([[p for _, p in positions]], device=kv.device)  # [1, N]
        self.slots = torch.tensor(slots, device=kv.device)
        self.singles = sum(n == 1 for _, n in batch)  # the first rows

    def attend(self, layer, q, k, v, window):
        """q [1, N, H, D], k and v [1, N, K, D] -> [1, N, H, D]: each query over its sequence up to itself."""
        for pages, new in zip(self.kv[2 * layer : 2 * layer + 2], (k, v), strict=True):
            pages.view(-1, *new.shape[2:]).index_copy_(0, self.slots, new[0])
        parts = self.attention(layer, q[0])
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


class ViewCache(StepCache):
    """On a CPU: PyTorch's attention, a sequence at a time, over views where its pages lie in a row, else over
    gathered pages."""

    def __init__(self, kv, batch, window):
        super().__init__(kv, batch, window)
        self.seen = [self.keys_seen(s.block_table, s.cached, s.cached + n) for s, n in batch]
        self.counts = [n for _, n in batch[self.singles :]]
        self.masks = [self.mask(s.cached, s.cached + n) for s, n in batch[self.singles :]]

    def first_seen(self, position):
        return max(0, position + 1 - self.window) if self.window else 0

    def keys_seen(self, block_table, begin, end):
        """Where the keys lie that tokens begin to end see: views for each layer's keys and values, or (pages,
        part of them)."""
        size, first = self.kv.shape[2], self.first_seen(begin)
        pages = block_table[first // size : -(-end // size)]
        start = first % size
        if contiguous(pages):
            start += pages[0] * size
            return self.kv.flatten(1, 2)[:, start : start + end - first].transpose(1, 2).unsqueeze(1).unbind()
        return torch.tensor(pages), slice(start, start + end - first)

    def mask(self, begin, end):
        """What to add to the scores of queries begin to end, [queries, seen]; None for a whole prompt
        (plainly causal)."""
        if begin == 0 and not (self.window and end > self.window):
            return None
        query, key = torch.arange(begin, end)[:, None], torch.arange(self.first_seen(begin), end)
        hidden = (key > query) | (key <= query - (self.window or end))
        return torch.zeros(hidden.shape, dtype=self.kv.dtype).masked_fill_(hidden, -torch.inf)

    def read(self, layer, seen):
        """Keys and values, [1, K, seen, D] each."""
        if not isinstance(seen[1], slice):
            return seen[2 * layer : 2 * layer + 2]
        pages, part = seen
        gathered = (self.kv[2 * layer + i].index_select(0, pages).flatten(0, 1)[part] for i in range(2))
        return [x.transpose(0, 1)[None] for x in gathered]

    def attention(self, layer, q):
        parts, key_heads = [], self.kv.shape[3]
        if self.singles:  # the query heads that share a key head become rows of one product
            folded = q[: self.singles].unflatten(1, (key_heads, -1)).unsqueeze(1).unbind()  # [1, K, H/K, D]
            seen = self.seen[: self.singles]
            single = [
                F.scaled_dot_product_attention(x, *self.read(layer, keys))
                for x, keys in zip(folded, seen, strict=True)
            ]
            parts.append(torch.cat(single).flatten(1, 2))
        several = zip(
            q[self.singles :].split(self.counts), self.seen[self.singles :], self.masks, strict=True
        )
        for x, seen, mask in several:  # x [n, H, D]
            attended = F.scaled_dot_product_attention(
                x.transpose(0, 1)[None],
                *self.read(layer, seen),
                mask,
                is_causal=mask is None,
                enable_gqa=x.shape[1] != key_heads,
            )
            parts.append(attended[0].transpose(0, 1))
        return parts


class TableCache(StepCache):
    """On a GPU: a call of the paged kernel for all single tokens, one for all prompts, which are cut into
    blocks of queries."""

    def __init__(self, kv, batch, window, query_heads):
        super().__init__(kv, batch, window)
        self.query_heads = query_heads
        self.decode = self.prefill = None
        if self.singles:
            self.decode = self.tables(batch[: self.singles], [s.cached + 1 for s, _ in batch[: self.singles]])
        if self.singles < len(batch):
            self.prefill = self.blocks(batch[self.singles :])

    def tables(self, batch, ends, owners=None):
        """(block table int32 [S, pages], the ends as lengths int32 [S]); owners: the sequence of each end."""
        widest = max(len(s.block_table) for s, _ in batch)
        table = [s.block_table + [0] * (widest - len(s.block_table)) for s, _ in batch]
        table, ends = (torch.tensor(x, dtype=torch.int32, device=self.kv.device) for x in (table, ends))
        return table if owners is None else table[owners], ends

    def blocks(self, batch):
        """Prompts cut into blocks of Q queries: rows of q int64 [S, Q], where the results lie in S * Q,
        tables and lengths.

        Of a chunk's last block, which may have fewer queries, the places before the first are padded with
        some row.
        """
        group = self.query_heads // self.kv.shape[3]
        size = max(1, min(MAX_TILE_ROWS // group, max(n for _, n in batch)))
        rows, places, ends, owners, row = [], [], [], [], self.singles
        for owner, (sequence, count) in enumerate(batch):
            for begin in range(0, count, size):
                end = min(begin + size, count)
                places += range((len(ends) + 1) * size - (end - begin), (len(ends) + 1) * size)
                rows.append([row + max(begin, i) for i in range(end - size, end)])
                ends.append(sequence.cached + end)
                owners.append(owner)
            row += count
        rows, places = (torch.tensor(x, device=self.kv.device) for x in (rows, places))
        return rows, places, *self.tables(batch, ends, owners)

    def attention(self, layer, q):
        keys, values = self.kv[2 * layer : 2 * layer + 2]
        parts = []
        if self.decode:
            single = q[: self.singles, None]  # [S, 1, H, D]
            parts.append(kernels.decode_attention(single, keys, values, *self.decode, self.window)[:, 0])
        if self.prefill:
            rows, places, *tables = self.prefill
            blocks = kernels.decode_attention(q[rows], keys, values, *tables, self.window)  # [S, Q, H, D]
            parts.append(blocks.flatten(0, 1)[places])
        return parts
