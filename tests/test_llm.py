"""The seam to models: an endpoint over real HTTP on 127.0.0.1, a checkpoint, and which actor plays when none
is named."""

import email.utils
import http.server
import io
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from conftest import random_config, random_model

import checkpoint
import llm
from common import files
from common.files import ROOT, UsageError
from generate import SamplingParams
from llm import Reply, endpoint, local
from llm.endpoint import Endpoint
from llm.reply import REASONING_TOKENS, Model, open_tag, split_reasoning, spoken_so_far
from text.hf import QWEN2_PATTERN
from tokenizer import load_tokenizer

KEY = "sk-test-4f9c2e71d0"
HELLO = [{"role": "user", "content": "hello"}]


class Server(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on 127.0.0.1 that keeps all it was asked in `requests`.

    answer(body, number) gives the text of a completion, or (status, payload, headers) with a payload of bytes
    or for JSON, or None to hang up without a word.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer):
        self.answer, self.requests, self.lock = answer, [], threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def use(self, monkeypatch):
        """Makes it the endpoint of `openai:MODEL` on the command line."""
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("OPENAI_BASE_URL", self.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        """A client that has left is no trouble."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(
                SimpleNamespace(path=self.path, headers=dict(self.headers), body=body)
            )
        answer = self.server.answer(body, number)
        if answer is None:
            return
        status, payload, headers = (200, completion(answer), {}) if isinstance(answer, str) else answer
        payload = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": len(payload),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


def completion(text):
    """What a server answers that says `text`."""
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


class Script:
    """A model object that answers with `say(messages, params)` and keeps (messages, params) of all it was
    asked.

    `openings` are what its replies were to begin with, `batches` how many were asked for at a time.
    """

    name, local, identity, adaptations, chat_format_reason = "script", True, "script", (), None

    def __init__(self, say):
        self.say, self.asked, self.openings, self.batches, self.line = say, [], [], [], []

    def submit(self, messages, params, opening=""):
        self.line.append((Future(), messages, params, opening))
        return self.line[-1][0]

    def step(self):
        futures, *asked = zip(*self.line, strict=True) if self.line else [()] * 4
        self.line = []
        for future, reply in zip(futures, self.chat(*map(list, asked)) if futures else (), strict=True):
            future.set_result(reply)

    def chat(self, conversations, params, openings=None, on_reply=lambda: None):
        params = params if isinstance(params, list) else [params] * len(conversations)
        self.openings += openings or [""] * len(conversations)
        self.batches.append(len(conversations))
        pairs = list(zip(conversations, params, strict=True))
        self.asked += pairs
        return [Reply(self.say(*pair), "stop", 7, 3, 2) for pair in pairs]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    """Requests to 127.0.0.1 go there, whatever the surroundings."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries, recorded and not waited for."""
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(endpoint, "sleep", sleep)
    return slept


def ask(server, conversations=(HELLO,), params=None, **options):
    """Replies of an Endpoint at the server."""
    endpoint = Endpoint("m", **{"url": server.url, "key": KEY, "pause": 0.01, **options})
    return endpoint.chat(list(conversations), params or SamplingParams(0))


def refusal(server, **options):
    """The one line an Endpoint at the server ends with, for all requests or for each one."""
    try:
        replies = ask(server, **options)
    except UsageError as error:
        line = str(error)
    else:
        assert all(reply.text == "" and reply.finish_reason == "error" for reply in replies)
        line = replies[0].error
    assert "\n" not in line
    return line


# ---- what is sent, and what comes back -------------------------------------------------------------------


def test_body_and_headers_sent():
    """A request carries the model, the messages and the parameters, the key as bearer, and nothing else."""
    messages = [
        {"role": "system", "content": "Be Lear. {}"},
        {"role": "user", "content": "Nothing, my lord.\n\n\u2014 \u6f22"},
    ]
    with Server(lambda *_: "Nothing?") as server:
        ask(
            server, [messages], SamplingParams(0.7, 0.9, 0, 33, ("END", "\n\n"), seed=5), url=server.url + "/"
        )
        ask(server, [messages], SamplingParams(0))
        ask(server, [messages], SamplingParams(0, seed=0))
    first, second, third = server.requests
    assert first.path == "/v1/chat/completions"
    assert first.headers["Authorization"] == f"Bearer {KEY}"
    expected = {"model": "m", "messages": messages, "temperature": 0.7, "max_tokens": 33}
    assert first.body == {**expected, "top_p": 0.9, "stop": ["END", "\n\n"], "seed": 5}
    assert second.body == {**expected, "temperature": 0, "max_tokens": 256}
    assert third.body == {**second.body, "seed": 0}


def test_replies_come_in_order_and_are_asked_for_together():
    """Replies stand in the order of the conversations, each asked with its own parameters, several at once
    but not too many."""
    together, at_once, most = threading.Barrier(3), 0, 0

    def answer(body, number):
        nonlocal at_once, most
        with server.lock:
            at_once += 1
            most = max(most, at_once)
        if number < 3:
            together.wait(20)  # none of the first three is answered before all of them are asked
        time.sleep(random.uniform(0, 0.02))
        with server.lock:
            at_once -= 1
        return f"{body['messages'][0]['content']}/{body['seed']}"

    conversations = [[{"role": "user", "content": f"question {i}"}] for i in range(30)]
    with Server(answer) as server:
        replies = ask(server, conversations, [SamplingParams(0, seed=100 + i) for i in range(30)])
    assert [reply.text for reply in replies] == [f"question {i}/{100 + i}" for i in range(30)]
    assert 3 <= most <= endpoint.CONCURRENCY


def test_token_counts_are_the_endpoints():
    """Counts are taken from `usage`, cached ones included, and are 0 where there is none."""
    usage = {"prompt_tokens": 40, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 32}}
    known = {"choices": [{"message": {"content": "hi"}, "finish_reason": "length"}], "usage": usage}
    for payload, expected in (
        (known, Reply("hi", "length", 40, 9, 32)),
        ({**known, "usage": {**usage, "prompt_tokens_details": None}}, Reply("hi", "length", 40, 9, 0)),
        ({**known, "usage": None}, Reply("hi", "length", 0, 0, 0)),
        (completion(None), Reply("", "stop", 0, 0, 0)),
    ):
        with Server(lambda *_, payload=payload: (200, payload, {})) as server:
            assert ask(server) == [expected]


# ---- trouble ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 529])
def test_passing_trouble_is_retried_with_growing_pauses(status, pauses):
    """Overload and server errors are asked again, each time after about twice the pause."""
    with Server(lambda _, n: "at last" if n == 3 else (status, {"error": {"message": "busy"}}, {})) as server:
        assert ask(server)[0].text == "at last"
    assert len(server.requests) == 4
    assert len({json.dumps(request.body) for request in server.requests}) == 1
    assert len(pauses) == 3
    assert all(0.7 * 0.01 * 2**i <= pause <= 1.3 * 0.01 * 2**i for i, pause in enumerate(pauses))


@pytest.mark.parametrize("asked", ["7", "0", "2.5"])
def test_retry_after_is_honoured(asked, pauses):
    """A Retry-After in seconds is waited for as told."""
    with Server(lambda _, n: "at last" if n else (429, {}, {"Retry-After": asked})) as server:
        assert ask(server)[0].text == "at last"
    assert len(pauses) == 1 and float(asked) <= pauses[0] <= 1.25 * float(asked)


