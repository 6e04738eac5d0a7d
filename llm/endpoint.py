"""A model behind an OpenAI-compatible endpoint."""

import email.utils
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
from dataclasses import asdict
from pathlib import Path

import httpx

from common import terminal
from common.files import UsageError, make_dir, write_whole
from llm.reply import Reply

TRIES = 5


TIMEOUT, CONNECT = 120, 10  # seconds without a word of an answer, and for a connection


DEADLINE = 600  # seconds for a request, its tries and pauses included


LONGEST_PAUSE = 60  # seconds


LARGEST, LONGEST_REPLY = 2**24, 2**15  # bytes of an answer, characters of its text


CONCURRENCY = 8  # requests to an endpoint at once


WRITING = threading.Lock()


class Endpoint:
    """A model behind an OpenAI-compatible `/chat/completions`.

    pause: seconds before a second try. answers: a directory to keep answers in. concurrency, per_minute: how many requests at
    once, and how many a minute (None: any number); they hold for this model at this address.
    """

    local = False

    def __init__(
        self, model, url=None, key=None, pause=1.0, answers=None, concurrency=CONCURRENCY, per_minute=None
    ):
        self.name, self.model, self.pause, self.answers = f"openai:{model}", model, pause, answers
        self.url = (url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").rstrip("/")
        try:
            address = httpx.URL(self.url)
            valid = address.scheme in ("http", "https") and address.host
        except httpx.InvalidURL:
            valid = False
        if not valid:
            shown = re.sub(r"//[^/]*@", "//", self.url)
            raise UsageError(
                f"{self.name} at {shown}: not an http(s) address; look at OPENAI_BASE_URL or what follows the @"
            )
        if address.userinfo or address.query or address.fragment:
            raise UsageError(
                f"{self.name} at {address.host}: the address may have no user, query or fragment; keys go elsewhere"
            )
        variable = "OPENAI_API_KEY_" + re.sub(r"\W", "_", address.host).upper()
        self.key = (key or os.environ.get(variable) or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not self.key:
            raise UsageError(
                f"{self.name}: set OPENAI_API_KEY or {variable} (to anything, for a server that asks for none)"
            )
        if not self.key.isascii() or not self.key.isprintable() or " " in self.key:
            raise UsageError("OPENAI_API_KEY: holds characters that no key has; was it pasted whole?")
        self.identity = f"{self.model} at {self.url}"
        self.slots, self.concurrency = threading.Semaphore(concurrency), concurrency
        self.interval, self.free_at, self.lock = 60 / per_minute if per_minute else 0, 0.0, threading.Lock()
        self.down = (
            False  # a request has just failed in all its tries: until one is answered, each gets a single one
        )
        header, limits = {"Authorization": f"Bearer {self.key}"}, httpx.Limits(max_connections=None)
        try:
            self.client = httpx.Client(headers=header, limits=limits)
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            raise UsageError(
                f"{self.name}: {error}; look at the proxies in HTTP_PROXY, ALL_PROXY, NO_PROXY"
            ) from None

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
        threads = [
            threading.Thread(target=work, daemon=True)
            for _ in range(min(self.concurrency, len(conversations)))
        ]
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
        if (
            file and reply.error is None and reply.text.strip()
        ):  # nothing said may be a fault, and is asked for again
            with WRITING:
                make_dir(file.parent)
                with write_whole(file) as out:
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
            except (
                httpx.RequestError,
                zlib.error,
            ) as error:  # no connection, no time left, an answer in pieces
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
                pause = (
                    pause if asked is None else asked * random.uniform(1, 1.25)
                )  # all that wait come back, but not at once
            failed += not busy
            left = begun + DEADLINE - time.monotonic()
            pause = min(pause, LONGEST_PAUSE)
            if 5 <= pause < left and failed < most:
                terminal.note(f"{self.name}: {trouble}; asked again in {pause:.0f} s")
            if failed == most or pause >= left or stopped.wait(pause):
                break
        self.down = self.down or not busy
        after = f"in {most} tries" if failed == most else f"within {DEADLINE:g} s"
        return Reply(
            "", "error", error=f"{self.name} at {self.url} did not answer {after}; the last: {trouble}"
        )

    def post(self, body, deadline):
        """(response, its Retry-After), given up at the deadline (of time.monotonic) however slowly the answer trickles in."""
        left, came = max(0.01, deadline - time.monotonic()), queue.Queue()
        timeout = httpx.Timeout(min(TIMEOUT, left), connect=CONNECT)

        def work():
            try:
                with self.client.stream(
                    "POST", f"{self.url}/chat/completions", json=body, timeout=timeout
                ) as response:
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
