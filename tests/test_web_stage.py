"""The web stage: what its routes answer, and the page in a real browser."""

import base64
import itertools
import json
import random
import re
import shutil
import socket
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import uvicorn
from starlette.testclient import TestClient
from test_simulate import make_scene

import serve
from common.files import write_lines
from data.brackets import BracketParser
from data.cards import Card, write_card
from data.chats import END_CHAT, NEXT_SPEAKER
from data.scenes import ENVIRONMENT, load_scenes, to_test_scene
from evals import metrics
from evals.rubric import scripts
from evals.verdicts import read_performances
from llm.reply import Reply
from play.perform import perform
from play.protocol import Protocol
from play.transcripts import TRANSCRIPT_KEYS
from serving import stage as web
from serving.app import build_app
from serving.worker import Worker

ROLES = ("actor", "environment", "next_speaker")


class Cast:
    """A local model that says a word a step. say(messages, params) is what a reply will have said."""

    name, identity, adaptations, local, chat_format_reason = "cast", "cast", (), True, "none"

    def __init__(self, say, pause=0.005):
        self.say, self.pause, self.asked, self.running = say, pause, [], {}
        self.engine = SimpleNamespace(grammars={})

    def submit(self, messages, params, opening=""):
        future = Future()
        self.asked.append(messages)
        sequences = [SimpleNamespace(generated=[], text="")]
        self.running[future] = SimpleNamespace(text=self.say(messages, params), count=0, sequences=sequences)
        future.add_done_callback(lambda future: self.running.pop(future, None))
        return future

    def step(self):
        for future, request in list(self.running.items()):
            request.count += 1
            if request.count > len(request.text.split(" ")):
                future.set_result(Reply(request.text, "stop", 7, 3, 2))
            time.sleep(self.pause)

    def spoken(self, future):
        request = self.running[future]
        return " ".join(request.text.split(" ")[: request.count])

    def chat(self, conversations, params, openings=None, on_reply=lambda: None):
        return [Reply(self.say(messages, params), "stop") for messages in conversations]


def is_next_speaker(messages):
    return messages[0]["content"].startswith("You watch a scene")


def scripted(messages, params):
    """A cast that talks in turns, ends its scene late, and says other things with other seeds."""
    rng = random.Random(f"{messages}{params.seed}")
    if is_next_speaker(messages):
        return rng.choice(["Ada", "Ben", "Environment", "nobody", END_CHAT])
    return f"[I am number {rng.randrange(1000)}] (nods) Good evening to you all, whoever you may be."


@pytest.fixture(scope="module")
def cast():
    return Cast(scripted)


@pytest.fixture(scope="module")
def app(cast):
    return build_app(Worker({"cast": cast}), routes=web.routes())


@pytest.fixture
def client(app):
    return TestClient(app, base_url="http://localhost")


def body(scene=None, messages=(), human=None, line=None, **settings):
    settings = {"model": "cast", "temperature": 0.7, "seed": 0, "max_rounds": 8} | settings
    scene = (scene or make_scene()).to_dict()
    return {"scene": scene, "messages": list(messages), "human": human, "line": line, "settings": settings}


def events(client, *args, **options):
    """The events of /stage/next."""
    reply = client.post("/stage/next", json=body(*args, **options))
    assert reply.status_code == 200, reply.text
    return [json.loads(event.removeprefix("data: ")) for event in reply.text.split("\n\n") if event]


def messages_of(stream):
    return [event["message"] for event in stream if "message" in event]


# ---- the routes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/stage.css", "/stage.js", "/stage/scenes"])
def test_a_page_may_load_nothing_but_its_own(client, path):
    reply = client.get(path)
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    assert reply.status_code == 200 and policy.pop("default-src") == "'none'"
    assert set(policy.values()) == {"'self'", "'none'"} and policy["script-src"] == "'self'"
    assert {"base-uri", "form-action", "frame-ancestors"} <= policy.keys()
    assert reply.headers["x-content-type-options"] == "nosniff"
    if path != "/stage/scenes":
        assert not re.search(r"https?:|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", reply.text)
        assert not re.search(r"<script>|<style|\sstyle=|\son[a-z]+=", reply.text)


