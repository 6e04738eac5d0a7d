"""What verdicts add up to: means with intervals, comparisons, the leaderboard, and the page one shows to others.

Everything here takes the lines of verdicts.jsonl and gives plain dicts (`--json` prints them as they are), lines of text, or
one self-contained HTML file. Scores of different judges never stand in one table.
"""

import base64
import hashlib
import itertools
import json
import math
import random
import re
import statistics
from collections import defaultdict
from difflib import SequenceMatcher
from pathlib import Path

import jinja2
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

import cli
from cli import UsageError
from data.chats import NEXT_SPEAKER
from data.scenes import ENVIRONMENT
from metrics import bootstrap, paired, spearman, weigh

METRICS = {
    "BLEU": "bleu",
    "BLEU without names": "bleu_without_names",
    "ROUGE-L": "rouge_l",
    "ROUGE-L (release)": "rouge_l_release",
}
WEIGHTS = [i / 100 for i in range(101)]  # length weights swept


def values(line):
    """{label: value} of one scene: the dimensions, their Average, and the metrics times 100; None where there is no score."""
    scores = {name: verdict["score"] for name, verdict in line["dimensions"].items()}
    metrics = {label: 100 * line[name] for label, name in METRICS.items() if name in line}
    return scores | ({"Average": line["score"]} if scores else {}) | metrics


def scene_of(line):
    return line["book"], line["i_p"], line["i_c"]


def interval(numbers):
    mean, low, high = bootstrap(numbers)
    return {"mean": mean, "low": low, "high": high, "scenes": len(numbers)}


def summarise(lines):
    """Means over scenes with their intervals, and over all scenes of each repeat."""
    columns, repeats = defaultdict(list), defaultdict(list)
    for line in lines:
        for label, value in values(line).items():
            columns[label] += [value] if value is not None else []
        for r, scores in enumerate(itertools.zip_longest(*(v["scores"] for v in line["dimensions"].values()))):
            repeats[r] += [statistics.mean(scores)] if None not in scores else []
    means = [statistics.mean(scores) for scores in repeats.values() if scores]
    told = {name: one_of(lines, name) for name in ("judge", "rubric", "seed", "length_weight")}
    told |= {"scenes": len(lines), "verdicts": len(verdicts(lines)), "invalid": invalid(lines)}
    rows = {label: interval(numbers) for label, numbers in columns.items() if numbers}
    spread = {"means": means, "deviation": statistics.stdev(means)} if len(means) > 1 else None
    return told | {"rows": rows, "repeats": spread}


def verdicts(lines):
    """The score of every verdict, of each repeat of each dimension of each scene; None where it never became valid."""
    return [score for line in lines for verdict in line["dimensions"].values() for score in verdict["scores"]]


def invalid(lines):
    return verdicts(lines).count(None)


def one_of(lines, name):
    """What all lines say, or all that they say."""
    said = list(dict.fromkeys(line.get(name) for line in lines))
    return said[0] if len(said) == 1 else ", ".join(map(str, said))


def same_judge(ours, theirs):
    """UsageError where different judges, or rubrics, gave the scores."""
    judges = [{(line["judge"], line.get("rubric")) for line in lines if line["judge"]} for lines in (ours, theirs)]
    if all(judges) and judges[0] != judges[1]:
        said = [" and ".join(f"{judge} ({rubric})" for judge, rubric in sorted(side)) for side in judges]
        raise UsageError(f"--versus: judged by {said[0]} here and {said[1]} there; scores of two judges do not compare")


def compare(ours, theirs):
    """{label: paired comparison} on the scenes both have."""
    both = [{scene_of(line): line for line in lines} for lines in (ours, theirs)]
    common = [scene for scene in both[0] if scene in both[1]]
    if not common:
        raise UsageError("--versus: the two have no scene in common")
    same_judge(ours, theirs)
    pairs = defaultdict(list)
    for scene in common:
        mine, other = (values(side[scene]) for side in both)
        for label, value in mine.items():
            if value is not None and other.get(label) is not None:
                pairs[label].append((value, other[label]))
    return {label: paired(*zip(*both, strict=True)) for label, both in pairs.items()}


# ---- leaderboard --------------------------------------------------------------------------------------------------------