def test_retry_after_as_a_date_is_honoured(pauses):
    """A Retry-After of twenty seconds from now, as a date of HTTP, is waited for to a second."""
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    with Server(lambda _, n: "at last" if n else (503, {}, {"Retry-After": date})) as server:
        assert ask(server)[0].text == "at last"
    assert len(pauses) == 1 and 18 <= pauses[0] <= 25


@pytest.mark.parametrize("asked", ["Wed, 21 Oct 2015 07:28:00 GMT", "soon", "", "-5", "1.2.3", "\xb2", "nan"])
def test_retry_after_of_another_form_leaves_the_usual_pause(asked, pauses):
    """A Retry-After that is no number of seconds changes nothing."""
    with Server(lambda _, n: "at last" if n else (503, {}, {"Retry-After": asked})) as server:
        assert ask(server)[0].text == "at last"
    assert len(pauses) == 1 and 0.007 <= pauses[0] <= 0.013


def test_no_pause_is_endless(pauses, capsys):
    """A server that asks for a day gets a minute, and whoever waits is told why, without the key."""
    with Server(
        lambda _, n: (
            "at last" if n else (429, {"error": {"message": f"busy {KEY}"}}, {"Retry-After": "86400"})
        )
    ) as server:
        ask(server)
    told = " ".join(capsys.readouterr().err.split())
    assert "openai:m: HTTP 429: busy ***; asked again in 60 s" in told and KEY not in told
    assert pauses == [endpoint.LONGEST_PAUSE] and endpoint.LONGEST_PAUSE <= 120


def test_a_pause_that_outlasts_the_deadline_is_not_announced(pauses, monkeypatch, capsys):
    """Nothing is asked again then."""
    monkeypatch.setattr(endpoint, "DEADLINE", 6)
    with Server(lambda *_: (429, {}, {"Retry-After": "30"})) as server:
        assert "did not answer" in refusal(server)
    assert len(server.requests) == 1 and "asked again" not in capsys.readouterr().err


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_more_tries_cannot_mend_ends_at_once(status, pauses):
    """A refusal is not asked again; the line has the model, the address, the status and the server's own
    words."""
    with Server(
        lambda *_: (status, {"error": {"message": "no such\nmodel"}}, {"Retry-After": "1"})
    ) as server:
        line = refusal(server)
    assert len(server.requests) == 1 and not pauses
    assert all(part in line for part in ("openai:m", server.url, str(status), "no such model"))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_request_survives_ends_all(status, pauses):
    """A wrong key or model is an error of the run."""
    with Server(lambda *_: (status, {}, {})) as server, pytest.raises(UsageError, match=str(status)):
        ask(server)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_prompt_fails_alone(status, pauses):
    """The others of the batch are answered; what was refused has an error and no text, and was asked once."""
    conversations = [[{"role": "user", "content": f"question {i}"}] for i in range(5)]

    def answer(body, _):
        return (
            (status, {"error": {"message": "too long"}}, {})
            if "3" in body["messages"][0]["content"]
            else "yes"
        )

    with Server(answer) as server:
        replies = ask(server, conversations)
    assert len(server.requests) == 5 and [reply.text for reply in replies] == ["yes"] * 3 + ["", "yes"]
    assert "too long" in replies[3].error and [reply.error for reply in replies if reply.text] == [None] * 4


def test_a_refusal_leaves_the_rest_unasked():
    """With one conversation refused for a reason that holds for all, those not yet asked are not."""

    def answer(*_):
        time.sleep(0.02)
        return 401, {}, {}

    with Server(answer) as server:
        refusal(server, conversations=[HELLO] * 200)
        assert len(server.requests) < 200


def test_tries_are_bounded(pauses):
    """A server that only fails is asked five times, and the line says so and what it last said."""
    with Server(lambda _, n: (500, {"error": {"message": f"failure {n}"}}, {})) as server:
        line = refusal(server)
    assert len(server.requests) == endpoint.TRIES == 5 and len(pauses) == 4
    assert all(part in line for part in ("openai:m", server.url, "5 tries", "500", "failure 4"))


def test_time_out_is_one_clear_line(monkeypatch, pauses):
    """A server that never answers is given up after as many tries."""
    monkeypatch.setattr(endpoint, "TIMEOUT", 0.05)
    over = threading.Event()
    with Server(lambda *_: over.wait(20) and None) as server:
        line = refusal(server)
        over.set()
    assert len(pauses) == 4 and "timed out" in line.lower() and server.url in line


@pytest.mark.parametrize("way", ["retries", "trickle"])
def test_there_is_a_deadline_for_everything(way, monkeypatch):
    """Neither a server that fails again and again nor one that answers byte by byte holds a request for
    longer."""
    monkeypatch.setattr(endpoint, "DEADLINE", 0.5)

    def answer(*_):
        return 503, {}, {"Retry-After": "0.2"}

    with Server(answer) as server:
        if way == "trickle":
            server.RequestHandlerClass = Trickle
        begun = time.monotonic()
        line = refusal(server)
    assert time.monotonic() - begun < 5 and "did not answer" in line
    assert len(server.requests) < endpoint.TRIES or way == "trickle"


def test_the_deadline_holds_for_the_headers_too(monkeypatch):
    """A server that sends them letter by letter, each within the time-out."""
    monkeypatch.setattr(endpoint, "DEADLINE", 0.5)
    with Server(lambda *_: "never") as server:
        server.RequestHandlerClass = TrickleOfHeaders
        begun = time.monotonic()
        line = refusal(server)
    assert time.monotonic() - begun < 3 and "did not answer" in line


class TrickleOfHeaders(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        for _ in range(200):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def log_message(self, *_):
        pass


def test_an_endless_answer_is_given_up(pauses, monkeypatch):
    """It does not fill the memory."""
    monkeypatch.setattr(endpoint, "LARGEST", 1000)
    with Server(lambda *_: (200, b" " * 2000, {})) as server:
        assert "too large" in refusal(server)


def test_who_is_too_busy_is_asked_until_the_deadline():
    """A server that takes so many requests a second turns the rest away with 429: none of them is lost."""
    taken, lock = [], threading.Lock()

    def answer(*_):
        with lock:
            now = time.monotonic()
            if sum(now - at < 0.25 for at in taken) >= 4:
                return 429, {}, {"Retry-After": "0.25"}
            taken.append(now)
            return "yes"

    conversations = [[{"role": "user", "content": f"question {i}"}] for i in range(40)]
    with Server(answer) as server:
        replies = ask(server, conversations, concurrency=20)
    assert [reply.text for reply in replies] == ["yes"] * 40 and len(server.requests) > 60


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": "12", "completion_tokens": float("nan")}, {"prompt_tokens": -1}, []]
)
def test_counts_that_are_none_are_0(usage):
    """A server's own count is used if it is one."""
    with Server(lambda *_: (200, {**completion("yes"), "usage": usage}, {})) as server:
        reply = ask(server)[0]
    assert reply.text == "yes" and (reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens) == (
        0,
        0,
        0,
    )


def test_an_empty_answer_is_not_kept(tmp_path):
    """Nothing said may be a fault; the next run asks again."""
    for said in ("", "at last"):
        with Server(lambda *_: said) as server:  # noqa: B023
            kept = ask(server, answers=tmp_path)[0].text
        assert kept == said and len([*tmp_path.rglob("*.json")]) == bool(said)


