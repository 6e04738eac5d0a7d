"""A model behind an OpenAI-compatible endpoint: concurrency, retries, deadlines, and answers kept on disk.

All requests of a process run as coroutines on one event loop in one background thread; whoever waits for a
Reply, or is interrupted by Ctrl-C, only waits for or cancels a future.
"""

import asyncio
import email.utils
import functools
import hashlib
import json
import os
import random
import re
import threading
import time
import weakref
import zlib
from asyncio import sleep
from dataclasses import asdict
from pathlib import Path

import httpx

from common import terminal
from common.files import UsageError, make_dir, write_whole
from llm.reply import REASONING_TOKENS, Model, Reply, needs_room
from llm.request import change_for, changed, describe, read_error, read_reply, request_body

TRIES = 5
TIMEOUT, CONNECT_TIMEOUT = 120, 10  # seconds without a byte of an answer, and for a connection
DEADLINE = 600  # seconds for a request, its retries and pauses included
LONGEST_PAUSE = 60  # seconds
LARGEST = 2**24  # bytes of an answer
CONCURRENCY = 8  # requests in flight at an address
ADDRESSES = weakref.WeakValueDictionary()  # those of which a model is in use


@functools.cache
def event_loop(process):
    """The event loop of this process (its id, since a fork has no threads), in a daemon thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


class Address:
    """What all models at one address share: the limits, and how requests to each model had to be changed."""

    def __init__(self, concurrency, per_minute):
        self.slots = asyncio.Semaphore(concurrency)
        self.interval, self.next_start = 60 / per_minute if per_minute else 0, 0.0
        self.changes = {}  # model -> {parameter: its new name, None if left out}

    @classmethod
    def at(cls, url, *limits):
        """The one address of a URL with these limits."""
        key = (os.getpid(), url.host, url.port, limits)
        address = ADDRESSES.get(key) or cls(*limits)
        return ADDRESSES.setdefault(key, address)

    async def wait_for_start(self):
        """Spaces requests out to the number per minute."""
        if self.interval:
            start = self.next_start = max(time.monotonic(), self.next_start + self.interval)
            await sleep(start - time.monotonic())


class Endpoint(Model):
    """A model behind an OpenAI-compatible `/chat/completions`.

    pause: seconds before the first retry. answers: a directory to keep answers in (None: they are not kept).
    concurrency, per_minute: requests in flight, and begun per minute (None: any number), over all models at
    this address. reasoning_tokens: what is added to max_tokens, once a reply has been cut off while the model
    was reasoning.
    """

    local, chat_format_reason = False, None

    def __init__(self, model, url=None, key=None, pause=1.0, answers=None,
                 concurrency=CONCURRENCY, per_minute=None):  # fmt: skip
        self.name, self.model, self.pause, self.answers = f"openai:{model}", model, pause, answers
        self.url = (url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").rstrip("/")
        parsed = self.check_url()
        self.key = self.find_key(key, parsed.host)
        self.identity = f"{self.model} at {self.url}"
        self.address = Address.at(parsed, concurrency, per_minute)
        self.changes = self.address.changes.setdefault(model, {})
        self.reasoning_tokens = 0
        self.continues = False  # whether the server is serve.py, which goes on from a last assistant message
        self.down = False  # a request failed in all its tries; until one succeeds, each is tried only once
        try:
            headers, limits = {"Authorization": f"Bearer {self.key}"}, httpx.Limits(max_connections=None)
            self.client = httpx.AsyncClient(headers=headers, limits=limits)
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            raise UsageError(f"{self.name}: {error}; check HTTP_PROXY, ALL_PROXY and NO_PROXY") from None

    def check_url(self):
        """The URL in parts; UsageError, without the password, if it is not a plain http(s) URL."""
        try:
            url = httpx.URL(self.url)
            valid = url.scheme in ("http", "https") and url.host
        except httpx.InvalidURL:
            valid = False
        if not valid:
            shown, hint = re.sub(r"//[^/]*@", "//", self.url), "check OPENAI_BASE_URL and the @URL"
            raise UsageError(f"{self.name} at {shown}: not an http(s) URL; {hint}")
        if url.userinfo or url.query or url.fragment:
            raise UsageError(f"{self.name} at {url.host}: the URL may have no user, query or fragment")
        return url

    def find_key(self, key, host):
        """The key for a host; UsageError if there is none or it cannot be one."""
        variable = "OPENAI_API_KEY_" + re.sub(r"\W", "_", host).upper()
        key = (key or os.environ.get(variable) or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not key:
            raise UsageError(f"{self.name}: set OPENAI_API_KEY or {variable} (any word, if none is needed)")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError("OPENAI_API_KEY: has characters that no key has; was it pasted incompletely?")
        return key

    @property
    def adaptations(self):
        """How requests are changed because the server refused a parameter, in words."""
        return [describe(name, change) for name, change in self.changes.items()]

    def submit(self, messages, params, opening=""):
        """A Future of the Reply, as in `chat`; openings are sent to serve.py alone. UsageError: none can
        succeed."""
        body = request_body(self.model, messages, params)
        return asyncio.run_coroutine_threadsafe(self.answer(body, params, opening), event_loop(os.getpid()))

    def opened(self, body, opening):
        """The body for a server that continues a last assistant message: the one with the opening."""
        added = [{"role": "assistant", "content": opening}] if opening else []
        return {**body, "messages": [*body["messages"], *added]}

    def file_of(self, body):
        """Where the answer to a body is kept."""
        digest = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        return Path(self.answers) / digest[:2] / f"{digest}.json"

    async def answer(self, body, params, opening):
        """The Reply to a request, from the answers on disk or from the endpoint."""
        async with self.address.slots:
            keeps = self.answers and (params.temperature == 0 or params.seed is not None)
            opened = self.opened(body, opening)
            for sent in (opened, body) if keeps else ():
                if (reply := self.kept(self.file_of(sent))) and (sent == opened or not self.continues):
                    return reply
            added, sent = self.reasoning_tokens, opened if self.continues else body
            reply = await self.fetch(sent, added)
            if self.continues and sent != opened:  # the answer was the first of serve.py
                reply = await self.fetch(sent := opened, added)
            if needs_room(reply) and not added:
                self.reasoning_tokens = REASONING_TOKENS
                reply = await self.fetch(sent, REASONING_TOKENS)
            if keeps and reply.error is None and reply.text.strip():  # an empty one may be a fault
                file = self.file_of(sent)
                make_dir(file.parent)
                with write_whole(file) as out:
                    kept = {"reply": asdict(reply), "changes": self.changes, "continues": self.continues}
                    json.dump(kept, out)
            return reply

    def kept(self, file):
        """The Reply in a file, or None; the changes that its request needed hold from then on, and what the
        server was."""
        try:
            kept = json.loads(file.read_bytes())
            reply, changes = Reply(**kept["reply"]), dict(kept["changes"])
        except (OSError, ValueError, TypeError, LookupError):
            return None
        for name, change in changes.items():
            if name not in self.changes:
                self.learn(name, change, "as for answers on disk")
        self.continues = kept.get("continues", self.continues)
        return reply

    def learn(self, name, change, reason):
        """Changes a parameter in all requests from now on."""
        if self.changes.get(name, "") != change:
            self.changes[name] = change
            terminal.note(f"{self.name}: {describe(name, change)} from now on ({reason})")

    async def fetch(self, body, added_tokens):
        """The Reply to a request, after retries; those after 429 are limited by the deadline alone."""
        body = {**body, "max_tokens": body["max_tokens"] + added_tokens}
        tries, failed, retries, deadline = 1 if self.down else TRIES, 0, 0, None
        while True:
            await self.address.wait_for_start()
            deadline = deadline or time.monotonic() + DEADLINE
            outcome = await self.attempt(changed(body, self.changes), deadline)
            if isinstance(outcome, Reply):
                self.down = self.down and outcome.error is not None
                return outcome
            if outcome is None:
                continue
            trouble, busy, asked_pause = outcome
            failed += not busy
            pause = self.pause * 2 ** min(retries, 10) * random.uniform(0.75, 1.25)
            if asked_pause is not None:  # spread out, so that not all come back at the same moment
                pause = asked_pause * random.uniform(1, 1.25)
            pause, retries = min(pause, LONGEST_PAUSE), retries + 1
            if failed == tries or pause >= deadline - time.monotonic():
                break
            if pause >= 5:
                terminal.note(f"{self.name}: {trouble}; asked again in {pause:.0f} s")
            await sleep(pause)
        self.down = self.down or not busy
        limit = f"in {tries} tries" if failed == tries else f"within {DEADLINE:g} s"
        return self.failure(f"did not answer {limit}; the last: {trouble}")

    def failure(self, what):
        return Reply("", "error", error=f"{self.name} at {self.url} {what}")

    async def attempt(self, body, deadline):
        """Sends a request once. UsageError where no request can succeed.

        Returns a Reply; or, for a retry, (what went wrong, whether it is 429, Retry-After in seconds if any);
        or None where a parameter is changed from now on and the request is to be sent again at once.
        """
        try:
            status, text, retry_after = await self.post(body, deadline)
        except (httpx.RequestError, zlib.error, TimeoutError) as error:
            return describe_error(error), False, None
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        status, words, parameter = read_error(status, answer, text)
        if status == 200:
            try:
                reply = read_reply(answer)
            except ValueError as error:
                return f"{error}: {self.shown(text)}", False, None
            self.continues = str(answer.get("system_fingerprint")).startswith("coser ")
            return self.failure(f"gave no answer: {self.shown(reply.error)}") if reply.error else reply
        trouble = f"HTTP {status}: {self.shown(words)}"
        if status in (401, 403, 404):
            raise UsageError(f"{self.name} at {self.url} refused: {trouble}")
        if status in (400, 422) and (change := change_for(body, f"{parameter} {words}")):
            self.learn(*change, trouble)
            return None
        if status not in (408, 409, 425, 429) and status < 500:
            return self.failure(f"refused: {trouble}")
        return trouble, status == 429, seconds_of(retry_after)

    async def post(self, body, deadline):
        """(status, text, Retry-After) of an answer; TimeoutError at the deadline, even in mid-answer."""
        left = max(0.01, deadline - time.monotonic())
        timeout = httpx.Timeout(min(TIMEOUT, left), connect=CONNECT_TIMEOUT)
        content, request = bytearray(), dict(url=f"{self.url}/chat/completions", json=body, timeout=timeout)
        async with asyncio.timeout(left), self.client.stream("POST", **request) as response:
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > LARGEST:
                    raise httpx.ReadError("the answer is too large")
        text = content.decode(errors="replace")
        if len(self.key) >= 16:  # a shorter one may be a word
            text = text.replace(self.key, "***")
        return response.status_code, text, response.headers.get("Retry-After", "")

    def shown(self, words):
        """A server's words for an error message: one short line, without HTML tags and without the key."""
        words = re.sub(r"<[^<>]*>", " ", words.replace(self.key, "***"))
        return " ".join(words.split())[:300] or "no message"


def describe_error(error):
    """What went wrong with a connection, in the words of the first cause."""
    if isinstance(error, (TimeoutError, httpx.TimeoutException)):
        return f"timed out ({type(error).__name__})"
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {error}"


def seconds_of(retry_after):
    """Seconds from now that a Retry-After (a number or a date) asks for; None if it is neither or past."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", retry_after):
        return float(retry_after)
    try:
        seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        return seconds if seconds > 0 else None
    except (ValueError, TypeError, OverflowError):
        return None