def leaderboard(runs):
    """Tables, one a judge and rubric, best first, and where their ranking turns; the published one. runs: {name: lines}."""
    tables, made = defaultdict(lambda: defaultdict(list)), []
    for name, lines in runs.items():
        for line in lines:
            tables[line["judge"], line.get("rubric")][str(name)].append(line)
    for (judge, rubric), members in tables.items():
        rows = []
        for name, lines in members.items():
            settings, summary = [line.get("settings") or {} for line in lines], summarise(lines)
            row = {"run": name, "actor": short(one_of(settings, "actor") or "not said"), "protocol": protocol(settings[0])}
            rows.append(row | {key: summary[key] for key in ("seed", "length_weight", "scenes", "invalid", "rows", "repeats")})
        rows.sort(key=lambda row: -row["rows"].get("Average", {"mean": 0})["mean"])
        same = len({frozenset(map(scene_of, lines)) for lines in members.values()}) == 1
        made.append({"judge": judge, "rubric": rubric, "same_scenes": same, "rows": rows, "sweep": sweep(members)})
    return {"tables": made, "published": json.loads((cli.ROOT / "data" / "published_results.json").read_text())}


def protocol(settings):
    """What a run's settings say of how it was played, in a few words."""
    parts = [str(settings.get("protocol", "")), f"{settings['max_rounds']} rounds" if "max_rounds" in settings else ""]
    parts += [f"k={settings['continue_from']}" if settings.get("continue_from") else ""]
    return ", ".join([part for part in parts if part] + ["no thoughts"] * (settings.get("thoughts") is False)) or "not said"


def sweep(runs):
    """[{from, to, ranking}] over WEIGHTS: at which length weights which order of the runs holds."""
    runs = {name: [line for line in lines if line["score"] is not None] for name, lines in runs.items()}
    spans = []
    for weight in WEIGHTS if len(runs) > 1 and all(runs.values()) else ():
        means = {name: statistics.mean(weigh(line, weight)["score"] for line in lines) for name, lines in runs.items()}
        ranking = sorted(means, key=lambda name: -means[name])
        if spans and spans[-1]["ranking"] == ranking:
            spans[-1]["to"] = weight
        else:
            spans.append({"from": weight, "to": weight, "ranking": ranking})
    return spans


# ---- calibration --------------------------------------------------------------------------------------------------------


def as_played(scene):
    """The original conversation in the shape of a performance."""
    return [{"role": turn["character"], "content": turn["message"]} for turn in scene.dialogues]


def shuffled(scene):
    """The same messages in another order."""
    messages = as_played(scene)
    mixed = random.Random(scene.key).sample(messages, len(messages))
    return mixed if mixed != messages else messages[::-1]


def compare_judges(judged, recorded):
    """How a judge's verdict lines agree with recorded ones. judged, recorded: {model: lines}; judged has the controls too."""
    both, points = {}, []
    for name, lines in recorded.items():
        other = {scene_of(line): line for line in lines}
        pairs = {scene: (line, other[scene]) for line in judged[name] if (scene := scene_of(line)) in other}
        both[name] = {scene: pair for scene, pair in pairs.items() if None not in (pair[0]["score"], pair[1]["score"])}
        points += both[name].values()

    def agreement(pairs):
        scores = [[line["score"] for line in side] for side in zip(*pairs, strict=True)] or [[], []]
        ranks = {"scenes": len(pairs), "spearman": spearman(*scores)}
        return ranks | {name: bootstrap(side)[0] for name, side in zip(("mean", "recorded"), scores, strict=True)}

    length = {"turns": [line["turns"] for line, _ in points], "judge": [line["score"] for line, _ in points]}
    length["recorded"] = [old["score"] for _, old in points]
    length["difference"] = [round(x - y, 9) for x, y in zip(length["judge"], length["recorded"], strict=True)]
    names = ("original", "shuffled")
    original, mixed = ({scene_of(line): line["score"] for line in judged[name]} for name in names)
    controls = [(original[scene], mixed[scene]) for scene in original if None not in (original[scene], mixed[scene])]
    told = paired(*zip(*controls, strict=True)) if controls else None
    for i, name in enumerate(names if controls else ()):
        told[name] = statistics.mean(pair[i] for pair in controls)
    return {
        "models": {name: agreement(list(pairs.values())) for name, pairs in both.items()} | {"pooled": agreement(points)},
        "better_of_two": {label: better_of_two(both, key) for label, key in (("judge", "score"), *METRICS.items())},
        "length": {name: spearman(length["turns"], length[name]) for name in ("judge", "recorded", "difference")},
        "controls": told,
        "invalid": sum(map(invalid, judged.values())),
    }


