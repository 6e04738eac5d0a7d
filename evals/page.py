"""The page one shows to others: one self-contained HTML file."""

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
from evals.report import METRICS, one_of, protocol, short, values


def html(lines, performances, summary):
    """A page that needs nothing from outside. Every text in it is escaped, and its policy lets no script but its own run."""
    source = (Path(__file__).with_name("page.html")).read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        own = re.search(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL)[1]
        hashes[tag] = "sha256-" + base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    dimensions = list(dict.fromkeys(name for line in lines for name in line["dimensions"]))
    severities = [
        flaw["severity"] for line in lines for v in line["dimensions"].values() for flaw in v.get("flaws", ())
    ]
    ids = itertools.count()
    scenes = [
        scene_page(line, scene, m, dimensions, ids)
        for line, (scene, m, _) in zip(lines, performances, strict=True)
    ]
    rows = {label: row for label, row in summary["rows"].items() if label not in METRICS}
    settings = [line.get("settings") or {} for line in lines]
    facts = (
        [("Judge", summary["judge"]), ("Rubric", summary["rubric"]), ("Seed", summary["seed"])]
        if summary["judge"]
        else []
    )
    facts += [
        ("Actor", one_of(settings, "actor")),
        ("Protocol", protocol(settings[0])),
        ("Scenes", summary["scenes"]),
    ]
    facts += [("Messages", sum(line["turns"] for line in lines)), ("Flaws", len(severities))]
    against = {
        k: row for k, row in summary.get("versus", {}).get("rows", {}).items() if k in rows or k in METRICS
    }
    edges = [
        abs(edge)
        for row in against.values()
        for edge in (row["difference"], row["low"], row["high"])
        if edge is not None
    ]

    def colour(label):
        return f"d{dimensions.index(label) % 6}" if label in dimensions else "dx"

    def dots(label):
        found = [(i, scenes[i]["book"], values(line).get(label)) for i, line in enumerate(lines)]
        return [
            {"scene": i, "title": title, "value": value} for i, title, value in found if value is not None
        ]

    shown = [
        {"label": name, "mid": row["mean"], "colour": colour(name), "dots": dots(name), **row}
        for name, row in rows.items()
    ]
    books = list(dict.fromkeys(scene["book"] for scene in scenes))
    page = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = page.from_string(source).render(
        title=" and ".join(books) if len(books) < 3 else f"{len(lines)} scenes from {len(books)} books",
        hashes=hashes,
        facts=[(name, short(value)) for name, value in facts if value is not None],
        against=short(summary.get("versus", {}).get("name", "")),
        rows=shown,
        average=rows.get("Average"),
        metrics=[(label, row) for label, row in summary["rows"].items() if label in METRICS],
        summary=summary,
        versus=[
            {"label": label, "mid": row["difference"], "colour": colour(label), **row}
            for label, row in against.items()
        ],
        reach=4 * max(1, math.ceil(max(edges, default=0) / 4)),
        top=max([100, *(dot["value"] for row in shown for dot in row["dots"])]),
        dimensions=dimensions,
        least=min([1, *severities]),
        most=min(10, max([5, *severities])),
        scenes=scenes,
        at=lambda value, low, high: round(100 * (value - low) / (high - low), 2),
        ticks=lambda low, high: (
            [low + (high - low) * i / 4 for i in range(5)] if low else range(0, int(high) + 1, 25)
        ),
    )
    return page.encode("utf-8", errors="replace").decode()


def scene_page(line, scene, messages, dimensions, ids):
    """What the template shows of one scene: its lines with the flaws that quote them, and the flaws that quote none."""
    spoken = [message for message in messages if message["role"] != NEXT_SPEAKER]
    texts = [
        terminal.plain(m["content"]).replace(f"{m['role']}:", "", 1).strip()
        if m.get("named")
        else terminal.plain(m["content"])
        for m in spoken
    ]
    marks, flaws, loose = defaultdict(list), defaultdict(list), []
    visible = [
        "".join(
            " " * len(part) if channel == THOUGHT else part for part, channel in BracketParser().feed(text)
        )
        for text in texts
    ]
    for index, name in enumerate(dimensions):
        for flaw in line["dimensions"].get(name, {}).get("flaws", ()):
            shown = {
                "repeat": 0,
                **flaw,
                "id": next(ids),
                "index": index,
                "colour": index % 6,
                "dimension": name,
            }
            where = find_quote(flaw["instance"], visible)
            if where:
                flaws[where[0]].append(shown)
                marks[where[0]].append((*where[1:], shown["id"]))
            else:
                loose.append(shown)

    def shown_line(name, text, i=None):
        return {"name": name, "world": name == ENVIRONMENT, "spans": spans(text, marks[i]), "flaws": flaws[i]}

    return {
        "book": scene.book,
        "where": ", ".join(
            [part for part in (scene.topic, f"plot {scene.i_p}, conversation {scene.i_c}") if part]
        ),
        "scenario": scene.scenario,
        "score": line["score"],
        "chips": [{"name": name, "score": verdict["score"]} for name, verdict in line["dimensions"].items()],
        "played": [
            shown_line(m["role"], text, i) for i, (m, text) in enumerate(zip(spoken, texts, strict=True))
        ],
        "loose": loose,
        "written": [shown_line(turn["character"], turn["message"]) for turn in scene.dialogues],
    }


def find_quote(instance, texts):
    """(index of the text, first, last character) of what a flaw quotes: its longest quotation found, else the longest run of
    five words or more that it shares with a text; None where there is neither.
    """
    instance = instance[:1000]  # enough to quote a line, and soon searched however long a judge went on
    quoted = re.findall(
        r"\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|(?<!\w)['\u2018](.+?)['\u2019](?!\w)", instance
    )
    words = [re.findall(r"\w+", "".join(groups)) for groups in quoted]
    own, runs = [word.casefold() for word in re.findall(r"\w+", instance)], []
    for text in texts:
        theirs = [word.casefold() for word in re.findall(r"\w+", text)]
        run = SequenceMatcher(None, own, theirs, autojunk=False).find_longest_match()
        runs.append(own[run.a : run.a + run.size])
    longest = max(runs, key=len, default=[])
    for candidate in sorted((w for w in words if len(w) > 1), key=len, reverse=True) + [longest] * (
        len(longest) > 4
    ):
        pattern = re.compile(r"(?<!\w)" + r"\W+".join(map(re.escape, candidate)) + r"(?!\w)", re.IGNORECASE)
        for i, text in enumerate(texts):
            if found := pattern.search(text):
                return i, *found.span()
    return None


def spans(text, marks):
    """A message as pieces {text, kind, flaws}: kind is thought, action or nothing, flaws the ids of the flaws that quote it."""
    pieces, at, kinds = [], 0, {THOUGHT: "thought", ACTION: "action"}
    for part, channel in BracketParser().feed(text):
        edges = [edge - at for mark in marks for edge in mark[:2] if 0 < edge - at < len(part)]
        for first, last in itertools.pairwise(sorted({0, len(part), *edges})):
            quoting = " ".join(str(i) for a, b, i in marks if a < at + last and at + first < b)
            pieces.append({"text": part[first:last], "kind": kinds.get(channel, ""), "flaws": quoting})
        at += len(part)
    return pieces
