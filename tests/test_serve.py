"""serve.py: clients as people have them, against the same model asked directly; clients that misbehave."""

import asyncio
import contextlib
import json
import os
import random
import socket
import threading
import time
from concurrent.futures import Future

import httpx
import openai
import pydantic
import pytest
import torch
import uvicorn
from conftest import ROOT, usage_error
from engines import everything_given_back, logprobs_of

import checkpoint
import serve
from common.files import UsageError
from engine.constrain import advance
from engine.engine import Engine
from engine.params import SamplingParams
from llm import Reply, open_model
from llm.reply import Model
from serving.app import MAX_BODY, build_app
from serving.requests import read_chat
from serving.worker import Worker

SYSTEM = {"role": "system", "content": "You are Hanne Brod, who keeps the ferry."}
ASK = [SYSTEM, {"role": "user", "content": "Who goes there?"}]
STAGE_ACTOR = ROOT / "data" / "stage" / "actor"
SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", 4))


class Served:
    """A server in this process, on a port of its own: `url`, `worker`, and an httpx client, `http`."""

    def __init__(self, models, capacity=256, **options):
        self.worker = Worker(models, capacity)
        self.model = next(iter(models.values()))
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        app = build_app(self.worker, **options)
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def close(self):
        self.http.close()
        self.server.should_exit = True
        self.thread.join(10)

    def ask(self, messages=ASK, **fields):
        return self.http.post("/v1/chat/completions", json={"messages": messages, **fields})

    def complete(self, prompt, **fields):
        return self.http.post("/v1/completions", json={"prompt": prompt, **fields})

    def idle(self, seconds=10):
        """Waits until no request is left, and checks that all its pages are back."""
        deadline = time.monotonic() + seconds
        while (self.worker.jobs or self.model.running or self.worker.watched) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not (self.worker.jobs or self.model.running or self.worker.watched)
        everything_given_back(self.model.engine)


@pytest.fixture(scope="module")
def served(tiny_actor):
    model = open_model(tiny_actor)
    server = Served({"tiny": model, "gpt-4o": model})
    yield server
    server.close()


@pytest.fixture(scope="module")
def local(tiny_actor):
    """The same model, asked directly."""
    return open_model(tiny_actor)


@pytest.fixture
def client(served):
    http_client = httpx.Client(trust_env=False)
    with openai.OpenAI(base_url=served.url + "/v1", api_key="any", http_client=http_client) as client:
        yield client


