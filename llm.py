"""The one seam between a script and a language model: a local engine, or an OpenAI-compatible endpoint.

    model = open_model("out/stage/final")                        # a checkpoint directory
    model = open_model("openai:gpt-4o")                          # OPENAI_API_KEY, OPENAI_BASE_URL
    model = open_model("openai:llama@http://127.0.0.1:8000/v1")  # OPENAI_API_KEY_127_0_0_1, else OPENAI_API_KEY
    replies = model.chat([messages, ...], params)                # list of conversations -> list of Reply, in order

Endpoints are asked over HTTP, so many requests at once and a minute, with a bounded number of tries, growing pauses with jitter
between them (a Retry-After is honoured) and a deadline for each request. What fails for one prompt (400, the context, the
deadline) is a Reply with an `error`; what no request can survive (401, 403, 404) is a UsageError. Keys go to the endpoint and
nowhere else. Answers can be kept on disk, each under the hash of what was asked.
"""

import email.utils
import functools
import hashlib
import itertools
import json
import os
import queue
import random
import re
import threading
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx

import cli
from checkpoint import MANIFEST, find_model
from cli import UsageError
from generate import load_engine

TRIES = 5
TIMEOUT, CONNECT = 120, 10  # seconds without a word of an answer, and for a connection
DEADLINE = 600  # seconds for a request, its tries and pauses included
LONGEST_PAUSE = 60  # seconds
LARGEST, LONGEST_REPLY = 2**24, 2**15  # bytes of an answer, characters of its text
CONCURRENCY = 8  # requests to an endpoint at once
BUNDLED_ACTOR = cli.ROOT / "data" / "stage" / "actor"
WRITING = threading.Lock()


