"""A request inside the engine."""

import hashlib
from dataclasses import dataclass, field

import torch

from engine.constrain import Grammar
from engine.lookup import Lookup
from engine.params import SamplingParams


@dataclass(eq=False)
class Sequence:
    """A prompt and what follows it. Of its tokens the first `cached` have their keys and values in the pages of block_table."""

    ids: list
    params: SamplingParams
    prompt_tokens: int
    limit: int  # tokens in all
    seed: int
    scored: bool = (
        False  # all ids are given, and what is wanted is the log-probability of those after the prompt
    )
    block_table: list = field(default_factory=list)
    digests: list = field(default_factory=list)  # of the prefix up to the end of each full page
    cached: int = 0
    reused: int | None = None  # tokens found in the cache when it first began
    text: str | None = None  # what is certain of the text
    torn: str = ""  # what follows it, as long as a character may be missing bytes
    goes_on: bool = False  # the text goes on from the prompt's last token
    anchor: int = 0  # where to start decoding for the next piece of text: some tokens before `read`
    read: int = 0  # tokens whose text is in `text`
    logprobs: list = field(default_factory=list)
    grammar: Grammar | None = None
    state: tuple | None = None  # of the grammar
    seen: torch.Tensor | None = None  # bool [V], for the repetition penalty
    lookup: Lookup = field(default_factory=Lookup)
    draft: list = field(
        default_factory=list
    )  # guessed tokens that are run at this step, with the one before them
    finish_reason: str | None = None

    @property
    def generated(self):
        return self.ids[self.prompt_tokens :]

    @property
    def pending(self):
        """Tokens that are to be run. The last of a scored text predicts nothing that is asked for."""
        return len(self.ids) - self.scored - self.cached

    def uniform(self, at):
        """A number in [0, 1) for the token after the one at a place; it depends on the seed and the place, and nothing else."""
        digest = hashlib.blake2b(f"{self.seed}|{at + 1}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big") / 2**56
