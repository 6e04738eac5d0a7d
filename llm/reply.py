"""What a language model answers."""

from dataclasses import dataclass


@dataclass
class Reply:
    """An answer; token counts as the engine or the endpoint gives them (0 where it does not).

    ids: its tokens as sampled, by a local model. probabilities: {choice: p} where choices were given. error: why there is none
    (text is empty then). own_tokens: how many of the prompt's tokens stand as this model sampled them in earlier replies.
    reasoning: what the model thought before the text, apart from it.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    ids: list | None = None
    probabilities: dict | None = None
    error: str | None = None
    own_tokens: int = 0
    reasoning: str = ""