@pytest.mark.parametrize("seed", range(2))
def test_the_page_plays_what_simulate_plays(client, seed):
    """The messages of a stream, joined over pauses, are those of `perform` with the same seed; what is shown
    of a turn before it ends is how the turn begins."""
    whole = []
    protocol = Protocol(max_rounds=7, temperature=0.7, seed=seed)
    models = dict.fromkeys(ROLES, Cast(scripted, 0))
    perform([make_scene()], models, protocol, on_end=lambda _, messages, *rest: whole.extend(messages))
    stream = events(client, seed=seed, max_rounds=7)
    assert messages_of(stream) == whole and stream[-1]["asked"] is stream[-1]["error"] is None
    assert stream[0]["settings"]["temperature"] == 0.7 and stream[-1]["stats"]["decoded"] > 0
    texts = [event for event in stream if "text" in event]
    assert texts and all(
        any(m["role"] == t["name"] and m["content"].startswith(t["text"]) for m in whole) for t in texts
    )
    first = messages_of(events(client, seed=seed, max_rounds=3))
    rest = messages_of(events(client, messages=first, seed=seed, max_rounds=7))
    assert first + rest == whole


def test_taking_a_role(client, cast):
    """The person is asked, others never read their thoughts, and silence is passed over."""
    stream = events(client, human="Ada")
    assert stream[-1]["asked"] == "Ada" and not messages_of(stream)
    cast.asked.clear()
    stream = events(client, human="Ada", line="[SECRET] (waves) Hello.")
    assert messages_of(stream)[0] == {"role": "Ada", "content": "[SECRET] (waves) Hello.", "human": True}
    others = [chat for chat in cast.asked if "The wish of Ada." not in chat[0]["content"]]
    assert others and "(waves) Hello." in str(others) and "SECRET" not in str(others)
    silent = messages_of(events(client, human="Ada", line="", max_rounds=2))
    assert silent[0]["role"] == NEXT_SPEAKER and silent[0]["content"] != "Ada"


def test_a_client_that_goes_away_is_not_played_for():
    """The job of a stream that is closed is cancelled."""
    worker = Worker({"cast": (slow := Cast(lambda *_: "word " * 100_000))})
    with Served(build_app(worker, routes=web.routes())) as url:
        head = b"POST /stage/next HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"
        data = json.dumps(body()).encode()
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
            connection.sendall(head % len(data) + data)
            while not slow.running:
                assert connection.recv(4096)
        deadline = time.monotonic() + 10
        while worker.jobs or slow.running:
            assert time.monotonic() < deadline
            time.sleep(0.01)


REFUSED = [
    ({}, "scene"),
    (body() | {"scene": {"book": 1}}, "book"),
    (body() | {"messages": [{"role": "Ada"}]}, "content"),
    (body(messages=[{"role": "Zoe", "content": "Hello."}]), "Zoe"),
    (body(human="Zoe"), "choose from Ada, Ben"),
    (body(model="another"), "model"),
    (body(temperature=3), "temperature"),
    (body(max_rounds=10**6), "rounds"),
    (body(make_scene(speaking_characters=["NSP"])), "name"),
    (body() | {"line": 5}, "line"),
]


