"""The engine: text for many requests at once, through one model and one paged cache.

    engine = Engine(model, tokenizer)
    completions = engine.generate(prompts, SamplingParams(temperature=0))        # prompts: lists of token ids

A step is: schedule, run, sample, advance. All sequences in flight share one forward pass: their new tokens lie one after the
other in a single row, parts of prompts beside single tokens. Keys and values live in pages of `page_size` tokens; a sequence's
`block_table` lists its pages. A page that nobody holds any more keeps what is in it, and is found again by whoever begins
with the same tokens, until it is the oldest and its room is needed. Sequences join and leave at every step; when pages run out
the youngest is put back in line and computed again later.

Whoever repeats himself is guessed at: tokens that may follow run along with the last one, and those that are then chosen are
kept, which saves steps and changes no text.

Greedy text is the same alone, in any batch, and with any part of it found in the cache, up to the rounding of attention, which
may add in another order. A seed and a position determine a draw, whatever else is in the batch.
"""

import json
import mmap
import os
import sys

import numpy as np
import torch

from common.files import UsageError
from engine.cache import StepCache
from engine.constrain import Grammar, Vocabulary, advance, cost
from engine.cpu import packed
from engine.pages import BlockManager, common_prefix, in_one_piece, last_piece
from engine.params import Completion, SamplingParams
from engine.sample import draw
from engine.sequence import Sequence

# memory that counts only as it is touched, in a fork too; Python has no name for the last of these before 3.13
UNTOUCHED = (
    mmap.MAP_PRIVATE
    | mmap.MAP_ANONYMOUS
    | (getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0)
)


LOGITS = 2**26  # at most so many logits of scored text at a step, 256 MiB in fp32


