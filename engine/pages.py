"""The pages of the engine's cache: which holds what, who holds it, and where a chat can lie in one piece."""

import hashlib

import numpy as np

BLANK, RESERVED, USED = range(
    3
)  # of a page: nothing to lose; the same, but room for the sequence before it; held or known


class BlockManager:
    """Which page holds what, and who holds the page.

    A page is known by the digest of all tokens before it and by its own tokens, which may be fewer than fit. Pages given back
    join the end of `free`, of each sequence the last page first: the oldest is reused first, and what follows it before it.
    """

    def __init__(self, num_pages, page_size):
        self.num_pages, self.page_size = num_pages, page_size
        self.state = np.full(num_pages, BLANK, np.int8)
        self.held = {}  # page -> by how many sequences
        self.free = {}  # known pages that nobody holds, in the order in which they will be reused
        self.known = {}  # page -> (digest of what is before it, its tokens, digest with them)
        self.following = {}  # digest -> {page: its tokens} of the pages that are known to follow
        self.full = {}  # digest of all tokens up to the end of a full page -> {page: None}

    def available(self):
        return self.num_pages - len(self.held)

    def continues(self, page, n):
        """Whether a sequence that ends with this page can have the n after it."""
        after = self.state[page + 1 : page + 1 + n]
        return len(after) == n and not (after == USED).any()

    def gap(self, n, begin=0, end=None):
        """The first of n blank pages in a row, the lowest such among pages begin to end; None where there are none."""
        blank = self.state[begin:end] == BLANK
        runs = np.flatnonzero(np.diff(blank, prepend=False, append=False)).reshape(
            -1, 2
        )  # where each begins and ends
        fits = runs[runs[:, 1] - runs[:, 0] >= n, 0]
        return begin + int(fits[0]) if len(fits) else None

    def take(self, n, after=None, rooms=()):
        """n pages to write to: those after a page if they have nothing to lose, so that a sequence lies in one piece; else a
        gap with the first of these rooms to grow into that can be had; else what is blank or oldest. Without rooms no more
        is forgotten than is needed; with them up to n pages more, to lie in one piece."""
        start = after + 1 if after is not None and self.continues(after, n) else None
        if start is None:
            for room in rooms:
                if start is None and (start := self.gap(n + room)) is not None:
                    self.state[start : start + n + room] = RESERVED
            if start is None and (start := self.gap(n)) is None:
                self.state[self.state == RESERVED] = BLANK
                start = self.gap(n)
            for page in (
                [*self.free][: max(0, n * (1 + bool(rooms)) - (self.state == BLANK).sum())]
                if start is None
                else ()
            ):
                self.forget(page)
                if (start := self.gap(n, max(0, page - n + 1), page + n)) is not None:
                    break
        pages = (
            np.flatnonzero(self.state == BLANK)[:n].tolist() if start is None else [*range(start, start + n)]
        )
        self.hold(pages)
        return pages

    def hold(self, pages):
        for page in pages:
            self.free.pop(page, None)
            self.held[page] = self.held.get(page, 0) + 1
        self.state[pages] = USED

    def release(self, pages):
        for page in reversed(pages):
            self.held[page] -= 1
            if not self.held[page]:
                del self.held[page]
                if page in self.known:
                    self.free[page] = None
                else:
                    self.state[page] = BLANK

    def remember(self, page, before, tokens):
        """Makes known that a page holds these tokens after those of the digest; returns the digest that includes them."""
        digest = chain(before, tokens)
        self.forget(page)
        self.known[page] = before, tokens, digest
        self.following.setdefault(before, {})[page] = tokens
        if len(tokens) == self.page_size:
            self.full.setdefault(digest, {})[page] = None
        return digest

    def forget(self, page):
        if page in self.known:
            before, _, digest = self.known.pop(page)
            for places, key in ((self.full, digest), (self.following, before)):
                if page in places.get(key, ()):
                    del places[key][page]
                    if not places[key]:
                        del places[key]
            if page not in self.held:
                del self.free[page]
                self.state[page] = BLANK

    def find(self, tokens):
        """The longest beginning of tokens that is known: (its full pages, their digests, a page that goes on, how far). Of
        pages that hold the same those that lie before the next."""
        digests, size, before = [], self.page_size, b""
        while len(rest := tokens[len(digests) * size : (len(digests) + 1) * size]) == size:
            if (digest := chain(before, rest)) not in self.full:
                break
            digests.append(before := digest)
        common = {page: common_prefix(known, rest) for page, known in self.following.get(before, {}).items()}
        best = max(reversed(common), key=common.get, default=None)  # the newest of those that are as good
        pages, after = [], best if common.get(best) else None
        for digest in reversed(digests):
            same = self.full[digest]
            after = after - 1 if after and after - 1 in same else next(reversed(same))
            pages.append(after)
        return pages[::-1], digests, best, common.get(best, 0)


def chain(before, tokens):
    """The digest of a prefix and the page of tokens after it."""
    return hashlib.blake2b(before + np.array(tokens, np.int64).tobytes(), digest_size=16).digest()


def common_prefix(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def last_piece(pages):
    """The pages at the end of these that lie one after the other."""
    first = len(pages) - 1
    while first > 0 and pages[first - 1] == pages[first] - 1:
        first -= 1
    return pages[first:]


def in_one_piece(pages):
    return pages == [*range(pages[0], pages[0] + len(pages))] if pages else True
