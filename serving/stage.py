"""The web stage: a page on which a scene is watched line by line, and a part in it can be played.

The server keeps no play: a request holds the scene and the messages so far, and the reply streams what
follows (play/session.py), so to retry, to edit and to branch are requests with other messages.
"""

import asyncio
import json
import tempfile
from dataclasses import fields
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from common.files import UsageError
from data.chats import NEXT_SPEAKER
from data.records import Report, mend_surrogates
from data.scenes import Scene, load_scenes, load_stage
from evals.judging import judge_all
from evals.metrics import LENGTH_WEIGHT, METRICS
from evals.rubric import load_rubric
from evals.shapes import check
from evals.verdicts import MESSAGES, SCENE, read_performances, verdict_line
from play.perform import TokenCounts
from play.protocol import Call, NobodySpoke, Protocol, SceneFailed
from play.replies import played_so_far
from play.session import Session, line
from play.transcripts import TRANSCRIPT_KEYS, settings_of
from serving.worker import Busy

HERE = Path(__file__).parent
PAGE = {"/": ("stage.html", "text/html"), "/stage.css": ("stage.css", "text/css")}
PAGE |= {"/stage.js": ("stage.js", "text/javascript")}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
HEADERS |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
PLAY = {"scene": SCENE, "messages": MESSAGES, "settings": dict}
LONGEST = 2**24, 2**21  # bytes of a file that is opened, and of any other request
MOST = 500, 200  # scenes of a file that are offered, and rounds of a play
WAIT = 0.05  # seconds between two looks at a turn that is being generated


def routes(worker, judge=None):
    """The routes of the page. worker: answers for the actors. judge: the model of --judge, or None."""
    stage = WebStage(worker, judge)
    pages = [Route(path, page(*file)) for path, file in PAGE.items()]
    posts = {"open": stage.open, "next": stage.next, "judge": stage.judge}
    named = [Route(f"/stage/{name}", answering(post), methods=["POST"]) for name, post in posts.items()]
    return [*pages, Route("/stage/scenes", stage.scenes), *named]


def page(name, media_type):
    """The endpoint of one of the page's own files."""
    content = (HERE / name).read_bytes()

    async def send(_):
        return Response(content, media_type=media_type, headers=HEADERS)

    return send


def answering(post):
    """An endpoint whose refusals are JSON: {"error": one line} with status 400."""

    async def send(request):
        try:
            return await post(request)
        except (UsageError, ValueError, TypeError, RecursionError) as error:
            return JSONResponse({"error": " ".join(str(error).split())}, 400, HEADERS)

    return send


