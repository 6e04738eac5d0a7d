"""The web stage: a page on which a scene is watched line by line, and a part in it can be played.

The server keeps no play: a request holds the scene and the messages so far, and the reply streams what
follows (play/session.py), so to retry, to edit and to branch are requests with other messages.
"""

import asyncio
import base64
import json
import tempfile
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from common.files import UsageError
from data.cards import read_card, scene_of
from data.chats import NEXT_SPEAKER
from data.records import Report, mend_surrogates
from data.scenes import ENVIRONMENT, Scene, load_scenes, load_stage
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
from serving.app import read_json, reply
from serving.requests import Refused
from serving.worker import Busy

PAGE = {"/": ("stage.html", "text/html"), "/stage.css": ("stage.css", "text/css")}
PAGE |= {"/stage.js": ("stage.js", "text/javascript")}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
HEADERS |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
PLAY = {"scene": SCENE, "messages": MESSAGES, "settings": dict}
SETTINGS = {"model": str, "temperature": int | float, "seed": int, "max_rounds": int}
NEXT = PLAY | {"settings": SETTINGS, "seed?": int, "human?": str | None, "line?": str | None}
FILES = [{"name": str, "data": str}]  # data: base64
ROLES = ("actor", "environment", "next_speaker")
LARGEST = 2**25  # bytes of a request that opens files
MOST_SCENES, MOST_ROUNDS = 500, 1000  # of a file that is opened, and of a play
VISITOR = "Visitor"  # who meets the character of a single card
WAIT = 0.05  # seconds between two looks at a turn that is being generated


def routes(judge=None):
    """The routes of the page, for `build_app`. judge: the model that judges plays, or None."""
    pages = [Route(path, partial(page, *file)) for path, file in PAGE.items()]
    posts = {"open": open_files, "next": next_turns, "judge": partial(judge_play, judge, asyncio.Lock())}
    posts = [Route(f"/stage/{name}", post, methods=["POST"]) for name, post in posts.items()]
    return [*pages, Route("/stage/scenes", bundled), *posts]


async def page(name, media_type, _):
    return Response(Path(__file__).with_name(name).read_bytes(), 200, HEADERS, media_type)


async def read_play(request, shape):
    """(the JSON, the Scene) of a request with a play; UsageError where it has another shape."""
    value = mend_surrogates(await read_json(request), "play", Report())
    try:
        check(value, shape, "play")
        scene = Scene(**{field.name: value["scene"].get(field.name, {}) for field in fields(Scene)})
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    if not all(name.strip() and name != NEXT_SPEAKER for name in scene.speaking_characters):
        raise UsageError(f"every character needs a name, which may not be {NEXT_SPEAKER}")
    return value, scene


# ---- what can be played ------------------------------------------------------------------------------------


async def bundled(request):
    """The bundled scenes, and the names of the actors."""
    plays = [offer(scene) for scene in load_stage().values()]
    return reply({"plays": plays, "models": list(request.app.state.worker.models)}, headers=HEADERS)


async def open_files(request):
    """What the files of a request hold: scenes, saved plays, or cards, which make one scene."""
    value = await read_json(request, LARGEST)
    try:
        check(value, {"files": FILES}, "request")
        contents = [(file["name"], base64.b64decode(file["data"])) for file in value["files"]]
    except ValueError as error:
        raise UsageError(str(error)) from None
    return reply({"plays": await asyncio.to_thread(plays_in, contents)}, headers=HEADERS)


def offer(scene, messages=(), settings=None):
    """A play as the page lists it."""
    return {"scene": scene.to_dict(), "messages": list(messages), "settings": settings or {}}


def plays_in(contents):
    """The plays of [(file name, bytes)], cards last. A card's first message is the first of its play."""
    plays, cards = [], []
    for name, data in contents:
        try:
            cards.append(read_card(data))
        except UsageError as error:
            if data.startswith((b"\x89PNG", b"PK")):
                raise UsageError(f"{name}: {error}") from None
            plays += plays_of_text(name, data)
    if cards:
        scene = scene_of(cards, user=None if len(cards) > 1 else VISITOR, actions=True)
        first = [{"role": turn["character"], "content": turn["message"]} for turn in scene.dialogues]
        first = [message for message in first if message["role"] != ENVIRONMENT]
        settings = {"human": VISITOR} if len(cards) == 1 else {}
        plays.append(offer(replace(scene, dialogues=[]), first, settings))
    return plays[:MOST_SCENES]


def plays_of_text(name, data):
    """The plays of a file: saved ones of a transcript, else the scenes of a book or a test file."""
    with tempfile.TemporaryDirectory() as directory:
        is_saved = is_transcript(data)
        path = Path(directory, "file.jsonl" if is_saved else "file.json")
        path.write_bytes(data)
        try:
            if is_saved:
                return [offer(*performance) for performance in read_performances(path)]
            return [offer(scene) for scene in load_scenes(path)]
        except UsageError as error:
            raise UsageError(str(error).replace(str(path), name)) from None