def events(response):
    """The JSON of a stream's events, which ends with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *found, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found]


def without_end(served):
    """The logit_bias of a text that only its length ends."""
    return {str(i): -100 for i in served.model.tokenizer.specials.values()}


# ---- the same text as the model itself gives ---------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_openai_client_whole_and_streamed(client, local, temperature):
    params = SamplingParams(temperature, top_p=0.95, max_tokens=60, seed=5)
    expected = local.chat([ASK], params)[0]
    fields = dict(model="tiny", messages=ASK, temperature=temperature, top_p=0.95, max_tokens=60, seed=5)
    whole = client.chat.completions.create(**fields)
    choice = whole.choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert whole.usage.prompt_tokens == expected.prompt_tokens
    assert whole.usage.completion_tokens == expected.completion_tokens > 5
    stream = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant" and "".join(d.content or "" for d in deltas) == expected.text


def test_the_shape_of_a_stream(served):
    """Every event has choices; the role comes first, the finish reason alone and last, then the usage."""
    found = events(
        served.ask(stream=True, max_tokens=9, temperature=0, stream_options={"include_usage": True})
    )
    *pieces, usage = found
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] > 9
    assert all(len(event["choices"]) == 1 and event["usage"] is None for event in pieces)
    first, *middle, last = [event["choices"][0] for event in pieces]
    assert first["delta"] == {"role": "assistant", "content": ""} and len(middle) > 3
    assert all(set(choice["delta"]) == {"content"} and choice["finish_reason"] is None for choice in middle)
    assert last["delta"] == {} and last["finish_reason"] in ("stop", "length")
    assert not any("usage" in event for event in events(served.ask(stream=True, max_tokens=2)))


def test_choices_and_their_seeds(served, local):
    """Choice i of a request is what its seed + i alone gives, whole and streamed."""
    fields = dict(n=3, seed=11, max_tokens=12, temperature=1.2)
    expected = [local.chat([ASK], SamplingParams(1.2, max_tokens=12, seed=11 + i))[0].text for i in range(3)]
    assert len({*expected}) == 3
    assert [c["message"]["content"] for c in served.ask(**fields).json()["choices"]] == expected
    texts = ["", "", ""]
    for event in events(served.ask(**fields, stream=True)):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == expected


def test_a_last_assistant_message_is_continued(served, local):
    opening = "Hanne Brod: I said"
    expected = local.chat([ASK], SamplingParams(0, max_tokens=20), [opening])[0].text
    answer = served.ask([*ASK, {"role": "assistant", "content": opening}], temperature=0, max_tokens=20)
    assert answer.json()["choices"][0]["message"]["content"] == expected


class Answer(pydantic.BaseModel):
    name: str
    age: int
    lines: list[str]


def test_structured_output(client):
    fields = dict(model="tiny", messages=ASK, response_format=Answer, max_tokens=200, temperature=0.8, seed=1)
    answer = client.chat.completions.parse(**fields).choices[0].message.parsed
    assert isinstance(answer, Answer)
    with client.chat.completions.stream(**fields) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == answer


def test_stop_strings_never_show(served, local):
    """What may begin a stop string is held back, and what began one is not in the text."""
    whole = local.chat([ASK], SamplingParams(0, max_tokens=60))[0].text
    for at in (10, 25, 40):
        stop = whole[at : at + 6]
        pieces = events(served.ask(stream=True, temperature=0, max_tokens=60, stop=["never there", stop]))
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in pieces)
        assert text == whole[: whole.find(stop)]
        assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities(served, tiny_actor):
    """Of chats and completions, chosen tokens and likeliest ones, against one uncached pass."""
    model, tokenizer = checkpoint.load_model(tiny_actor), served.model.tokenizer
    prompt, _ = tokenizer.render(ASK, add_generation_prompt=True)
    fields = dict(max_tokens=10, temperature=0)
    answer = served.ask(logprobs=True, top_logprobs=3, **fields).json()["choices"][0]
    entries = answer["logprobs"]["content"]
    text = b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace")
    assert text.strip() == answer["message"]["content"].strip() and len(entries) == 10
    stream = events(served.ask(logprobs=True, top_logprobs=3, stream=True, **fields))
    streamed = [
        e for s in stream if s["choices"][0]["logprobs"] for e in s["choices"][0]["logprobs"]["content"]
    ]
    assert [e["token"] for e in streamed] == [e["token"] for e in entries]
    ids = served.model.engine.generate([prompt], SamplingParams(temperature=0, max_tokens=10))[0].ids
    assert [e["logprob"] for e in entries] == pytest.approx(logprobs_of(model, prompt, ids), abs=1e-4)
    with torch.no_grad():
        rows = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    for entry, row in zip(entries, rows, strict=True):
        assert [t["logprob"] for t in entry["top_logprobs"]] == pytest.approx(
            row.topk(3).values.tolist(), abs=1e-4
        )


def test_penalties_and_bias(served, tiny_actor):
    """Greedy text under each, against logits of uncached passes that are changed here."""
    model, tokenizer = checkpoint.load_model(tiny_actor), served.model.tokenizer
    ids = tokenizer.encode("The ferry leaves")
    for fields in (
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.2},
        {"logit_bias": {"314": 3.5, "400": -100}},
    ):
        expected = []
        while len(expected) < 12:
            with torch.no_grad():
                logits = model(torch.tensor([ids + expected]))[0, -1, : tokenizer.vocab_size].clone()
            for i in {*expected}:
                logits[i] -= fields.get("presence_penalty", 0)
                logits[i] -= fields.get("frequency_penalty", 0) * expected.count(i)
            for i, bias in fields.get("logit_bias", {}).items():
                logits[int(i)] += bias
            expected.append(int(logits.argmax()))
            if expected[-1] in tokenizer.stop_ids:
                expected.pop()
                break
        answer = served.complete(ids, temperature=0, max_tokens=12, logprobs=0, **fields).json()
        tokens = answer["choices"][0]["logprobs"]["tokens"]
        assert tokens == [tokenizer.token_bytes(i).decode(errors="replace") for i in expected], fields


def test_streamed_log_probabilities_end_where_the_text_does(served, local):
    """Tokens whose text a stop string may still cut come with that text, or not at all."""
    whole = local.chat([ASK], SamplingParams(0, max_tokens=60))[0].text
    fields = dict(temperature=0, max_tokens=60, logprobs=True, stop=[whole[20:30], whole[10:14] + "never"])
    expected = served.ask(**fields).json()["choices"][0]["logprobs"]["content"]
    pieces = [event["choices"][0] for event in events(served.ask(**fields, stream=True))]
    found, text = [], ""
    for piece in pieces:
        text += piece["delta"].get("content", "")
        found += piece["logprobs"]["content"] if piece["logprobs"] else []
        assert whole[:20].startswith("".join(entry["token"] for entry in found)[: len(text)])
    assert found == expected and text == whole[:20]


def test_a_stream_is_one_even_if_all_is_done_at_once(served, monkeypatch):
    """However fast the worker is, and where nothing is generated."""
    start = served.worker.start

    def start_and_wait(*args):
        job = start(*args)
        job.exception(timeout=10)
        return job

    monkeypatch.setattr(served.worker, "start", start_and_wait)
    assert len(events(served.ask(stream=True, max_tokens=1))) >= 2
    answer = served.complete("The ferry", echo=True, max_tokens=0, stream=True)
    assert "".join(event["choices"][0]["text"] for event in events(answer)) == "The ferry"


def test_an_endpoint_behind_a_name():
    """It gets a last assistant message as it is, and a limit that it can take; what it cannot do is refused
    by name, and nobody takes it for this server."""
    asked = []

    class Upstream(Model):
        local, name, identity = False, "openai:m", "m at http://127.0.0.1"

        def submit(self, messages, params, opening=""):
            if params.logprobs:
                raise UsageError("logprobs: an endpoint cannot do this")
            asked.append((messages, params.max_tokens, opening))
            future = Future()
            future.set_result(Reply("yes", "stop"))
            return future

    server = Served({"gpt-4o": Upstream()})
    turns = [*ASK, {"role": "assistant", "content": "Hanne Brod: I"}]
    answer = server.http.post("/v1/chat/completions", json={"messages": turns}).json()
    assert answer["choices"][0]["message"]["content"] == "yes" and answer["system_fingerprint"] is None
    server.http.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 8196})
    assert asked == [(turns, 4096, ""), (ASK, 8196, "")]
    for stream in (False, True):
        body = {"messages": ASK, "logprobs": True, "stream": stream}
        answer = server.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "logprobs"
    server.close()


# ---- requests of programs that exist -----------------------------------------------------------------------


def test_lm_evaluation_harness(served, tiny_actor):
    """The request and the reading of its local-completions: log-likelihood and whether it is greedy."""
    model, rng = checkpoint.load_model(tiny_actor), random.Random(0)
    contexts = [[rng.randrange(5, 400) for _ in range(n)] for n in (1, 7, 30)]
    greedy = served.model.engine.generate(contexts, SamplingParams(temperature=0, max_tokens=4))
    afters = [[rng.randrange(5, 400) for _ in range(4)], greedy[1].ids, greedy[2].ids[:3] + [7]]
    body = dict(model="tiny", prompt=[a + b for a, b in zip(contexts, afters, strict=True)])
    body |= dict(temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    for limit in (1, 0):
        answer = served.http.post("/v1/completions", json={**body, "max_tokens": limit}).json()
        for choice, context, after in zip(answer["choices"], contexts, afters, strict=True):
            end = len(context) + len(after)
            assert len(choice["logprobs"]["tokens"]) == end + limit
            chosen = choice["logprobs"]["token_logprobs"][len(context) : end]
            tops = choice["logprobs"]["top_logprobs"][len(context) : end]
            assert sum(chosen) == pytest.approx(sum(logprobs_of(model, context, after)), abs=1e-3)
            is_greedy = all(p == max(top.values()) for p, top in zip(chosen, tops, strict=True))
            assert is_greedy == (after == greedy[contexts.index(context)].ids)
            assert choice["logprobs"]["token_logprobs"][0] is None


def test_sillytavern(served, local):
    """Chat Completion > Custom, then Text Completion: its requests, its way to read the answers."""
    headers = {"Authorization": "Bearer null"}
    listed = served.http.get("/v1/models", headers=headers).json()["data"]
    assert [model["id"] for model in listed] == ["tiny", "gpt-4o"]
    turns = [
        SYSTEM,
        {"role": "system", "content": "[Start a new Chat]"},
        {"role": "assistant", "content": "Hanne Brod: The last boat is gone."},
        {"role": "user", "content": "I can wait."},
        {"role": "user", "content": [{"type": "text", "text": "Until morning."}]},
        {"role": "system", "content": "[Write the next reply of Hanne Brod.]"},
    ]
    fields = dict(
        model="tiny", temperature=1, max_tokens=25, stream=True, presence_penalty=0, top_p=1, top_k=0
    )
    fields |= dict(
        frequency_penalty=0, logit_bias={}, seed=3, n=1, logprobs=True, top_logprobs=5, stop=["\nYou:"]
    )
    fields |= dict(an_option_of_tomorrow={"x": 1}, chat_completion_source="custom", min_p=None)
    body = {"messages": turns, **fields}
    answer = served.http.post("/v1/chat/completions", json=body, headers=headers)
    text = ""
    for event in events(answer):
        choice = event["choices"][0]
        text += choice["delta"].get("content", "")
        assert choice["logprobs"] is None or all(t["top_logprobs"] for t in choice["logprobs"]["content"])
    merged = [
        {"role": "system", "content": SYSTEM["content"] + "\n\n[Start a new Chat]"},
        turns[2],
        {"role": "user", "content": "I can wait.\n\nUntil morning.\n\n[Write the next reply of Hanne Brod.]"},
    ]
    params = SamplingParams(1, max_tokens=25, seed=3, stop=("\nYou:",))
    assert text == local.chat([merged], params)[0].text != ""
    fields = dict(prompt="Hanne Brod:", max_tokens=6, max_new_tokens=6, temperature=0.7, top_k=40, min_p=0.05)
    fields |= dict(
        repetition_penalty=1.1, mirostat_mode=0, typical_p=1, stop=[], logprobs=5, seed=-0, stream=True
    )
    pieces = [event["choices"][0] for event in events(served.http.post("/v1/completions", json=fields))]
    assert "".join(piece["text"] for piece in pieces) and pieces[-1]["finish_reason"] in ("stop", "length")
    assert all(p["logprobs"] is None or 5 <= len(p["logprobs"]["top_logprobs"][0]) <= 6 for p in pieces)
    assert served.http.get("/v1/internal/model/info").status_code == 404


def test_the_official_harness(client, served):
    """One address for all roles, histories that grow, 8,196 tokens for a judge: real text each time."""
    history = [SYSTEM, {"role": "user", "content": "===Conversation Start==="}]
    for round_ in range(4):
        for model in ("tiny", "gpt-4o"):
            answer = client.chat.completions.create(
                model=model, messages=history, max_tokens=30, temperature=0
            )
            content = answer.choices[0].message.content
            assert content.strip() and answer.choices[0].finish_reason in ("stop", "length")
            role = "assistant" if model == "tiny" else "user"
            history = [*history, {"role": role, "content": f"round {round_}: {content}"}]
    judged = served.ask(
        [{"role": "user", "content": "x " * 2000}], max_tokens=8196, stop=["e"], temperature=1
    )
    assert judged.status_code == 200, judged.text
    assert served.model.engine.stats["reused"] > 100


def test_simulation_and_judge_over_the_server(script, monkeypatch, tmp_path):
    """simulate.py and judge.py play and judge over the server what they do with the model itself."""
    server = Served({"coser": open_model(STAGE_ACTOR)})
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    spec, found = f"openai:coser@{server.url}/v1", []
    for actor, out in ((spec, tmp_path / "served"), (STAGE_ACTOR, tmp_path / "local")):
        args = ("--scene", "the-last-ferry/5", "--actor", actor, "--max-rounds", 5, "--out", out)
        assert script("simulate", *args, "--temperature", 0)[0] == 0
        script("judge", out, "--judge", actor)
        played = json.loads((out / "transcripts.jsonl").read_text())["messages"]
        verdicts = json.loads((out / "verdicts.jsonl").read_text())["dimensions"]
        found.append((played, verdicts))
    server.idle()
    server.close()
    assert len(found[0][0]) > 5
    assert found[0] == found[1]


# ---- what is refused ---------------------------------------------------------------------------------------


REFUSED = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
    ({"messages": "hello"}, "messages"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"seed": 2**70}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 10**6}, "n"),
    ({"stop": [""] * 65}, "stop"),
    ({"stop": [3]}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "stop"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"messages": [{"role": "user", "content": False}]}, "messages"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "response_format",
    ),
    ({"stream_options": {"include_usage": "yes"}}, "include_usage"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(served, fields, param, stream):
    body = json.dumps({"messages": ASK, "stream": stream, **fields})
    answer = served.http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param) and error["message"]
    assert "tiny" not in error["message"]  # the model's path


def test_neutral_and_unknown_fields_are_served(served):
    fields = dict(tools=[], tool_choice="none", n=1, logit_bias={}, presence_penalty=0, frequency_penalty=0.0)
    fields |= dict(
        response_format={"type": "text"}, stop=None, user="me", store=True, top_k=-1, modalities=["text"]
    )
    assert served.ask(**fields, max_tokens=2).status_code == 200


def test_errors_that_clients_know(client, served):
    for call, kind, code in (
        (dict(model="gpt-9", messages=ASK), openai.NotFoundError, "model_not_found"),
        (dict(model="tiny", messages=[{"role": "user", "content": "word " * 20000}]), openai.BadRequestError,
         "context_length_exceeded"),
    ):  # fmt: skip
        for stream in (False, True):
            with pytest.raises(kind) as raised:
                client.chat.completions.create(**call, stream=stream)
            assert raised.value.code == code
    with pytest.raises(openai.BadRequestError, match="no token id|vocabulary"):
        client.completions.create(model="tiny", prompt=[10**9])
    for stream in (False, True):  # half a surrogate pair
        body = json.dumps({"prompt": "\ud800", "stream": stream})
        answer = served.http.post("/v1/completions", content=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert served.http.get("/v1/models/none").status_code == 404
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
        answer = served.http.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["message"]
    for content in (b"", b"[]", b"{", b"\xff", b"[" * 10**5, b'{"seed": 1' + b"0" * 5000 + b"}"):
        answer = served.http.post("/v1/chat/completions", content=content)
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert served.http.post("/v1/completions", content=b" " * (MAX_BODY + 1)).status_code == 413


def test_strangers_are_kept_out(tiny_actor):
    """Pages of other origins, other names for this host, and, with a key, whoever lacks it."""
    model = open_model(tiny_actor)
    server = Served({"tiny": model}, key="secret", origins=["https://friend.example"])
    bearer, port = {"Authorization": "Bearer secret"}, server.address[1]
    basic = {"Authorization": "Basic YW55OnNlY3JldA=="}  # any:secret
    for headers, status in (
        (bearer, 200),
        (basic, 200),
        ({}, 401),
        ({"Authorization": "Bearer secre"}, 401),
        ({"Authorization": "Basic !"}, 401),
        ({**bearer, "Origin": "http://evil.example"}, 403),
        ({**bearer, "Origin": "null"}, 403),
        ({**bearer, "Origin": "https://friend.example"}, 200),
        ({**bearer, "Origin": f"http://127.0.0.1:{port}"}, 200),
        ({**bearer, "Host": f"evil.example:{port}"}, 403),
        ({**bearer, "Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}, 403),
        ({**bearer, "Host": f"localhost:{port}"}, 200),
        ({**bearer, "Host": "LOCALHOST"}, 200),
        ({**bearer, "Host": f"[::1]:{port}"}, 200),
        ({**bearer, "Host": "[::1]"}, 200),
        ({**bearer, "Host": "localhost:80.evil.example"}, 403),
        ({**bearer, "Host": ""}, 403),
    ):
        answer = server.http.get("/v1/models", headers=headers)
        assert answer.status_code == status, headers
        assert status == 200 or answer.json()["error"]["message"]
    assert server.http.get("/health").status_code == 200
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, status in (("https://friend.example", 200), ("https://evil.example", 400)):
        answer = server.http.options("/v1/chat/completions", headers={"Origin": origin, **ask})
        assert answer.status_code == status
    server.close()


def test_a_full_queue_is_503(tiny_actor):
    server = Served({"tiny": open_model(tiny_actor)}, capacity=4)
    long = dict(max_tokens=4000, temperature=1, stream=True, logit_bias=without_end(server))
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            body = {"messages": ASK, **long}
            stack.enter_context(server.http.stream("POST", "/v1/chat/completions", json=body))
        answer = server.ask(max_tokens=1)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["type"] == "server_error"
    server.idle()
    assert server.ask(max_tokens=1).status_code == 200
    server.close()


@pytest.mark.parametrize("where", ["engine.run", "spoken"])
@pytest.mark.parametrize("error", [ZeroDivisionError, ValueError])
def test_a_failing_step_ends_its_requests_only(tiny_actor, monkeypatch, where, error):
    """With 500, whatever the error is; the worker lives on."""
    server = Served({"tiny": open_model(tiny_actor)})

    def fail(*_):
        raise error

    with monkeypatch.context() as broken:
        owner = server.model.engine if where == "engine.run" else server.model
        broken.setattr(owner, where.split(".")[-1], fail)
        for stream in (False, True):
            answer = server.ask(max_tokens=3, stream=stream)
            assert answer.status_code == 500 or '"server_error"' in answer.text
    assert server.ask(max_tokens=3).status_code == 200
    server.idle()
    server.close()


def test_the_command_line(script, tmp_path, tiny_actor, monkeypatch):
    assert "--api-key" in usage_error(script("serve", "--host", "0.0.0.0"))
    for alias in ("gpt-4o", "=x", "x=", "tiny=tiny"):
        assert "NAME=M" in usage_error(script("serve", "--port", 0, "--model", tiny_actor, "--alias", alias))
    assert "ASCII" in usage_error(script("serve", "--api-key", "a b"))
    args = ["--model", str(tiny_actor), "--alias", f"a={tiny_actor}/", "gpt-4o=tiny", "b=a"]
    monkeypatch.setattr("sys.argv", ["serve.py", *args])
    models = serve.open_models(serve.parse_args())
    assert [*models] == ["tiny", "a", "gpt-4o", "b"] and len({*map(id, models.values())}) == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in usage_error(script("serve", "--port", taken.getsockname()[1]))


def test_nothing_of_a_prompt_is_printed(tiny_actor, capfd):
    secret = "the ferryman's daughter"
    for log_prompts in (False, True):
        server = Served({"tiny": open_model(tiny_actor)}, log_prompts=log_prompts)
        server.ask([{"role": "user", "content": secret}], max_tokens=2)
        server.ask([{"role": "user", "content": secret}], max_tokens=-1)
        server.close()
        printed = "".join(capfd.readouterr())
        assert (secret in printed) == log_prompts


def test_roles_and_parts():
    """How messages of any order become turns."""
    u, a, s = ({"role": role, "content": role[0]} for role in ("user", "assistant", "system"))
    developer = {
        "role": "developer",
        "content": [{"type": "text", "text": "d"}, {"type": "text", "text": "e"}],
    }
    empty = {"role": "assistant", "content": None, "tool_calls": []}
    for messages, turns, opening in (
        ([s, developer, u], [("system", "s\n\nd\ne"), ("user", "u")], ""),
        ([u, s, a, a, u], [("user", "u\n\ns"), ("assistant", "a\n\na"), ("user", "u")], ""),
        ([s, a, u, a], [("system", "s"), ("assistant", "a"), ("user", "u")], "a"),
        ([u, empty], [("user", "u")], ""),
        ([a], [], "a"),
    ):
        body = read_chat({"messages": messages})
        assert ([(m["role"], m["content"]) for m in body.messages], body.opening) == (turns, opening)


# ---- clients that misbehave --------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_pages(served):
    """In the middle of a stream, while a whole reply is made, and of several choices at once."""
    body = {"messages": ASK, "max_tokens": 6000, "temperature": 1}
    body["logit_bias"] = without_end(served)
    for path, extra in (
        ("chat/completions", {"n": 3}),
        ("completions", {"prompt": "The ferry", "echo": True}),
    ):
        with served.http.stream("POST", f"/v1/{path}", json={**body, **extra, "stream": True}) as stream:
            parts = stream.iter_text()  # the stream is closed with it
            next(parts)
            assert served.worker.jobs
        served.idle()
        with pytest.raises(httpx.ReadTimeout):
            served.http.post(f"/v1/{path}", json={**body, **extra}, timeout=0.4)
        served.idle()


def test_a_client_that_leaves_before_the_first_event(served, monkeypatch):
    """A response that never begins, as when the client goes just before, is no reason to go on."""

    class NeverBegun:
        def __init__(self, *_, **__):
            pass

        async def __call__(self, scope, receive, send):
            pass

    monkeypatch.setattr("serving.app.StreamingResponse", NeverBegun)
    served.ask(stream=True, max_tokens=7000, temperature=1, logit_bias=without_end(served))
    served.idle(1)


def test_messages_without_number_are_read_in_no_time(served):
    begun = time.process_time()
    body = read_chat({"messages": [{"role": "user", "content": "a"}] * 500_000})
    assert time.process_time() - begun < 3 and len(body.messages) == 1


def test_grammars_take_bounded_memory(served):
    """Of many schemas, and of one whose states have no end."""
    engine = served.model.engine
    for i in range(80):
        assert engine.grammar(schema := {"type": "integer", "minimum": i}) is engine.grammar(schema)
    assert len(engine.grammars) <= 64
    grammar = engine.grammar({"type": "array", "items": {"type": "string"}})
    state, found = advance(grammar.start, b'["'), None
    for _ in range(300):
        ids, costs = grammar.allowed(state)
        assert found is None or ids.tolist() == found
        state, found = advance(state, b'a", "'), ids.tolist()
    assert len(engine.vocabulary.known) <= 256


def test_torn_bodies(served):
    """Half a body, a wrong length, no end of chunks: the connection goes, the server stays."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    body = json.dumps({"messages": ASK, "max_tokens": 5})
    for torn in (
        f"{head}Content-Length: {len(body)}\r\n\r\n{body[:20]}",
        f"{head}Content-Length: {len(body)}\r\n",
        f"{head}Transfer-Encoding: chunked\r\n\r\n10\r\n{body[:16]}\r\n",
        f"{head}Content-Length: -3\r\n\r\n{body}",
        "\x16\x03\x01 not http at all\r\n\r\n",
    ):
        with socket.create_connection(served.address, timeout=5) as connection:
            connection.sendall(torn.encode("latin-1"))
    served.idle()
    assert served.ask(max_tokens=2).status_code == 200


