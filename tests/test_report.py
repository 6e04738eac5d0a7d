"""What verdicts add up to: intervals against brute force, comparisons, leaderboards, calibration, and a page
safe to open.
"""

import html.parser
import itertools
import json
import random
import re
import shutil
import statistics
import subprocess
from copy import deepcopy

import numpy as np
import pytest
from conftest import usage_error
from test_judge import FLAW, acted, dimension_of, judge_answer, plays, read_lines, verdict, write_plays  # noqa: F401
from test_llm import Server

from common import files, terminal
from data.prompts import DIMENSIONS
from evals import calibrate, page, report, verdicts
from evals.metrics import bootstrap, paired, spearman, with_scores

# ---- how sure ------------------------------------------------------------------------------------


def test_the_bootstrap_covers_what_it_should():
    """Of 300 samples of 40 from a known distribution, about 95 in 100 intervals hold the true mean; narrower
    with more data.
    """
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        mean, low, high = bootstrap(rng.normal(60, 12, 40), resamples=1000)
        assert low < mean < high
        held += low <= 60 <= high
    assert 0.90 <= held / 300 <= 0.98
    wide, narrow = (bootstrap(np.resize([40.0, 80.0], n)) for n in (20, 200))
    assert wide[2] - wide[1] > 2.5 * (narrow[2] - narrow[1])
    _, low, high = bootstrap(np.resize([40.0, 80.0], 100))
    assert low == pytest.approx(60 - 1.96 * 2, abs=0.5) and high == pytest.approx(60 + 1.96 * 2, abs=0.5)
    several = bootstrap(
        np.repeat([1.0, 2, 3, 7], 3), scenes=np.repeat(range(4), 3)
    )  # three times the same tells no more
    assert several == pytest.approx(bootstrap([1, 2, 3, 7]), abs=1e-9)
    assert (
        bootstrap([1, 2, 3]) == bootstrap([1, 2, 3])
        and bootstrap([7]) == (7, None, None)
        and bootstrap([]) == (None, None, None)
    )


def test_the_interval_of_a_hundred_recorded_scenes(shared):
    """About two to three points to either side, as is known of this benchmark."""
    for model in ("gpt-4o", "coser-8b", "llama-3.1-8b-instruct"):
        lines, *_ = verdicts.rescore(shared / "coser" / "gca" / f"{model}.evaluation.json")
        row = report.summarise(lines)["rows"]["Average"]
        assert 1.5 < row["mean"] - row["low"] < 3 and 1.5 < row["high"] - row["mean"] < 3


def test_paired_comparison():
    """A small steady difference is found though the scenes differ far more; wins count ties as half."""
    scenes = np.random.default_rng(1).normal(60, 20, 100)
    found = paired(scenes + 1 + np.resize([0.5, -0.5], 100), scenes)
    assert (
        found["low"] > 0.8
        and found["high"] < 1.2
        and found["difference"] == pytest.approx(1)
        and found["wins"] == 1
    )
    assert paired([1, 2, 3, 4], [1, 3, 2, 4])["wins"] == 0.5 and paired([1, 2], [1, 1])["wins"] == 0.75


def brute_spearman(x, y):
    ranks = [[sum(b < a for b in v) + (sum(b == a for b in v) + 1) / 2 for a in v] for v in (x, y)]
    return statistics.correlation(*ranks)


def test_rank_correlations():
    """As their definitions say, ties included; none where one side does not vary."""
    for seed in range(100):
        rng = random.Random(seed)
        x, y = ([rng.randrange(rng.choice([4, 100])) for _ in range(rng.randrange(5, 30))] for _ in range(2))
        x, y = x[: min(len(x), len(y))], y[: min(len(x), len(y))]
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert spearman(x, y) == pytest.approx(brute_spearman(x, y))
    assert spearman([1, 2, 3], [1, 4, 9]) == pytest.approx(1) and spearman(
        [1, 2, 3], [3, 2, 1]
    ) == pytest.approx(-1)
    assert spearman([1, 1, 1], [1, 2, 3]) is spearman([5], [5]) is spearman([], []) is None


# ---- comparisons ---------------------------------------------------------------------------------


