"""What a request asks of the engine, and what it gets back. This module does not import torch."""

import math
from dataclasses import dataclass

from common.files import UsageError


class RequestRefused(UsageError):
    """One request that the engine cannot serve: its prompt or its schema does not fit. Other requests are not
    affected."""


@dataclass
class SamplingParams:
    """How to choose tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep all tokens.

    stop: strings that end the text; stop_ids: token ids that end it besides the tokenizer's. min_p: leaves
    out tokens whose probability is below this share of the highest. repetition_penalty: divides the logits of
    tokens already in prompt or text where positive, multiplies them where negative (Keskar et al. 2019).
    presence_penalty, frequency_penalty: taken off the logits of tokens already in the text, once and for each
    time. logit_bias: {token id: what is added to its logit}. logprobs: whether to return log-probabilities;
    top_logprobs: of how many of the likeliest tokens besides (see Sequence). choices: strings, one of which
    is the text. json_schema: the text is JSON of this schema (see constrain.py).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple = ()
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple = ()
    logprobs: bool = False
    choices: list | None = None
    json_schema: dict | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict | None = None
    top_logprobs: int = 0

    def __post_init__(self):
        for name, good, what in (
            ("temperature", 0 <= self.temperature < math.inf, "a number from 0"),
            ("top_p", 0 < self.top_p <= 1, "a share above 0, at most 1"),
            ("top_k", self.top_k >= 0, "a number from 0"),
            ("max_tokens", self.max_tokens > 0, "a number from 1"),
            ("seed", 0 <= (self.seed or 0) < 2**63, "a number from 0 to 2^63 - 1"),
            ("min_p", 0 <= self.min_p <= 1, "a share from 0 to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "a number from 0.01 to 100"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "a number from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "a number from -2 to 2"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a list of texts, none empty"),
        ):
            if not good:
                raise UsageError(f"{name} is {what}, not {getattr(self, name)!r}")
        if (self.choices is not None) + (self.json_schema is not None) + bool(self.stop or self.stop_ids) > 1:
            raise UsageError(
                "choices, json_schema and stop (or stop_ids) each say where a text ends; give one of them"
            )
        choices = [choice for choice in {*(self.choices or ())} if isinstance(choice, str) and choice]
        if self.choices is not None and (not choices or len(choices) < len(self.choices)):
            raise UsageError(f"choices are different texts, none empty; got {self.choices}")

    @property
    def adjusts(self):
        """Whether logits are changed before a token is chosen."""
        return bool(
            self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
        )


@dataclass
class Completion:
    """What was generated. finish_reason: "stop" (at a stop id or string, which is part of neither ids nor
    text) or "length".

    logprobs: natural log-probability of each of ids under the model itself, before penalties, temperature and
    filters. probabilities: of each choice, where choices were given. cached_tokens: of the prompt, found in
    the cache.
    """

    ids: list
    text: str | None
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    logprobs: list | None = None
    probabilities: dict | None = None