def rss():
    """Megabytes of memory that this process has in use."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def misbehave(served, seconds, seed, counts):
    """A client: whole, streamed, read slowly, left half-way, torn; counts what came of it."""
    rng, deadline = random.Random(seed), time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=served.url, timeout=300, trust_env=False, verify=False) as http:
        while time.monotonic() < deadline:
            words = " ".join(rng.choice(["ferry", "bell", "key", "ward"]) for _ in range(rng.randrange(60)))
            messages = [SYSTEM, {"role": "user", "content": words}]
            body = dict(messages=messages, max_tokens=rng.randrange(1, 40), temperature=rng.choice([0, 1]))
            kind = rng.choice(["whole", "stream", "slow", "leave", "torn", "refused"])
            counts[kind] = counts.get(kind, 0) + 1
            try:
                if kind in ("whole", "refused"):
                    body |= {"top_p": -1} if kind == "refused" else {}
                    answer = await http.post("/v1/chat/completions", json=body)
                    assert answer.status_code == (400 if kind == "refused" else 200), answer.text
                elif kind == "torn":
                    _, writer = await asyncio.open_connection(*served.address)
                    writer.write(
                        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
                    )
                    writer.close()
                else:
                    body |= {"stream": True} | ({"max_tokens": 3000} if kind == "leave" else {})
                    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                        assert answer.status_code == 200
                        text = ""
                        async for part in answer.aiter_text():
                            text += part
                            if kind == "leave" and len(text) > 2000:
                                break
                            if kind == "slow":
                                await asyncio.sleep(0.05)
                        assert kind == "leave" or text.endswith("data: [DONE]\n\n"), text[-200:]
            except Exception as error:
                counts[f"{kind}: {error!r}"] = counts.get(f"{kind}: {error!r}", 0) + 1


@pytest.mark.parametrize("clients", [32])
def test_soak(tiny_actor, clients, capsys):
    """SOAK_SECONDS (4) of 32 clients of all kinds, with too few pages for all: nothing lost, all pages back.
    Prints the memory in use as it goes."""
    model, counts = open_model(tiny_actor), {}
    model.engine = Engine(checkpoint.load_model(tiny_actor), model.tokenizer, cache_tokens=2**14)
    served = Served({"tiny": model})

    async def all_clients(seconds, seed):
        await asyncio.gather(*(misbehave(served, seconds, seed + i, counts) for i in range(clients)))

    asyncio.run(all_clients(min(SOAK_SECONDS / 4, 30), 0))  # caches fill
    begun, started, marks = rss(), time.monotonic(), []
    counts.clear()
    while time.monotonic() < started + SOAK_SECONDS:
        asyncio.run(all_clients(max(1, SOAK_SECONDS / 10), int(time.monotonic())))
        marks.append(round(rss()))
    served.idle(30)
    with capsys.disabled():
        print(f"\nsoak: {time.monotonic() - started:.0f} s, {sum(counts.values())} requests {counts}, "
              f"{begun:.0f} MB before, {marks}")  # fmt: skip
    served.close()
    assert set(counts) <= {"whole", "stream", "slow", "leave", "torn", "refused"}, counts
    assert sum(counts.values()) >= clients
