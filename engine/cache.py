"""Keys and values of one forward pass: written to pages, attended over."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import kernels
from engine.pages import in_one_piece


@dataclass
class Span:
    """The queries of one sequence in a step: their rows of q, and the keys that any of them sees."""

    rows: slice
    pages: torch.Tensor | list  # int64, where these keys are; nobody asks for it where there are views
    seen: slice  # of the tokens of those pages
    views: (
        tuple | None
    )  # keys and values of every layer in turn, [1, K, seen, D] each, where they lie in one piece
    mask: (
        torch.Tensor | None
    )  # [queries, seen], for several queries: bool, or what is to be added to the scores


class StepCache:
    """The cache of one forward pass: writes the new keys and values to their pages, and attends over all there are.

    batch: (sequence, tokens of it) in the order of the row: single tokens, then whole prompts, then parts of prompts and tokens
    with a draft behind them. wanted: of each, the tokens (from, to) whose logits are wanted.
    """

    def __init__(self, engine, batch, wanted):
        self.kv, self.device, self.window = engine.kv, engine.device, engine.config.sliding_window
        self.size, self.kernel = engine.blocks.page_size, engine.kernel
        new = [(s, p) for s, n in batch for p in range(s.cached, s.cached + n)]
        places = [(p, s.block_table[p // self.size] * self.size + p % self.size) for s, p in new]
        self.positions, self.slots = torch.tensor(places, device=self.device).T.contiguous()
        self.positions = self.positions[None]  # [1, N]
        every = [(s, s.cached, s.cached + n) for s, n in batch]
        last = [(s, *tokens) for (s, _), tokens in zip(batch, wanted, strict=True)]
        self.everything = self.plan(every)
        self.last = (
            self.everything
            if last == every and all(end - begin == 1 for _, begin, end in every)
            else self.plan(last, last=True)
        )

    def plan(self, queries, last=False):
        """What to attend with: (single queries, rows of whole prompts, spans of several queries)."""
        row, singles, rest, fresh = 0, [], [], None
        for sequence, begin, end in queries:
            rows, row = slice(row, row + end - begin), row + end - begin
            if end - begin == 1:
                singles.append((sequence, rows, begin, end))
            elif begin == 0 and not last:
                fresh = slice(fresh.start if fresh else rows.start, rows.stop)
            elif end > begin:
                rest.append(self.span(sequence, rows, begin, end))
        return self.single(singles, row), fresh, rest

    def span(self, sequence, rows, begin, end):
        size, window, views, mask = self.size, self.window, None, None
        first = max(0, begin + 1 - window) if window else 0  # no query sees further back
        pages = sequence.block_table[first // size : -(-end // size)]
        seen = slice(first % size, first % size + end - first)
        if not self.kernel and in_one_piece(pages):
            start = pages[0] * size + first % size
            views = (
                self.kv.flatten(1, 2)[:, start : start + end - first].transpose(1, 2).unsqueeze(1).unbind()
            )
        else:
            pages = torch.tensor(pages, device=self.device)
        if end - begin > 1:
            at, keys = (torch.arange(*ends, device=self.device) for ends in ((begin, end), (first, end)))
            mask = (keys <= at[:, None]) & (keys > at[:, None] - (window or end))
            if not self.kernel:  # a CPU adds a mask, and would make this one of the other in every layer
                mask = torch.zeros(mask.shape, dtype=self.kv.dtype).masked_fill_(~mask, -torch.inf)
        return Span(rows, pages, seen, views, mask)

    def single(self, singles, rows):
        """One query each: their rows, and a Span each, or a block table and lengths for the kernel."""
        if not singles:
            return None
        index = None  # all of them
        if len(singles) < rows:
            places = [rows.start for _, rows, _, _ in singles]
            index = slice(places[0], places[-1] + 1)  # single tokens are the row's beginning
            if index.stop - index.start > len(places):
                index = torch.tensor(places, device=self.device)
        if not self.kernel:
            return index, [self.span(*single) for single in singles], None
        widest = max(len(sequence.block_table) for sequence, *_ in singles)
        table = [s.block_table + [0] * (widest - len(s.block_table)) for s, *_ in singles]
        lengths = [end for *_, end in singles]
        return index, *(torch.tensor(x, dtype=torch.int32, device=self.device) for x in (table, lengths))

    def attend(self, layer, q, k, v, window, rows):
        """q [1, N, H, D], or [rows, H, D] with rows; k and v [1, N, K, D] -> as q."""
        keys, values = self.kv[2 * layer : 2 * layer + 2]  # [P, page_size, K, D]
        for pages, new in ((keys, k), (values, v)):
            pages.view(-1, *k.shape[2:]).index_copy_(0, self.slots, new[0])
        singles, fresh, rest = self.everything if rows is None else self.last
        queries = q.flatten(0, -3)  # [N, H, D]
        if singles:
            index, table, lengths = singles
            asking = queries if index is None else queries[index]
            if lengths is None:  # a product for each key head: the heads of a group are folded into rows
                folded = asking.view(
                    len(asking), 1, k.shape[2], -1, k.shape[3]
                ).unbind()  # [1, K, H / K, D] each
                parts = [
                    F.scaled_dot_product_attention(x, *self.seen(layer, s))
                    for x, s in zip(folded, table, strict=True)
                ]
                attended = torch.cat(parts)
            else:
                attended = kernels.decode_attention(asking[:, None], keys, values, table, lengths, window)
            if index is None:
                return attended.view_as(q)
        out = torch.empty_like(queries)
        if singles:
            out[index] = attended.view_as(asking)
        if fresh:
            parts = (x[:, fresh] for x in (q, k, v, self.positions))
            out[fresh] = kernels.attention(*parts, window)[0]
        for span in rest:
            x, grouped = queries[span.rows].transpose(0, 1)[None], q.shape[-2] != k.shape[2]  # [1, H, n, D]
            attended = F.scaled_dot_product_attention(
                x, *self.seen(layer, span), span.mask, enable_gqa=grouped
            )
            out[span.rows] = attended[0].transpose(0, 1)
        return out.view_as(q)

    def seen(self, layer, span):
        """Keys and values of a layer for a span, [1, K, seen, D]: as they lie, or gathered from the pages."""
        if span.views:
            return span.views[2 * layer : 2 * layer + 2]
        pages = (
            self.kv[2 * layer + i].index_select(0, span.pages) for i in range(2)
        )  # [pages, page_size, K, D]
        return [x.flatten(0, 1)[span.seen].transpose(0, 1)[None] for x in pages]