@pytest.fixture
def two(script, stage, tmp_path, monkeypatch):
    """Directories a and b with six scenes each, by the same judge: a has one flaw fewer everywhere, and
    shorter scenes.
    """
    scenes = list(stage.values())[:6]
    for name in "ab":
        (tmp_path / name).mkdir()
        messages = [acted(scene)[: None if name == "b" else 7] for scene in scenes]
        for said in messages:
            said[0]["content"] += f" I am {name}."
        write_plays(tmp_path / name, list(zip(scenes, messages, strict=True)))
    with Server(lambda body, _: verdict(*[3] * (1 if "I am a." in str(body) else 2))) as server:
        server.use(monkeypatch)
        for name in "ab":
            assert script("judge", tmp_path / name, "--judge", "openai:j")[0] == 0
    return tmp_path


def test_versus(script, two, monkeypatch):
    """The difference scene by scene, by hand; another judge's scores are refused before anything is asked."""
    code, out, _ = script("judge", two / "a", "--versus", two / "b", "--json")
    rows = json.loads(out)["versus"]["rows"]
    lines = [
        {(v["book"], v["i_p"], v["i_c"]): v for v in read_lines(two / name / "verdicts.jsonl")}
        for name in "ab"
    ]
    differences = [lines[0][key]["score"] - lines[1][key]["score"] for key in lines[0]]
    assert code == 0 and len(differences) == 6
    assert rows["Average"]["difference"] == pytest.approx(statistics.mean(differences))
    assert rows["Average"]["wins"] == sum((d > 0) + (d == 0) / 2 for d in differences) / 6
    assert rows["Average"]["low"] <= rows["Average"]["difference"] <= rows["Average"]["high"]
    assert set(rows) == {*DIMENSIONS, "Average", *report.METRICS}
    assert "better on" in script("judge", two / "a", "--versus", two / "b")[1]
    with Server(judge_answer) as server:
        server.use(monkeypatch)
        command = ["judge", two / "a", "--judge", "openai:k", "--out", two / "k.jsonl", "--versus", two / "b"]
        assert "openai:k" in usage_error(script(*command)) and not server.requests
    assert "not judged" in usage_error(script("judge", two / "a", "--versus", two / "nosuch"))


def test_a_terminal_shows_tables(script, two, monkeypatch):
    """The same cells as in the plain lines, the header set apart by a rule, whatever a name holds."""
    plain = script("judge", "--table", two / "a")[1]
    monkeypatch.setattr(terminal, "stdout", terminal.Console(force_terminal=True, width=500, highlight=False))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", script("judge", "--table", two / "a")[1])
    assert "\u2500\u2500\u2500" in shown and "\u2500" not in plain and shown.split() != plain.split()
    assert [cell for cell in shown.split() if "\u2500" not in cell] == plain.split()


def test_the_leaderboard(script, two, shared, monkeypatch):
    """A table a judge, best first; published rows apart and named so; the length weights at which the ranking
    turns.
    """
    with Server(judge_answer) as server:
        server.use(monkeypatch)
        assert (
            script("judge", two / "a", "--judge", "openai:k", "--out", two / "k.jsonl", "--seed", 7)[0] == 0
        )
    runs = [two / "b", two / "a", two / "k.jsonl", shared / "coser" / "gca" / "gpt-4o.evaluation.json"]
    code, out, _ = script("judge", "--table", *runs, "--json")
    board = json.loads(out)
    assert code == 0 and [table["judge"] for table in board["tables"]] == ["openai:j", "openai:k", "recorded"]
    first, second, _ = board["tables"]
    means = [row["rows"]["Average"]["mean"] for row in first["rows"]]
    assert len(means) == 2 and means == sorted(means, reverse=True) and second["rows"][0]["seed"] == 7
    spans = first["sweep"]
    assert (
        spans[0]["from"] == 0 and spans[-1]["to"] == 1 and len(spans) == 2
    )  # b has more flaws and more messages
    assert [spans[0]["ranking"][0], spans[1]["ranking"][0]] == [str(two / "a"), str(two / "b")]
    lines = {name: read_lines(two / name / "verdicts.jsonl") for name in "ab"}
    gap = statistics.mean(v["turns"] for v in lines["b"]) - statistics.mean(v["turns"] for v in lines["a"])
    assert spans[1]["from"] == pytest.approx(
        3 / gap, abs=0.0101
    )  # three severity points over the difference in length
    assert len(board["published"]["gca"]) == 21
    _, out, _ = script("judge", "--table", *runs)
    blocks = [block for block in re.split(r"\n\s*\n", out) if block.strip()]
    assert len(blocks) == 4
    for block, other in itertools.permutations(["openai:j", "openai:k", "published"], 2):
        assert not any(block in b.splitlines()[0] and other in b for b in blocks)
    assert all("(published)" in line for line in blocks[-1].splitlines()[2:]) and "59.95" in blocks[-1]


