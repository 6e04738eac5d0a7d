"""The routes of /v1 and /health, and what is refused before a route is reached."""

import asyncio
import base64
import contextlib
import hmac
import json
import re
import time
from concurrent.futures import Future
from dataclasses import replace

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from common import terminal
from common.files import UsageError
from serving import replies
from serving.requests import ANY_LENGTH, LOOPBACK, Refused, read_chat, read_completion, refusal
from serving.worker import Busy

MAX_BODY, BODY_SECONDS = 2**22, 30
ENDPOINT_TOKENS = 2**12  # max_tokens for an endpoint where a request has none


def build_app(worker, key=None, origins=(), log_prompts=False, hosts=LOOPBACK, routes=()):
    """The ASGI app over a Worker. key: what clients have to give, if any. origins: of other sites' pages that
    may ask. hosts: names by which the server is reached (None: any). routes: more of them, guarded alike."""
    own = [
        Route("/health", lambda request: reply({"status": "ok"}, 200 if worker.thread.is_alive() else 503)),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
    ]
    cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    handlers = {
        Refused: refused,
        HTTPException: not_found,
        ClientDisconnect: lambda *_: Response(status_code=400),
    }
    handlers |= {UsageError: lambda request, error: refused(request, refusal(error)), Exception: failed}
    app = Starlette(routes=[*own, *routes], middleware=[cors, Middleware(Guard, key, origins, hosts)],
                    exception_handlers=handlers)  # fmt: skip
    app.state.worker, app.state.log_prompts, app.state.started = worker, log_prompts, int(time.time())
    return app


class Guard:
    """Refuses, before a request is read: other names for this host (DNS rebinding), pages of other origins,
    and, except at /health, clients without the key. A browser gives the key as the password of Basic auth."""

    def __init__(self, app, key, origins, hosts):
        self.app, self.key, self.origins, self.hosts = app, key, origins, hosts

    async def __call__(self, scope, receive, send):
        error = self.check(scope) if scope["type"] == "http" else None
        await (refused(None, error) if error else self.app)(scope, receive, send)

    def check(self, scope):
        """The Refused of a request, None if it may pass."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts and re.sub(r":\d+\Z", "", host).strip("[]").lower() not in self.hosts:
            return Refused(403, f"Host {host[:100]!r} is not a name of this server; use {self.hosts[0]}")
        if origin and origin not in (*self.origins, f"http://{host}", f"https://{host}"):
            return Refused(403, f"pages of {origin[:100]} may not send requests; --origin allows an origin")
        if self.key and scope["path"] != "/health" and not self.knows_key(headers.get("authorization", "")):
            challenge = {"WWW-Authenticate": 'Basic realm="key as password"'}
            return Refused(401, "the API key is missing or wrong", None, "invalid_api_key", challenge)

    def knows_key(self, authorization):
        kind, _, value = authorization.partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value).decode().partition(":")[2]
            except ValueError:
                return False
        return hmac.compare_digest(value.strip().encode(), self.key.encode())


# ---- answers without a model -------------------------------------------------------------------------------


def reply(value, status=200, headers=None):
    return Response(replies.dumps(value), status, headers, "application/json")


def refused(request, error):
    return reply({"error": error.error}, error.status, error.headers)


def not_found(request, error):
    return refused(request, Refused(error.status_code, error.detail, headers=error.headers))


def failed(request, error):
    return refused(request, Refused(500, f"the server failed ({type(error).__name__})"))


def models(request):
    worker, name = request.app.state.worker, request.path_params.get("name")
    entry = {"object": "model", "created": request.app.state.started, "owned_by": "coser"}
    entries = [{"id": name, **entry} for name in worker.models]
    if name is None:
        return reply({"object": "list", "data": entries})
    for entry in entries:
        if entry["id"] == name:
            return reply(entry)
    raise Refused(404, f"the model {name!r} is not served", "model", "model_not_found")


def find(worker, body):
    """The model that a request names, the first if it names none."""
    body.model = body.model or next(iter(worker.models))
    if body.model not in worker.models:
        message = f"the model {body.model!r} is not served; there are {', '.join(worker.models)}"
        raise Refused(404, message, "model", "model_not_found")
    if 2 * body.n * max(1, len(body.prompts)) > worker.capacity:
        raise Refused(400, f"more than {worker.capacity // 2} choices in one request", "n")
    return worker.models[body.model]


async def read_json(request, limit=MAX_BODY):
    """The object in a request's body, of at most `limit` bytes that have BODY_SECONDS to arrive."""
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > limit:
                    raise Refused(413, f"the body is larger than {limit} bytes")
        value = json.loads(content)
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {BODY_SECONDS} s") from None
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body has to be a JSON object")
    if request.app.state.log_prompts:
        terminal.note(replies.dumps(value))
    return value


