"""The routes of /v1 and /health, and what is refused before a route is reached."""

import asyncio
import base64
import hmac
import json
import time
from concurrent.futures import Future

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
from serving.requests import Refused, read_chat, read_completion, refusal
from serving.worker import Busy

MAX_BODY, BODY_SECONDS = 2**22, 30
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


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
    """Refuses, before anything else is looked at: other hosts' names (DNS rebinding), pages of other origins,
    and, but for /health, clients without the key. A browser gives the key as a password."""

    def __init__(self, app, key, origins, hosts):
        self.app, self.key, self.origins, self.hosts = app, key, origins, hosts

    async def __call__(self, scope, receive, send):
        refusal = self.refusal(scope) if scope["type"] == "http" else None
        await (refused(None, refusal) if refusal else self.app)(scope, receive, send)

    def refusal(self, scope):
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts and host.removesuffix(":" + host.rpartition(":")[2]) not in self.hosts:
            return Refused(403, f"this server is not {host[:100]}")
        if origin and origin not in (*self.origins, f"http://{host}", f"https://{host}"):
            return Refused(
                403, "pages of other origins may not ask; start the server with --origin to let one"
            )
        if self.key and scope["path"] != "/health" and not self.knows_key(headers.get("authorization", "")):
            ask = {"WWW-Authenticate": 'Basic realm="key as password"'}
            return Refused(401, "the API key is missing or wrong", None, "invalid_api_key", ask)

    def knows_key(self, given):
        kind, _, value = given.partition(" ")
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


def find(worker, asked):
    """The model that is asked; the first, where none is named."""
    asked.model = asked.model or next(iter(worker.models))
    if asked.model not in worker.models:
        message = f"the model {asked.model!r} is not served; there are {', '.join(worker.models)}"
        raise Refused(404, message, "model", "model_not_found")
    if 2 * asked.n * max(1, len(asked.prompts)) > worker.capacity:
        raise Refused(400, f"more than {worker.capacity // 2} choices in one request", "n")
    return worker.models[asked.model]