@dataclass
class Reply:
    """An answer; token counts as the engine or the endpoint gives them (0 where it does not).

    ids: its tokens as sampled, by a local model. probabilities: {choice: p} where choices were given. error: why there is none
    (text is empty then). own_tokens: how many of the prompt's tokens stand as this model sampled them in earlier replies.
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


# ---- checkpoints --------------------------------------------------------------------------------------------------------


class Local:
    """A checkpoint on this machine. `identity` says which model computes what: files, device and dtype."""

    local = True

    def __init__(self, directory):
        self.name, self.engine = str(directory), load_engine(directory)
        self.tokenizer = self.engine.tokenizer
        self.identity = f"{fingerprint(find_model(directory))} {self.engine.device.type} {self.engine.kv.dtype}"
        self.markers = tuple(self.tokenizer.specials.values())  # none has a place within a turn, so each ends it
        self.encode = functools.lru_cache(2**15)(self.tokenizer.encode)  # a chat's turns are rendered at each of its calls
        self.asked, self.refused = {}, []  # key -> (what the engine has in line, tokens it sampled itself); (key, Reply)
        self.as_sampled = functools.lru_cache(2**15)(functools.partial(as_sampled, self.tokenizer.decode, self.encode))

    def chat(self, conversations, params, openings=None, on_reply=lambda: None):
        """conversations: lists of messages; params: one SamplingParams for all, or one each. Returns a list of Reply.

        openings: the text each reply is to begin with; it is not part of the Reply. An endpoint cannot be made to, and is not.
        A message may carry `sampled`, the ids that a Reply had, with the `opening` it was asked for: see `as_sampled`. Nothing
        else may be in line. on_reply() is called at each reply.
        """
        openings = openings or [""] * len(conversations)
        params = params if isinstance(params, list) else [params] * len(conversations)
        replies = {}
        try:
            for i, asked in enumerate(zip(conversations, params, openings, strict=True)):
                self.ask(i, *asked)
            while len(replies) < len(conversations):
                done = self.step()
                replies.update(done)
                for _ in done:
                    on_reply()
        finally:
            self.drop()
        return [replies[i] for i in range(len(conversations))]

    def ask(self, key, messages, params, opening=""):
        """Puts a conversation in line, as `chat`; `step` will give its reply under this key."""
        ids, own = self.prompt(messages, opening)
        takes = self.engine.room - 1
        needed = len(ids) + max(len(self.encode(choice)) for choice in params.choices or [""])
        needed += 64 if params.json_schema is not None else 0  # a schema's shortest text has to fit as well
        if needed > takes:
            error = f"a prompt of {needed:,} tokens, and {self.name} takes {takes:,}"
            self.refused.append((key, Reply("", "error", len(ids), error=error)))
            return
        if params.choices is None and params.json_schema is None:
            params = replace(params, stop_ids=self.markers)
        self.asked[key] = self.engine.add(ids, params), own

    def step(self):
        """Lets all conversations in line go on by a step of the engine -> [(key, Reply)] of those that are at their end."""
        done, self.refused = self.refused, []
        if not done and self.asked:
            self.engine.step()
            for key, (line, own) in list(self.asked.items()):
                if c := self.engine.completion(line):
                    counts = (c.prompt_tokens, len(c.ids), c.cached_tokens)
                    done.append((key, Reply(c.text, c.finish_reason, *counts, c.ids, c.probabilities, own_tokens=own)))
                    del self.asked[key]
        return done

    def spoken(self, key):
        """The text of a reply so far, in whole characters."""
        return self.asked[key][0][0].text

    def drop(self):
        """Takes all conversations out of line."""
        for line, _ in self.asked.values():
            self.engine.cancel(line)
        self.asked, self.refused = {}, []

    def prompt(self, messages, opening=""):
        """(ids of the conversation up to a reply that begins with opening, how many of them this model has sampled)."""
        rendered, own = [], 0
        for message in messages:
            if message.get("sampled"):
                ids, kept = self.as_sampled(message["content"], message["opening"], tuple(message["sampled"]))
                own += kept
            else:
                ids = self.encode(message["content"])
            rendered.append({**message, "ids": ids})
        return self.tokenizer.render(rendered, add_generation_prompt=True)[0] + self.encode(opening), own


def as_sampled(decode, encode, content, opening, sampled):
    """(ids of an own turn, how many of them were sampled): the opening, then as many of the sampled tokens as say what the
    content says, then the rest of the content, encoded. White space after the opening stays as it was sampled."""
    spoken = content.removeprefix(opening).lstrip()
    for n in range(len(sampled), 0, -1):
        text = decode(sampled[:n]).lstrip()
        if text and spoken.startswith(text):
            return [*encode(opening), *sampled[:n], *encode(spoken[len(text) :])], n
    return encode(content), 0


def fingerprint(directory):
    """sha256 of a checkpoint: of its manifest, which has the hash of each file, or else of the files themselves; of a file of
    more than 64 MiB its size, its first MiB and 64 KiB at 255 places, since hashing 140 GB takes minutes."""
    directory, digest = Path(directory), hashlib.sha256()
    files = [directory / MANIFEST]
    if not files[0].is_file():
        files = sorted(f for f in directory.iterdir() if f.suffix in (".json", ".safetensors", ".model"))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as stream:
            if size <= 2**26:
                digest.update(stream.read())
            else:
                for i in range(256):
                    stream.seek(i * (size // 256))
                    digest.update(stream.read(2**16 if i else 2**20))
    return "sha256:" + digest.hexdigest()[:16]


# ---- endpoints ----------------------------------------------------------------------------------------------------------


class Endpoint:
    """A model behind an OpenAI-compatible `/chat/completions`.

    pause: seconds before a second try. answers: a directory to keep answers in. concurrency, per_minute: how many requests at
    once, and how many a minute (None: any number); they hold for this model at this address.
    """

    local = False

    def __init__(self, model, url=None, key=None, pause=1.0, answers=None, concurrency=CONCURRENCY, per_minute=None):
        self.name, self.model, self.pause, self.answers = f"openai:{model}", model, pause, answers
        self.url = (url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").rstrip("/")
        try:
            address = httpx.URL(self.url)
            valid = address.scheme in ("http", "https") and address.host
        except httpx.InvalidURL:
            valid = False
        if not valid:
            shown = re.sub(r"//[^/]*@", "//", self.url)
            raise UsageError(f"{self.name} at {shown}: not an http(s) address; look at OPENAI_BASE_URL or what follows the @")
        if address.userinfo or address.query or address.fragment:
            raise UsageError(
                f"{self.name} at {address.host}: the address may have no user, query or fragment; keys go elsewhere"
            )
        variable = "OPENAI_API_KEY_" + re.sub(r"\W", "_", address.host).upper()
        self.key = (key or os.environ.get(variable) or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not self.key:
            raise UsageError(f"{self.name}: set OPENAI_API_KEY or {variable} (to anything, for a server that asks for none)")
        if not self.key.isascii() or not self.key.isprintable() or " " in self.key:
            raise UsageError("OPENAI_API_KEY: holds characters that no key has; was it pasted whole?")
        self.identity = f"{self.model} at {self.url}"
        self.slots, self.concurrency = threading.Semaphore(concurrency), concurrency
        self.interval, self.free_at, self.lock = 60 / per_minute if per_minute else 0, 0.0, threading.Lock()
        self.down = False  # a request has just failed in all its tries: until one is answered, each gets a single one
        header, limits = {"Authorization": f"Bearer {self.key}"}, httpx.Limits(max_connections=None)
        try:
            self.client = httpx.Client(headers=header, limits=limits)
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            raise UsageError(f"{self.name}: {error}; look at the proxies in HTTP_PROXY, ALL_PROXY, NO_PROXY") from None

    def chat(self, conversations, params, openings=None, on_reply=lambda: None):
        """As `Local.chat`; what a reply is to begin with is not passed on, since the interface has no place for it."""
        params = params if isinstance(params, list) else [params] * len(conversations)
        stopped, todo = threading.Event(), iter(range(len(conversations)))
        replies, errors = [None] * len(conversations), []

        def work():
            while not stopped.is_set() and (i := next(todo, None)) is not None:
                try:
                    with self.slots:
                        replies[i] = self.ask(conversations[i], params[i], stopped)
                    on_reply()
                except BaseException as error:  # for good: the others need not go on trying
                    errors.append(error)
                    stopped.set()

        # daemons, so that Ctrl-C need not wait for an answer that may take minutes
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.concurrency, len(conversations)))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            stopped.set()
        if errors:
            raise errors[0]
        return replies

    def ask(self, messages, params, stopped):
        """The Reply to one conversation, from the answers on disk or from the endpoint."""
        body = {
            "model": self.model,
            "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_tokens,
        }
        if params.stop:
            body["stop"] = list(params.stop)
        if params.seed is not None:
            body["seed"] = params.seed
        file = None
        if self.answers and (params.temperature == 0 or params.seed is not None):
            asked = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
            file = Path(self.answers) / asked[:2] / f"{asked}.json"
            try:
                return Reply(**json.loads(file.read_bytes()))
            except (OSError, ValueError, TypeError):  # not there, or no such answer
                pass
        reply = self.fetch(body, stopped)
        if file and reply.error is None and reply.text.strip():  # nothing said may be a fault, and is asked for again
            with WRITING:
                cli.make_dir(file.parent)
                with cli.write_whole(file) as out:
                    json.dump(asdict(reply), out)
        return reply

    def fetch(self, body, stopped):
        """The Reply to a request, after as many tries as it takes and may take; 429 (too many requests) counts as none, and is
        bounded by the deadline alone."""
        begun, failed, most, trouble = None, 0, 1 if self.down else TRIES, ""
        for attempt in itertools.count():
            self.wait_for_a_turn(stopped)
            begun, busy = begun or time.monotonic(), False
            pause = self.pause * 2 ** min(attempt, 10) * random.uniform(0.75, 1.25)
            try:
                response, later = self.post(body, begun + DEADLINE)
            except (httpx.RequestError, zlib.error) as error:  # no connection, no time left, an answer in pieces
                trouble = f"{type(error).__name__}: {error}"
            else:
                trouble = f"HTTP {response.status_code}: {self.said(response)}"
                if response.status_code == 200:
                    reply = self.read(response)
                    if reply:
                        self.down = False
                        return reply
                    trouble = "an answer that is no chat completion"
                elif response.status_code in (401, 403, 404):
                    raise UsageError(f"{self.name} at {self.url} refused: {trouble}")
                elif response.status_code not in (408, 409, 425, 429) and response.status_code < 500:
                    return Reply("", "error", error=f"{self.name} at {self.url} refused: {trouble}")
                busy, asked = response.status_code == 429, retry_after(later)
                pause = pause if asked is None else asked * random.uniform(1, 1.25)  # all that wait come back, but not at once
            failed += not busy
            left = begun + DEADLINE - time.monotonic()
            pause = min(pause, LONGEST_PAUSE)
            if 5 <= pause < left and failed < most:
                cli.note(f"{self.name}: {trouble}; asked again in {pause:.0f} s")
            if failed == most or pause >= left or stopped.wait(pause):
                break
        self.down = self.down or not busy
        after = f"in {most} tries" if failed == most else f"within {DEADLINE:g} s"
        return Reply("", "error", error=f"{self.name} at {self.url} did not answer {after}; the last: {trouble}")

    def post(self, body, deadline):
        """(response, its Retry-After), given up at the deadline (of time.monotonic) however slowly the answer trickles in."""
        left, came = max(0.01, deadline - time.monotonic()), queue.Queue()
        timeout = httpx.Timeout(min(TIMEOUT, left), connect=CONNECT)

        def work():
            try:
                with self.client.stream("POST", f"{self.url}/chat/completions", json=body, timeout=timeout) as response:
                    content = bytearray()
                    for chunk in response.iter_bytes():
                        content += chunk
                        if len(content) > LARGEST or time.monotonic() > deadline:
                            raise httpx.ReadTimeout("the answer came too slowly, or is too large")
                later = response.headers.get("Retry-After", "")
                came.put((httpx.Response(response.status_code, content=bytes(content)), later))
            except BaseException as error:
                came.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            answer = came.get(timeout=left)
        except queue.Empty:
            raise httpx.ReadTimeout("the answer came too slowly") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def wait_for_a_turn(self, stopped):
        """Keeps to so many requests a minute."""
        if self.interval:
            with self.lock:
                at = self.free_at = max(time.monotonic(), self.free_at + self.interval)
            stopped.wait(max(0.0, at - time.monotonic()))

    def said(self, response):
        """The server's own words, short, without the key."""
        try:
            text = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = response.text
        return " ".join(str(text).replace(self.key, "***").split())[:300] or "no message"

    def read(self, response):
        """The Reply in a response; None where it is no chat completion."""

        def count(value):
            return value if type(value) is int and value >= 0 else 0

        try:
            answer = response.json()
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            counts = map(count, (usage.get("prompt_tokens"), usage.get("completion_tokens"), cached))
            text, end = choice["message"]["content"] or "", choice.get("finish_reason") or "stop"
            text = text[:LONGEST_REPLY].encode("utf-8", errors="replace").decode()  # halves of surrogates
            text = text.replace(self.key, "***") if len(self.key) >= 16 else text  # shorter ones may be words
            return Reply(text, str(end), *counts)
        except (ValueError, LookupError, TypeError, AttributeError):
            return None


