"""Summaries of verdict lines: means with intervals, comparisons, the leaderboard; as plain dicts and as text.

Scores of different judges or rubrics are never put in one table.
"""

import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common import terminal
from common.files import UsageError
from evals.metrics import METRICS, bootstrap, paired, with_scores

WEIGHTS = [i / 100 for i in range(101)]  # length weights of the sweep


def values(line):
    """{label: value} of a scene: its dimensions, their Average, the metrics times 100; None if invalid."""
    scores = {name: verdict["score"] for name, verdict in line["dimensions"].items()}
    metrics = {label: 100 * line[key] for label, key in METRICS.items() if key in line}
    return scores | ({"Average": line["score"]} if scores else {}) | metrics


def scene_of(line):
    return line["book"], line["i_p"], line["i_c"]


def common_value(lines, name):
    """The value that all lines have, or the different ones, joined by commas."""
    distinct = list(dict.fromkeys(line.get(name) for line in lines))
    return distinct[0] if len(distinct) == 1 else ", ".join(map(str, distinct))


def summarise(lines):
    """{judge, rubric, seed, ..., rows: {label: mean and interval}, repeats: their means and deviation}."""
    columns, rows, means = defaultdict(list), {}, repeat_means(lines)
    for label, value in (item for line in lines for item in values(line).items()):
        if value is not None:
            columns[label].append(value)
    for label, column in columns.items():
        mean, low, high = bootstrap(column)
        rows[label] = {"mean": mean, "low": low, "high": high, "scenes": len(column)}
    facts = {name: common_value(lines, name) for name in ("judge", "rubric", "seed", "length_weight")}
    repeats = {"means": means, "deviation": statistics.stdev(means)} if len(means) > 1 else None
    return facts | {"scenes": len(lines)} | count_verdicts(lines) | {"rows": rows, "repeats": repeats}


def repeat_means(lines):
    """The mean of each repeat over the scenes in which all its verdicts are valid."""
    repeats = defaultdict(list)
    for line in lines:
        scores = [verdict["scores"] for verdict in line["dimensions"].values()]
        for repeat, by_dimension in enumerate(itertools.zip_longest(*scores)):
            repeats[repeat] += [] if None in by_dimension else [statistics.mean(by_dimension)]
    return [statistics.mean(scores) for scores in repeats.values() if scores]


def count_verdicts(lines):
    """{verdicts, invalid, first_error}: over each repeat of each dimension of each scene."""
    dimensions = [verdict for line in lines for verdict in line["dimensions"].values()]
    scores = [score for verdict in dimensions for score in verdict["scores"]]
    error = next((verdict["error"] for verdict in dimensions if "error" in verdict), None)
    return {"verdicts": len(scores), "invalid": scores.count(None), "first_error": error}


def require_same_judge(ours, theirs):
    """UsageError where the scores of two runs come from different judges or rubrics."""
    here, there = (
        " and ".join(sorted({f"{line['judge']} ({line.get('rubric')})" for line in run if line["judge"]}))
        for run in (ours, theirs)
    )
    if here and there and here != there:
        raise UsageError(f"--versus: judged by {here} here, by {there} there; their scores do not compare")


def compare_runs(ours, theirs):
    """{label: paired comparison} over the scenes that both runs have."""
    require_same_judge(ours, theirs)
    others = {scene_of(line): values(line) for line in theirs}
    pairs = defaultdict(list)
    for scene, own in {scene_of(line): values(line) for line in ours}.items():
        for label, value in own.items():
            other = others.get(scene, {}).get(label)
            if value is not None and other is not None:
                pairs[label].append((value, other))
    if not pairs:
        raise UsageError("--versus: the two have no scored scene in common")
    return {label: paired(*zip(*scores, strict=True)) for label, scores in pairs.items()}


def leaderboard(runs):
    """{tables: one per judge and rubric, best run first, with a sweep; published}. runs: {name: lines}."""
    groups, tables = defaultdict(lambda: defaultdict(list)), []
    for name, lines in runs.items():
        for line in lines:
            groups[line["judge"], line.get("rubric")][str(name)].append(line)
    for (judge, rubric), members in groups.items():
        rows = [{"run": name} | how_played(lines) | summarise(lines) for name, lines in members.items()]
        rows.sort(key=lambda row: -row["rows"].get("Average", {"mean": 0})["mean"])
        same_scenes = len({frozenset(map(scene_of, lines)) for lines in members.values()}) == 1
        table = {"judge": judge, "rubric": rubric, "same_scenes": same_scenes}
        tables.append(table | {"rows": rows, "sweep": sweep(members)})
    published = Path(__file__).with_name("published_results.json").read_text(encoding="utf-8")
    return {"tables": tables, "published": json.loads(published)}


def sweep(runs):
    """[{from, to, ranking}]: for which length weights which ranking of the runs holds."""
    runs = {name: [line for line in lines if line["score"] is not None] for name, lines in runs.items()}
    spans = []
    for weight in WEIGHTS if len(runs) > 1 and all(runs.values()) else ():
        means = {
            name: statistics.mean(with_scores(line, weight)["score"] for line in lines)
            for name, lines in runs.items()
        }
        ranking = sorted(means, key=lambda name: -means[name])
        if spans and spans[-1]["ranking"] == ranking:
            spans[-1]["to"] = weight
        else:
            spans.append({"from": weight, "to": weight, "ranking": ranking})
    return spans


