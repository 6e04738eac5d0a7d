"""The engine: text for many requests at once, through one model and one paged cache.

    engine = Engine(model, tokenizer)
    completions = engine.generate(prompts, SamplingParams(temperature=0))        # prompts: lists of token ids

A step is: schedule, run, sample, advance. All scheduled sequences share one forward pass: their new tokens
lie one after the other in a single row, chunks of prompts beside single tokens. Keys and values live in
pages; a sequence's block table lists its pages, and a prompt that begins like an earlier one reuses them.
Sequences join and leave at every step.

Greedy text is the same alone, in any batch, and with any part of it found in the cache, up to the rounding of
attention, which may add in another order. A seed and a position determine a draw, whatever else is in the
batch.
"""

import json
import os

import torch

from common.files import UsageError
from engine.cache import TableCache, ViewCache, allocate_cache
from engine.constrain import Grammar, Vocabulary, advance, cost
from engine.cpu import packed
from engine.params import Completion, RequestRefused, SamplingParams
from engine.sample import sample
from engine.scheduler import Scheduler
from engine.sequence import Sequence

MAX_LOGITS = 2**26  # of scored sequences in a step: 256 MiB in fp32
MAX_GRAMMARS = 64  # of the latest schemas


class Engine:
    """Generates text for many prompts at once, and scores given text.

    model: a Transformer in eval mode, any dtype and device. On a CPU the engine runs a packed twin of it (see
    cpu.py), made here if the model is not one already.
    tokenizer: None where only ids go in and out. max_batch: sequences that run at once. max_step_tokens:
    tokens of prompts in a step; longer prompts are prefilled in chunks. cache_tokens: size of the key/value
    cache, by default most of a GPU's free memory, or a quarter of the machine's (at most 8 GiB, taken only as
    it is used). UsageError for sizes with which nothing could run.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        max_batch=64,
        max_step_tokens=4096,
        cache_tokens=None,
        page_size=16,
    ):
        pages = 1 if cache_tokens is None else cache_tokens // max(page_size, 1)
        if min(max_batch, max_step_tokens, page_size, pages) < 1:
            raise UsageError(
                "max_batch, max_step_tokens and page_size are at least 1, cache_tokens at least a page"
            )
        self.tokenizer, self.config = tokenizer, model.config
        parameter = next(model.parameters())
        self.device = parameter.device
        self.use_tables = self.device.type != "cpu"  # attend by block tables, with the paged kernel
        self.model = model if self.use_tables else packed(model)
        self.dtype = getattr(self.model, "dtype", parameter.dtype)  # of the weights; of the cache: kv.dtype
        self.kv = allocate_cache(self.config, parameter.dtype, self.device, page_size, cache_tokens)
        self.max_sequence_tokens = min(self.config.max_position_embeddings, self.kv.shape[1] * page_size)
        # a model's may be padded
        self.vocab_size = tokenizer.vocab_size if tokenizer else self.config.vocab_size
        self.stop_ids = set(tokenizer.stop_ids) if tokenizer else set()
        max_scored = max(1, MAX_LOGITS // self.vocab_size)
        self.scheduler = Scheduler(self.kv, max_batch, max_step_tokens, max_scored)
        self.stats = self.scheduler.stats  # tokens prefilled, reused and decoded
        self.stats["decoded"] = 0
        self.grammars, self.vocabulary = {}, None

    # ---- requests ------------------------------------------------------------------------------------------

    def generate(self, prompts, params):
        """prompts (token ids each), one SamplingParams for all or a list -> list[Completion], in the prompts'
        order."""
        params = params if isinstance(params, list) else [params] * len(prompts)
        requests = [self.request(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
        self.finish([sequence for request in requests for sequence in request])
        return [self.completion(request) for request in requests]

    def score(self, prompts, continuations):
        """Log-probability (nats) of each continuation after its prompt, both token ids -> list of floats.

        A prompt that several continuations share is computed once.
        """
        pairs = zip(prompts, continuations, strict=True)
        sequences = [self.sequence(prompt, SamplingParams(), after) for prompt, after in pairs]
        self.finish(sequences)
        return [sum(sequence.logprobs) for sequence in sequences]

    def stream(self, prompt, params, goes_on=False):
        """Yields the text of one completion piece by piece, in whole characters; its `return` value is the
        Completion.

        goes_on: the text continues the prompt's, so a space between them is part of it (SentencePiece drops
        the first).
        """
        if params.choices:
            done = self.generate([prompt], params)[0]
            yield done.text
            return done
        [sequence] = request = self.add(prompt, params, goes_on)
        shown = 0
        try:
            while sequence.finish_reason is None:
                self.step()
                text = sequence.settled
                if len(text) > shown:
                    yield text[shown:]
                    shown = len(text)
            if len(sequence.text) > shown:  # it has ended in a step of another stream
                yield sequence.text[shown:]
        finally:  # the reader may have left
            self.cancel(request)
        return self.completion(request)

    def add(self, prompt, params, goes_on=False, continuation=None):
        """Enqueues a prompt for the next steps; returns its request, a list of Sequences, for `completion`
        and `cancel`.

        goes_on: see `stream`. continuation: ids after the prompt that are only scored. RequestRefused if the
        prompt cannot fit; other requests go on.
        """
        if continuation is None:
            request = self.request(prompt, params)
        else:
            request = [self.sequence(prompt, params, continuation)]
        for sequence in request:
            sequence.goes_on, sequence.anchor = goes_on, sequence.anchor - goes_on
        self.scheduler.waiting += [sequence for sequence in request if sequence.finish_reason is None]
        return request

    def cancel(self, request):
        """Takes a request's sequences out, wherever they are, and gives their pages back."""
        self.scheduler.remove(request)

    def finish(self, sequences):
        """Runs steps until these sequences are finished."""
        self.scheduler.waiting += [sequence for sequence in sequences if sequence.finish_reason is None]
        try:
            while any(sequence.finish_reason is None for sequence in sequences):
                self.step()
        finally:  # also after Ctrl-C
            self.cancel(sequences)

    def request(self, prompt, params):
        """The Sequences of a request: one, or a scored one for each choice.

        A choice that is the beginning of another is scored together with the end of the turn after it.
        """
        if not params.choices:
            return [self.sequence(prompt, params)]
        choices = [self.tokenizer.encode(choice) for choice in params.choices]
        ends = [any(a != b and b[: len(a)] == a for b in choices) for a in choices]
        stop = self.tokenizer.stop_ids[:1]
        return [
            self.sequence(prompt, params, ids + stop * end) for ids, end in zip(choices, ends, strict=True)
        ]

    def sequence(self, prompt, params, continuation=None):
        """A prompt as a Sequence, scored if it has a continuation. RequestRefused if it is empty, not made of
        the model's tokens, or can never fit."""
        ids, scored = [*prompt, *(continuation or [])], continuation is not None
        most = self.max_sequence_tokens - (not scored)
        if not prompt or len(ids) > most:
            limited = self.max_sequence_tokens == self.config.max_position_embeddings
            what = "model takes" if limited else "cache has room for"
            raise RequestRefused(f"a prompt of {len(ids)} tokens; the {what} 1 to {most}")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            size = self.config.vocab_size
            raise RequestRefused(f"token ids {min(ids)} to {max(ids)}, but the vocabulary has {size}")
        if unknown := [i for i in params.logit_bias or () if not 0 <= i < self.vocab_size]:
            raise RequestRefused(f"logit_bias: {unknown[0]} is no token id below {self.vocab_size}")
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "big")
        max_length = len(ids) if scored else min(self.max_sequence_tokens, len(ids) + params.max_tokens)
        sequence = Sequence(ids, params, len(prompt), max_length, seed, scored)
        sequence.anchor = sequence.decoded = len(prompt)
        sequence.text = "" if self.tokenizer else None
        sequence.finish_reason = "stop" if scored and not continuation else None
        if params.json_schema is not None:
            sequence.grammar = self.grammar(params.json_schema)
            sequence.grammar_state = sequence.grammar.start
            needed, left = cost(sequence.grammar_state), max_length - len(prompt)
            if needed > left:
                what = f"the shortest JSON of this schema takes up to {needed} tokens"
                raise RequestRefused(f"{what}, but there is room for {left}")
        return sequence

    def grammar(self, schema):
        """The Grammar of a schema, compiled once for the requests that share it."""
        key = json.dumps(schema)
        if key not in self.grammars:
            self.vocabulary = self.vocabulary or Vocabulary(self.tokenizer)
            self.grammars[key] = Grammar(schema, self.vocabulary)
            while len(self.grammars) > MAX_GRAMMARS:  # clients may send schemas without end
                self.grammars.pop(next(iter(self.grammars)))
        return self.grammars[key]

    def completion(self, request):
        """The Completion of a request, None until all its sequences are finished."""
        if any(sequence.finish_reason is None for sequence in request):
            return None
        if request[0].params.choices:
            return self.choose(request)
        [s] = request
        logprobs = s.logprobs if s.params.logprobs else None
        return Completion(s.generated, s.text, s.finish_reason, s.prompt_tokens, s.reused, logprobs)

    def choose(self, request):
        """The Completion of scored choices. Their probabilities are those of their tokens after the prompt,
        divided by their sum; temperature 0 takes the likeliest, others draw from the probabilities to the
        power of 1 / temperature."""
        first, params = request[0], request[0].params
        scores = torch.tensor([sum(choice.logprobs) for choice in request], dtype=torch.float64)
        chosen = int(scores.argmax())
        if params.temperature > 0:
            sums = ((scores - scores.max()) / params.temperature).softmax(-1).cumsum(-1)
            chosen = int((sums <= first.uniform(first.prompt_tokens - 1) * sums[-1]).sum())
        text, length = params.choices[chosen], len(self.tokenizer.encode(params.choices[chosen]))
        logprobs = request[chosen].logprobs[:length] if params.logprobs else None
        probabilities = dict(zip(params.choices, scores.softmax(-1).tolist(), strict=True))
        ids, cached = request[chosen].generated[:length], min(choice.reused for choice in request)
        return Completion(ids, text, "stop", first.prompt_tokens, cached, logprobs, probabilities)

    # ---- a step --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self):
        """One forward pass: schedule, run, sample, advance."""
        batch = self.scheduler.schedule()
        if not batch:
            return
        queries = [(sequence, position) for sequence, n in batch for position in sequence.queries(n)]
        logits = self.run(batch)[: len(queries), : self.vocab_size]
        sampled = sample(logits, queries, self.stop_ids)
        for sequence, n in batch:
            self.scheduler.advance(sequence, n)
        for (sequence, _), (token, logprob) in zip(queries, sampled, strict=True):
            self.advance(sequence, token, logprob)
        self.cancel([sequence for sequence, _ in batch if sequence.finish_reason])

    def run(self, batch):
        """Logits [queries, V] of a batch, [(sequence, number of its tokens to run)]; of one token where there
        is no query."""
        tokens = [i for s, n in batch for i in s.ids[s.cached : s.cached + n]]
        rows, first = [], 0  # of the queries
        for s, n in batch:
            rows += [first + position - s.cached for position in s.queries(n)]
            first += n
        if self.use_tables:
            cache = TableCache(self.kv, batch, self.config.sliding_window, self.config.num_attention_heads)
        else:
            cache = ViewCache(self.kv, batch, self.config.sliding_window)
        tokens, rows = (torch.tensor(x, device=self.device) for x in ([tokens], rows or [0]))
        return self.model(tokens, cache.positions, cache=cache, rows=rows)

    def advance(self, s, token, logprob):
        """Appends a sampled token to a sequence and finishes it at a stop id, a stop string or its length
        limit."""
        if logprob is not None:
            s.logprobs.append(logprob)
        if s.scored:
            s.finish_reason = "stop" if len(s.logprobs) == len(s.generated) else None
            return
        self.stats["decoded"] += 1
        if token in self.stop_ids or token in s.params.stop_ids:
            s.finish_reason = "stop"
        else:
            s.ids.append(token)
            if s.grammar:
                s.grammar_state = advance(s.grammar_state, self.tokenizer.token_bytes(token))
                s.finish_reason = "stop" if not s.grammar_state or len(s.ids) == s.max_length else None
            if self.tokenizer:
                s.read_text(self.tokenizer.decode)
            if len(s.ids) == s.max_length and not s.finish_reason:
                s.finish_reason = "length"
        if s.finish_reason:
            if self.tokenizer:
                s.text += s.torn
            s.cached = min(s.cached, len(s.ids))  # a stop string may have cut ids
            del s.logprobs[len(s.generated) :]