def test_a_key_that_a_server_repeats_is_masked():
    """In what is said, as in errors."""
    key = "a-key-of-more-than-16-letters"
    with Server(lambda *_: f"your key is {key}") as server:
        assert ask(server, key=key)[0].text == "your key is ***"


def test_what_cannot_be_reached_is_one_line(monkeypatch):
    """A proxy of an unknown kind, an address with a wrong port, without the password that stands in it."""
    monkeypatch.setenv("ALL_PROXY", "foo://x")
    with pytest.raises(UsageError, match="HTTP_PROXY"):
        Endpoint("m", url="http://127.0.0.1:1/v1", key=KEY)
    monkeypatch.delenv("ALL_PROXY")
    with pytest.raises(UsageError) as error:
        Endpoint("m", url="http://u:secret@host:99999999/v1", key=KEY)
    assert "secret" not in str(error.value)


class Trickle(http.server.BaseHTTPRequestHandler):
    """An answer of a byte every 50 ms, for ten seconds."""

    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(200):
            self.wfile.write(b" ")
            time.sleep(0.05)

    def log_message(self, *_):
        pass


def test_a_server_that_is_down_is_not_asked_five_times_by_everybody(pauses):
    """After one request has failed in all its tries the others get one each; the first answer ends that."""
    up = []
    conversations = [HELLO] * 4
    with Server(lambda *_: "yes" if up else (500, {}, {})) as server:
        endpoint = Endpoint("m", server.url, KEY, pause=0.01, concurrency=1)
        assert all(reply.error for reply in endpoint.chat(conversations, SamplingParams(0)))
        assert len(server.requests) == 5 + 3
        up.append(1)
        assert [reply.text for reply in endpoint.chat(conversations, SamplingParams(0))] == ["yes"] * 4
        up.clear()
        assert endpoint.chat([HELLO], SamplingParams(0))[0].error and len(server.requests) == 8 + 4 + 5


@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_requests_at_once_over_all_calls(concurrency):
    """The limit holds for batches and for calls from several threads together."""
    now, most, lock = [0], [0], threading.Lock()

    def answer(*_):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.03)
        with lock:
            now[0] -= 1
        return "yes"

    with Server(answer) as server:
        endpoint = Endpoint("m", server.url, KEY, concurrency=concurrency)
        threads = [
            threading.Thread(target=endpoint.chat, args=([HELLO] * 2, SamplingParams(0))) for _ in range(6)
        ]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(server.requests) == 12 and most[0] == concurrency


def test_so_many_requests_a_minute():
    """At 1,200 a minute the requests begin 50 ms apart, tries that fail included."""
    times = []

    def answer(_, number):
        times.append(time.monotonic())
        return "yes" if number != 1 else (429, {}, {"Retry-After": "0"})

    with Server(answer) as server:
        begun = time.monotonic()
        replies = ask(server, [HELLO] * 5, per_minute=1200)
    assert [reply.text for reply in replies] == ["yes"] * 5 and len(times) == 6
    assert all(at - begun >= 0.05 * i - 0.01 for i, at in enumerate(sorted(times)))


# ---- what an endpoint refuses ----------------------------------------------------------------------------


def picky(refuses):
    """A server that answers 400 as refuses(body) says, a message or (message, param), and "yes" where it says
    None."""

    def answer(body, _):
        refused = refuses(body)
        if refused is None:
            return "yes"
        message, param = refused if isinstance(refused, tuple) else (refused, None)
        return 400, {"error": {"message": message, "type": "invalid_request_error", "param": param}}, {}

    return Server(answer)


def reasoning_models(body):
    """As OpenAI's reasoning models refuse."""
    if "max_tokens" in body:
        return (
            "Unsupported parameter: 'max_tokens' is not supported with this model. "
            "Use 'max_completion_tokens' instead."
        ), "max_tokens"
    if body.get("temperature", 1) != 1:
        return (
            "Unsupported value: 'temperature' does not support 0 with this model. "
            "Only the default (1) value is supported."
        ), "temperature"
    return None


def test_refused_parameters_are_adapted_once_and_remembered(capsys):
    """The models of OpenAI that reason: two refusals in all, whatever is asked later; told once each, and
    recorded."""
    with picky(reasoning_models) as server:
        model = Endpoint("m", server.url, KEY, concurrency=1)
        assert model.adaptations == []
        for _ in range(2):
            replies = model.chat([HELLO] * 4, SamplingParams(0, max_tokens=33, seed=1))
            assert [reply.text for reply in replies] == ["yes"] * 4
        again = Endpoint("m", server.url, KEY, concurrency=1)
        assert again.chat([HELLO], SamplingParams(0))[0].text == "yes"
        other = Endpoint("n", server.url, KEY, concurrency=1)
        assert other.adaptations == []
    assert len(server.requests) == 9 + 2
    body = {"model": "m", "messages": HELLO, "max_completion_tokens": 33, "seed": 1}
    assert [request.body for request in server.requests[2:10]] == [body] * 8
    expected = ["max_tokens is sent as max_completion_tokens", "temperature is left out"]
    assert model.adaptations == again.adaptations == expected
    told = " ".join(capsys.readouterr().err.split())
    assert all(told.count(words) == 1 for words in expected) and "'temperature' does not support 0" in told


def test_requests_in_flight_adapt_together():
    """Eight that are refused at the same time are told of once, and all are answered."""
    together = threading.Barrier(8)

    def refuses(body):
        if "max_tokens" in body:
            together.wait(20)
        return reasoning_models(body)

    with picky(refuses) as server:
        model = Endpoint("m", server.url, KEY)
        replies = model.chat([HELLO] * 8, SamplingParams(0))
    assert [reply.text for reply in replies] == ["yes"] * 8 and len(model.adaptations) == 2


@pytest.mark.parametrize(
    ("refuses", "sent", "adaptations"),
    [
        (
            lambda b: (
                b.get("max_tokens", 0) > 4096 and "max_tokens is too large: 9000. It takes at most 4096"
            ),
            {"max_tokens": None, "max_completion_tokens": 9000},
            ["max_tokens is sent as max_completion_tokens"],
        ),
        (
            lambda b: next(
                (f"Invalid {n}, the valid range is [1, 8192]" for n in b if "max" in n and b[n] > 8192), None
            ),
            {"max_tokens": None},
            ["max_tokens is sent as max_completion_tokens", "max_completion_tokens is left out"],
        ),
        (
            lambda b: (
                b.get("seed", 0) >= 2**31 and ("Invalid 'seed': expected a value <= 2147483647", "seed")
            ),
            {"seed": None},
            ["seed is left out"],
        ),
        (
            lambda b: "seed" in b and "Argument not supported on this model: seed",
            {"seed": None},
            ["seed is left out"],
        ),
        (
            lambda b: "seed" in b and "Unknown parameter: 'seed'. Did you mean 'random_seed'?",
            {"seed": None, "random_seed": 2**31 + 7},
            ["seed is sent as random_seed"],
        ),
        (
            lambda b: b.get("temperature", 0) > 1 and "temperature: range: 0..1",
            {"temperature": None},
            ["temperature is left out"],
        ),
        (
            lambda b: (
                len(b.get("stop", "")) > 4
                and ("Invalid 'stop': array too long. Expected one with maximum length 4, not 6", "stop")
            ),
            {"stop": None},
            ["stop is left out"],
        ),
        (
            lambda b: (
                {"temperature", "top_p"} <= b.keys()
                and "`temperature` and `top_p` cannot both be given; use only one."
            ),
            {"temperature": None},
            ["temperature is left out"],
        ),
        (
            lambda b: (
                (unknown := [n for n in ("top_k", "min_p", "repetition_penalty") if n in b])
                and f"Unrecognized request argument supplied: {unknown[0]}"
            ),
            {"top_k": None, "min_p": None, "repetition_penalty": None},
            ["top_k is left out", "min_p is left out", "repetition_penalty is left out"],
        ),
    ],
    ids=["large", "bounds", "seed range", "seed", "renamed", "range", "list", "combination", "extras"],
)
def test_a_refused_parameter_is_renamed_or_left_out(refuses, sent, adaptations):
    """By the server's words; all else is sent as before."""
    params = SamplingParams(1.5, 0.9, 40, 9000, tuple("abcdef"), 2**31 + 7, 0.1, 1.1)
    with picky(lambda body: refuses(body) or None) as server:
        model = Endpoint("m", server.url, KEY)
        assert model.chat([HELLO], params)[0].text == "yes"
    first, last = server.requests[0].body, server.requests[-1].body
    expected = {name: value for name, value in {**first, **sent}.items() if value is not None}
    assert last == expected and model.adaptations == adaptations


