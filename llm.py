"""The one seam between a script and a language model: a local engine, or an OpenAI-compatible endpoint.

    model = open_model("out/stage/final")            # a checkpoint directory
    model = open_model("openai:gpt-4o")              # OPENAI_API_KEY, OPENAI_BASE_URL
    replies = model.chat([messages, ...], params)    # list of conversations -> list of Reply, in order

Endpoints are asked over HTTP with time-outs, a bounded number of tries and growing pauses between them (a Retry-After is
honoured); what more tries cannot mend (400, 401, 403, 404) ends at once. Keys are sent to the endpoint and shown nowhere.
"""

import os
import random
import re
import threading
import zlib
from dataclasses import dataclass

import httpx

import cli
from cli import UsageError
from generate import load_engine

TRIES = 5
TIMEOUT = httpx.Timeout(120, connect=10)  # seconds for an answer, and for a connection
LONGEST_PAUSE = 60  # seconds
CONCURRENCY = 8  # requests to an endpoint at once
BUNDLED_ACTOR = cli.ROOT / "data" / "stage" / "actor"


@dataclass
class Reply:
    """An answer; token counts as the engine or the endpoint gives them (0 where it does not)."""

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None


class Local:
    """A checkpoint on this machine."""

    local = True

    def __init__(self, directory):
        self.name, self.engine = str(directory), load_engine(directory)

    def chat(self, conversations, params, openings=None, on_reply=None):
        """conversations: lists of messages; params: one SamplingParams for all, or one each. Returns a list of Reply.

        openings: the text each reply is to begin with; it is not part of the Reply. An endpoint cannot be made to, and is not.
        on_reply(i, reply): called for each reply as it comes, of an endpoint from another thread.
        """
        prompts = [self.engine.tokenizer.render(messages, add_generation_prompt=True)[0] for messages in conversations]
        if openings:
            prompts = [prompt + self.engine.tokenizer.encode(text) for prompt, text in zip(prompts, openings, strict=True)]
        done = self.engine.generate(prompts, params)
        replies = [Reply(c.text, c.finish_reason, c.prompt_tokens, len(c.ids), c.cached_tokens) for c in done]
        for i, reply in enumerate(replies if on_reply else ()):
            on_reply(i, reply)
        return replies


class Endpoint:
    """A model behind an OpenAI-compatible `/chat/completions`."""

    local = False

    def __init__(self, model, url=None, key=None, pause=1.0):
        self.name, self.model, self.pause = f"openai:{model}", model, pause
        self.url = (url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").rstrip("/")
        self.key = (key or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not self.key:
            raise UsageError(f"{self.name}: set OPENAI_API_KEY (to anything, for a server that asks for none)")
        try:
            valid = httpx.URL(self.url).scheme in ("http", "https") and httpx.URL(self.url).host
        except httpx.InvalidURL:
            valid = False
        if not valid:
            raise UsageError(f"OPENAI_BASE_URL {self.url}: not an http(s) address")
        if not self.key.isascii() or not self.key.isprintable() or " " in self.key:
            raise UsageError("OPENAI_API_KEY: holds characters that no key has; was it pasted whole?")
        self.stopped = threading.Event()
        self.client = httpx.Client(timeout=TIMEOUT, headers={"Authorization": f"Bearer {self.key}"})

    def chat(self, conversations, params, openings=None, on_reply=None):
        """As `Local.chat`; what a reply is to begin with is not passed on, since the interface has no place for it."""
        params = params if isinstance(params, list) else [params] * len(conversations)
        self.stopped.clear()  # a call before this one may have ended early
        todo, replies, errors = iter(range(len(conversations))), [None] * len(conversations), []

        def work():
            while not self.stopped.is_set() and (i := next(todo, None)) is not None:
                try:
                    replies[i] = self.ask(conversations[i], params[i])
                    if on_reply:
                        on_reply(i, replies[i])
                except Exception as error:  # for good: the others need not go on trying
                    errors.append(error)
                    self.stopped.set()

        # daemons, so that Ctrl-C need not wait for an answer that may take minutes
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(CONCURRENCY, len(conversations)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return replies

    def ask(self, messages, params):
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_tokens,
        }
        if params.stop:
            body["stop"] = list(params.stop)
        if params.seed is not None:
            body["seed"] = params.seed
        for attempt in range(TRIES):
            pause = self.pause * 2**attempt * random.uniform(0.75, 1.25)
            try:
                response = self.client.post(f"{self.url}/chat/completions", json=body)
            except (httpx.RequestError, zlib.error) as error:  # no connection, no time left, an answer in pieces
                trouble = f"{type(error).__name__}: {error}"
            else:
                trouble = f"HTTP {response.status_code}: {self.said(response)}"
                if response.status_code == 200:
                    reply = self.read(response)
                    if reply:
                        return reply
                    trouble = "an answer that is no chat completion"
                elif response.status_code not in (408, 409, 425, 429) and response.status_code < 500:
                    raise UsageError(f"{self.name} at {self.url} refused: {trouble}")
                asked = response.headers.get("Retry-After", "")
                pause = float(asked) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", asked) else pause
            if attempt == TRIES - 1 or self.stopped.wait(min(pause, LONGEST_PAUSE)):
                break
        raise UsageError(f"{self.name} at {self.url} did not answer in {TRIES} tries; the last: {trouble}")

    def said(self, response):
        """The server's own words, short, without the key."""
        try:
            text = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = response.text
        return " ".join(str(text).replace(self.key, "***").split())[:300] or "no message"

    @staticmethod
    def read(response):
        try:
            answer = response.json()
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            counts = (usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0, cached)
            text = choice["message"]["content"] or ""
            text = text.encode("utf-8", errors="replace").decode() if isinstance(text, str) else None  # halves of surrogates
            return Reply(text, choice.get("finish_reason") or "stop", *counts) if text is not None else None
        except (ValueError, LookupError, TypeError, AttributeError):
            return None


def default_actor():
    """The last trained stage actor if there is one, else the bundled one."""
    trained = cli.OUT / "stage" / "final"
    for directory, what in ((trained, "the last trained stage actor"), (BUNDLED_ACTOR, "the bundled stage actor")):
        if (directory / "config.json").is_file():
            cli.note(f"using {what}, {os.path.relpath(directory)}")
            return directory
    raise UsageError("no stage actor has been trained yet; run `torchrun train.py` first, or name a model")


def open_model(spec):
    """`openai:MODEL` or a checkpoint directory -> a model with `name` and `chat`."""
    spec = str(spec)
    if spec.startswith("openai:"):
        if not spec.removeprefix("openai:"):
            raise UsageError("openai: what model? write openai:MODEL")
        return Endpoint(spec.removeprefix("openai:"))
    return Local(spec)
