"""A request inside the engine."""

import hashlib
from dataclasses import dataclass, field

from engine.constrain import Grammar
from engine.params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """A prompt and the tokens after it. Keys and values of the first `cached` tokens are in the pages of
    `block_table`.

    A scored sequence is given whole: the log-probabilities of its tokens after the prompt are computed, and
    nothing is generated.
    """

    ids: list
    params: SamplingParams
    prompt_tokens: int
    max_length: int  # prompt included
    seed: int
    scored: bool = False
    block_table: list = field(default_factory=list)
    digests: list = field(default_factory=list)  # of all tokens up to the end of each full page
    cached: int = 0
    reused: int | None = None  # tokens found in the cache when it was first admitted
    text: str | None = None  # the whole characters generated so far; None without a tokenizer
    torn: str = ""  # text after them that still lacks bytes
    goes_on: bool = False  # the text continues the prompt's last token
    anchor: int = 0  # decoding for the next piece of text starts here, a token before `decoded`
    decoded: int = 0  # the tokens before this one are in `text`
    logprobs: list = field(default_factory=list)
    top_logprobs: list = field(default_factory=list)  # [(id, log-probability), ...], likeliest first, of each
    grammar: Grammar | None = None
    grammar_state: tuple | None = None
    finish_reason: str | None = None

    @property
    def generated(self):
        return self.ids[self.prompt_tokens :]

    @property
    def settled(self):
        """The text so far without an end that may begin a stop string; all of it once it has ended."""
        stops, length = () if self.finish_reason else self.params.stop, len(self.text)
        begun = (n for stop in stops for n in range(1, min(len(stop), length + 1))
                 if stop.startswith(self.text[length - n :]))  # fmt: skip
        return self.text[: length - max(begun, default=0)]

    @property
    def pending(self):
        """Tokens still to be run. The last token of a scored sequence predicts nothing that is wanted."""
        return len(self.ids) - self.scored - self.cached

    @property
    def first_query(self):
        """The first position whose logits are wanted; tokens before it may be found in the cache."""
        return (self.prompt_tokens if self.scored else len(self.ids)) - 1

    def queries(self, n):
        """Positions among the next n tokens whose logits are wanted, as a range."""
        return range(max(self.first_query, self.cached), self.cached + n)

    def uniform(self, position):
        """A number in [0, 1) for the draw after the token at a position, fixed by seed and position alone."""
        digest = hashlib.blake2b(f"{self.seed}|{position + 1}".encode(), digest_size=7).digest()
        return (int.from_bytes(digest, "big") >> 3) / 2**53  # 56 bits would round up to 1

    def read_text(self, decode):
        """Adds the text of the newest token. An incomplete character waits for its bytes; a stop string cuts
        text and ids."""
        before = len(self.text)
        known = decode(self.ids[self.anchor : self.decoded])
        piece = decode(self.ids[self.anchor :])[len(known) :]
        self.torn = piece if piece.endswith("\ufffd") else ""
        if not self.torn:
            self.text, self.anchor, self.decoded = self.text + piece, self.decoded, len(self.ids)
        if not self.params.stop:
            return
        text, begin = self.text + self.torn, max(0, before + 1 - max(map(len, self.params.stop)))
        found = [at for stop in self.params.stop if (at := text.find(stop, begin)) >= 0]
        if found:
            self.text, self.torn, self.finish_reason = text[: min(found)], "", "stop"
            first = self.prompt_tokens - self.goes_on
            length = len(self.text) + len(decode(self.ids[first : self.prompt_tokens]))
            while len(decode(self.ids[first:])) > length:
                self.ids.pop()