@pytest.mark.parametrize(("value", "named"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_played_is_refused(client, value, named):
    reply = client.post("/stage/next", json=value)
    assert reply.status_code == 400 and named in reply.json()["error"]["message"]


def test_what_goes_wrong_is_one_line_without_a_path():
    """A model whose step fails, and one that refuses; what is saved has the served name of the actor."""
    broken = Cast(lambda *_: 1 / 0)
    broken.name = "/home/ann/model"
    client = TestClient(build_app(Worker({"cast": broken}), routes=web.routes()), base_url="http://localhost")
    first, last = events(client)
    assert last["error"] == "the server failed (ZeroDivisionError)" and last["stats"]
    assert first["settings"]["actor"] == first["settings"]["next_speaker"] == "cast"
    broken.say = lambda *_: "word"
    broken.spoken = lambda future: ""
    refusal = Reply("", "error", error="/home/ann/model: too long")
    broken.step = lambda: [future.set_result(refusal) for future in [*broken.running]]
    assert events(client)[-1]["error"] == "too long"


def test_a_retried_line_records_its_seed(client):
    """Each message of a play whose seed changed can be played again from those before it."""
    first = messages_of(events(client, seed=3, max_rounds=3))
    value = body(messages=first[:2], seed=3, max_rounds=6) | {"seed": 9}
    reply = client.post("/stage/next", json=value).text.split("\n\n")
    again = [json.loads(event.removeprefix("data: ")) for event in reply if event]
    assert again[0]["settings"]["seed"] == 3
    assert messages_of(again) and all(message["seed"] == 9 for message in messages_of(again))
    assert not any("seed" in message for message in first)


def test_other_pages_may_not_ask(client):
    reply = client.post("/stage/next", json=body(), headers={"Origin": "http://evil.example"})
    assert reply.status_code == 403


# ---- files


def opened(client, *files):
    """The plays that files [(name, bytes)] hold, or the error."""
    listed = [{"name": name, "data": base64.b64encode(data).decode()} for name, data in files]
    reply = client.post("/stage/open", json={"files": listed})
    return reply.json()["plays"] if reply.status_code == 200 else reply.json()["error"]["message"]


def test_files_are_opened(client, tmp_path):
    """A book, a test file and a transcript hold what our own readers find in them."""
    book = web.Path(web.__file__).parent.parent / "data" / "stage" / "the_last_ferry.json"
    assert [p["scene"] for p in opened(client, ("b.json", book.read_bytes()))] == [
        scene.to_dict() for scene in load_scenes(book)
    ]
    test_file = json.dumps([to_test_scene(make_scene())]).encode()
    assert opened(client, ("t.json", test_file))[0]["scene"] == make_scene(tag="train").to_dict()
    stream = events(client, human=None)
    line = {key: getattr(make_scene(), key, None) for key in TRANSCRIPT_KEYS}
    line |= {"scene": make_scene().to_dict(), "settings": stream[0]["settings"], "stats": stream[-1]["stats"]}
    line |= {"messages": messages_of(stream)}
    write_lines(tmp_path / "transcripts.jsonl", [line])
    [play] = opened(client, ("t.jsonl", (tmp_path / "transcripts.jsonl").read_bytes()))
    [(scene, messages, settings)] = read_performances(tmp_path)
    assert play == {"scene": scene.to_dict(), "messages": messages, "settings": settings}


def test_cards_make_a_scene(client, tmp_path):
    write_card(
        Card("Una", description="Una is old.", first_mes="*waves* Hello, {{user}}."), tmp_path / "u.png"
    )
    write_card(Card("Otto", description="Otto is young.", scenario="A hall."), tmp_path / "o.json")
    files = [(name, (tmp_path / name).read_bytes()) for name in ("u.png", "o.json")]
    [play] = opened(client, *files)
    assert play["messages"] == [{"role": "Una", "content": "(waves) Hello, Otto."}]
    assert play["scene"]["speaking_characters"] == ["Una", "Otto"] and not play["scene"]["dialogues"]
    [play] = opened(client, files[0])
    assert play["scene"]["speaking_characters"] == ["Una", "Visitor"]
    stream = events(client, web.Scene(**play["scene"]), play["messages"], human="Visitor", max_rounds=3)
    assert "error" in stream[-1] and not stream[-1]["error"]


@pytest.mark.parametrize(
    "data",
    [b"", b"\x89PNG\r\n\x1a\nshort", b"PK\x03\x04", b"[" * 5000, b"{}", b"[]", b'{"a": NaN}', b"\xff\xfe"],
)
def test_a_file_that_is_nothing_is_one_line(client, data):
    error = opened(client, ("odd<b>.x", data))
    assert isinstance(error, str) and "odd<b>.x" in error and "\n" not in error and "/tmp" not in error


# ---- judging


def test_metrics_against_the_original(client):
    scene, said = make_scene(), [{"role": "Ada", "content": "original 0 and more"}]
    found = client.post("/stage/judge", json=body(messages=said)).json()
    pair = scripts(scene, said)
    assert found["metrics"]["BLEU"] == metrics.bleu(*pair) and found["judge"] is None
    assert found["metrics"]["ROUGE-L"] == metrics.rouge_l(*pair) > 0
    none = client.post("/stage/judge", json=body(make_scene(dialogues=[], speaking_characters=["Ada"]), said))
    assert none.json()["metrics"] == {}


def test_the_judge_of_the_server(cast):
    flaw = {"instance": "Ada: Hm.", "type": "flat", "severity": 3}
    judge = Cast(lambda *_: json.dumps({"flaws": [flaw]}))
    client = TestClient(
        build_app(Worker({"cast": cast}), routes=web.routes(judge)), base_url="http://localhost"
    )
    found = client.post("/stage/judge", json=body(messages=[{"role": "Ada", "content": "Hm."}])).json()
    assert found["judge"] == "cast" and len(found["dimensions"]) == 4
    assert all(v["score"] == 100 - 5 * (3 - 0.3) for v in found["dimensions"].values())
    assert found["score"] == pytest.approx(86.5)


def test_a_served_model_is_lent_to_the_judge(cast):
    """It is not loaded again, its jobs are the worker's, and a worker without places is busy."""
    judge = Cast(lambda *_: json.dumps({"flaws": []}), 0)
    judge.name = "checkpoints/judge"
    worker = Worker({"cast": cast, "judge": judge})
    assert serve.judge_of("judge", worker).worker is serve.judge_of("./checkpoints/judge", worker).worker
    app = build_app(worker, routes=web.routes(serve.judge_of("judge", worker)))
    client = TestClient(app, base_url="http://localhost")
    value = body(messages=[{"role": "Ada", "content": "Hm."}])
    found = client.post("/stage/judge", json=value).json()
    assert found["judge"] == "judge" and found["score"] > 100 and len(judge.asked) == 4 and not worker.jobs
    worker.capacity = 2
    reply = client.post("/stage/judge", json=value)
    assert reply.status_code == 503 and reply.headers["retry-after"] and not judge.running


# ---- the page, in a browser --------------------------------------------------------------------------------


class Served:
    """An app on a free port of 127.0.0.1, while the block lasts."""

    def __init__(self, app):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)

    def __enter__(self):
        self.thread.start()
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(5)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
    if not (chromium := shutil.which("chromium") or shutil.which("chromium-browser")):
        pytest.skip("no Chromium (on Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def endless(messages, params):
    """As `scripted`, but nobody is named, so that the next speaker is drawn, and no scene ends."""
    return "nobody" if is_next_speaker(messages) else scripted(messages, params)


@pytest.fixture(scope="module")
def players():
    return Cast(endless, 0.02)


@pytest.fixture(scope="module")
def url(players):
    with Served(build_app(Worker({"cast": players}), routes=web.routes())) as url:
        yield url


@pytest.fixture
def page(browser, url):
    """The page at 1280 pixels; at the end, nothing it did was against its policy or failed."""
    page, problems = browser.new_page(viewport={"width": 1280, "height": 900}), []
    page.set_default_timeout(15_000)
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda request: (
            problems.append(request.url) if not request.url.startswith((url, "blob:", "data:")) else None
        ),
    )
    page.goto(url)
    page.evaluate("document.getElementById('rounds').value = 100")
    until(page, "document.getElementById('scene').options.length > 0")
    yield page
    page.close()
    assert not problems


def hostile(count=200):
    """Strings that would be markup, script, styles, entities, templates or our own markers elsewhere."""
    payloads = ["<img src=x onerror=hacked=1>", "<script>hacked=1</script>", "<svg/onload=hacked=1>"]
    payloads += [
        "&lt;b&gt;&amp;&#x3c;",
        "javascript:hacked=1",
        "</li></ol><h1>out",
        "\"><b onclick='hacked=1'>",
    ]
    payloads += [
        "${hacked=1}",
        "{{hacked}}",
        "<style>*{display:none}</style>",
        "<!--",
        "]]>",
        "\u202egnp.exe",
    ]
    payloads += [
        "[NSP]",
        "__proto__",
        "constructor",
        "<|im_end|>",
        "===Conversation Start===",
        "data: {}\n\n",
    ]
    payloads += [
        "(((",
        ")]",
        "[a (b] c)",
        "a\tb",
        "\U0001f600\u200d",
        "x" * 300,
        "<iframe srcdoc='<script>1'>",
    ]
    return [f"{payload} {i}" for i, payload in zip(range(count), itertools.cycle(payloads), strict=False)]


def test_200_hostile_strings_stay_text(page):
    """As names, lines, titles, scenarios and profiles: shown letter for letter, bracketed as data.brackets
    does, and nothing of them becomes an element."""
    texts = hostile()
    names = [" ".join(f"{text} who".split()) for text in texts]
    scene = make_scene(book=texts[0], scenario=texts[1], dialogues=[], speaking_characters=names,
                       profiles=dict(zip(names, texts, strict=True)))  # fmt: skip
    messages = [{"role": name, "content": text} for name, text in zip(names, texts, strict=True)]
    line = {"book": scene.book, "i_p": 0, "i_c": 0, "scene": scene.to_dict(), "settings": {"actor": None}}
    data = json.dumps(line | {"messages": messages, "stats": {}}).encode()
    page.set_input_files("#file", {"name": "<b>.jsonl", "mimeType": "text/plain", "buffer": data})
    until(page, "document.getElementById('status').textContent === 'Opened <b>.jsonl.'")
    assert page.text_content("#programme-title") == texts[0]
    assert page.locator("#programme-cast p").all_text_contents() == texts
    page.click("text=Raise the curtain")
    page.wait_for_selector("#script li >> nth=199")
    assert page.text_content("#title") == texts[0] and page.text_content("#scenario") == texts[1]
    assert page.locator("#script .name").all_text_contents() == names
    shown = page.eval_on_selector_all(
        "#script .line",
        "lines => lines.map(l => [...l.querySelectorAll('span')].map(s => [s.textContent, s.className]))",
    )
    for text, spans in zip(texts, shown, strict=True):
        merged = [
            ["".join(part for part, _ in group), ["speech", "action", "thought"][channel - 1]]
            for channel, group in itertools.groupby(BracketParser().feed(text), lambda span: span[1])
        ]
        assert [span for span in spans if span[0]] == merged, text
    tags = page.eval_on_selector_all("main *", "all => [...new Set(all.map(e => e.localName))]")
    assert not set(tags) & {"img", "script", "svg", "style", "iframe", "h1"}
    assert page.evaluate("typeof hacked") == "undefined"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_width_scrolls_sideways(page, width, scheme):
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 844})
    fits = "document.documentElement.scrollWidth <= window.innerWidth"
    assert page.evaluate(fits)
    for summary in page.locator("#choose summary").all():
        summary.click()
    assert page.evaluate(fits)
    page.fill("#own-title", "W" * 200)
    page.locator("#own-cast input").first.fill("Ada" * 60)
    page.locator("#own-cast input").first.press("Enter")
    until(page, "document.activeElement.id === 'programme-title'")  # and the curtain has not been raised
    page.select_option("#human", index=1)
    page.click("text=Raise the curtain")
    page.fill("#line", "very" * 100)
    assert page.evaluate(fits)
    page.click("text=Say it")
    page.wait_for_selector("#script li")
    assert page.evaluate(fits)
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert contrast(ink, paper) > 7
    name = page.evaluate("getComputedStyle(document.querySelector('.name')).color")
    assert contrast(name, paper) >= 4.5