def test_a_refusal_in_the_words_of_a_validator():
    """422 with a list of what is wrong, as pydantic words it, or as a router passes it on."""
    wrong = {"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}
    raw = {"metadata": {"raw": json.dumps({"detail": [wrong]})}}
    for status, payload in (
        (422, {"detail": [wrong]}),
        (422, {"object": "error", "message": {"detail": [wrong]}, "type": "invalid_request_error"}),
        (400, {"error": {"message": "Provider returned error", "code": 400, **raw}}),
        (200, {"error": {"message": "Provider returned error", "code": 400, **raw}}),
    ):
        with Server(lambda body, _, s=status, p=payload: (s, p, {}) if "seed" in body else "yes") as server:
            model = Endpoint("m", server.url, KEY)
            assert model.chat([HELLO], SamplingParams(0, seed=1))[0].text == "yes"
        assert model.adaptations == ["seed is left out"] and len(server.requests) == 2


def test_a_schema_is_sent_and_left_out_where_it_is_refused():
    """As response_format."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    unavailable = "This response_format type is unavailable now"
    with picky(lambda body: unavailable if "response_format" in body else None) as server:
        model = Endpoint("m", server.url, KEY)
        assert model.chat([HELLO], SamplingParams(0, json_schema=schema))[0].text == "yes"
    sent = server.requests[0].body["response_format"]
    assert sent["type"] == "json_schema" and sent["json_schema"]["schema"] == schema
    assert "response_format" not in server.requests[1].body
    assert model.adaptations == ["response_format is left out"]


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 8192 tokens. You requested 9000 tokens; reduce max_tokens.",
        "'max_tokens' is too large: 512. This model's maximum context length is 8192 tokens.",
        "max_tokens must be smaller: the request exceeds the available context size.",
        "The prompt about the temperature of a seed was flagged.",
        "Invalid value for 'messages'.",
        "",
    ],
)
def test_a_refusal_of_the_prompt_changes_no_parameter(message):
    """Too long, flagged: the Reply has the server's own words, and the next one is asked as the first."""
    with picky(lambda _: message) as server:
        model = Endpoint("m", server.url, KEY)
        reply = model.chat([HELLO], SamplingParams(0, seed=1))[0]
    assert message in reply.error and len(server.requests) == 1 and model.adaptations == []


def test_what_an_endpoint_cannot_be_asked_for_is_refused_by_name():
    """Rather than being left out without a word."""
    with Server(lambda *_: "yes") as server:
        model = Endpoint("m", server.url, KEY)
        for name, value in (("choices", ["a", "b"]), ("stop_ids", (5,)), ("logprobs", True)):
            with pytest.raises(UsageError, match=name):
                model.chat([HELLO], SamplingParams(0, **{name: value}))
    assert not server.requests


def test_kept_answers_tell_what_was_adapted(tmp_path):
    """A run from the answers on disk alone has the same record, and asks nothing again."""
    with picky(reasoning_models) as server:
        before = Endpoint("m", server.url, KEY, answers=tmp_path)
        before.chat([HELLO], SamplingParams(0))
        adaptations, asked = before.adaptations, len(server.requests)
        before.address.changes.clear()
        after = Endpoint("m", server.url, KEY, answers=tmp_path)
        assert after.adaptations == [] and after.chat([HELLO], SamplingParams(0))[0].text == "yes"
        assert after.adaptations == adaptations and len(server.requests) == asked == 3


# ---- answers that are no plain completion ----------------------------------------------------------------


def message(finish_reason="stop", **fields):
    return {"choices": [{"message": {"role": "assistant", **fields}, "finish_reason": finish_reason}]}


@pytest.mark.parametrize(
    "error",
    [
        {"message": "Rate limit exceeded: free-models-per-min", "code": 429},
        {"message": "Rate limit exceeded", "code": "429"},
        {"message": "Rate limit reached", "type": "rate_limit_error"},
        {"message": "Rate limit reached", "code": "rate_limit_exceeded"},
    ],
)
def test_a_rate_limit_under_200_is_waited_for(error, pauses):
    """As often as 429 itself, not five times."""
    with Server(lambda _, n: "at last" if n == 9 else (200, {"error": error}, {})) as server:
        assert ask(server)[0].text == "at last"
    assert len(server.requests) == 10


@pytest.mark.parametrize(
    ("payload", "requests"),
    [
        ({"error": {"message": "prompt was flagged", "code": 400}}, 1),
        ({"error": {"message": "prompt was flagged", "type": "invalid_request_error"}}, 1),
        ({"object": "error", "message": "prompt was flagged", "code": 400}, 1),
        (
            {
                "choices": [
                    {"error": {"message": "prompt was flagged", "code": 502}, "finish_reason": "error"}
                ]
            },
            5,
        ),
        ({"error": {"message": "prompt was flagged", "code": 502}}, 5),
        ({"error": "prompt was flagged"}, 5),
        (message(content=None, refusal="prompt was flagged"), 1),
        (message(content=[{"type": "refusal", "refusal": "prompt was flagged"}]), 1),
    ],
)
def test_an_error_under_200_counts_as_what_it_says(payload, requests, pauses):
    """Its code is the status; the line has its words."""
    with Server(lambda *_: (200, payload, {})) as server:
        line = refusal(server)
    assert "prompt was flagged" in line and len(server.requests) == requests


def test_a_wrong_key_under_200_ends_the_run(pauses):
    """As 401 does."""
    with Server(lambda *_: (200, {"error": {"message": "no credits", "code": 401}}, {})) as server:
        with pytest.raises(UsageError, match="no credits"):
            ask(server)


def test_a_filter_is_told_of():
    """Withheld whole it is an error; what was said before it cut in is a reply."""
    with Server(lambda *_: (200, message("content_filter", content=None), {})) as server:
        assert "content filter" in refusal(server) and len(server.requests) == 1
    with Server(lambda *_: (200, message("content_filter", content="I was"), {})) as server:
        assert ask(server) == [Reply("I was", "content_filter")]


def test_the_words_of_a_proxy_are_told(pauses):
    """HTML under 200, and what else is no completion, is quoted without its tags."""
    html = b"<html><head><title>Sign in</title></head><body>to the <b>proxy</b></body></html>"
    for payload, words in ((html, "Sign in to the proxy"), ({"choices": []}, "without choices")):
        with Server(lambda *_, payload=payload: (200, payload, {})) as server:
            line = refusal(server)
        assert words in line and "no chat completion" in line and "<" not in line


def test_parts_of_a_message_are_joined():
    """A content that is a list of parts of text."""
    parts = [{"type": "text", "text": "Good "}, {"type": "output_text", "text": "evening."}]
    with Server(lambda *_: (200, message(content=parts), {})) as server:
        assert ask(server) == [Reply("Good evening.", "stop")]


# ---- reasoning -------------------------------------------------------------------------------------------

SECRET, SPEECH = "I secretly plan\n\nto leave.", "Good evening.\n\n(bows)"
RAW = {
    "think": f"<think>\n{SECRET}\n</think>\n\n{SPEECH}",
    "thinking": f"<Thinking>{SECRET}</THINKING>{SPEECH}",
    "reasoning": f"  <reasoning>{SECRET}</reasoning>\n{SPEECH}",
    "seed": f"<seed:think>{SECRET}</seed:think>{SPEECH}",
    "kimi": f"\u25c1think\u25b7{SECRET}\u25c1/think\u25b7{SPEECH}",
    "mistral": f"[THINK]{SECRET}[/THINK]{SPEECH}",
    "opened in the prompt": f"{SECRET}\n</think>\n\n{SPEECH}",
    "that mentions a tag": f"I open <think> first.\n{SECRET}</think>{SPEECH}",
    "that mentions a closing tag": f"<think>{SECRET} then </think> {SECRET}</think>{SPEECH}",
    "harmony": f"<|channel|>analysis<|message|>{SECRET}<|end|><|start|>assistant"
    f"<|channel|>final<|message|>{SPEECH}<|return|>",
    "harmony, opened": f"{SECRET}<|end|><|start|>assistant<|channel|>final<|message|>{SPEECH}",
    "harmony with a comment": f"<|channel|>analysis<|message|>{SECRET}<|end|><|start|>assistant"
    f"<|channel|>commentary<|message|>{SECRET}<|end|><|start|>assistant"
    f"<|channel|>final <|constrain|>json<|message|>{SPEECH}",
    "harmony without markers": f"analysis{SECRET}assistantfinal{SPEECH}",
}
UNFINISHED = {
    "after a name": f"Ada Byron: <think>{SECRET}",
    "think": f"<think>\n{SECRET}",
    "thinking": f"\n<THINKING>{SECRET}",
    "harmony": f"<|channel|>analysis<|message|>{SECRET}",
    "harmony without markers": f"analysis{SECRET}",
}


@pytest.mark.parametrize("form", RAW)
def test_reasoning_is_told_apart(form):
    """In every form, all of it and nothing else; in what is shown while it comes as well."""
    reasoning, text = split_reasoning(RAW[form])
    assert text == SPEECH and "secretly" in reasoning and "bows" not in reasoning
    assert not re.search(r"</?think>|<\|", text)
    if "opened" not in form and "mentions" not in form:
        for n in range(len(RAW[form]) + 1):
            assert SPEECH.startswith(spoken_so_far(RAW[form][:n]).strip()), RAW[form][:n]


@pytest.mark.parametrize("form", UNFINISHED)
def test_unfinished_reasoning_is_all_reasoning(form):
    """Nothing is said then."""
    assert split_reasoning(UNFINISHED[form]) == (SECRET, "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Good evening.",
        " I [think of him] say <b>no</b>.\n",
        'He wrote <think> on the wall,\nand "<reasoning>" below.',
        "[think it over] Well.",
        "I was thinking. </b>",
        "analysis of the evidence, Watson.",
        "Analysis: none. The final word.",
        "<thinker> is my name",
        '{"flaws": [{"instance": "<think>"}]}',
    ],
)
def test_speech_is_left_as_it_is(text):
    """A tag in the middle of a line is only mentioned; nothing is stripped where there is no reasoning."""
    assert split_reasoning(text) == ("", text) and spoken_so_far(text) == text