# ---- answers of a model ------------------------------------------------------------------------------------


class Choice:
    """One choice of a response. ids: the tokens of a completion's prompt; echo: the prompt's text if it is
    echoed. job: generates the text, None if there is nothing to generate; scoring: computes the
    log-probabilities of an echoed prompt, None if they are not wanted."""

    def __init__(self, index, model, body, ids=(), echo=""):
        self.index, self.model, self.body, self.ids, self.echo = index, model, body, ids, echo
        self.job, self.scoring = None, None
        self.text, self.num_tokens = "", 0  # what `added` has returned so far

    @property
    def jobs(self):
        return [job for job in (self.scoring, self.job) if job]

    @property
    def done(self):
        return all(job.done() for job in self.jobs)

    @property
    def result(self):
        return self.job.result() if self.job and self.job.done() else None

    @property
    def ending(self):
        """(finish reason, reasoning) of a choice that is done."""
        return getattr(self.result, "finish_reason", "length"), getattr(self.result, "reasoning", "")

    def start(self, worker, on_change):
        body, params = self.body, self.body.params_of(self.index % self.body.n)
        on_text = on_change if body.stream else None
        if body.chat:
            self.job = worker.submit(body.model, body.messages, params, body.opening, on_text)
        elif body.generates:
            self.job = worker.complete(body.model, self.ids, params, on_text)
        if body.echo and params.logprobs:
            self.scoring = worker.complete(body.model, self.ids[:1], params, None, self.ids[1:])
        for job in self.jobs:
            job.add_done_callback(on_change)

    def added(self):
        """(text, log-probabilities or None) since the last call."""
        if self.scoring and not self.scoring.done():
            return "", None
        text, count = ("", None) if self.job is None else self.job.progress
        if self.result:
            text, count = self.result.text, None
        text = self.echo + text
        text = text if text.startswith(self.text) else self.text  # a streamed text is never taken back
        added, offset, self.text = text[len(self.text) :], len(self.text), text
        tokens = self.tokens(count)[self.num_tokens :] if self.body.params.logprobs else []
        if not tokens:
            return added, None
        self.num_tokens += len(tokens)
        return added, replies.logprobs(self.body.chat, self.model.tokenizer, tokens, offset)

    def tokens(self, count):
        """[(id, log-probability, likeliest)] of an echoed prompt and `count` generated tokens (None: all)."""
        tokens = [(self.ids[0], None, None)] if self.scoring else []
        for job in self.jobs:
            if job.request:
                sequence = job.request.sequences[0]
                ids = sequence.generated[: count if job is self.job else None]
                tops = sequence.top_logprobs or [()] * len(ids)
                tokens += zip(ids, sequence.logprobs, tops, strict=False)  # stop strings cut ids
        return tokens

    def check(self):
        """Raises what went wrong with a job as Refused; ClientDisconnect if it was cancelled."""
        for job in filter(Future.done, self.jobs):
            if job.cancelled():
                raise ClientDisconnect
            error = job.exception()
            if error and not isinstance(error, (UsageError, ValueError, RecursionError)):
                raise Refused(500, f"the model failed ({type(error).__name__})")
            size = len(self.ids) if error else job.result().prompt_tokens
            if error := error or getattr(job.result(), "error", None):
                message = str(error).removeprefix(f"{self.model.name}: ")  # which may be a path
                if self.model.local and size >= self.model.engine.max_sequence_tokens:
                    what = "messages" if self.body.chat else "prompt"
                    raise Refused(400, message, what, "context_length_exceeded")
                if not (self.model.local or refusal(message).error["param"]):
                    raise Refused(502, message)
                raise refusal(message)