def contrast(first, second):
    """The contrast of two CSS colours (WCAG 2.2, 1.4.3)."""

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def until(page, expression, argument=None):
    """Waits until an expression of JavaScript is true; the page's policy forbids playwright's own way."""
    deadline = time.monotonic() + 15
    while not page.evaluate(expression, argument):
        assert time.monotonic() < deadline, expression
        time.sleep(0.02)


def tab_to(page, selector):
    """Presses Tab until this element has the focus."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"{selector}: no visible focus"
            return
    raise AssertionError(f"{selector} cannot be reached with Tab")


def test_a_play_by_keyboard_alone(page, tmp_path):
    """Choose a scene and a role, speak, edit, go between versions, judge and save, without a mouse."""
    page.focus("body")
    tab_to(page, "#scene")
    page.keyboard.press("ArrowDown")
    tab_to(page, "#human")
    page.keyboard.press("ArrowDown")
    tab_to(page, "#setup .main")
    page.keyboard.press("Enter")
    page.wait_for_selector("#say:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "line"
    me = page.text_content("#line-label").removeprefix("Your line as ")
    for text in ("[Oh.] (bows) Good evening.", "And you?"):
        page.keyboard.type(text)
        page.keyboard.press("Enter")
        until(
            page,
            "text => [...document.querySelectorAll('#script p')].some(p => p.textContent.includes(text))",
            text,
        )
        until(
            page,
            "!document.getElementById('say').hidden || !document.getElementById('curtain').hidden"
            " || document.getElementById('status').textContent.startsWith('A pause')",
        )
        if page.is_hidden("#say"):
            break
    lines = page.locator("#script li .line").all_text_contents()
    assert lines[0] == f"{me} [Oh.] (bows) Good evening."
    page.focus("#title")
    tab_to(page, "#script li:first-child summary")
    page.keyboard.press("Enter")
    tab_to(page, "#script li:first-child button:nth-of-type(2)")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "line"
    assert page.input_value("#line") == "[Oh.] (bows) Good evening."
    page.keyboard.press("Control+A")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.matches('#script li:first-child summary')")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert not page.evaluate("document.activeElement.parentElement.open")
    page.keyboard.press("Enter")
    tab_to(page, "#script li:first-child button:nth-of-type(2)")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+A")
    page.keyboard.type("Good night.")
    page.keyboard.press("Enter")
    assert page.evaluate("['go', 'line'].includes(document.activeElement.id)")
    until(page, "document.querySelector('#script .line').textContent.endsWith('Good night.')")
    tab_to(page, "#go, #line")
    until(page, "!document.getElementById('judge').disabled")
    tab_to(page, "#version")
    page.keyboard.press("ArrowUp")
    assert page.locator("#script li .line").all_text_contents()[0] == lines[0]
    tab_to(page, "#judge")
    page.keyboard.press("Enter")
    page.wait_for_selector("#scores tr")
    assert page.evaluate("document.activeElement.id") == "verdict-title"
    place = "document.activeElement.getBoundingClientRect().bottom"
    assert page.evaluate(f"{place} < document.querySelector('footer').getBoundingClientRect().top")
    tab_to(page, "#save")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    download.value.save_as(tmp_path / "transcripts.jsonl")
    [(scene, messages, settings)] = read_performances(tmp_path)
    assert settings["human"] == me and messages[0]["content"] == "[Oh.] (bows) Good evening."
    spoken = [m for m in messages if m["role"] != NEXT_SPEAKER]
    assert [f"{m['role']} {m['content']}" for m in spoken] == lines


def test_what_a_screen_reader_finds(page):
    """Landmarks, one name for every control, new lines announced once, hidden thoughts not."""
    controls = "[...document.querySelectorAll('input, select, textarea, button')]"
    is_named = "control => control.labels?.length || control.textContent.trim() || control.ariaLabel"
    assert page.evaluate(f"{controls}.every({is_named})")
    assert page.evaluate("[...document.querySelectorAll('main, header, footer, nav')].length") == 4
    assert page.get_attribute("html", "lang") == "en"
    page.click("text=Raise the curtain")
    page.uncheck("#thoughts")
    page.wait_for_selector("#script li")
    until(page, "document.getElementById('spoken').textContent.includes('Good evening to you all')")
    until(page, "!document.getElementById('spoken').textContent.includes('I am number')")
    assert "I am number" in page.text_content("#script")
    assert page.get_attribute("#spoken", "aria-live") == "polite"
    assert page.get_attribute("#speaking", "aria-hidden") == "true"
    page.click("#go")
    until(page, "document.getElementById('status').textContent === 'Stopped.'")


def test_stop_retry_and_versions(page, players):
    page.click("text=Raise the curtain")
    page.wait_for_selector("#script li")
    page.click("#go")
    until(page, "document.getElementById('go').textContent === 'Go on'")
    first = page.locator("#script li .line").all_text_contents()
    deadline = time.monotonic() + 5
    while players.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not players.running
    seen = {first[0]}
    for count in (2, 3):  # the same line twice from the first version: each time something else
        page.locator("#script summary").first.click()
        page.locator("#script li button").first.click()
        assert page.evaluate("document.activeElement.id") == "go"
        page.wait_for_selector("#script li")
        page.click("#go")
        seen.add(page.locator("#script li .line").all_text_contents()[0])
        assert len(seen) == count
        page.select_option("#version", index=0)
        assert page.locator("#script li .line").all_text_contents() == first
    page.click("#judge")
    page.wait_for_selector("#scores tr")
    page.click("#go")
    assert page.is_hidden("#verdict")  # it was of what had been played
    page.click("#leave")
    assert page.locator("#scene option:checked").evaluate("o => o.parentElement.label").startswith("Left: ")
    page.click("text=Raise the curtain")
    assert page.locator("#script li .line").all_text_contents()[: len(first)] == first
    page.click("#leave")
    assert ENVIRONMENT in page.locator("#human option").all_text_contents()


def test_names_that_javascript_knows(page):
    """A book or a character may be called as what every object of JavaScript has."""
    said = [{"character": name, "message": "Hm."} for name in ("toString", "__proto__")]
    scene = make_scene(book="constructor", speaking_characters=[], dialogues=said, profiles={})
    data = json.dumps([to_test_scene(scene)]).encode()
    page.set_input_files("#file", {"name": "t.json", "mimeType": "text/plain", "buffer": data})
    until(page, "document.getElementById('status').textContent === 'Opened t.json.'")
    assert page.text_content("#programme-title") == "constructor"
    assert page.locator("#programme-cast p").all_text_contents() == ["", ""]
    assert page.input_value("#file") == ""
    status = "document.getElementById('status').getBoundingClientRect()"
    assert page.evaluate(f"{status}.bottom <= innerHeight && {status}.top > 0")  # seen without scrolling


def test_a_field_that_is_wrong_is_shown(page):
    """Where the values that the form refuses are folded away, they are unfolded."""
    page.evaluate("document.getElementById('rounds').value = ''")
    page.click("text=Raise the curtain")
    until(page, "document.activeElement.id === 'rounds'")
    assert page.is_visible("#rounds") and page.is_hidden("#play")


def test_dropped_text_is_no_file(page):
    drag = "new DragEvent(kind, {dataTransfer: new DataTransfer(), cancelable: true})"
    drop = f"kind => document.dispatchEvent({drag})"
    assert page.evaluate(drop, "dragover") and page.evaluate(drop, "drop")
    assert page.text_content("#status") == "" and page.locator("#scene option:checked").count() == 1


def test_the_bar_hides_nothing_at_390_pixels(page):
    """The last line ends above the bar, and the bar at the edge of the window, however high it is."""
    page.set_viewport_size({"width": 390, "height": 700})
    page.select_option("#human", index=1)
    page.click("text=Raise the curtain")
    for text in ("Good evening. " * 30, "And you?"):
        page.fill("#line", text)
        page.click("text=Say it")
        until(page, "!document.getElementById('say').hidden")
        edge = page.evaluate("document.querySelector('footer').getBoundingClientRect().toJSON()")
        assert abs(edge["bottom"] - 700) < 1 and edge["top"] > 100
        until(page, "document.querySelector('#script li:last-child').getBoundingClientRect().bottom"
                    " <= document.querySelector('footer').getBoundingClientRect().top")  # fmt: skip