def test_reasoning_that_is_cut_off_after_speech_is_not_said():
    """The tag ends its line."""
    assert split_reasoning("Good evening. <think>\nsecret") == ("secret", "Good evening.")


def test_reasoning_in_the_middle_is_not_said():
    """Between two lines, or closed on the line where it opens."""
    for raw in ("Good evening.\n<think>\nsecret\n</think>\nSit.", "Good evening. <think>secret</think> Sit."):
        reasoning, text = split_reasoning(raw)
        assert reasoning == "secret" and text.split() == ["Good", "evening.", "Sit."]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"content": RAW["think"]}, (SPEECH, SECRET)),
        ({"content": SPEECH, "reasoning_content": SECRET}, (SPEECH, SECRET)),
        ({"content": SPEECH, "reasoning": SECRET, "reasoning_content": SECRET}, (SPEECH, SECRET)),
        ({"content": SPEECH, "reasoning": None}, (SPEECH, "")),
        ({"content": None, "reasoning_content": SECRET}, ("", SECRET)),
        ({"reasoning": SECRET}, ("", SECRET)),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": SECRET}]},
                    {"type": "text", "text": SPEECH},
                ]
            },
            (SPEECH, SECRET),
        ),
    ],
)
def test_an_endpoints_reasoning_is_kept_apart(fields, expected):
    """In the text, in fields beside it, in parts."""
    with Server(lambda *_: (200, message(**fields), {})) as server:
        reply = ask(server)[0]
    assert (reply.text, reply.reasoning) == expected and reply.error is None


@pytest.mark.parametrize("hidden", [False, True])
def test_a_model_that_reasons_gets_room(hidden):
    """Cut off inside its reasoning it is asked once more with room for it, and has it from then on."""

    def answer(body, _):
        if body["max_tokens"] >= 1000:
            return "Ada"
        return 200, message("length", content="" if hidden else "<think>\nWho could"), {}

    with Server(answer) as server:
        model = Endpoint("m", server.url, KEY, concurrency=1)
        replies = model.chat([HELLO] * 3, SamplingParams(0, max_tokens=32))
    assert [reply.text for reply in replies] == ["Ada"] * 3
    more = 32 + REASONING_TOKENS
    assert [request.body["max_tokens"] for request in server.requests] == [32, more, more, more]


def test_room_for_reasoning_is_given_once():
    """A model that never comes to an end is not asked a third time; the reply says nothing."""
    with Server(lambda *_: (200, message("length", content="<think>Who could"), {})) as server:
        reply = ask(server)[0]
    assert (reply.text, reply.reasoning, reply.error) == ("", "Who could", None) and len(server.requests) == 2


