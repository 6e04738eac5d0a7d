"""The report to show to others: one self-contained HTML file."""

import base64
import hashlib
import itertools
import math
import re
from collections import defaultdict
from difflib import SequenceMatcher
from pathlib import Path

import jinja2

from common import terminal
from data.brackets import ACTION, THOUGHT, BracketParser
from data.chats import NEXT_SPEAKER
from data.scenes import ENVIRONMENT
from evals.metrics import METRICS
from evals.report import common_value, protocol, short, values

COLOURS = 6  # of dimensions, in page.html
KINDS = {THOUGHT: "thought", ACTION: "action"}
QUOTATION = re.compile(r"\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|(?<!\w)['\u2018](.+?)['\u2019](?!\w)")


def html(lines, performances, summary):
    """The page as text: it loads nothing, escapes all text, and its policy allows no script but its own."""
    dimensions = list(dict.fromkeys(name for line in lines for name in line["dimensions"]))
    verdicts = [verdict for line in lines for verdict in line["dimensions"].values()]
    severities = [flaw["severity"] for verdict in verdicts for flaw in verdict["flaws"]]
    ids, pairs = itertools.count(), zip(lines, performances, strict=True)
    scenes = [scene_fields(line, scene, messages, dimensions, ids) for line, (scene, messages, _) in pairs]
    columns = [values(line) for line in lines]

    def row_fields(label, row, mean):
        scored = [(i, column[label]) for i, column in enumerate(columns) if column.get(label) is not None]
        dots = [{"scene": i, "title": scenes[i]["book"], "value": value} for i, value in scored]
        colour = f"d{dimensions.index(label) % COLOURS}" if label in dimensions else "dx"
        return {**row, "label": label, "mid": row[mean], "colour": colour, "dots": dots}

    scores = {label: row for label, row in summary["rows"].items() if label not in METRICS}
    rows = [row_fields(label, row, "mean") for label, row in scores.items()]
    versus = summary.get("versus", {"name": "", "rows": {}})
    differences = [row_fields(label, row, "difference") for label, row in versus["rows"].items()]
    edges = [row[key] or 0 for row in differences for key in ("difference", "low", "high")]
    books = list(dict.fromkeys(scene["book"] for scene in scenes))
    return render(
        "page.html",
        title=" and ".join(books) if len(books) < 3 else f"{len(lines)} scenes from {len(books)} books",
        facts=_facts(lines, summary, len(severities)),
        against=short(versus["name"]),
        rows=rows,
        average=scores.get("Average"),
        metrics=[(label, row) for label, row in summary["rows"].items() if label in METRICS],
        summary=summary,
        versus=differences,
        reach=4 * max(1, math.ceil(max(map(abs, edges), default=0) / 4)),
        top=max([100, *(dot["value"] for row in rows for dot in row["dots"])]),
        dimensions=dimensions,
        least=min([1, *severities]),
        most=min(10, max([5, *severities])),
        scenes=scenes,
        at=lambda value, low, high: round(100 * (value - low) / (high - low), 2),
        ticks=lambda low, high: (
            range(0, int(high) + 1, 25) if low == 0 else [low, low / 2, 0, high / 2, high]
        ),
    )


def render(name, **fields):
    """A template of this folder, filled; its security policy allows no style or script but its own."""
    source = Path(__file__).with_name(name).read_text(encoding="utf-8")
    options = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    template = jinja2.Environment(autoescape=True, **options).from_string(source)
    hashes = {tag: _policy_hash(source, tag) for tag in ("style", "script") if f"<{tag}>" in source}
    return template.render(hashes=hashes, **fields).encode("utf-8", errors="replace").decode()


def _policy_hash(source, tag):
    """The hash by which the page's security policy knows its own style or script."""
    own = re.search(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL)[1]
    return "sha256-" + base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()


def _facts(lines, summary, flaws):
    """[(name, value)] for the head of the page."""
    settings = [line.get("settings", {}) for line in lines]
    facts = {name.title(): summary[name] for name in ("judge", "rubric", "seed") if summary["judge"]}
    facts |= {"Actor": common_value(settings, "actor"), "Protocol": protocol(settings[0])}
    facts |= {"Scenes": summary["scenes"], "Messages": sum(line["turns"] for line in lines), "Flaws": flaws}
    return [(name, short(value)) for name, value in facts.items() if value is not None]