def test_another_weight_leaves_the_lines_as_they_were(script, two):
    """Scores of another length weight are in a copy: a leaderboard, whose sweep tries 101 of them, changes no
    line.
    """
    runs = {name: verdicts.read_verdicts(two / name) for name in "ab"}
    before = deepcopy(runs)
    rescored = with_scores(runs["a"][0], 1.0)
    assert rescored["score"] != runs["a"][0]["score"] and rescored["dimensions"] != runs["a"][0]["dimensions"]
    board = report.leaderboard(runs)
    assert len(board["tables"][0]["sweep"]) == 2 and runs == before


def test_verdicts_of_two_judges_in_one_file_are_two_tables(script, two):
    """However they came together."""
    file, other = two / "a" / "verdicts.jsonl", two / "b" / "verdicts.jsonl"
    (two / "both.jsonl").write_text(file.read_text() + other.read_text().replace("openai:j", "openai:k"))
    tables = json.loads(script("judge", "--table", two / "both.jsonl", "--json")[1])["tables"]
    assert [(table["judge"], table["rows"][0]["scenes"]) for table in tables] == [
        ("openai:j", 6),
        ("openai:k", 6),
    ]


def test_a_dimension_with_a_bracket_in_its_name_has_a_column(script, two):
    file = two / "a" / "verdicts.jsonl"
    file.write_text(file.read_text().replace('"Anthropomorphism"', '"Wit (dry)"'))
    header = script("judge", "--table", two / "a")[1].splitlines()[1]
    assert "Wit (dry)" in header and "(release)" not in header


def test_verdicts_of_plays_that_are_gone_are_in_no_table(script, two):
    """A directory whose transcripts have changed since: what was judged then is not of what is there now."""
    transcripts = two / "a" / "transcripts.jsonl"
    kept = transcripts.read_text().splitlines()[1:]
    transcripts.write_text("\n".join(kept) + "\n")
    tables = json.loads(script("judge", "--table", two / "a", "--json")[1])["tables"]
    assert tables[0]["rows"][0]["scenes"] == len(kept)


# ---- calibration ---------------------------------------------------------------------------------


@pytest.fixture
def recording(stage, tmp_path):
    """A folder as the release has it: two models' simulations of eight scenes, with recorded verdicts, and
    the scenes.
    """
    scenes = list(stage.values())[:8]
    (tmp_path / "gca").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "id.json").write_text(json.dumps([scene.to_dict() for scene in scenes]))
    for m, model in enumerate(("one", "two")):
        runs, cases = [], {}
        for i, scene in enumerate(scenes):
            messages = [
                {"role": d["character"], "content": f"Line {i} {model}"}
                for d in scene.dialogues[: 4 + (i * 3) % 5]
            ]
            severities = [1 + (i * 3 + m * 2) % 5, 1 + i % 3]
            turns = sum(message["role"] != "Environment" for message in messages)
            found = {
                "flaws": [{**FLAW, "severity": s} for s in severities],
                "score": 100 - 5 * (sum(severities) - 0.3 * turns),
            }
            runs.append({"book": scene.book, "i_p": scene.i_p, "i_c": scene.i_c, "simulation": messages})
            cases[scene.key] = {
                "critique": dict.fromkeys(DIMENSIONS, found),
                "simulation": messages,
                "score": found["score"],
            }
        (tmp_path / "gca" / f"{model}.simulation.json").write_text(json.dumps(runs))
        (tmp_path / "gca" / f"{model}.evaluation.json").write_text(json.dumps({"cases": cases}))
    return tmp_path