# ---- limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{"concurrency": 2}, {"concurrency": 8, "per_minute": 1200}])
def test_limits_hold_for_all_models_at_an_address(limits):
    """Two models at one address, asked at once, share its requests in flight and its requests per minute."""
    now, most, times, lock = [0], [0], [], threading.Lock()

    def answer(*_):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            times.append(time.monotonic())
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return "yes"

    with Server(answer) as server:
        models = [Endpoint(name, server.url, KEY, **limits) for name in ("m", "n")]
        begun = time.monotonic()
        futures = [model.submit(HELLO, SamplingParams(0)) for _ in range(5) for model in models]
        assert [future.result().text for future in futures] == ["yes"] * 10
    assert {request.body["model"] for request in server.requests} == {"m", "n"}
    if "per_minute" in limits:
        assert all(at - begun >= 0.05 * i - 0.01 for i, at in enumerate(sorted(times)))
    else:
        assert most[0] == 2


def test_ctrl_c_does_not_wait_for_an_answer(tmp_path):
    """A process of its own, interrupted while it waits, is gone at once and prints no trace of what it waited
    for."""
    program = (
        # whoever starts the tests may ignore Ctrl-C, which processes inherit
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import sys; from common import terminal; from llm.endpoint import Endpoint; "
        "from engine.params import SamplingParams; "
        "model = Endpoint('m', sys.argv[1], 'key', concurrency=4); "
        "chat = [{'role': 'user', 'content': 'hello'}]; "
        "terminal.run(lambda: model.chat([chat] * 8, SamplingParams(0)))"
    )
    over = threading.Event()
    with Server(lambda *_: over.wait(60) and None) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", program, server.url], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        while len(server.requests) < 4 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        code, error = process.wait(20), process.stderr.read()
        took = time.monotonic() - begun
        over.set()
    assert code == 130 and took < 10 and error.strip() == "stopped.", error
    assert len(server.requests) == 4


def test_requests_that_wait_are_cancelled_first():
    """Else the place of a cancelled one would go to the next, which would still be sent."""

    cancelled = []

    class Slots(Model):
        local = True

        def submit(self, messages, params, opening):
            future = Future()
            future.add_done_callback(lambda _: cancelled.append(messages))
            return future

        def step(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Slots().chat(["first", "second", "third"], SamplingParams(0))
    assert cancelled == ["third", "second", "first"]


# ---- answers kept on disk --------------------------------------------------------------------------------


def test_an_answer_is_kept_and_not_asked_for_again(tmp_path):
    """Under the hash of the request and its address: another text, seed, temperature, model or address is
    another request."""
    with Server(lambda _, n: f"answer {n}") as server, Server(lambda *_: "other") as other:

        def once(text="hello", params=None, model="m", url=server.url):
            params = params or SamplingParams(0.5, seed=1)
            endpoint = Endpoint(model, url, KEY, answers=tmp_path)
            return endpoint.chat([[{"role": "user", "content": text}]], params)[0].text

        first = once()
        assert [once(), once()] == [first, first] and len(server.requests) == 1
        others = [
            once("hallo"),
            once(params=SamplingParams(0.5, seed=2)),
            once(params=SamplingParams(0.6, seed=1)),
            once(params=SamplingParams(0.5, seed=1, max_tokens=9)),
            once(model="n"),
        ]
        assert len({first, *others}) == 6 and once(url=other.url) == "other"
        assert (
            len({once(params=SamplingParams(0.5)) for _ in range(3)}) == 3
        )  # without a seed nothing says they are the same
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 7 and not any(KEY in file.read_text() for file in files)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"text": "x"', b'{"text": "x", "unknown": 1, "finish_reason": "stop"}']
)
def test_a_kept_answer_that_is_none_is_asked_for_again(tmp_path, content):
    """A file torn or of another kind counts as absent, and is put right."""
    with Server(lambda *_: "yes") as server:
        for _ in range(2):
            assert ask(server, answers=tmp_path)[0].text == "yes"
            (file,) = (file for file in tmp_path.rglob("*") if file.is_file())
            whole = file.read_bytes()
            file.write_bytes(content)
        assert ask(server, answers=tmp_path)[0].text == "yes" and file.read_bytes() == whole
    assert len(server.requests) == 3


def test_an_opening_is_part_of_what_a_kept_answer_is_to(tmp_path):
    """Of our own server, which continues it; other servers never see it, and what they said is found without
    it."""

    def say(body, number):
        last = body["messages"][-1]
        text = f"continues {last['content']}" if last["role"] == "assistant" else "begins"
        fingerprint = {"system_fingerprint": "coser sha256"} if body["model"] == "coser" else {}
        return 200, completion(text) | fingerprint, {}

    with Server(say) as server:

        def texts(model, *openings):
            endpoint = Endpoint(model, server.url, KEY, answers=tmp_path, concurrency=1)
            replies = endpoint.chat([HELLO] * len(openings), SamplingParams(0), openings)
            return [reply.text for reply in replies]

        expected = ["continues A:", "continues B:", "begins"]
        assert [texts("coser", "A:", "B:", "") for _ in range(2)] == [expected] * 2
        assert len(server.requests) == 4  # the first answer told what server it is
        assert texts("coser", "C:") == ["continues C:"] and len(server.requests) == 5
        before = len(server.requests)
        assert texts("m", "A:") == texts("m", "") == texts("m", "B:") == ["begins"]
        assert len(server.requests) == before + 1


def test_no_failure_is_kept(tmp_path, pauses):
    """A refusal today may be an answer tomorrow."""
    with Server(lambda _, n: "yes" if n else (400, {}, {})) as server:
        assert ask(server, answers=tmp_path)[0].error and not list(tmp_path.rglob("*.json"))
        assert ask(server, answers=tmp_path)[0].text == "yes"


