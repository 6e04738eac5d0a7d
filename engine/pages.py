"""Pages of the key/value cache: which are in use, and which hold tokens that a later prompt can reuse."""

import hashlib

import numpy as np


class BlockManager:
    """Allocates pages, counts their references, and finds the pages that hold the beginning of a prompt.

    A page in use has a reference count. One that nobody uses any more keeps its tokens (it is `free`) until
    its room is needed; the least recently used goes first, and of a sequence the last page first. A page
    without known tokens is blank. Known pages form a prefix tree: `children` leads from the digest of all
    tokens before a page to the pages that may follow. The last page of a sequence is often partly filled, and
    known by the tokens it has.
    """

    def __init__(self, num_pages, page_size):
        self.num_pages, self.page_size = num_pages, page_size
        self.ref_counts = {}  # page -> sequences that use it
        self.blank = np.ones(num_pages, bool)
        self.known = {}  # page -> (digest of all tokens before it, its tokens)
        self.children = {}  # digest -> {tokens: page}
        self.free = {}  # known pages without references, least recently used first

    def available(self):
        """Pages that can be allocated."""
        return self.num_pages - len(self.ref_counts)

    def allocate(self, n, after=None):
        """n pages to write to, in a row where possible, since keys and values that lie in a row need not be
        gathered.

        They follow the page `after` if those are blank; else they lie in the middle of the longest run of
        blank pages, which leaves room to grow for them and for the sequence before them; else anywhere.
        """
        while self.available() - len(self.free) < n:
            self.forget(next(iter(self.free)))
        if after is not None and self.blank[after + 1 : after + 1 + n].sum() == n:
            pages = [*range(after + 1, after + 1 + n)]
        else:
            edges = np.flatnonzero(np.diff(self.blank, prepend=False, append=False)).reshape(-1, 2)
            begin, end = max(edges.tolist(), key=lambda run: run[1] - run[0], default=(0, 0))
            middle = begin + (end - begin - n) // 2
            pages = [*range(middle, middle + n)]
            if n > end - begin:
                pages = np.flatnonzero(self.blank)[:n].tolist()
        self.hold(pages)
        return pages

    def hold(self, pages):
        """Adds a reference to each page."""
        for page in pages:
            self.free.pop(page, None)
            self.ref_counts[page] = self.ref_counts.get(page, 0) + 1
        self.blank[pages] = False

    def release(self, pages):
        """Drops a reference of each page."""
        for page in reversed(pages):
            self.ref_counts[page] -= 1
            if not self.ref_counts[page]:
                del self.ref_counts[page]
                if page in self.known:
                    self.free[page] = None
                else:
                    self.blank[page] = True

    def remember(self, page, before, tokens):
        """Makes known that a page holds these tokens (tuple) after those of a digest; returns the digest that
        includes them."""
        self.forget(page)
        pages = self.children.setdefault(before, {})
        if pages.setdefault(tokens, page) == page:
            self.known[page] = before, tokens
        return chain(before, tokens)

    def forget(self, page):
        """Makes a page's tokens unknown; without references it becomes blank."""
        if page in self.known:
            before, tokens = self.known.pop(page)
            del self.children[before][tokens]
            if not self.children[before]:
                del self.children[before]
            if self.free.pop(page, page) is None:
                self.blank[page] = True

    def is_leaf(self, page):
        """Whether no known page follows this known one."""
        return chain(*self.known[page]) not in self.children

    def find(self, tokens):
        """The longest known beginning of tokens: (its full pages, their digests, a page that goes on or None,
        how far)."""
        pages, digests, before, size = [], [], b"", self.page_size
        while True:
            block = tuple(tokens[len(pages) * size : (len(pages) + 1) * size])
            children = self.children.get(before, {})
            if len(block) < size or block not in children:
                break
            pages.append(children[block])
            digests.append(before := chain(before, block))
        common = {page: common_prefix(known, block) for known, page in children.items()}
        best = max(reversed(common), key=common.get, default=None)  # the newest among equals
        return (pages, digests, best, common[best]) if common.get(best) else (pages, digests, None, 0)


def chain(before, tokens):
    """The digest of the tokens of a digest and those after them."""
    return hashlib.blake2b(before + np.array(tokens, np.int64).tobytes(), digest_size=16).digest()


def common_prefix(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def contiguous(pages):
    return pages == [*range(pages[0], pages[0] + len(pages))]
