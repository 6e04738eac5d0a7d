"""What models have in common: their answers, and how reasoning is told apart from what they say."""

import re
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass

REASONING_TOKENS = 2048  # added to max_tokens for a model that reasons before it answers

_NAME = r"(?:\w+:)?(?:think|thinking|thoughts?|reasoning)"
_OPEN = rf"(?:<{_NAME}\b[^<>\n]*>|\[(?-i:THINK)\]|\u25c1think\u25b7)"
_CLOSE = rf"(?:</{_NAME}\s*>|\[/(?-i:THINK)\]|\u25c1/think\u25b7)"
_FLAGS = re.IGNORECASE | re.DOTALL | re.MULTILINE
_BLOCK = re.compile(rf"(?:^[ \t]*{_OPEN}(.*?)|{_OPEN}([^\n]*?)){_CLOSE}", _FLAGS)
_CLOSED = re.compile(rf"\A(.*){_CLOSE}", _FLAGS)  # a closing tag whose opening tag was in the prompt
# at the start of a line, perhaps after a name, or before the end of one
_UNCLOSED = re.compile(rf"(?:(?:^|\A[^\n<:]{{1,60}}:)[ \t]*{_OPEN}|{_OPEN}[ \t]*$)(.*)\Z", _FLAGS)
_FINAL = re.compile(r"<\|channel\|>\s*final\b.*?<\|message\|>(.*?)(?:<\|\w+\|>|\Z)", re.DOTALL)
_HARMONY = re.compile(r"<\|start\|>\w*|<\|channel\|>[^<]*|<\|\w+\|>")


@dataclass
class Reply:
    """An answer of a model."""

    text: str  # what the model says
    finish_reason: str
    prompt_tokens: int = 0  # as the endpoint counts, 0 if it does not
    completion_tokens: int = 0
    cached_tokens: int = 0
    ids: list | None = None  # of a local model: all sampled tokens, reasoning included
    probabilities: dict | None = None  # {choice: p} where choices were given
    error: str | None = None  # why there is no answer; text is then empty
    own_tokens: int = 0  # prompt tokens that this model sampled in earlier replies
    reasoning: str = ""  # what the model wrote for itself, which nobody else may see


class Model:
    """A model that is asked by `submit(messages, params, opening)`, which returns the Future of a Reply.

    A message may carry `sampled`, the ids of the Reply it was, with the `opening` it had, so that a local
    model need not read it again. opening: what a local model's reply begins with; it is not in the Reply.
    """

    def step(self):
        """Brings all requests on; those to an endpoint proceed by themselves."""

    def chat(self, conversations, params, openings=None, on_reply=lambda: None):
        """The Replies to a list of conversations; params: SamplingParams for all, or a list. on_reply() is
        called after each reply."""
        openings = openings or [""] * len(conversations)
        params = params if isinstance(params, list) else [params] * len(conversations)
        futures = [self.submit(*request) for request in zip(conversations, params, openings, strict=True)]
        try:
            pending = futures
            while pending:
                self.step()
                # not without end: a Ctrl-C just before a wait is noticed only after it
                done, pending = wait(pending, 0 if self.local else 1, FIRST_COMPLETED)
                for future in done:
                    future.result()  # raises what ended the request
                    on_reply()
            return [future.result() for future in futures]
        finally:  # after an error or Ctrl-C; the latest first: they may be waiting for an earlier one's place
            for future in reversed(futures):
                future.cancel()


def split_reasoning(text):
    """(reasoning, what is said) of a reply's raw text; ("", text unchanged) where there is no reasoning.

    Reasoning is: a block in tags (<think>, <thinking>, <thought>, <reasoning>, <seed:think>, [THINK],
    ◁think▷) that opens at the start of a line or closes on the line it opened on; everything before a
    closing tag without an opening one (it was in the prompt); everything after an opening tag at the start or
    the end of a line that is never closed; all channels but `final` of OpenAI's Harmony format, with or
    without its special tokens. Any other opening tag that does not close is only mentioned.
    """
    if "<|channel|>" in text:
        return _HARMONY.sub("\n", _FINAL.sub("", text)).strip(), "\n".join(_FINAL.findall(text)).strip()
    before, marker, final = text.rpartition("assistantfinal")
    if marker:
        return re.sub(r"\A\s*analysis", "", before).strip(), final.strip()
    if bare := re.match(r"\s*analysis(?=\w)(.*)", text, re.DOTALL):
        return bare[1].strip(), ""
    found = []

    def take(block):
        found.append(next(filter(None, block.groups()), "").strip())
        return ""

    spoken, count = _BLOCK.subn(take, text)
    for pattern in (_CLOSED, _UNCLOSED):
        spoken, more = pattern.subn(take, spoken)
        count += more
    return ("\n".join(filter(None, found)), spoken.strip()) if count else ("", text)


def spoken_so_far(text):
    """What is said in a reply that is still being generated, without a tag that may only have begun."""
    spoken = split_reasoning(text)[1]
    if any(mark.startswith(spoken.strip()) for mark in ("[THINK]", "analysis", "<|start|>assistant")):
        return ""
    return re.sub(r"[<\u25c1][^\s>]*\Z", "", spoken)


def open_tag(prompt):
    """The tag that opens reasoning at the end of a prompt, so that the reply begins inside it; else ""."""
    found = re.search(rf"({_OPEN})\s*\Z", prompt, _FLAGS)
    return found[1] if found else ""


def needs_room(reply):
    """Whether a reply was cut off by max_tokens before the model had finished reasoning."""
    hidden = reply.ids is None  # an endpoint may not show its reasoning
    return reply.finish_reason == "length" and not reply.text and bool(reply.reasoning or hidden)