def test_refused_connection_is_one_clear_line(pauses):
    """Nobody at the address: told as such, after as many tries."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    line = refusal(SimpleNamespace(url=url))
    assert len(pauses) == 4 and url in line and "refused" in line.lower()


def test_a_connection_cut_short_is_retried(pauses):
    """A server that hangs up is asked again."""
    with Server(lambda _, n: "at last" if n == 2 else None) as server:
        assert ask(server)[0].text == "at last"
    assert len(server.requests) == 3


NO_COMPLETIONS = [
    b"",
    b"<html>Bad gateway</html>",
    b"\xff\xfe",
    [],
    {},
    5,
    None,
    {"choices": []},
    {"choices": None},
    {"choices": [{}]},
    {"choices": [{"message": None}]},
    {"choices": [{"message": {"role": "assistant"}}]},
    {"choices": [{"message": {"content": ["a", "b"]}}]},
    {"choices": [{"message": {"content": {"text": "a"}}}]},
]


@pytest.mark.parametrize("payload", NO_COMPLETIONS, ids=repr)
def test_an_answer_that_is_no_chat_completion_is_retried(payload, pauses):
    """What has no text of an assistant is asked for again."""
    with Server(lambda _, n: "at last" if n else (200, payload, {})) as server:
        assert ask(server)[0].text == "at last"


def test_an_answer_that_is_never_a_chat_completion_is_told(pauses):
    """A server that speaks another language is given up, and the line says what is wrong."""
    with Server(lambda *_: (200, b"<html>Welcome!</html>", {})) as server:
        assert "no chat completion" in refusal(server)
    assert len(server.requests) == 5


def test_an_answer_that_cannot_be_unpacked_is_retried(pauses):
    """A body that is not in the encoding it claims is trouble of the same kind."""
    with Server(lambda _, n: "at last" if n else (200, b"no gzip", {"Content-Encoding": "gzip"})) as server:
        assert ask(server)[0].text == "at last"


# ---- keys and addresses ----------------------------------------------------------------------------------


def test_key_and_address_come_from_the_environment(monkeypatch):
    """OPENAI_API_KEY and OPENAI_BASE_URL are read; openai:MODEL opens such an endpoint."""
    with Server(lambda *_: "hi") as server:
        server.use(monkeypatch)
        assert llm.open_model("openai:some/model:free").chat([HELLO], SamplingParams(0))[0].text == "hi"
    assert server.requests[0].body["model"] == "some/model:free"
    assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_missing_key_is_told(monkeypatch):
    """Without a key nothing is asked, and the line names the variable."""
    for set_ in (
        lambda: monkeypatch.delenv("OPENAI_API_KEY", raising=False),
        lambda: monkeypatch.setenv("OPENAI_API_KEY", ""),
    ):
        set_()
        with pytest.raises(UsageError, match="OPENAI_API_KEY"):
            llm.open_model("openai:m")


def test_a_model_has_an_address_and_a_key_of_its_own(monkeypatch):
    """openai:MODEL@URL goes there whatever OPENAI_BASE_URL says, with OPENAI_API_KEY_<HOST> where that is
    set."""
    with Server(lambda *_: "here") as here, Server(lambda *_: "there") as there:
        there.use(monkeypatch)
        for variable, key in ((None, KEY), ("OPENAI_API_KEY_127_0_0_1", "sk-another-one")):
            if variable:
                monkeypatch.setenv(variable, key)
            model = llm.open_model(f"openai:@org/model@20250101@{here.url}")
            assert model.chat([HELLO], SamplingParams(0))[0].text == "here"
            request = here.requests[-1]
            assert (
                request.headers["Authorization"] == f"Bearer {key}"
                and request.body["model"] == "@org/model@20250101"
            )
            assert key not in model.name + model.identity and here.url in model.identity
    assert not there.requests


@pytest.mark.parametrize(
    "spec",
    ["openai:m@localhost:8000/v1", "openai:m@ftp://host/v1", "openai:@http://host/v1", "openai:m@http://", "openai:m@http://a:b@h",
     "openai:m@https://host/v1?key=1"],
)  # fmt: skip
def test_an_address_that_would_mislead_is_told(spec, monkeypatch):
    """No scheme, another scheme, no model, no host, a password or a query in it: one line, which shows no
    password."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UsageError) as error:
        llm.open_model(spec)
    assert "a:b" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["openai:", "nosuchdirectory", ""])
def test_a_model_that_is_none_is_told(spec, tmp_path, monkeypatch):
    """No model name, no such directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UsageError):
        llm.open_model(spec)


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1", "127.0.0.1:8000/v1", "http://127.0.0.1:port/v1", "http://"]
)
def test_an_address_that_is_none_is_told(url, pauses):
    """Each is one line that shows the address."""
    assert url.rstrip("/") in refusal(SimpleNamespace(url=url))


@pytest.mark.parametrize("status", [200, 401, 403, 500])
@pytest.mark.parametrize("padding", [0, 270, 282])
@pytest.mark.parametrize("form", ["message", "text", "html"])
def test_the_key_is_in_no_message(status, padding, form, pauses):
    """A server that repeats the key does not bring it to light, not even a part of it where its words are cut
    short."""

    def answer(*_):
        words = "x" * padding + f" wrong key {KEY}"
        payload = {
            "message": {"error": {"message": words}},
            "text": {"detail": words},
            "html": words.encode(),
        }[form]
        return status, payload, {"X-Key": KEY}

    with Server(answer) as server:
        line = refusal(server)
    assert KEY not in line and KEY[:4] not in line


@pytest.mark.parametrize(
    "key", [KEY + " ", " " + KEY, KEY + "\n", KEY + "\u2026", KEY + "\x7f", f"{KEY}\t{KEY}"]
)
def test_a_key_pasted_badly_is_not_shown(key, pauses):
    """A key with a space, a line end or a stray character either works without it or is refused, and is not
    printed."""
    with Server(lambda *_: (401, {"error": {"message": f"wrong key {key}"}}, {})) as server:
        line = refusal(server, key=key)
    assert KEY not in line


# ---- checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("openings", [None, ["Hanne Brod:", "", "Wick Tarn:"]])
def test_a_checkpoint_answers_as_its_model_does(tiny_actor, openings):
    """Replies of a local model are the greedy tokens of a plain forward pass after the rendered chat and the
    opening."""
    conversations = [
        [{"role": "system", "content": "S"}, {"role": "user", "content": "you " * n}] for n in (1, 7, 3)
    ]
    replies = llm.open_model(tiny_actor).chat(conversations, SamplingParams(0, max_tokens=6), openings)
    model, tokenizer = checkpoint.load_model(tiny_actor), load_tokenizer(tiny_actor)
    for messages, opening, reply in zip(conversations, openings or ["", "", ""], replies, strict=True):
        ids = tokenizer.render(messages, add_generation_prompt=True)[0] + tokenizer.encode(opening)
        said = []
        with torch.no_grad():
            while len(said) < 6 and not set(said) & set(tokenizer.stop_ids):
                said.append(model(torch.tensor([ids + said]))[0, -1].argmax().item())
        said = [i for i in said if i not in tokenizer.stop_ids]
        assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == (
            tokenizer.decode(said),
            len(ids),
            len(said),
        )


def test_a_chat_marker_ends_a_turn(tiny_actor):
    """A model that samples a special token within its turn, another turn's head say, is not let go on, and no
    text has it."""
    model = llm.open_model(tiny_actor)
    assert set(model.markers) == set(model.tokenizer.specials.values())
    whole = model.chat([HELLO], SamplingParams(0, max_tokens=8))[0]
    n = next(i for i in range(1, 8) if whole.ids[i] not in whole.ids[:i])
    model.markers = (whole.ids[n],)
    reply = model.chat([HELLO], SamplingParams(0, max_tokens=8))[0]
    assert (reply.ids, reply.finish_reason) == (whole.ids[:n], "stop")
    assert reply.text == model.tokenizer.decode(whole.ids[:n])


@pytest.fixture
def reasoner(tmp_path):
    """A checkpoint that answers "<think>plan</think>Hi" to everything, tags as added tokens: each token
    determines the next."""
    chain = ["<think>", *"plan", "</think>", *"Hi", "<|im_end|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    ids = {token: i for i, token in enumerate([*alphabet, *specials])} | {"\n": alphabet.index("\u010a")}
    config = random_config(
        0, vocab_size=len(alphabet) + 4, hidden_size=32, num_attention_heads=4, num_key_value_heads=2
    )
    model = random_model(replace(config, head_dim=8, tie_word_embeddings=False, max_position_embeddings=8192))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)
            for i, (token, following) in enumerate(
                zip(["\n", ":", *chain], [chain[0], *chain, ""], strict=False)
            ):
                if "embed_tokens" in name:
                    parameter[ids[token], i] = 1.0
                if "lm_head" in name and following:
                    parameter[ids[following], i] = 1.0
    checkpoint.save_model(model, tmp_path / "reasoner")
    hf = {
        "added_tokens": [{"id": ids[name], "content": name, "special": "im" in name} for name in specials],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": QWEN2_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(alphabet)}, "merges": []},
    }
    (tmp_path / "reasoner" / "tokenizer.json").write_text(json.dumps(hf))
    return tmp_path / "reasoner"


@pytest.mark.parametrize("opening", ["", "Ada:"])
def test_a_local_models_reasoning_is_kept_apart(reasoner, opening):
    """In the reply, in what is shown while it is spoken, and in the prompts that follow."""
    model = llm.open_model(reasoner)
    future, shown = model.submit(HELLO, SamplingParams(0, max_tokens=60), opening), set()
    while not future.done():
        shown.add(model.spoken(future))
        model.step()
    reply = future.result()
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("Hi", "plan", "stop")
    assert shown <= {"", "H", "Hi"} and model.tokenizer.decode(reply.ids) == "<think>plan</think>Hi"
    said = {"role": "assistant", "content": f"{opening}Hi", "opening": opening, "sampled": reply.ids}
    plain = {"role": "assistant", "content": f"{opening}Hi"}
    prompts = [model.prompt([*HELLO, own, *HELLO], opening) for own in (said, plain)]
    assert prompts[0] == prompts[1] and prompts[0][1] == 0


def test_a_local_model_that_reasons_gets_room(reasoner):
    """Cut off inside its reasoning it is asked once more, and has the room from then on."""
    model = llm.open_model(reasoner)
    asked, add = [], model.engine.add
    model.engine.add = lambda ids, params, *_: asked.append(params.max_tokens) or add(ids, params)
    for _ in range(2):
        replies = model.chat([HELLO] * 2, SamplingParams(0, max_tokens=3))
        assert [(reply.text, reply.reasoning) for reply in replies] == [("Hi", "plan")] * 2
    assert asked == [3, 3] + [3 + REASONING_TOKENS] * 4


def test_a_chat_shows_no_reasoning(reasoner, script, monkeypatch):
    """generate.py prints what is said, and its next prompt holds no more."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Good day\nAnd?\n"))
    options = ["--model", reasoner, "--temperature", 0, "--dtype", "float32", "--stats"]
    code, out, err = script("generate", "--chat", *options)
    assert (code, out) == (0, "Hi\nHi\n")
    counts = [int(n) for n in re.findall(r"of (\d+) prompt tokens", err)]
    tokenizer = load_tokenizer(reasoner)
    chat = [{"role": "user", "content": "Good day"}, {"role": "assistant", "content": "Hi"}]
    rendered = tokenizer.render([*chat, {"role": "user", "content": "And?"}], add_generation_prompt=True)[0]
    assert counts[1] == len(rendered)