async def body_of(request, limit):
    """The bytes of a request; ValueError as soon as there are more than `limit`."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise ValueError(f"more than {limit / 2**20:.0f} MB; open a smaller file")
    return bytes(body)


async def play_of(request):
    """(the request's JSON, its Scene) of a play that the page sends; ValueError where it has another form."""
    value = mend_surrogates(json.loads(await body_of(request, LONGEST[1])), "request", Report())
    check(value, PLAY, "request")
    scene = Scene(**{field.name: value["scene"].get(field.name, {}) for field in fields(Scene)})
    if not all(name.strip() and name != NEXT_SPEAKER for name in scene.speaking_characters):
        raise ValueError("every character needs a name")
    return value, scene


class WebStage:
    """The endpoints of the page."""

    def __init__(self, worker, judge):
        self.worker, self.judge_model, self.judging = worker, judge, asyncio.Lock()

    async def scenes(self, _):
        """The bundled scenes, the names of the actors and of the judge."""
        plays = [offer(scene) for scene in load_stage().values()]
        judge = self.judge_model and self.judge_model.name
        return JSONResponse(
            {"plays": plays, "models": list(self.worker.models), "judge": judge}, 200, HEADERS
        )

    async def open(self, request):
        """What a file holds: scenes, or plays that were saved."""
        data = await body_of(request, LONGEST[0])
        return JSONResponse({"plays": await run_in_threadpool(plays_in, data)}, 200, HEADERS)

    async def next(self, request):
        """A stream of what follows in a play, up to the person's turn or the end."""
        value, scene = await play_of(request)
        given = value["settings"]
        check(given, {"model": str, "temperature": int | float, "seed": int, "max_rounds": int}, "settings")
        model = self.worker.models.get(given["model"])
        if model is None or not 0 <= given["temperature"] <= 2 or not given["max_rounds"] <= MOST[1]:
            raise ValueError(f"a known model, a temperature of 0 to 2 and at most {MOST[1]} rounds, please")
        options = {name: given[name] for name in ("temperature", "seed", "max_rounds")}
        protocol = Protocol(**options)
        session = Session(scene, protocol, value["messages"], value.get("human") or None)
        roles = dict.fromkeys(("actor", "environment", "next_speaker"), model)
        settings = settings_of(roles, [scene], "paper", protocol) | {"human": session.human}
        said = value.get("line")
        check(said or "", str, "line")
        events = self.events(session, given["model"], settings, said)
        stream = (f"data: {json.dumps(event)}\n\n" async for event in events)
        return StreamingResponse(stream, media_type="text/event-stream", headers=HEADERS)

    async def events(self, session, model, settings, said):
        """What the page is told: settings, growing texts, messages; last whose line is asked for, that the
        scene is over, or an error, with the stats. said: the person's line, or None if it is still to come."""
        performance, tokens, reply, error = session.performance(), TokenCounts(), None, None
        coroutine, sent, asked = performance.play(), len(performance.messages), None
        yield {"settings": settings}
        try:
            while asked is None:
                step = advance(coroutine, reply)
                for message in performance.messages[sent:]:
                    yield {"message": message}
                sent, reply = len(performance.messages), None
                if step is None:
                    break
                if session.is_asked(step) and said is None:
                    asked = step.agent
                elif session.is_asked(step):
                    reply, said = line(said), None
                elif isinstance(step, Call):
                    async for text, reply in self.answer(model, step, performance.cast):
                        if text:
                            yield {"name": step.agent, "text": text}
                    tokens.add(step.agent, reply, 1)
        except (SceneFailed, Busy) as failure:
            error = str(failure) or "the server is busy; go on in a moment"
        yield {"asked": asked, "error": error, "stats": {**tokens.stats(), **performance.stats}}

    async def answer(self, model, call, cast):
        """Yields (what will surely be played of a turn, None) as it grows, then ("", the Reply)."""
        job = self.worker.submit(model, call.messages, call.params, call.opening)
        shown = ""
        try:
            while not job.done():
                await asyncio.wait([asyncio.wrap_future(job)], timeout=WAIT)
                text = played_so_far(job.text, call.agent, cast) if call.role != "next_speaker" else ""
                if text != shown and not job.done():
                    shown = text
                    yield text, None
            yield "", job.result()
        finally:
            job.cancel()

    async def judge(self, request):
        """Metrics of a play that has an original, and the verdict of the judge where the server has one."""
        value, scene = await play_of(request)
        async with self.judging:
            line = await run_in_threadpool(self.verdict, scene, value["messages"], value["settings"])
        metrics = {label: line[key] for label, key in METRICS.items()} if scene.dialogues else {}
        verdict = {name: line[name] for name in ("judge", "score", "dimensions", "turns")}
        return JSONResponse({"metrics": metrics} | verdict, 200, HEADERS)

    def verdict(self, scene, messages, settings):
        """The line that judge.py would write of this play."""
        rubric, model, dimensions = load_rubric(), self.judge_model, {}
        if model:
            [(_, dimensions)] = judge_all({"play": (scene, messages, settings)}, model, rubric)
        fields = {"judge": model and model.name, "rubric": rubric["name"]}
        return verdict_line("play", (scene, messages, settings), fields, LENGTH_WEIGHT, dimensions)


def advance(coroutine, reply):
    """The next step of a Performance; None at its end."""
    try:
        return coroutine.send(reply)
    except (StopIteration, NobodySpoke):
        return None


def offer(scene, messages=(), settings=None):
    """A play as the page lists it."""
    return {"scene": scene.to_dict(), "messages": list(messages), "settings": settings or {}}


def plays_in(data):
    """The plays of a file: saved ones of a transcript, else the scenes of a book or a test file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "file.jsonl")
        path.write_bytes(data)
        try:
            if is_transcript(data):
                return [offer(*performance) for performance in read_performances(path)[: MOST[0]]]
            return [offer(scene) for scene in load_scenes(path)[: MOST[0]]]
        except UsageError as error:
            raise UsageError(str(error).replace(str(path), "this file")) from None


def is_transcript(data):
    """Whether the first line of a file is a transcript's."""
    try:
        first = json.loads(data.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and first.keys() >= set(TRANSCRIPT_KEYS)