def better_of_two(both, key):
    """How often `key` and the recorded score agree on which of two models did better on a scene; a tie of `key`'s is half."""
    agree, scenes = [], []
    for one, two in itertools.combinations(both.values(), 2):
        for scene in one.keys() & two.keys():
            (a, old_a), (b, old_b) = one[scene], two[scene]
            if old_a["score"] != old_b["score"]:
                agree.append((np.sign(a[key] - b[key]) * np.sign(old_a["score"] - old_b["score"]) + 1) / 2)
                scenes.append(str(scene))
    mean, low, high = bootstrap(agree, scenes=scenes)
    return {"share": mean, "low": low, "high": high, "pairs": len(agree)}


# ---- as text ------------------------------------------------------------------------------------------------------------


def number(value, form=".2f"):
    return "-" if value is None else format(value, form)


def between(row, form=".2f"):
    return "-" if row.get("low") is None else f"{row['low']:{form}} to {row['high']:{form}}"


def table(header, rows):
    """A table on a terminal; where stdout is none, plain lines of the same cells, the first column to the left."""
    cells = [[cli.plain(str(cell)) for cell in row] for row in (header, *rows)]
    if cli.stdout.is_terminal:
        drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        for i, name in enumerate(cells[0]):
            style = "dim" if "interval" in name or name in ("scenes", "pairs") else ""
            drawn.add_column(Text(name), justify="right" if i else "left", style=style, vertical="bottom", overflow="fold")
        for row in cells[1:]:
            drawn.add_row(*map(Text, row))
        yield drawn
        return
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        others = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *others]).rstrip()


def text(summary):
    """A summary as lines and tables: of one run, of a leaderboard, or of a calibration."""
    if "tables" in summary:
        yield from leaderboard_text(summary)
    elif "models" in summary:
        yield from calibration_text(summary)
    else:
        judge = f"judge: {summary['judge']}, {summary['rubric']}" if summary["judge"] else "judge: none"
        yield f"{summary['scenes']} scene(s), {judge}, length weight {summary['length_weight']}"
        rows = [(label, number(row["mean"]), between(row), row["scenes"]) for label, row in summary["rows"].items()]
        yield from table(("", "mean", "95% interval", "scenes"), rows)
        if summary["repeats"]:
            means = " ".join(map(number, summary["repeats"]["means"]))
            yield f"means of the repeats: {means}, standard deviation {summary['repeats']['deviation']:.2f}"
        if "versus" in summary:
            yield f"\nagainst {summary['versus']['name']}, scene by scene"
            rows = [
                (label, number(row["difference"], "+.2f"), between(row, "+.2f"), number(row["wins"], ".0%"), row["scenes"])
                for label, row in summary["versus"]["rows"].items()
            ]
            yield from table(("", "difference", "95% interval", "better on", "scenes"), rows)
        if "recomputed" in summary:
            yield summary["recomputed"]


def leaderboard_text(summary):
    for board in summary["tables"]:
        labels = list(dict.fromkeys(label for row in board["rows"] for label in row["rows"] if "(" not in label))
        yield f"judge: {board['judge'] or 'none'}, {board['rubric']}, length weight {board['rows'][0]['length_weight']}"
        names, rows = ("run", "actor", "protocol", "seed", "scenes", "invalid"), []
        for row in board["rows"]:
            cells = [number(row["rows"].get(label, {}).get("mean")) for label in labels]
            sure = between(row["rows"].get("Average", {}))
            rows.append((*("-" if row[name] is None else row[name] for name in names), *cells, sure))
        yield from table((*names, *labels, "95% interval of the Average"), rows)
        if not board["same_scenes"]:
            yield "These runs played different scenes, and their means do not compare; --versus takes what two have in common."
        for span in board["sweep"]:
            yield f"length weight {span['from']:.2f} to {span['to']:.2f}: {' > '.join(span['ranking'])}"
        yield ""
    published = summary["published"]
    names = [name for name in published["gca"][0] if name not in ("model", "weights")]
    yield f"published ({published['source']})"
    rows = [
        (f"{row['model']} (published)", *(number(row[name]) for name in names))
        for row in sorted(published["gca"], key=lambda r: -r["average"])
    ]
    yield from table(("", *(name.replace("_", " ") for name in names)), rows)