def echo(recording, sane=True, sign=1):
    """A judge that says what is recorded (sign 1) or the reverse (-1), and finds every line out of place if
    it is sane.
    """
    known = {}
    for model in ("one", "two"):
        cases = json.loads((recording / "gca" / f"{model}.evaluation.json").read_text())["cases"].values()
        for i, case in enumerate(cases):
            known[f"Line {i} {model}"] = [
                flaw["severity"] for flaw in case["critique"]["Anthropomorphism"]["flaws"]
            ]

    def answer(body, _):
        assert dimension_of(body["messages"])
        original, played = re.findall(
            r" BEGIN\n(.*?)\n=====\w+ END", body["messages"][-1]["content"], re.DOTALL
        )
        line = re.search(r"Line \d+ (one|two)", played)
        if line:
            return verdict(*(s if sign > 0 else 6 - s for s in known[line[0]]))
        return verdict(*[5] * (played != original) * sane)

    return answer


def calibration(script, recording, monkeypatch, **options):
    with Server(echo(recording, **options)) as server:
        server.use(monkeypatch)
        command = [
            "judge",
            "--calibrate",
            recording / "gca",
            "--scenes",
            recording / "test" / "id.json",
            "--judge",
            "openai:j",
            "--out",
            recording / f"out{options}",
        ]
        code, out, _ = script(*command, "--json")
        asked = len(server.requests)
        text = script(*command)[1]
        assert code == 0 and asked == len(server.requests) == 4 * 8 * 4
    return json.loads(out), text


def test_calibration_of_a_judge_that_agrees(script, recording, monkeypatch):
    """One who says what was recorded correlates perfectly, per model and pooled, and passes the controls."""
    found, text = calibration(script, recording, monkeypatch)
    for name in ("one", "two", "pooled"):
        agreement = found["models"][name]
        assert agreement["spearman"] == pytest.approx(1)
        assert agreement["mean"] == pytest.approx(agreement["recorded"]) and agreement["scenes"] == (
            16 if name == "pooled" else 8
        )
    assert found["better_of_two"]["judge"]["share"] == 1 and found["better_of_two"]["BLEU"]["share"] < 1
    assert found["controls"]["difference"] == pytest.approx(25) and found["controls"]["wins"] == 1
    assert "controls passed" in text and "FAILED" not in text


def test_calibration_of_a_judge_that_does_not(script, recording, monkeypatch):
    """One who says the opposite correlates the other way, and one who likes everything does not pass the
    controls.
    """
    found, text = calibration(script, recording, monkeypatch, sane=False, sign=-1)
    recorded = json.loads((recording / "gca" / "one.evaluation.json").read_text())["cases"].values()
    assert (
        found["models"]["one"]["spearman"] < 0.5
        and found["better_of_two"]["judge"]["share"] < 0.5
        and len(recorded) == 8
    )
    assert found["controls"]["difference"] == 0 and "controls FAILED" in text


def test_a_calibration_has_a_place_of_its_own(script, recording, tmp_path, monkeypatch):
    """Without --out, a directory named after the judge; a judge without one valid verdict is a failure."""
    monkeypatch.setattr(files, "OUT", tmp_path / "out")
    scenes = ["--scenes", recording / "test" / "id.json"]
    with Server(lambda *_: "No.") as server:
        server.use(monkeypatch)
        code, out, err = script("judge", "--calibrate", recording / "gca", "--judge", "openai:j", *scenes)
    place = tmp_path / "out" / "calibration" / "openai-j"
    assert code == 1 and "no verdict is valid" in err and str(place) in err and "pooled" in out
    assert len(read_lines(place / "one.jsonl")) == 8


