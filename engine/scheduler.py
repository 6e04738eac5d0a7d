"""Which sequences run at a step, and how many of their tokens."""

from engine.pages import BlockManager


class Scheduler:
    """Continuous batching with chunked prefill, prefix reuse and preemption.

    Sequences wait in the order of arrival, and run until they are finished. Running ones come first at each
    step: one token each, or the next chunk of a prompt. Then waiting ones are admitted while the token budget
    and the pages allow. When a running sequence finds no free page, the youngest is preempted: it gives its
    pages back and is computed again later.

    kv: keys and values, [2 layers, pages, page_size, K, D]. max_batch: running sequences. max_step_tokens:
    tokens of prompts in a step. max_scored_tokens: tokens of scored sequences in a step whose logits are
    wanted.
    """

    def __init__(self, kv, max_batch, max_step_tokens, max_scored_tokens):
        self.kv = kv
        self.blocks = BlockManager(kv.shape[1], kv.shape[2])
        self.max_batch, self.max_step_tokens = max_batch, max_step_tokens
        self.max_scored_tokens = max_scored_tokens
        self.waiting, self.running = [], []
        self.stats = dict.fromkeys(("prefilled", "reused"), 0)

    def schedule(self):
        """[(sequence, number of its tokens to run)], single tokens first."""
        self.token_budget, self.logit_budget = self.max_step_tokens, self.max_scored_tokens
        self.in_progress, batch = set(), []  # pages of prompts that this step works on
        for sequence in list(self.running):
            if sequence in self.running:  # not preempted meanwhile
                n = self.chunk(sequence)
                if self.grow(sequence, n):
                    self.schedule_tokens(sequence, n, batch)
        for sequence in list(self.waiting):
            if len(self.running) == self.max_batch or self.token_budget < 1:
                break
            found = self.blocks.find(sequence.ids[: sequence.first_query])
            if self.continued_in_progress(sequence, found):
                continue
            if not self.admit(sequence, found):
                break
            self.schedule_tokens(sequence, self.chunk(sequence), batch)
        return sorted(batch, key=lambda entry: entry[1] > 1)

    def chunk(self, sequence):
        """How many pending tokens of a sequence fit into this step's budgets. A single token of a running one
        always does."""
        if sequence.pending == 1 and not sequence.scored:
            return 1
        n = min(sequence.pending, self.token_budget)
        if sequence.scored:
            n = min(n, max(0, sequence.first_query - sequence.cached) + self.logit_budget)
        return n

    def schedule_tokens(self, sequence, n, batch):
        """Puts n tokens of a sequence into the batch and takes them off the budgets."""
        if sequence.pending > 1:
            self.token_budget -= n
            self.in_progress.add(self.next_page(sequence, sequence.digests))
        if sequence.scored:
            self.logit_budget -= len(sequence.queries(n))
        if n:
            batch.append((sequence, n))

    def grow(self, sequence, n):
        """Allocates pages for n more tokens, preempting the youngest for them; False if that is the sequence
        itself."""
        while self.pages(sequence.cached + n) > len(sequence.block_table):
            if self.blocks.available():
                sequence.block_table += self.blocks.allocate(1, sequence.block_table[-1])
                continue
            youngest = self.running.pop()
            self.release(youngest)
            self.waiting.insert(0, youngest)
            if youngest is sequence:
                return False
        return True

    def next_page(self, sequence, digests):
        """What the first page of a sequence that has no digest yet will be known by."""
        size = self.blocks.page_size
        tokens = sequence.ids[len(digests) * size : min((len(digests) + 1) * size, sequence.first_query)]
        return digests[-1] if digests else b"", tuple(tokens)

    def continued_in_progress(self, sequence, found):
        """Whether this step computes a page after those found for a waiting sequence, which it can reuse at
        the next step.

        A page that is not full counts only for scored sequences: the choices after a prompt, which end there.
        """
        _, digests, _, common = found
        page = self.next_page(sequence, digests)
        reusable = sequence.scored or len(page[1]) == self.blocks.page_size
        return reusable and len(page[1]) > common and page in self.in_progress

    def admit(self, sequence, found):
        """Starts a waiting sequence with the pages found for its beginning and new ones; False if there are
        too few.

        The page on which the found beginning ends is written on if nobody can need what it holds after that,
        else copied.
        """
        (pages, digests, last, common), blocks = found, self.blocks
        total = self.pages(len(sequence.ids))
        in_place = last is not None and last not in blocks.ref_counts and blocks.is_leaf(last)
        in_place &= not sequence.scored  # other choices may need it
        held = [*pages, last] if common else pages
        blocks.hold(held)
        if common and not in_place and total - len(pages) > blocks.available():  # no room for a copy
            blocks.release([last])
            held, common = pages, 0
        needed = total - len(pages) - in_place
        if needed > blocks.available() - len(self.running):  # each of those may soon need a page
            blocks.release(held)
            return False
        if in_place:
            if common < len(blocks.known[last][1]):
                blocks.forget(last)
            pages = held
        new = blocks.allocate(needed, pages[-1] if pages else None)
        if common and not in_place:
            self.kv[:, new[0]] = self.kv[:, last]
            blocks.release([last])
        sequence.block_table, sequence.digests = pages + new, digests
        sequence.cached = len(digests) * blocks.page_size + common
        sequence.reused = sequence.cached if sequence.reused is None else sequence.reused
        self.stats["reused"] += sequence.cached
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def advance(self, sequence, n):
        """n more tokens of a sequence have been run."""
        if n > 1 or sequence.scored or sequence.cached < sequence.prompt_tokens:
            self.stats["prefilled"] += n
        sequence.cached += n
        self.remember(sequence)

    def remember(self, sequence, partly=False):
        """Lets other sequences find the full pages of a sequence, and with `partly` its last one."""
        size, digests = self.blocks.page_size, sequence.digests
        while (at := len(digests) * size) + size <= sequence.cached or (partly and at < sequence.cached):
            tokens = tuple(sequence.ids[at : min(at + size, sequence.cached)])
            before = digests[-1] if digests else b""
            digests.append(self.blocks.remember(sequence.block_table[len(digests)], before, tokens))

    def remove(self, sequences):
        """Takes sequences out, waiting or running, and gives their pages back."""
        for sequence in sequences:
            for queue in (self.waiting, self.running):
                if sequence in queue:
                    queue.remove(sequence)
                    self.release(sequence)
        if not (self.waiting or self.running) and self.blocks.ref_counts:
            # an interrupt (Ctrl-C) came between the allocation of pages and their entry in a block table
            self.blocks = BlockManager(self.blocks.num_pages, self.blocks.page_size)

    def release(self, sequence):
        """Gives the pages of a sequence back; what they hold can be found again."""
        self.remember(sequence, partly=True)
        self.blocks.release(sequence.block_table)
        sequence.block_table, sequence.digests, sequence.cached = [], [], 0
        if sequence.scored and not sequence.finish_reason:
            sequence.logprobs, sequence.top_logprobs = [], []

    def pages(self, tokens):
        return -(-tokens // self.blocks.page_size)