def how_played(lines):
    """{actor, protocol} of a run in a few words, from its settings."""
    settings = [line["settings"] for line in lines]
    played = [{"actor": short(own.get("actor") or "unknown"), "protocol": protocol(own)} for own in settings]
    return {name: common_value(played, name) for name in ("actor", "protocol")}


def protocol(settings):
    parts = [str(settings.get("protocol", ""))]
    parts += [f"{settings['max_rounds']} rounds"] if "max_rounds" in settings else []
    parts += [f"k={settings['continue_from']}"] if settings.get("continue_from") else []
    parts += ["no thoughts"] if settings.get("thoughts") is False else []
    return ", ".join(filter(None, parts)) or "unknown"


def short(name):
    """The last two parts of an absolute path: what is shown to others names no other folders."""
    return "/".join(Path(name).parts[-2:]) if str(name).startswith("/") else str(name)


def number(value, form=".2f"):
    return "-" if value is None else format(value, form)


def interval(row, form=".2f"):
    return "-" if row.get("low") is None else f"{row['low']:{form}} to {row['high']:{form}}"


def table(header, rows):
    """A table for `show`; the header is ruled off on a terminal."""
    drawn = Table(box=SIMPLE_HEAD if terminal.stdout.is_terminal else None, show_edge=False, pad_edge=False)
    for i, name in enumerate(header):
        style = "dim" if "interval" in name or name in ("scenes", "pairs") else ""
        justify, name = "right" if i else "left", Text(terminal.plain(name))
        drawn.add_column(name, justify=justify, style=style, vertical="bottom", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(terminal.plain(str(cell))) for cell in row))
    return drawn


def show(parts):
    """Prints lines and tables to stdout; elsewhere than on a terminal tables are as wide as they need."""
    on_terminal = terminal.stdout.is_terminal
    console = terminal.stdout if on_terminal else Console(width=10_000, emoji=False, highlight=False)
    for part in parts:
        is_text = isinstance(part, str)
        console.print(terminal.plain(part) if is_text else part, markup=False, soft_wrap=is_text)


def summary_text(summary):
    """Yields the lines and tables of one run's summary, with its comparison if there is one."""
    judge = f"judge: {summary['judge']}, {summary['rubric']}" if summary["judge"] else "judge: none"
    yield f"{summary['scenes']} scene(s), {judge}, length weight {summary['length_weight']}"
    rows = [(label, number(r["mean"]), interval(r), r["scenes"]) for label, r in summary["rows"].items()]
    yield table(("", "mean", "95% interval", "scenes"), rows)
    if "plays" in summary:
        rows = [
            (label, *(cell for row in sides.values() for cell in (number(row["mean"]), interval(row))))
            for label, sides in summary["plays"].items()
        ]
        yield ""
        yield table(("the plays", "played", "95% interval", "original", "95% interval"), rows)
    if summary["repeats"]:
        means = " ".join(map(number, summary["repeats"]["means"]))
        yield f"means of the repeats: {means}, standard deviation {summary['repeats']['deviation']:.2f}"
    if "versus" in summary:
        yield f"\nagainst {summary['versus']['name']}, scene by scene"
        rows = [
            (
                label,
                number(r["difference"], "+.2f"),
                interval(r, "+.2f"),
                number(r["wins"], ".0%"),
                r["scenes"],
            )
            for label, r in summary["versus"]["rows"].items()
        ]
        yield table(("", "difference", "95% interval", "better on", "scenes"), rows)
    if "recomputed" in summary:
        yield summary["recomputed"]


def leaderboard_text(board):
    """Yields the lines and tables of a leaderboard, a blank line between tables."""
    facts = ("run", "actor", "protocol", "seed", "scenes", "invalid")
    for part in board["tables"]:
        labels = dict.fromkeys(label for row in part["rows"] for label in row["rows"])
        labels.pop("ROUGE-L (release)", None)  # a column less
        weight, rows = part["rows"][0]["length_weight"], []
        yield f"judge: {part['judge'] or 'none'}, {part['rubric']}, length weight {weight}"
        for row in part["rows"]:
            means = [number(row["rows"].get(label, {}).get("mean")) for label in labels]
            known = ["-" if row[name] is None else row[name] for name in facts]
            rows.append((*known, *means, interval(row["rows"].get("Average", {}))))
        yield table((*facts, *labels, "95% interval of the Average"), rows)
        if not part["same_scenes"]:
            yield "These runs have different scenes, so the means do not compare; --versus takes common ones."
        for span in part["sweep"]:
            yield f"length weight {span['from']:.2f} to {span['to']:.2f}: {' > '.join(span['ranking'])}"
        yield ""
    published = sorted(board["published"]["gca"], key=lambda row: -row["average"])
    columns = [name for name in published[0] if name not in ("model", "weights")]
    yield f"published ({board['published']['source']})"
    rows = [(f"{row['model']} (published)", *(number(row[name]) for name in columns)) for row in published]
    yield table(("", *(name.replace("_", " ") for name in columns)), rows)