def scene_fields(line, scene, messages, dimensions, ids):
    """What the template shows of a scene: its messages, the flaws quoting each, and those quoting none."""
    spoken = [message for message in messages if message["role"] != NEXT_SPEAKER]
    texts = [terminal.plain(message["content"]) for message in spoken]
    for i, message in enumerate(spoken):
        if message.get("named"):
            texts[i] = texts[i].replace(f"{message['role']}:", "", 1).strip()
    marks, flaws, loose = place_flaws(line, texts, dimensions, ids)
    where = f"plot {scene.i_p}, conversation {scene.i_c}"

    def message_fields(name, text, i=None):
        return {"name": name, "world": name == ENVIRONMENT, "spans": spans(text, marks[i]), "flaws": flaws[i]}

    return {
        "book": scene.book,
        "where": f"{scene.topic}, {where}" if scene.topic else where,
        "scenario": scene.scenario,
        "score": line["score"],
        "chips": [{"name": name, "score": verdict["score"]} for name, verdict in line["dimensions"].items()],
        "played": [message_fields(m["role"], texts[i], i) for i, m in enumerate(spoken)],
        "loose": loose,
        "written": [message_fields(turn["character"], turn["message"]) for turn in scene.dialogues],
    }


def place_flaws(line, texts, dimensions, ids):
    """({message: [(first, last, flaw id)]}, {message: its flaws}, flaws that quote no message).

    Thoughts are blanked before the search, since the judge has not seen them.
    """
    marks, flaws, loose = defaultdict(list), defaultdict(list), []
    visible = [
        "".join(" " * len(part) if kind == THOUGHT else part for part, kind in BracketParser().feed(text))
        for text in texts
    ]
    for index, name in enumerate(dimensions):
        for flaw in line["dimensions"].get(name, {"flaws": []})["flaws"]:
            shown = {"repeat": 0, **flaw, "id": next(ids), "index": index, "colour": index % COLOURS}
            shown["dimension"] = name
            if quote := find_quote(flaw["instance"], visible):
                i, first, last = quote
                flaws[i].append(shown)
                marks[i].append((first, last, shown["id"]))
            else:
                loose.append(shown)
    return marks, flaws, loose


def find_quote(instance, texts):
    """(index of a text, first, last character) of what a flaw quotes, or None.

    Searched for are its quotations, the longest first, then the longest run of at least five words that it
    shares with a text. Only its first thousand characters are read, to bound the time.
    """
    instance = instance[:1000]
    words = [re.findall(r"\w+", "".join(groups)) for groups in QUOTATION.findall(instance)]
    candidates = sorted((quoted for quoted in words if len(quoted) > 1), key=len, reverse=True)
    own, runs = [word.casefold() for word in re.findall(r"\w+", instance)], []
    for text in texts:
        others = [word.casefold() for word in re.findall(r"\w+", text)]
        run = SequenceMatcher(None, own, others, autojunk=False).find_longest_match()
        runs.append(own[run.a : run.a + run.size])
    longest = max(runs, key=len, default=[])
    for candidate in candidates + ([longest] if len(longest) > 4 else []):
        pattern = re.compile(r"(?<!\w)" + r"\W+".join(map(re.escape, candidate)) + r"(?!\w)", re.IGNORECASE)
        for i, text in enumerate(texts):
            if found := pattern.search(text):
                return i, *found.span()
    return None


def spans(text, marks):
    """A message as pieces {text, kind, flaws}: thought, action or "", and the ids of the flaws quoting it."""
    pieces, start = [], 0
    for part, channel in BracketParser().feed(text):
        edges = [edge - start for mark in marks for edge in mark[:2] if 0 < edge - start < len(part)]
        for first, last in itertools.pairwise(sorted({0, len(part), *edges})):
            quoting = " ".join(str(i) for a, b, i in marks if a < start + last and start + first < b)
            pieces.append({"text": part[first:last], "kind": KINDS.get(channel, ""), "flaws": quoting})
        start += len(part)
    return pieces