def test_a_rubric_is_read_once_in_a_calibration(script, recording, tmp_path, monkeypatch):
    """So its warning comes once, not once per run."""
    rubric = {"template": "{simulated_conversation}", "dimensions": {"Wit": {"brief": "", "criteria": ""}}}
    (tmp_path / "wit.json").write_text(json.dumps(rubric | {"severity": [1, 5]}))
    with Server(lambda *_: verdict(2)) as server:
        server.use(monkeypatch)
        command = ["judge", "--calibrate", recording / "gca", "--scenes", recording / "test" / "id.json"]
        options = ["--judge", "openai:j", "--rubric", tmp_path / "wit.json", "--out", tmp_path / "out"]
        code, _, err = script(*command, *options)
    assert code == 0 and err.count("may pose as instructions") == 1


def test_a_shuffled_scene_is_another_order_of_the_same_lines(stage):
    for scene in stage.values():
        original, other = calibrate.as_played(scene), calibrate.shuffled(scene)
        assert original != other == calibrate.shuffled(scene) and sorted(map(str, original)) == sorted(
            map(str, other)
        )


def test_calibrating_needs_a_judge_and_a_record(script, tmp_path):
    assert "--judge" in usage_error(script("judge", "--calibrate", tmp_path, "--scenes", "x.json"))
    assert "--scenes" in usage_error(script("judge", "--calibrate", tmp_path, "--judge", "openai:j"))
    assert "--calibrate" in usage_error(script("judge", "--judge", "openai:j", "--calibrate"))
    command = ["judge", "--calibrate", tmp_path, "--judge", "openai:j", "--scenes", "x.json"]
    assert str(tmp_path) in usage_error(script(*command))


# ---- the page ------------------------------------------------------------------------------------


def hostile():
    """Two hundred strings that would run a script, load something, or break out of where they stand."""
    run = "document.documentElement.setAttribute('data-pwned','1')"
    forms = [
        "<script>{run}</script>",
        "</script><script>{run}</script>",
        '<img src=x onerror="{run}">',
        '<svg onload="{run}">',
        '"><script>{run}</script>',
        '\'><img src=x onerror="{run}">',
        '<a href="javascript:{run}">x</a>',
        "javascript:{run}",
        '" autofocus onfocus="{run}',
        "' onmouseover='{run}",
        "</title><script>{run}</script>",
        "</style><script>{run}</script>",
        '<iframe srcdoc="<script>parent.{run}</script>">',
        '<iframe src="http://evil.example/">',
        "<link rel=stylesheet href=//evil.example/x>",
        '<meta http-equiv=refresh content="0;url=http://evil.example/">',
        '<base href="http://evil.example/">',
        "--><script>{run}</script><!--",
        "<![CDATA[<script>{run}</script>]]>",
        "<style>@import 'http://evil.example/';</style>",
        "{{{{ 7 * 7 }}}} {{% raw %}} {{# x #}}",
        "{{{{ self.__init__.__globals__ }}}}",
        "&lt;script&gt;{run}&lt;/script&gt;",
        '<math><mi//xlink:href="data:x,<script>{run}</script>">',
        '<details open ontoggle="{run}">',
    ]
    wraps = ["{}", "[{}]", "({})", "\u202e{}", "x\0{}", "\u201c{}\u201d", "\n\n{}\n", "{}" * 2]
    return [wrap.replace("{}", form.format(run=run)) for form in forms for wrap in wraps]