def retry_after(text):
    """Seconds from now that a Retry-After asks for, in seconds or as a date; None where it is neither, or the date is past."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    try:
        seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        return seconds if seconds > 0 else None
    except (ValueError, TypeError, OverflowError):
        return None


# ---- by name ------------------------------------------------------------------------------------------------------------


def default_actor():
    """The last trained stage actor if there is one, else the bundled one."""
    trained = cli.OUT / "stage" / "final"
    for directory, what in ((trained, "the last trained stage actor"), (BUNDLED_ACTOR, "the bundled stage actor")):
        if (directory / "config.json").is_file():
            cli.note(f"using {what}, {os.path.relpath(directory)}")
            return directory
    raise UsageError("no stage actor has been trained yet; run `torchrun train.py` first, or name a model")


def open_model(spec, **options):
    """`openai:MODEL`, `openai:MODEL@URL` or a checkpoint directory -> a model with `name`, `local`, `identity` and `chat`; one
    that is local also has `ask`, `step`, `spoken` and `drop`.

    options: those of Endpoint (answers, concurrency, per_minute); a checkpoint has no use for them.
    """
    spec = str(spec)
    if spec.startswith("openai:"):
        model, _, url = spec.removeprefix("openai:").partition("@http")
        if not model or re.search(r"@[\w.-]+:\d+|@\w+://", model):
            raise UsageError(f"{spec}: write openai:MODEL or openai:MODEL@URL, with a URL that begins with http:// or https://")
        return Endpoint(model, f"http{url}" if url else None, **options)
    return Local(spec)
