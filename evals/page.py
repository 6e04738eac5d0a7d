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
from data.brackets import ACTION, SPEECH, THOUGHT, BracketParser
from data.chats import NEXT_SPEAKER
from data.scenes import ENVIRONMENT
from evals.metrics import METRICS
from evals.report import how_played, short, values
from evals.rubric import writable

COLOURS = 6  # of dimensions: classes d0 to d5 in page.html
KINDS = {THOUGHT: "thought", ACTION: "action"}
QUOTATION = re.compile(r"\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|(?<!\w)['\u2018](.+?)['\u2019](?!\w)")


def html(lines, performances, summary):
    """The page as text: it loads nothing and escapes all text."""
    dimensions = list(dict.fromkeys(name for line in lines for name in line["dimensions"]))
    verdicts = [verdict for line in lines for verdict in line["dimensions"].values()]
    severities = [flaw["severity"] for verdict in verdicts for flaw in verdict["flaws"]]
    ids, pairs = itertools.count(), zip(lines, performances, strict=True)
    scenes = [scene_fields(line, scene, messages, dimensions, ids) for line, (scene, messages, _) in pairs]
    rows = {label: row for label, row in summary["rows"].items() if label not in METRICS}
    columns = [list(enumerate(values(line).get(label) for line in lines)) for label in rows]
    dots = [[(i, value) for i, value in column if value is not None] for column in columns]
    versus = summary.get("versus", {"name": "", "rows": {}})
    edges = [abs(row[key] or 0) for row in versus["rows"].values() for key in ("difference", "low", "high")]
    books = list(dict.fromkeys(scene["book"] for scene in scenes))
    return render(
        "page.html",
        title=" and ".join(books) if len(books) < 3 else f"{len(lines)} scenes from {len(books)} books",
        facts=_facts(lines, summary, len(severities)),
        summary=summary,
        rows=rows,
        dots=dict(zip(rows, dots, strict=True)),
        plays=summary["plays"],
        metrics={label: row for label, row in summary["rows"].items() if label in METRICS},
        against=short(versus["name"]),
        versus=versus["rows"],
        reach=4 * max(1, math.ceil(max(edges, default=0) / 4)),
        top=max([100, *(value for column in dots for _, value in column)]),
        colours={name: f"d{index % COLOURS}" for index, name in enumerate(dimensions)},
        least=min([1, *severities]),
        most=min(10, max([5, *severities])),
        scenes=scenes,
        at=lambda value, low, high: round(100 * (value - low) / (high - low), 2),
        ticks=lambda low, high: [low, low / 2, 0, high / 2, high] if low else range(0, int(high) + 1, 25),
    )


def render(name, **fields):
    """A template of this folder, filled; its security policy allows no style or script but its own."""
    source = Path(__file__).with_name(name).read_text(encoding="utf-8")
    options = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    template = jinja2.Environment(autoescape=True, **options).from_string(source)
    hashes = {tag: _policy_hash(source, tag) for tag in ("style", "script") if f"<{tag}>" in source}
    return writable(template.render(hashes=hashes, **fields))


def _policy_hash(source, tag):
    own = re.search(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL)[1]
    return "sha256-" + base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()


def _facts(lines, summary, flaws):
    """[(name, value)] for the head of the page."""
    facts = {name: summary[name] for name in ("judge", "rubric", "seed") if summary["judge"]}
    facts |= how_played(lines) | {"scenes": summary["scenes"]}
    facts |= {"messages": sum(line["turns"] for line in lines), "flaws": flaws}
    return [(name.title(), short(value)) for name, value in facts.items() if value is not None]


def scene_fields(line, scene, messages, dimensions, ids):
    """What the template shows of a scene: its messages, the flaws quoting each, and those quoting none."""
    spoken = [message for message in messages if message["role"] != NEXT_SPEAKER]
    texts = [terminal.plain(message["content"]) for message in spoken]
    for i, message in enumerate(spoken):
        if message.get("named"):
            texts[i] = texts[i].replace(f"{message['role']}:", "", 1).strip()
    names = [message["role"] for message in spoken]
    played = [channels(name, text) for name, text in zip(names, texts, strict=True)]
    marks, flaws, loose = place_flaws(line, played, dimensions, ids)
    where = f"plot {scene.i_p}, conversation {scene.i_c}"

    def message_fields(name, spans, flaws=()):
        return {"name": name, "world": name == ENVIRONMENT, "spans": spans, "flaws": flaws}

    written = [(turn["character"], turn["message"]) for turn in scene.dialogues]
    return {
        "book": scene.book,
        "where": f"{scene.topic}, {where}" if scene.topic else where,
        "scenario": scene.scenario,
        "score": line["score"],
        "dimensions": line["dimensions"],
        "played": [message_fields(names[i], spans(played[i], marks[i]), flaws[i]) for i in range(len(names))],
        "loose": loose,
        "written": [message_fields(name, spans(channels(name, text), [])) for name, text in written],
    }


def channels(name, text):
    """[(part, channel)] of a message; the Environment has no thoughts, as in `script_line`."""
    return [(text, SPEECH)] if name == ENVIRONMENT else list(BracketParser().feed(text))


def place_flaws(line, played, dimensions, ids):
    """({message: [(first, last, flaw id)]}, {message: its flaws}, flaws that quote no message).

    played: `channels` of each message. Thoughts are blanked before the search: the judge has not seen them.
    """
    marks, flaws, loose = defaultdict(list), defaultdict(list), []
    visible = [
        "".join(" " * len(part) if channel == THOUGHT else part for part, channel in parts)
        for parts in played
    ]
    for index, name in enumerate(dimensions):
        for flaw in line["dimensions"].get(name, {"flaws": []})["flaws"]:
            shown = {"repeat": 0, **flaw, "id": next(ids), "index": index, "dimension": name}
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


def spans(parts, marks):
    """A message as pieces {text, kind, flaws}: thought, action or "", and the ids of the flaws quoting it."""
    pieces, start = [], 0
    for part, channel in parts:
        edges = [edge - start for mark in marks for edge in mark[:2] if 0 < edge - start < len(part)]
        for first, last in itertools.pairwise(sorted({0, len(part), *edges})):
            quoting = " ".join(str(i) for a, b, i in marks if a < start + last and start + first < b)
            pieces.append({"text": part[first:last], "kind": KINDS.get(channel, ""), "flaws": quoting})
        start += len(part)
    return pieces
