"""What verdicts add up to: means with intervals, comparisons, the leaderboard, and the page one shows to others.

Everything here takes the lines of verdicts.jsonl and gives plain dicts (`--json` prints them as they are), lines of text, or
one self-contained HTML file. Scores of different judges never stand in one table.
"""

import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from common import terminal
from common.files import UsageError
from evals.metrics import bootstrap, paired, weigh

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
        for r, scores in enumerate(
            itertools.zip_longest(*(v["scores"] for v in line["dimensions"].values()))
        ):
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
    judges = [
        {(line["judge"], line.get("rubric")) for line in lines if line["judge"]} for lines in (ours, theirs)
    ]
    if all(judges) and judges[0] != judges[1]:
        said = [" and ".join(f"{judge} ({rubric})" for judge, rubric in sorted(side)) for side in judges]
        raise UsageError(
            f"--versus: judged by {said[0]} here and {said[1]} there; scores of two judges do not compare"
        )


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
            row = {
                "run": name,
                "actor": short(one_of(settings, "actor") or "not said"),
                "protocol": protocol(settings[0]),
            }
            rows.append(
                row
                | {
                    key: summary[key]
                    for key in ("seed", "length_weight", "scenes", "invalid", "rows", "repeats")
                }
            )
        rows.sort(key=lambda row: -row["rows"].get("Average", {"mean": 0})["mean"])
        same = len({frozenset(map(scene_of, lines)) for lines in members.values()}) == 1
        made.append(
            {"judge": judge, "rubric": rubric, "same_scenes": same, "rows": rows, "sweep": sweep(members)}
        )
    return {
        "tables": made,
        "published": json.loads((Path(__file__).with_name("published_results.json")).read_text()),
    }


def protocol(settings):
    """What a run's settings say of how it was played, in a few words."""
    parts = [
        str(settings.get("protocol", "")),
        f"{settings['max_rounds']} rounds" if "max_rounds" in settings else "",
    ]
    parts += [f"k={settings['continue_from']}" if settings.get("continue_from") else ""]
    return (
        ", ".join([part for part in parts if part] + ["no thoughts"] * (settings.get("thoughts") is False))
        or "not said"
    )


def sweep(runs):
    """[{from, to, ranking}] over WEIGHTS: at which length weights which order of the runs holds."""
    runs = {name: [line for line in lines if line["score"] is not None] for name, lines in runs.items()}
    spans = []
    for weight in WEIGHTS if len(runs) > 1 and all(runs.values()) else ():
        means = {
            name: statistics.mean(weigh(line, weight)["score"] for line in lines)
            for name, lines in runs.items()
        }
        ranking = sorted(means, key=lambda name: -means[name])
        if spans and spans[-1]["ranking"] == ranking:
            spans[-1]["to"] = weight
        else:
            spans.append({"from": weight, "to": weight, "ranking": ranking})
    return spans


def number(value, form=".2f"):
    return "-" if value is None else format(value, form)


def between(row, form=".2f"):
    return "-" if row.get("low") is None else f"{row['low']:{form}} to {row['high']:{form}}"


def table(header, rows):
    """A table on a terminal; where stdout is none, plain lines of the same cells, the first column to the left."""
    cells = [[terminal.plain(str(cell)) for cell in row] for row in (header, *rows)]
    if terminal.stdout.is_terminal:
        drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        for i, name in enumerate(cells[0]):
            style = "dim" if "interval" in name or name in ("scenes", "pairs") else ""
            drawn.add_column(
                Text(name), justify="right" if i else "left", style=style, vertical="bottom", overflow="fold"
            )
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
        rows = [
            (label, number(row["mean"]), between(row), row["scenes"])
            for label, row in summary["rows"].items()
        ]
        yield from table(("", "mean", "95% interval", "scenes"), rows)
        if summary["repeats"]:
            means = " ".join(map(number, summary["repeats"]["means"]))
            yield f"means of the repeats: {means}, standard deviation {summary['repeats']['deviation']:.2f}"
        if "versus" in summary:
            yield f"\nagainst {summary['versus']['name']}, scene by scene"
            rows = [
                (
                    label,
                    number(row["difference"], "+.2f"),
                    between(row, "+.2f"),
                    number(row["wins"], ".0%"),
                    row["scenes"],
                )
                for label, row in summary["versus"]["rows"].items()
            ]
            yield from table(("", "difference", "95% interval", "better on", "scenes"), rows)
        if "recomputed" in summary:
            yield summary["recomputed"]


def leaderboard_text(summary):
    for board in summary["tables"]:
        labels = list(
            dict.fromkeys(label for row in board["rows"] for label in row["rows"] if "(" not in label)
        )
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
    rows = [
        (name, number(r["share"], ".1%"), between(r, ".1%"), r["pairs"])
        for name, r in summary["better_of_two"].items()
    ]
    yield from table(("", "agrees", "95% interval", "pairs"), rows)
    length = summary["length"]
    yield (
        f"\nrank correlation with the number of messages: the judge's score {number(length['judge'])}, the recorded one "
        + (f"{number(length['recorded'])}, their difference {number(length['difference'])}")
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


def short(name):
    """Of a path from the root the last two parts: where a model lies is no one else's concern."""
    return "/".join(Path(name).parts[-2:]) if str(name).startswith("/") else str(name)