class Page(html.parser.HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def hostile_page(script, stage, tmp_path, monkeypatch):
    """(file, strings) of a report in which each string is a line, a name, a flaw, a rubric's dimension or a
    model.
    """
    strings, scenes = hostile(), list(stage.values())[:8]
    assert len(strings) == len(set(strings)) == 200
    pool = iter(strings)
    performances = []
    for scene in scenes:
        scene.__dict__ |= {"book": next(pool), "topic": next(pool), "scenario": next(pool)}
        scene.dialogues = [{"character": next(pool), "message": next(pool)} for _ in range(4)]
        performances.append((scene, [{"role": next(pool), "content": next(pool)} for _ in range(4)]))
    names = [next(pool), next(pool)]
    flaws = [{"instance": s, "type": t, "severity": 2} for s, t in zip(pool, reversed(strings), strict=False)]
    rubric = {"template": "{dimension_name}|{simulated_conversation}", "severity": [1, 5]}
    rubric["dimensions"] = {name: {"brief": "", "criteria": ""} for name in names}
    (tmp_path / "rubric.json").write_text(json.dumps(rubric))
    (tmp_path / "plays").mkdir()
    write_plays(tmp_path / "plays", performances)
    quoting = [
        {"instance": f'"{m["content"]}"', "type": "x", "severity": 5}
        for _, said in performances
        for m in said
    ]
    with Server(lambda *_: json.dumps({"flaws": flaws + quoting})) as server:
        server.use(monkeypatch)
        spec = f"openai:{strings[0]}"
        args = ["--rubric", tmp_path / "rubric.json", "--judge", spec, "--html", tmp_path / "report.html"]
        assert script("judge", tmp_path / "plays", *args)[0] == 0
    return tmp_path / "report.html", strings


@pytest.fixture
def stage():
    """Scenes of our own, since these tests change them."""
    from data.scenes import load_stage

    return load_stage()


def test_hostile_text_is_never_live(hostile_page):
    """Of 200 strings none makes a tag or an attribute: every tag is the template's, none points outside."""
    file, strings = hostile_page
    page = Page(file.read_text(encoding="utf-8"))
    template = Page((files.ROOT / "evals" / "page.html").read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in template.tags}
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in page.tags].count("style") == 1
    known = {(tag, name) for tag, attributes in template.tags for name in attributes} | {
        ("details", "open"),
        ("input", "checked"),
    }
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert (
                (tag, name) in known
                and not name.startswith("on")
                and name not in ("src", "style", "srcdoc", "action")
            )
            assert name != "href" or re.fullmatch(r"#(s\d+|scenes)", value)
    said, odd = "".join(page.texts), r"[\s\0\u202e\ufffd]+"
    assert [s for s in strings if re.sub(odd, "", s) not in re.sub(odd, "", said)] == []


def chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return found or pytest.skip("no Chromium on this machine")