async def chat(request):
    body = read_chat(await read_json(request))
    model, messages = find(request.app.state.worker, body), body.messages
    if not model.local:  # the server there decides what a last assistant message means
        messages += [{"role": "assistant", "content": body.opening}] if body.opening else []
        length = body.params.max_tokens if body.params.max_tokens < ANY_LENGTH else ENDPOINT_TOKENS
        body = replace(body, opening="", params=replace(body.params, max_tokens=length))
    elif not model.tokenizer.format.system_role:
        first = [message["role"] for message in messages].count("system")  # 1 at most
        if [message["role"] for message in messages[first : first + 1]] != ["user"]:
            messages.insert(first, {"role": "user", "content": ""})
    return await answer(request, body, model, [Choice(i, model, body) for i in range(body.n)])


async def completions(request):
    body = read_completion(await read_json(request))
    model, choices = find(request.app.state.worker, body), []
    if not model.local:
        raise Refused(400, f"{body.model} can only chat", "model")
    for ids, text in await asyncio.to_thread(encode, model, body):
        choices += [Choice(len(choices) + i, model, body, ids, text) for i in range(body.n)]
    return await answer(request, body, model, choices)


def encode(model, body):
    """[(ids, text to echo)] of the prompts; a text begins with the token that begins texts."""
    begin = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]
    texts = [prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt) for prompt in body.prompts]
    ids = [begin + model.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    return [(own, text * body.echo) for own, text in zip(ids, texts, strict=True)]


async def answer(request, body, model, choices):
    """The response with these choices; their jobs are cancelled once it is complete or the client gone."""
    loop, changed, worker = asyncio.get_running_loop(), asyncio.Event(), request.app.state.worker

    def on_change(job):
        with contextlib.suppress(RuntimeError):  # the server has stopped
            loop.call_soon_threadsafe(changed.set)

    async def cancel_at_end():
        try:
            await request.receive()  # returns when the response is complete or the client gone
        finally:
            for job in [job for choice in choices for job in choice.jobs]:
                job.cancel()

    request.state.task = asyncio.create_task(cancel_at_end())  # a reference, lest it is collected
    try:
        for choice in choices:
            choice.start(worker, on_change)
    except Busy:
        raise Refused(503, "too many requests are in progress", headers={"Retry-After": "2"}) from None
    while not all(choice.done for choice in choices):
        await changed.wait()
        changed.clear()
        if body.stream:
            break
    for choice in choices:
        choice.check()
    head = replies.head(body, model)
    if body.stream:
        pieces, headers = events(body, choices, changed, head), {"Cache-Control": "no-cache"}
        return StreamingResponse(pieces, headers=headers, media_type="text/event-stream")
    whole = [replies.choice(body.chat, choice.index, *choice.added(), *choice.ending) for choice in choices]
    return reply(head | {"choices": whole, "usage": replies.usage(body, choices)})


async def events(body, choices, changed, head):
    """The events of a stream."""
    blank = {"usage": None} if body.include_usage else {}

    def chunk(choice, delta, *rest):
        piece = replies.piece(body.chat, choice.index, delta, *rest)
        return replies.event(head | {"choices": [piece]} | blank)

    try:
        for choice in choices if body.chat else ():
            yield chunk(choice, {"role": "assistant", "content": ""})
        running = list(choices)
        changed.set()
        while running:
            await changed.wait()
            changed.clear()
            for choice in list(running):
                choice.check()
                done = choice.done  # asked before the text, so that none is missed
                text, logprobs = choice.added()
                if text or logprobs:
                    yield chunk(choice, {"content": text}, logprobs)
                if done:
                    reason, reasoning = choice.ending
                    if reasoning:
                        yield chunk(choice, {"reasoning_content": reasoning})
                    yield chunk(choice, {}, None, reason)
                    running.remove(choice)
        if body.include_usage:
            yield replies.event(head | {"choices": [], "usage": replies.usage(body, choices)})
        yield replies.event("[DONE]")
    except Refused as error:
        yield replies.event({"error": error.error, "choices": []})
    except ClientDisconnect:
        return