def test_a_tag_at_the_end_of_a_prompt_opens_reasoning():
    """As templates of models that always reason have it; a user's tag does not."""
    assert open_tag("<|assistant|><think>\n") == "<think>" and open_tag("<think>x<|assistant|>\n") == ""
    assert split_reasoning("<think>" + SECRET) == (SECRET, "")


def test_stop_ids_of_the_caller_are_kept(tiny_actor):
    """Beside the markers of the chat."""
    model = llm.open_model(tiny_actor)
    whole = model.chat([HELLO], SamplingParams(0, max_tokens=8))[0].ids
    n = next(i for i in range(1, 8) if whole[i] not in whole[:i])
    assert model.chat([HELLO], SamplingParams(0, max_tokens=8, stop_ids=(whole[n],)))[0].ids == whole[:n]


@pytest.mark.parametrize("left", [1, 8, 30])
def test_a_request_that_cannot_fit_ends_nothing(tiny_actor, left):
    """A schema whose shortest text is longer than what is left of the context is an error of that request
    alone."""
    model = llm.open_model(tiny_actor)
    word = model.encode(" a")
    count = (model.engine.config.max_position_embeddings - left - len(model.prompt(HELLO)[0])) // len(word)
    long = [{"role": "user", "content": "hello" + " a" * count}]
    names = [f"a_long_name_{i}" for i in range(20)]
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    params = SamplingParams(0, json_schema=schema, max_tokens=2000)
    long_reply, short_reply = model.chat([long, HELLO], params)
    assert (
        long_reply.finish_reason == "error"
        and "tokens" in long_reply.error
        and str(tiny_actor) in long_reply.error
    )
    assert short_reply.error is None and list(json.loads(short_reply.text)) == names


def test_models_of_any_form_have_a_fingerprint(tiny_actor, tmp_path):
    """A single file, an adapter, which counts with its base, and a directory: a byte changed anywhere is
    another model."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF weights")
    one = local.fingerprint(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF other weights")
    assert local.fingerprint(tmp_path / "model.gguf") != one
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_actor, base)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../base"}))
    (adapter / "adapter_model.safetensors").write_bytes(b"A and B")
    seen = {local.fingerprint(base), local.fingerprint(adapter)}
    (adapter / "adapter_model.safetensors").write_bytes(b"A and C")
    seen.add(local.fingerprint(adapter))
    (base / "manifest.json").unlink()
    seen.add(local.fingerprint(adapter))
    assert len(seen) == 4


def test_an_endpoint_is_not_given_an_opening():
    """What a reply is to begin with changes nothing in what an endpoint is asked."""
    with Server(lambda *_: "hi") as server:
        endpoint = Endpoint("m", server.url, KEY)
        assert endpoint.chat([HELLO], SamplingParams(0), ["Ada:"]) == endpoint.chat(
            [HELLO], SamplingParams(0)
        )
    assert server.requests[0].body == server.requests[1].body


def test_default_actor(tmp_path, monkeypatch, capsys):
    """The one trained last, else the shipped adapter where SmolLM2 is installed, else the small bundled
    one; stderr
    says which, and how to get the better one."""
    monkeypatch.setattr(files, "OUT", tmp_path / "out")

    def chosen(installed):
        def find_model(spec):
            if not installed:
                raise UsageError(f"{spec} is not installed: pip install it")
            return spec

        monkeypatch.setattr(local, "find_model", find_model)
        actor = local.default_actor()
        out, err = capsys.readouterr()
        assert not out and actor.name in err
        return actor, err

    actor, err = chosen(installed=False)
    assert actor == local.BUNDLED_ACTOR and "bundled" in err and "pip install" in err
    assert chosen(installed=True)[0] == local.SHIPPED_ACTOR
    trained = tmp_path / "out" / "stage" / "final"
    trained.mkdir(parents=True)
    assert chosen(installed=True)[0] == local.SHIPPED_ACTOR  # a directory that training has only begun
    (trained / "config.json").write_text("{}")
    for installed in (False, True):
        actor, err = chosen(installed)
        assert actor == trained and "trained last" in err


def test_half_a_character_in_a_reply_is_mended(pauses):
    """JSON may escape half of a surrogate pair; what is read of it can be written to a file."""
    answer = b'{"choices": [{"message": {"content": "hi \\ud83d"}}]}'
    with Server(lambda *_: (200, answer, {})) as server:
        (reply,) = ask(server)
    assert reply.text.encode() == b"hi ?"


def test_an_endpoint_answers_again_after_a_refusal(pauses):
    """One call that is refused ends that call alone: the next is asked, and answered."""
    with Server(lambda _, n: (401, {}, {}) if n == 0 else "yes") as server:
        endpoint = Endpoint("m", url=server.url, key=KEY)
        with pytest.raises(UsageError, match="401"):
            endpoint.chat([HELLO], SamplingParams(0))
        assert [reply.text for reply in endpoint.chat([HELLO], SamplingParams(0))] == ["yes"]