def dom(file):
    """The page's document after its scripts ran, as Chromium has it."""
    command = [
        chromium(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=2000",
        "--dump-dom",
        f"file://{file}",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def test_no_script_but_its_own_runs_in_a_browser(hostile_page, tmp_path):
    """In Chromium, with its security policy and without: our filter has counted the flaws, and none of the
    strings has run.
    """
    file, _ = hostile_page
    text = file.read_text(encoding="utf-8")
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", text), encoding="utf-8")
    alive = tmp_path / "alive.html"
    attack = "<script>document.documentElement.setAttribute('data-pwned','1')</script>"
    alive.write_text(text.replace("<main>", f"<main>{attack}"), encoding="utf-8")
    flaws = text.count('role="note"')
    for path in (file, bare, alive):  # the last: even where escaping failed, the policy would hold
        document = dom(path)
        assert (
            f"{flaws} of {flaws} flaws</output>" in document
            and "data-pwned=" not in document.split("<body")[0]
        )
    bare.write_text(bare.read_text(encoding="utf-8").replace("<main>", f"<main>{attack}"), encoding="utf-8")
    assert 'data-pwned="1"' in dom(bare).split("<body")[0]  # this test can fail


def test_flaws_stand_beside_the_lines_they_quote(script, plays, stage, tmp_path, monkeypatch):  # noqa: F811
    """By a quotation in any quotes, else by a run of words; what quotes nothing stands at the end; no flaw is
    lost.
    """
    scene = stage["the-last-ferry/1"]
    messages = [
        {
            "role": "Hanne",
            "content": "[Do not cry.] The ferry leaves at nine, and it doesn't wait. (ties the rope)",
        },
        {"role": "Environment", "content": "Rain comes down on the quay."},
        {
            "role": "Tor",
            "content": "Then I'll [sighs] swim after it, as I did when we were young and the water was warm.",
        },
    ]
    write_plays(plays, [(scene, messages)])
    instances = [
        "He says \u201cit doesn\u2019t wait\u201d far too early",
        "'RAIN comes  down' is a cliche",
        'Quotes "The ferry" and "I\'ll swim after it", which is longer',
        "Tor speaks of when we were young and the water as if it were a memory",
        "The pace is off",
    ]
    answer = json.dumps(
        {"flaws": [{"instance": text, "type": "Flow", "severity": 1 + i} for i, text in enumerate(instances)]}
    )
    with Server(
        lambda body, _: answer if dimension_of(body["messages"]) == "Storyline Quality" else verdict()
    ) as server:
        server.use(monkeypatch)
        assert script("judge", plays, "--judge", "openai:j", "--html", tmp_path / "r.html")[0] == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    turns = re.findall(r'<li class="turn.*?</li>', text, re.DOTALL)
    assert [re.findall(r'data-severity="(\d)"', turn) for turn in turns] == [["1"], ["2"], ["3", "4"]]
    assert re.findall(r'data-severity="(\d)"', text.split('class="loose"')[1]) == ["5"]
    marked = ["".join(re.findall(r"<mark[^>]*>(.*?)</mark>", turn, re.DOTALL)) for turn in turns]
    plain = [re.sub(r"<[^>]*>", "", m).replace("&#39;", "'") for m in marked]
    assert plain == [
        "it doesn't wait",
        "Rain comes down",
        "I'll [sighs] swim after itwhen we were young and the water",
    ]
    written = text.split('class="reference"')[1]
    assert all(turn["character"] in written for turn in scene.dialogues) and len(scene.dialogues) > 3


def test_what_the_environment_says_in_brackets_is_no_thought(stage):
    """The judge reads it, so a flaw may quote it; a thought in the same words is not quoted."""
    words, dimension = "[closed until the morning tide]", "Storyline Quality"
    messages = [{"role": name, "content": words} for name in ("Hanne", "Environment")]
    flaw = {"instance": "it says 'closed until the morning tide'", "type": "Flow", "severity": 2}
    line = {"score": 90, "dimensions": {dimension: {"flaws": [flaw], "score": 90}}}
    fields = page.scene_fields(line, stage["the-last-ferry/1"], messages, [dimension], itertools.count())
    thought, sign = fields["played"]
    assert {span["kind"] for span in thought["spans"]} == {"thought"} and thought["flaws"] == []
    assert {span["kind"] for span in sign["spans"]} == {""} and len(sign["flaws"]) == 1
    assert [span["text"] for span in sign["spans"] if span["flaws"]] == [words[1:-1]]


def test_filters_in_a_browser(hostile_page, tmp_path):
    """Ticking a dimension off and raising the severity hides flaws, and says how many are left."""
    file, _ = hostile_page
    text = file.read_text(encoding="utf-8")
    text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", text)
    act = "document.querySelector('[name=dimension]').click();"
    act += " document.querySelector('[name=severity][value=\"3\"]').click();"
    (tmp_path / "acted.html").write_text(
        text.replace("</body>", f"<script>{act}</script></body>"), encoding="utf-8"
    )
    cards = re.findall(r'data-dimension="(\d)" data-severity="(\d)"', text)
    left = sum(dimension != "0" and int(severity) >= 3 for dimension, severity in cards)
    assert 0 < left < len(cards) and f"{left} of {len(cards)} flaws</output>" in dom(tmp_path / "acted.html")


def test_a_report_without_a_judge(script, plays, tmp_path):  # noqa: F811
    """Metrics alone make a page too, and one with a comparison has a picture of it."""
    assert script("judge", plays, "--html", tmp_path / "new" / "r.html")[0] == 0
    text = (tmp_path / "new" / "r.html").read_text(encoding="utf-8")
    assert "No judge has seen" in text and "BLEU" in text and "http" not in re.sub(r"http-equiv", "", text)
    assert script("judge", plays, "--versus", plays, "--html", tmp_path / "r.html")[0] == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert (
        "Against" in text and str(tmp_path) not in text
    )  # what is shown to others says nothing of this machine


def test_a_judge_without_end_does_not_hold_up_the_page():
    """Only the first thousand characters of what a flaw says are searched for."""
    line = "the ferry leaves at nine tonight"
    assert page.find_quote("z" * 900 + f' "{line}" ' + "x y " * 100_000, [line]) == (0, 0, len(line))
    assert page.find_quote("z" * 999 + f' "{line}"', [line]) is None