def is_transcript(data):
    """Whether the first line of a file is a transcript's."""
    try:
        first = json.loads(data.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and first.keys() >= set(TRANSCRIPT_KEYS)


# ---- playing -----------------------------------------------------------------------------------------------


async def next_turns(request):
    """A stream of what follows in a play, up to the person's turn or the end; see `events`."""
    value, scene = await read_play(request, NEXT)
    worker, given = request.app.state.worker, value["settings"]
    model = worker.models.get(name := given["model"])
    if model is None or not 0 <= given["temperature"] <= 2 or given["max_rounds"] > MOST_ROUNDS:
        raise UsageError(f"choose a served model, a temperature of 0 to 2, at most {MOST_ROUNDS} rounds")
    protocol = Protocol(**{key: given[key] for key in SETTINGS if key != "model"})
    session = Session(scene, protocol, value["messages"], value.get("human"), value.get("seed"))
    models = dict.fromkeys(ROLES, model)
    settings = settings_of(models, [scene], "paper", protocol) | {"human": session.human}
    settings |= dict.fromkeys(ROLES, name)  # the model's own name may be a path of this machine
    found = events(worker, name, session, settings, value.get("line"))
    stream = (f"data: {json.dumps(event)}\n\n" async for event in found)
    return StreamingResponse(stream, 200, HEADERS, "text/event-stream")


async def events(worker, model, session, settings, said):
    """What the page is told: `settings`; growing `text`s with a `name`; `message`s; last `stats`, and with
    them who is `asked` for a line, or an `error`, or neither at the scene's end. said: the line of the person
    who was asked before, or None."""
    performance, tokens, answer, error = session.performance(), TokenCounts(), None, None
    coroutine, sent, step = performance.play(), len(performance.messages), None
    yield {"settings": settings}
    try:
        while True:
            step, answer = advance(coroutine, answer), None
            for message in performance.messages[sent:]:
                yield {"message": message}
            sent = len(performance.messages)
            if step is None or (session.is_asked(step) and said is None):
                break
            if session.is_asked(step):
                answer, said = line(said), None
            elif isinstance(step, Call):
                job = worker.submit(model, step.messages, step.params, step.opening)
                try:
                    async for text in growing(job, step, performance.cast):
                        yield {"name": step.agent, "text": text}
                finally:
                    job.cancel()
                answer = job.result()
                tokens.add(step, answer, 1)
    except Busy:
        step, error = None, "the server is busy; go on in a moment"
    except (SceneFailed, UsageError) as failure:
        step, error = None, str(failure).removeprefix(f"{worker.models[model].name}: ")  # may be a path
    except Exception as failure:  # of the model, or a scene that only looks like one
        step, error = None, f"the server failed ({type(failure).__name__})"
    asked = step.agent if step else None
    yield {"asked": asked, "error": error, "stats": {**tokens.stats(), **performance.stats}}


def advance(coroutine, answer):
    """The next step of a Performance; None at its end."""
    try:
        return coroutine.send(answer)
    except (StopIteration, NobodySpoke):
        return None


async def growing(job, call, cast):
    """Yields what will surely be played of a turn, each time that it has grown, until the job has ended."""
    ended, shown = asyncio.wrap_future(job), ""
    ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # it is read from the job
    while not job.done():
        await asyncio.wait([ended], timeout=WAIT)
        text = played_so_far(job.text, call.agent, cast) if call.role != "next_speaker" else ""
        if text != shown and not job.done():
            shown = text
            yield text


# ---- judging -----------------------------------------------------------------------------------------------


async def judge_play(model, lock, request):
    """Metrics of a play that has an original, and the verdict of the judge, if there is one."""
    value, scene = await read_play(request, PLAY)
    async with lock:  # one at a time
        try:
            found = await asyncio.to_thread(verdict, model, (scene, value["messages"], value["settings"]))
        except Busy:
            later = {"Retry-After": "2"}
            raise Refused(503, "the server is busy; judge in a moment", headers=later) from None
    metrics = {label: found[key] for label, key in METRICS.items()} if scene.dialogues else {}
    return reply({name: found[name] for name in ("judge", "score", "dimensions")} | {"metrics": metrics})


def verdict(model, performance):
    """The line that judge.py would write of a performance."""
    rubric, dimensions = load_rubric(), {}
    if model:
        [(_, dimensions)] = judge_all({"play": performance}, model, rubric)
    about = {"judge": model and model.name, "rubric": rubric["name"]}
    return verdict_line("play", performance, about, LENGTH_WEIGHT, dimensions)