def calibration_text(summary):
    yield f"judge: {summary['judge']}, {summary['rubric']}, against recorded verdicts"
    rows = [
        (name, number(row["spearman"]), number(row["mean"]), number(row["recorded"]), row["scenes"])
        for name, row in summary["models"].items()
    ]
    yield from table(("over scenes", "Spearman", "mean", "recorded", "scenes"), rows)
    yield "\nwhich of two models did better on a scene"
    rows = [(name, number(r["share"], ".1%"), between(r, ".1%"), r["pairs"]) for name, r in summary["better_of_two"].items()]
    yield from table(("", "agrees", "95% interval", "pairs"), rows)
    length = summary["length"]
    yield f"\nrank correlation with the number of messages: the judge's score {number(length['judge'])}, the recorded one " + (
        f"{number(length['recorded'])}, their difference {number(length['difference'])}"
    )
    controls = summary["controls"]
    if controls:
        told = f"the original as if played {number(controls['original'])}, its messages shuffled {number(controls['shuffled'])}"
        yield f"controls: {told}, difference {number(controls['difference'], '+.2f')} ({between(controls, '+.2f')})"
        if controls["low"] is None or controls["low"] <= 0:
            yield "NOT IN ORDER: this judge does not tell the original from its shuffled lines, on so many scenes"
        else:
            yield "the controls come out in order"
    if summary["invalid"]:
        yield f"{summary['invalid']} verdict(s) never became valid and are in no figure"


# ---- as a page ----------------------------------------------------------------------------------------------------------


def html(lines, performances, summary):
    """A page that needs nothing from outside. Every text in it is escaped, and its policy lets no script but its own run."""
    source = (cli.ROOT / "data" / "report.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        own = re.search(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL)[1]
        hashes[tag] = "sha256-" + base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    dimensions = list(dict.fromkeys(name for line in lines for name in line["dimensions"]))
    severities = [flaw["severity"] for line in lines for v in line["dimensions"].values() for flaw in v.get("flaws", ())]
    ids = itertools.count()
    scenes = [scene_page(line, scene, m, dimensions, ids) for line, (scene, m, _) in zip(lines, performances, strict=True)]
    rows = {label: row for label, row in summary["rows"].items() if label not in METRICS}
    settings = [line.get("settings") or {} for line in lines]
    facts = [("Judge", summary["judge"]), ("Rubric", summary["rubric"]), ("Seed", summary["seed"])] if summary["judge"] else []
    facts += [("Actor", one_of(settings, "actor")), ("Protocol", protocol(settings[0])), ("Scenes", summary["scenes"])]
    facts += [("Messages", sum(line["turns"] for line in lines)), ("Flaws", len(severities))]
    against = {k: row for k, row in summary.get("versus", {}).get("rows", {}).items() if k in rows or k in METRICS}
    edges = [abs(edge) for row in against.values() for edge in (row["difference"], row["low"], row["high"]) if edge is not None]

    def colour(label):
        return f"d{dimensions.index(label) % 6}" if label in dimensions else "dx"

    def dots(label):
        found = [(i, scenes[i]["book"], values(line).get(label)) for i, line in enumerate(lines)]
        return [{"scene": i, "title": title, "value": value} for i, title, value in found if value is not None]

    shown = [
        {"label": name, "mid": row["mean"], "colour": colour(name), "dots": dots(name), **row} for name, row in rows.items()
    ]
    books = list(dict.fromkeys(scene["book"] for scene in scenes))
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = page.from_string(source).render(
        title=" and ".join(books) if len(books) < 3 else f"{len(lines)} scenes from {len(books)} books",
        hashes=hashes,
        facts=[(name, short(value)) for name, value in facts if value is not None],
        against=short(summary.get("versus", {}).get("name", "")),
        rows=shown,
        average=rows.get("Average"),
        metrics=[(label, row) for label, row in summary["rows"].items() if label in METRICS],
        summary=summary,
        versus=[{"label": label, "mid": row["difference"], "colour": colour(label), **row} for label, row in against.items()],
        reach=4 * max(1, math.ceil(max(edges, default=0) / 4)),
        top=max([100, *(dot["value"] for row in shown for dot in row["dots"])]),
        dimensions=dimensions,
        least=min([1, *severities]),
        most=min(10, max([5, *severities])),
        scenes=scenes,
        at=lambda value, low, high: round(100 * (value - low) / (high - low), 2),
        ticks=lambda low, high: [low + (high - low) * i / 4 for i in range(5)] if low else range(0, int(high) + 1, 25),
    )
    return page.encode("utf-8", errors="replace").decode()


def short(name):
    """Of a path from the root the last two parts: where a model lies is no one else's concern."""
    return "/".join(Path(name).parts[-2:]) if str(name).startswith("/") else str(name)


def scene_page(line, scene, messages, dimensions, ids):
    """What the template shows of one scene: its lines with the flaws that quote them, and the flaws that quote none."""
    spoken = [message for message in messages if message["role"] != NEXT_SPEAKER]
    texts = [m["content"].replace(f"{m['role']}:", "", 1).strip() if m.get("named") else m["content"] for m in spoken]
    marks, flaws, loose = defaultdict(list), defaultdict(list), []
    visible = ["".join(" " * len(t) if style == cli.THOUGHT else t for t, style in cli.Painter().spans(text)) for text in texts]
    for index, name in enumerate(dimensions):
        for flaw in line["dimensions"].get(name, {}).get("flaws", ()):
            shown = {"repeat": 0, **flaw, "id": next(ids), "index": index, "colour": index % 6, "dimension": name}
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
        "where": ", ".join([part for part in (scene.topic, f"plot {scene.i_p}, conversation {scene.i_c}") if part]),
        "scenario": scene.scenario,
        "score": line["score"],
        "chips": [{"name": name, "score": verdict["score"]} for name, verdict in line["dimensions"].items()],
        "played": [shown_line(m["role"], text, i) for i, (m, text) in enumerate(zip(spoken, texts, strict=True))],
        "loose": loose,
        "written": [shown_line(turn["character"], turn["message"]) for turn in scene.dialogues],
    }