class Engine:
    """Generates for many prompts at once, with cached keys and values.

    model: a Transformer in eval mode, any dtype and device. On a CPU the engine runs a packed twin of it (fast_linear.py), made
    here: it sees no later change of the weights, and with `consume` takes the model apart for it, so that no weight is held
    twice. tokenizer: may be None where only ids go in and out (no stop ids then).
    max_batch: sequences in flight; max_step_tokens: tokens of prompts taken in at one step, longer ones in parts. cache_tokens:
    room for keys and values, in tokens; by default most of a GPU's free memory, or a quarter of the machine's (8 GiB at most),
    which is taken only as it is used. lookup: whether to guess tokens (see lookup.py); by default on a CPU.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        max_batch=64,
        max_step_tokens=4096,
        cache_tokens=None,
        page_size=16,
        consume=False,
        lookup=None,
    ):
        if (
            min(
                max_batch,
                max_step_tokens,
                page_size,
                page_size if cache_tokens is None else cache_tokens // page_size,
            )
            < 1
        ):
            raise UsageError(
                "an engine has room for a sequence, a token of a prompt at a step, and a page of its cache"
            )
        self.tokenizer, self.config = tokenizer, model.config
        self.max_batch, self.max_step_tokens = max_batch, max_step_tokens
        parameter = next(model.parameters())
        self.device, dtype, config = parameter.device, parameter.dtype, model.config
        self.model = packed(model, consume) if self.device.type == "cpu" else model
        shape = (page_size, config.num_key_value_heads, config.head_dim)
        bytes_a_page = 2 * config.num_hidden_layers * page_size * shape[1] * shape[2] * dtype.itemsize
        if cache_tokens is None:
            if self.device.type == "cuda":
                room = torch.cuda.mem_get_info(self.device)[0] * 0.85
            else:
                room = min(2**33, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
            cache_tokens = int(room // bytes_a_page) * page_size
        self.blocks = BlockManager(cache_tokens // page_size, page_size)
        shape = (
            2 * config.num_hidden_layers,
            self.blocks.num_pages,
            *shape,
        )  # [2 layers, P, page_size, K, D]
        if self.device.type == "cuda":
            self.kv = torch.zeros(shape, dtype=dtype, device=self.device)
        else:
            room = mmap.mmap(-1, self.blocks.num_pages * bytes_a_page, flags=UNTOUCHED)
            self.kv = torch.frombuffer(room, dtype=dtype).view(shape)
        self.kernel = (
            self.device.type != "cpu"
        )  # attends by block table; on a CPU, views of pages in one piece are faster
        self.room = min(
            config.max_position_embeddings, self.blocks.num_pages * page_size
        )  # tokens a sequence can have
        self.lookup = not self.kernel if lookup is None else lookup
        self.vocab_size = tokenizer.vocab_size if tokenizer else config.vocab_size  # a model's may be padded
        self.stop_ids = set(tokenizer.stop_ids) if tokenizer else set()
        self.waiting, self.running = [], []
        self.stats = dict.fromkeys(("prefilled", "reused", "decoded", "accepted"), 0)
        self.grammars = {}

    # ---- requests ----------------------------------------------------------------------------------------------------

    def generate(self, prompts, params):
        """list of prompts (token ids), one SamplingParams for all or a list -> list[Completion], in the prompts' order."""
        params = params if isinstance(params, list) else [params] * len(prompts)
        lines = [self.sequences(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        self.finish([sequence for line in lines for sequence in line])
        return [self.completion(line) for line in lines]

    def score(self, prompts, continuations):
        """Log-probability (nats) of each continuation after its prompt, both token ids -> list of floats."""
        lines = [self.sequence(p, SamplingParams(), c) for p, c in zip(prompts, continuations, strict=True)]
        self.finish(lines)
        return [sum(sequence.logprobs) for sequence in lines]

    def stream(self, prompt, params, goes_on=False):
        """Yields the text of one completion piece by piece, in whole characters; its `return` value is the Completion.

        goes_on: the text goes on from the prompt's, so a space between them is part of it (SentencePiece drops the first).
        """
        if params.choices:
            done = self.generate([prompt], params)[0]
            yield done.text
            return done
        line, shown = self.add(prompt, params), 0
        sequence = line[0]
        sequence.goes_on, sequence.anchor = goes_on, sequence.anchor - goes_on
        try:
            while sequence.finish_reason is None:
                self.step()
                text = sequence.text  # at whose end a stop string may have begun
                begun = (n for stop in params.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
                sure = len(text) - max(begun, default=0)
                if sequence.finish_reason is None and sure > shown:
                    yield text[shown:sure]
                    shown = sure
            if len(sequence.text) > shown:
                yield sequence.text[shown:]
        finally:  # the reader may have left
            self.cancel(line)
        return self.completion(line)

    def add(self, prompt, params):
        """Puts a prompt in line for the next steps; returns the line of Sequences it runs as, for `completion` and `cancel`."""
        line = self.sequences(prompt, params)
        self.waiting += [sequence for sequence in line if sequence.finish_reason is None]
        return line

    def cancel(self, sequences):
        """Takes sequences out, wherever they are, and gives their pages back."""
        for sequence in sequences:
            for line in (self.waiting, self.running):
                if sequence in line:
                    line.remove(sequence)
                    self.put_away(sequence)
        if not (self.waiting or self.running) and self.blocks.held:  # Ctrl-C came while pages changed hands
            self.blocks = BlockManager(self.blocks.num_pages, self.blocks.page_size)

    def finish(self, sequences):
        """Runs these, and what else is in flight, until these are done."""
        self.waiting += [sequence for sequence in sequences if sequence.finish_reason is None]
        try:
            while any(sequence.finish_reason is None for sequence in sequences):
                self.step()
        finally:  # Ctrl-C leaves nothing behind
            self.cancel(sequences)

    def sequences(self, prompt, params):
        """What a request runs as: one Sequence, or for choices a scored one each, which together walk the trie of their tokens.

        In the order of their tokens each is scored from where it leaves the one before it, so every edge of the trie once. A
        choice that is the beginning of another counts with the end of the turn after it, the others without.
        """
        if not params.choices:
            return [self.sequence(prompt, params)]
        ids = [self.tokenizer.encode(choice) for choice in params.choices]
        ends = [any(one != other and other[: len(one)] == one for other in ids) for one in ids]
        paths = [one + self.tokenizer.stop_ids[:1] * end for one, end in zip(ids, ends, strict=True)]
        shared, before = [0] * len(paths), []
        for i in sorted(range(len(paths)), key=paths.__getitem__):
            shared[i], before = common_prefix(before, paths[i]), paths[i]
        return [
            self.sequence([*prompt, *path[:at]], params, path[at:])
            for path, at in zip(paths, shared, strict=True)
        ]

    def sequence(self, prompt, params, continuation=None):
        """A prompt as a Sequence. UsageError if it is empty, not made of the model's tokens, or can never fit."""
        ids, scored = [*prompt, *(continuation or [])], continuation is not None
        room = self.room
        if not prompt or len(ids) > room - (not scored):
            what = "model takes" if room == self.config.max_position_embeddings else "cache has room for"
            raise UsageError(f"a prompt of {len(ids)} tokens; the {what} 1 to {room - (not scored)}")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise UsageError(
                f"token ids {min(ids)} to {max(ids)}, but the vocabulary has {self.config.vocab_size}"
            )
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "big")
        limit = len(ids) if scored else min(room, len(ids) + params.max_tokens)
        sequence = Sequence(
            ids, params, len(prompt), limit, seed, scored, anchor=len(prompt), read=len(prompt)
        )
        sequence.text = "" if self.tokenizer else None
        sequence.finish_reason = "stop" if scored and not continuation else None
        if params.json_schema is not None:
            sequence.grammar = self.grammar(params.json_schema)
            sequence.state = sequence.grammar.start
            if cost(sequence.state) > limit - len(prompt):
                needed, left = cost(sequence.state), limit - len(prompt)
                raise UsageError(
                    f"the shortest JSON of this schema takes up to {needed} tokens, but there is room for {left}"
                )
        return sequence

    def grammar(self, schema):
        key = json.dumps(schema)
        if key not in self.grammars:
            if not self.grammars:
                self.vocabulary = Vocabulary(self.tokenizer)
            self.grammars[key] = Grammar(schema, self.vocabulary)
        return self.grammars[key]

    def completion(self, line):
        """The Completion of a line of Sequences, None as long as one of them is not at its end."""
        if any(sequence.finish_reason is None for sequence in line):
            return None
        if line[0].params.choices:
            return self.choose(line)
        [s] = line
        logprobs = s.logprobs if s.params.logprobs else None
        return Completion(s.generated, s.text, s.finish_reason, s.prompt_tokens, s.reused, logprobs)

    def choose(self, line):
        """The Completion of scored choices: probabilities are those of the choices' tokens after the prompt, divided by their
        sum. Temperature 0 takes the likeliest; others draw from the probabilities to the power of 1 / temperature."""
        root, params = min(line, key=lambda choice: choice.prompt_tokens), line[0].params
        prompt_tokens, walked, path = root.prompt_tokens, {}, []
        for choice in sorted(
            line, key=lambda choice: choice.ids
        ):  # what it shares with the one before it was scored there
            walked[choice] = path = path[: choice.prompt_tokens - prompt_tokens] + choice.logprobs
        logits = torch.tensor([sum(walked[choice]) for choice in line], dtype=torch.float64)
        probabilities = logits.softmax(-1).tolist()
        picked = int(logits.argmax())
        if params.temperature > 0:
            drawn = ((logits - logits.max()) / params.temperature).softmax(-1).cumsum(-1)
            picked = int((drawn <= line[0].uniform(len(line[0].ids) - 1) * drawn[-1]).sum())
        choice, text = line[picked], params.choices[picked]
        ids = choice.ids[prompt_tokens:][: len(self.tokenizer.encode(text))]
        named = dict(zip(params.choices, probabilities, strict=True))
        logprobs = walked[choice][: len(ids)] if params.logprobs else None
        return Completion(ids, text, "stop", prompt_tokens, root.reused, logprobs, named)

    # ---- a step ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self):
        """One forward pass: schedule, run, sample, advance."""
        batch, wanted = self.schedule(), []
        for sequence, n in batch:  # of each, the tokens (from, to) whose logits are wanted
            begin = max(
                sequence.cached, (sequence.prompt_tokens if sequence.scored else len(sequence.ids)) - 1
            )
            wanted.append((begin, max(begin, sequence.cached + n)))
        if not batch:
            return
        owners = [
            (sequence, at)
            for (sequence, _), tokens in zip(batch, wanted, strict=True)
            for at in range(*tokens)
        ]
        logits = self.run(batch, wanted)[: len(owners), : self.vocab_size]
        results = self.sample(logits, owners) if owners else []
        for sequence, n in batch:
            n -= len(sequence.draft)
            decoding = n == 1 and sequence.cached >= sequence.prompt_tokens and not sequence.scored
            self.stats["prefilled"] += 0 if decoding else n
            sequence.cached += n
            self.remember(sequence)
        for (sequence, at), (token, logprob) in zip(owners, results, strict=True):
            if at < sequence.cached or self.accept(sequence, at):
                self.advance(sequence, token, logprob)
        self.cancel([sequence for sequence, _ in batch if sequence.finish_reason])

    def schedule(self):
        """[(sequence, number of its tokens to run, its draft included)]: those in flight first, the oldest before the younger,
        then new ones."""
        self.budget, self.rows, batch, coming, i = (
            self.max_step_tokens,
            max(1, LOGITS // self.vocab_size),
            [],
            set(),
            0,
        )
        while i < len(self.running):
            sequence = self.running[i]
            n = self.share(sequence)
            if self.pages(sequence.cached + n) > len(sequence.block_table):
                if not self.blocks.available():  # the youngest, which may be this one, goes back in line
                    youngest = self.running.pop()
                    self.put_away(youngest)
                    self.waiting.insert(0, youngest)
                    continue
                sequence.block_table += self.blocks.take(1, sequence.block_table[-1])
            sequence.draft = self.guess(sequence) if n == sequence.pending == 1 and self.lookup else []
            self.rows -= len(sequence.draft)
            self.enlist(batch, coming, sequence, n + len(sequence.draft))
            i += 1
        for sequence in list(self.waiting):
            if len(self.running) >= self.max_batch or self.budget < 1:
                break
            admitted = self.admit(sequence, coming)
            if admitted is False:
                break
            if admitted:
                self.enlist(batch, coming, sequence, self.share(sequence))
        return sorted(batch, key=lambda entry: (entry[1] > 1) + (entry[1] > 1 and entry[0].cached > 0))

    def share(self, sequence):
        """How many of a sequence's pending tokens can be run at this step. One that follows a run is always."""
        if sequence.pending == 1 and not sequence.scored:
            return 1
        n = min(sequence.pending, self.budget)
        return (
            min(n, max(0, sequence.prompt_tokens - 1 - sequence.cached) + self.rows) if sequence.scored else n
        )

    def enlist(self, batch, coming, sequence, n):
        if sequence.pending > 1:
            self.budget -= n
            coming.add(self.next_page(sequence.digests, sequence.ids))
        if sequence.scored:
            self.rows -= max(0, sequence.cached + n - max(sequence.cached, sequence.prompt_tokens - 1))
        if n:
            batch.append((sequence, n))

    def guess(self, s):
        """Tokens that may come next, as many as there is room for on the last page."""
        if (
            s.scored or s.grammar or s.params.repetition_penalty != 1
        ):  # what these allow changes with each token
            return []
        room = len(s.block_table) * self.blocks.page_size - len(s.ids)
        most = min(room, s.limit - len(s.ids) - 1, self.rows // 2)  # others want rows as well
        return s.lookup.guess(s.ids, s.prompt_tokens, self.blocks.page_size)[:most]

    def accept(self, s, at):
        """Whether the first token of the draft, at this place, is what was chosen since; the draft goes on behind it."""
        token = s.draft.pop(0)
        right = not s.finish_reason and at < len(s.ids) and token == s.ids[at]
        s.cached += right
        self.stats["accepted"] += right
        return right

    def next_page(self, digests, ids):
        """What the first page that is not known would be known by."""
        size = self.blocks.page_size
        return digests[-1] if digests else b"", tuple(ids[len(digests) * size : (len(digests) + 1) * size])

    def pages(self, tokens):
        return -(-tokens // self.blocks.page_size)

    def admit(self, sequence, coming):
        """Gives a sequence in line its pages and what the cache knows of it. False where there is no room; None where it had
        better wait for a page that it shares with one in flight."""
        blocks, ids = self.blocks, sequence.ids
        pages, digests, source, common = blocks.find(
            ids[: (sequence.prompt_tokens if sequence.scored else len(ids)) - 1]
        )
        following = self.next_page(digests, ids)
        if len(following[1]) == blocks.page_size and following in coming:
            return None
        found = [*pages, *([source] if common else [])]
        blocks.hold(found)
        # a page that nobody else uses is written on, if it is true to its end, or the last of a chat: that has likely gone on
        # in another way, and else loses no more than the page; of others the beginning is copied
        _, tokens, digest = blocks.known[source] if common else (None, (), None)
        taken = (
            common > 0
            and blocks.held[source] == 1
            and (common == len(tokens) or digest not in blocks.following)
        )
        total = self.pages(len(ids))
        needed = total - len(pages) - taken
        if common and not taken and needed > blocks.available():
            blocks.release([source])
            found, common = pages, 0
        if needed > blocks.available() - len(self.running):  # each of those may soon need one
            blocks.release(found)
            return False
        if taken and common < len(tokens):
            blocks.forget(source)
        kept, copied = [*pages, *([source] if taken else [])], [source] if common and not taken else []
        grown = self.pages(sequence.limit)  # a chat comes back longer: as much again, if there is room enough
        rooms = () if self.kernel else (2 * grown - total, grown - total)
        scattered = kept and (copied or not in_one_piece(kept) or not blocks.continues(kept[-1], needed))
        if scattered and not self.kernel and not sequence.scored and blocks.gap(grown) is not None:
            kept, copied, digests = [], found, []  # to gather it at each step would cost more
        table = kept + blocks.take(total - len(kept), kept[-1] if kept else None, rooms)
        if copied:
            self.kv[:, table[len(kept) : len(kept) + len(copied)]] = self.kv[:, copied]
        if copied is found and taken:  # a chat that has moved; what it shared with others is theirs as well
            for page in last_piece(copied):
                blocks.forget(page)
        blocks.release(copied)
        sequence.block_table, sequence.digests = table, digests
        sequence.cached = len(pages) * blocks.page_size + common
        sequence.reused = sequence.cached if sequence.reused is None else sequence.reused
        self.stats["reused"] += sequence.cached
        self.remember(sequence)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def remember(self, sequence, partly=False):
        """Lets the pages that a sequence has filled be found by others, and partly its last one too."""
        size, ids, digests = self.blocks.page_size, sequence.ids, sequence.digests
        while (at := len(digests) * size) + size <= sequence.cached or (partly and at < sequence.cached):
            tokens = ids[at : min(at + size, sequence.cached)]
            digests.append(
                self.blocks.remember(
                    sequence.block_table[len(digests)], digests[-1] if digests else b"", tokens
                )
            )

    def put_away(self, sequence):
        """Gives the pages of a sequence back."""
        self.remember(sequence, partly=True)
        self.blocks.release(sequence.block_table)
        sequence.block_table, sequence.digests, sequence.cached, sequence.draft = [], [], 0, []
        if sequence.scored and not sequence.finish_reason:
            sequence.logprobs = []

    def run(self, batch, wanted):
        """Logits [wanted tokens, V] of the model; of one token where none are wanted."""
        tokens = [i for s, n in batch for i in (*s.ids[s.cached : s.cached + n], *s.draft)]
        rows, row = [], 0
        if all(begin == end for begin, end in wanted):
            first = batch[0][0].cached
            wanted = [(first, first + 1), *wanted[1:]]
        for (sequence, n), (begin, end) in zip(batch, wanted, strict=True):
            rows += range(row + begin - sequence.cached, row + end - sequence.cached)
            row += n
        cache = StepCache(self, batch, wanted)
        tokens, rows = (torch.tensor(x, device=self.device) for x in ([tokens], rows))
        return self.model(tokens, cache.positions, cache=cache, rows=rows)

    def sample(self, logits, owners):
        """[(token, its log-probability where asked for)] for logits [N, V] and owners, [(sequence, at)]. One sync in all."""
        chosen = logits
        for i, (sequence, _) in enumerate(owners):
            if not sequence.scored and (sequence.grammar or sequence.params.repetition_penalty != 1):
                chosen = chosen.float().clone() if chosen is logits else chosen
                chosen[i] = self.constrain(chosen[i], sequence)
        if self.device.type == "cpu":  # where numpy's argmax is ten times as fast
            tokens = torch.from_numpy(chosen.float().numpy().argmax(-1))
        else:
            tokens = chosen.argmax(-1)
        drawn = [i for i, (s, _) in enumerate(owners) if s.params.temperature > 0 and not s.scored]
        if drawn:
            tokens[drawn] = draw(
                chosen[drawn].float(),
                [owners[i][0].params for i in drawn],
                [owners[i][0].uniform(owners[i][1]) for i in drawn],
            )
        given = {i: s.ids[at + 1] for i, (s, at) in enumerate(owners) if s.scored}
        if given:
            tokens[[*given]] = torch.tensor([*given.values()], device=self.device)
        asked = [i for i, (s, _) in enumerate(owners) if s.scored or s.params.logprobs]
        results = tokens.double()
        if asked:
            logprobs = logits[asked].float().log_softmax(-1).gather(1, tokens[asked][:, None])
            results = torch.cat((results, logprobs[:, 0].double()))
        results = results.tolist()
        logprobs = dict(zip(asked, results[len(owners) :], strict=True))
        return [(int(token), logprobs.get(i)) for i, token in enumerate(results[: len(owners)])]

    def constrain(self, logits, sequence):
        """logits fp32 [V] with the repetition penalty, and only of tokens that the grammar and what is left of room allow."""
        penalty, ids = sequence.params.repetition_penalty, sequence.ids
        if penalty != 1:
            if sequence.seen is None:
                sequence.seen = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=self.device)
                sequence.seen[ids] = True
            sequence.seen[ids[-1]] = True
            seen = sequence.seen[: len(logits)]
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if sequence.grammar:
            allowed, costs = sequence.grammar.allowed(sequence.state)
            allowed = allowed[costs < sequence.limit - len(ids)]
            if cost(sequence.state) == 0:
                allowed = np.concatenate((allowed, [*self.stop_ids]))
            allowed = torch.from_numpy(allowed.astype(np.int64)).to(self.device)
            logits = torch.full_like(logits, -torch.inf).index_copy(0, allowed, logits[allowed])
        return logits

    def advance(self, sequence, token, logprob):
        """Appends a token to a sequence, and ends it where it ends."""
        s, ids = sequence, sequence.ids
        if logprob is not None:
            s.logprobs.append(logprob)
        if s.scored:
            s.finish_reason = "stop" if len(s.logprobs) == len(ids) - s.prompt_tokens else None
            return
        self.stats["decoded"] += 1
        if token in self.stop_ids or token in s.params.stop_ids:
            s.finish_reason = "stop"
        else:
            ids.append(token)
            if s.grammar:
                s.state = advance(s.state, self.tokenizer.token_bytes(token))
                s.finish_reason = "stop" if not s.state or len(ids) == s.limit else None
            if self.tokenizer:
                self.read_text(s)
            if len(ids) == s.limit and not s.finish_reason:
                s.finish_reason = "length"
        if s.finish_reason:
            if self.tokenizer:
                s.text += s.torn
            s.cached = min(s.cached, len(ids))
            del s.logprobs[len(s.generated) :]

    def read_text(self, s):
        """Adds the text of the last token. A character that lacks bytes waits for them; a stop string cuts text and ids."""
        before, decode = len(s.text), self.tokenizer.decode
        piece = decode(s.ids[s.anchor :])[len(decode(s.ids[s.anchor : s.read])) :]
        s.torn = piece if piece.endswith("\ufffd") else ""
        if not s.torn:
            s.text, s.anchor, s.read = s.text + piece, s.read, len(s.ids)
        if not s.params.stop:
            return
        text, begin = s.text + s.torn, max(0, before + 1 - max(map(len, s.params.stop)))
        found = [at for stop in s.params.stop if (at := text.find(stop, begin)) >= 0]
        if found:
            s.text, s.torn, s.finish_reason = text[: min(found)], "", "stop"
            first = s.prompt_tokens - s.goes_on
            length = len(s.text) + len(decode(s.ids[first : s.prompt_tokens]))
            while len(decode(s.ids[first:])) > length:
                s.ids.pop()