async def read_json(request, limit=MAX_BODY):
    """The object in a request's body, of at most `limit` bytes that have BODY_SECONDS to arrive."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise Refused(413, f"the body is larger than {limit} bytes")
        value = json.loads(body)
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
    """One choice on its way. job: of its text, None where nothing is generated; scored: of log-probabilities
    of an echoed prompt, None if not wanted; echo: the text of that prompt, ids: its tokens."""

    def __init__(self, index, model, asked, ids=(), echo=""):
        self.index, self.model, self.asked, self.ids, self.echo = index, model, asked, ids, echo
        self.job, self.scored, self.jobs = None, None, []
        self.text, self.tokens = "", 0  # what has been taken

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
        asked, params = self.asked, self.asked.params_of(self.index % self.asked.n)
        if asked.chat:
            self.job = worker.submit(asked.model, asked.messages, params, asked.opening, on_change)
        elif asked.generates:
            self.job = worker.complete(asked.model, self.ids, params, on_change)
        self.jobs += [self.job] * (self.job is not None)
        if asked.echo and params.logprobs:
            self.scored = worker.complete(asked.model, self.ids[:1], params, on_change, self.ids[1:])
            self.jobs.insert(0, self.scored)
        for job in self.jobs:
            job.add_done_callback(on_change)

    def cancel(self):
        for job in self.jobs:
            job.cancel()

    def take(self):
        """(text, log-probabilities or None) beyond what was taken before."""
        if self.scored and not self.scored.done():
            return "", None
        text = self.echo + (self.result.text if self.result else self.job.text if self.job else "")
        text = text if text.startswith(self.text) else self.text
        added, offset, self.text = text[len(self.text) :], len(self.text), text
        tokens = self.token_list()[self.tokens :] if self.asked.params.logprobs else []
        self.tokens += len(tokens)
        logprobs = replies.logprobs(self.asked.chat, self.model.tokenizer, tokens, offset)
        return added, logprobs if tokens else None

    def token_list(self):
        """[(id, log-probability, likeliest)] of what there is so far, without what a stop string may cut."""
        lists = [[(self.ids[0], None, None)]] if self.scored else []
        for job in self.jobs:
            sequence = job.request.sequences[0] if job.request else None
            if sequence and (job.done() or sequence.text == job.text):
                tops = sequence.top_logprobs or [()] * len(sequence.logprobs)
                lists.append(zip(sequence.generated, sequence.logprobs, tops, strict=False))
        return [token for tokens in lists for token in tokens]

    def check(self):
        """Raises what went wrong with a job, as Refused."""
        for job in filter(Future.done, self.jobs):
            if job.cancelled():
                raise ClientDisconnect
            error = job.exception()
            if error and not isinstance(error, (UsageError, ValueError, RecursionError)):
                raise Refused(500, f"the model failed ({type(error).__name__})")
            size = len(self.ids) if error else getattr(job.result(), "prompt_tokens", 0)
            error = error or getattr(job.result(), "error", None)
            message = str(error).removeprefix(f"{self.model.name}: ")  # which may be a path
            if error and not self.model.local:
                raise Refused(502, message)
            if error and size >= self.model.engine.max_sequence_tokens:
                what = "messages" if self.asked.chat else "prompt"
                raise Refused(400, message, what, "context_length_exceeded")
            if error:
                raise refusal(message)


async def chat(request):
    asked = read_chat(await read_json(request))
    model = find(request.app.state.worker, asked)
    roles = [message["role"] for message in asked.messages if message["role"] != "system"]
    if model.local and not model.tokenizer.format.system_role and roles[:1] != ["user"]:
        asked.messages.insert(len(asked.messages) - len(roles), {"role": "user", "content": ""})
    choices = [Choice(i, model, asked) for i in range(asked.n)]
    return await answer(request, asked, model, choices)


async def completions(request):
    asked = read_completion(await read_json(request))
    model, choices = find(request.app.state.worker, asked), []
    if not model.local:
        raise Refused(400, f"{asked.model} can only chat", "model")
    for ids, text in await asyncio.to_thread(encode, model, asked):
        choices += [Choice(len(choices) + i, model, asked, ids, text) for i in range(asked.n)]
    return await answer(request, asked, model, choices)


def encode(model, asked):
    """[(ids, text to echo)] of the prompts; a text begins with the token that begins texts."""
    begin = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]
    texts = [one if isinstance(one, str) else model.tokenizer.decode(one) for one in asked.prompts]
    ids = [begin + model.encode(one) if isinstance(one, str) else one for one in asked.prompts]
    return [(own, text * asked.echo) for own, text in zip(ids, texts, strict=True)]


async def answer(request, asked, model, choices):
    """The response with these choices; whatever ends it before they do cancels them."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def on_change(job):
        if not loop.is_closed():
            loop.call_soon_threadsafe(changed.set)

    async def leave():  # after the body the only message is that the client has gone
        await request.receive()
        for choice in choices:
            choice.cancel()

    leaving, streams, opened = asyncio.create_task(leave()), False, False
    try:
        for choice in choices:
            choice.start(request.app.state.worker, on_change)
        while not (streams or all(choice.done for choice in choices)):
            await changed.wait()
            changed.clear()
            streams = asked.stream
        for choice in choices:
            choice.check()
        opened = streams
    except Busy:
        raise Refused(503, "too many requests are in progress", headers={"Retry-After": "2"}) from None
    finally:
        leaving.cancel()
        for choice in choices if not opened else ():
            choice.cancel()
    head = replies.head(asked.chat, asked.model, model, asked.stream)
    if streams:
        pieces, headers = events(asked, choices, changed, head), {"Cache-Control": "no-cache"}
        return StreamingResponse(pieces, headers=headers, media_type="text/event-stream")
    whole = [replies.choice(asked.chat, choice.index, *choice.take(), *choice.ending) for choice in choices]
    return reply(head | {"choices": whole, "usage": replies.usage(asked, choices)})


async def events(asked, choices, changed, head):
    """The events of a stream."""
    blank = {"usage": None} if asked.include_usage else {}

    def chunk(choice, delta, *rest):
        piece = replies.piece(asked.chat, choice.index, delta, *rest)
        return replies.event(head | {"choices": [piece]} | blank)

    try:
        for choice in choices if asked.chat else ():
            yield chunk(choice, {"role": "assistant", "content": ""})
        running = list(choices)
        changed.set()
        while running:
            await changed.wait()
            changed.clear()
            for choice in list(running):
                choice.check()
                done = choice.done  # before what there is is taken
                text, logprobs = choice.take()
                if text or logprobs:
                    yield chunk(choice, {"content": text}, logprobs)
                if done:
                    reason, reasoning = choice.ending
                    if reasoning:
                        yield chunk(choice, {"reasoning_content": reasoning})
                    yield chunk(choice, {}, None, reason)
                    running.remove(choice)
        if asked.include_usage:
            yield replies.event(head | {"choices": [], "usage": replies.usage(asked, choices)})
        yield replies.event("[DONE]")
    except Refused as error:
        yield replies.event({"error": error.error, "choices": []})
    finally:
        for choice in choices:
            choice.cancel()