def find_quote(instance, texts):
    """(index of the text, first, last character) of what a flaw quotes: its longest quotation found, else the longest run of
    five words or more that it shares with a text; None where there is neither.
    """
    instance = instance[:1000]  # enough to quote a line, and soon searched however long a judge went on
    quoted = re.findall(r"\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|(?<!\w)['\u2018](.+?)['\u2019](?!\w)", instance)
    words = [re.findall(r"\w+", "".join(groups)) for groups in quoted]
    own, runs = [word.casefold() for word in re.findall(r"\w+", instance)], []
    for text in texts:
        theirs = [word.casefold() for word in re.findall(r"\w+", text)]
        run = SequenceMatcher(None, own, theirs, autojunk=False).find_longest_match()
        runs.append(own[run.a : run.a + run.size])
    longest = max(runs, key=len, default=[])
    for candidate in sorted((w for w in words if len(w) > 1), key=len, reverse=True) + [longest] * (len(longest) > 4):
        pattern = re.compile(r"(?<!\w)" + r"\W+".join(map(re.escape, candidate)) + r"(?!\w)", re.IGNORECASE)
        for i, text in enumerate(texts):
            if found := pattern.search(text):
                return i, *found.span()
    return None


def spans(text, marks):
    """A message as pieces {text, kind, flaws}: kind is thought, action or nothing, flaws the ids of the flaws that quote it."""
    pieces, at, kinds = [], 0, {cli.THOUGHT: "thought", cli.ACTION: "action"}
    for part, style in cli.Painter().spans(text):
        edges = [edge - at for mark in marks for edge in mark[:2] if 0 < edge - at < len(part)]
        for first, last in itertools.pairwise(sorted({0, len(part), *edges})):
            quoting = " ".join(str(i) for a, b, i in marks if a < at + last and at + first < b)
            pieces.append({"text": part[first:last], "kind": kinds.get(style, ""), "flaws": quoting})
        at += len(part)
    return pieces
