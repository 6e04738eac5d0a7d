"""Compares a judge with the verdicts recorded in the release."""

import itertools
import random
import re
from pathlib import Path

import numpy as np

from common import files, terminal
from common.files import UsageError
from evals.judging import judge_run, open_judge
from evals.metrics import METRICS, bootstrap, mean, spearman
from evals.report import compare_runs, count_verdicts, interval, number, scene_of, table
from evals.rubric import load_rubric
from evals.verdicts import read_performances, rescore

SIMULATION, EVALUATION = ".simulation.json", ".evaluation.json"


def calibrate(args):
    """Judges the release's recorded simulations and two controls; compares with the recorded verdicts.

    The controls: each original conversation as if it had been simulated, and the same, messages shuffled.
    """
    folder = Path(args.calibrate)
    models = [file.name.removesuffix(SIMULATION) for file in sorted(folder.glob(f"*{SIMULATION}"))]
    models = [model for model in models if (folder / f"{model}{EVALUATION}").is_file()]
    if not models:
        raise UsageError(f"{folder}: no MODEL{SIMULATION} with its MODEL{EVALUATION} here")
    runs = {model: read_performances(folder / f"{model}{SIMULATION}", args.scenes) for model in models}
    chosen = {scene.key: scene for scene, *_ in runs[models[0]][: args.limit]}
    runs = {model: [p for p in run if p[0].key in chosen] for model, run in runs.items()}
    for control, messages_of in (("original", as_played), ("shuffled", shuffled)):
        runs[control] = [(scene, messages_of(scene), {"actor": control}) for scene in chosen.values()]
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", args.judge).strip("-")
    out = Path(args.out) if args.out else files.OUT / "calibration" / slug
    judge, rubric, judged = open_judge(args, out), load_rubric(args.rubric), {}
    for name, run in runs.items():
        terminal.note(f"{name}, {len(run)} scenes")
        judged[name] = judge_run(run, out / f"{name}.jsonl", args, judge, rubric)
    recorded = {name: rescore(folder / f"{name}{EVALUATION}", args.length_weight)[0] for name in models}
    facts = {"judge": judge.name, "rubric": rubric["name"], "out": str(out)}
    return facts | compare_with_recorded(judged, recorded)


def as_played(scene):
    """The original conversation in the form of a performance."""
    return [{"role": turn["character"], "content": turn["message"]} for turn in scene.dialogues]


def shuffled(scene):
    """The original messages in another order, always the same one."""
    messages = as_played(scene)
    mixed = random.Random(scene.key).sample(messages, len(messages))
    return mixed if mixed != messages else messages[::-1]


def compare_with_recorded(judged, recorded):
    """How verdicts agree with recorded ones; both are {model: lines}, and `judged` has the controls too."""
    pairs = {name: _scored_pairs(judged[name], lines) for name, lines in recorded.items()}
    by_model = {name: list(of_model.values()) for name, of_model in pairs.items()}
    pooled = [pair for of_model in by_model.values() for pair in of_model]
    keys = {"judge": "score"} | METRICS
    return {
        "models": {name: agreement(of_model) for name, of_model in (by_model | {"pooled": pooled}).items()},
        "better_of_two": {label: better_of_two(pairs, key) for label, key in keys.items()},
        "controls": compare_runs(judged["original"], judged["shuffled"]).get("Average"),
        **count_verdicts([line for lines in judged.values() for line in lines]),
    }


def _scored_pairs(lines, others):
    """{scene: (line, other line)} of the scenes that have a score in both."""
    lines, others = (
        {scene_of(line): line for line in run if line["score"] is not None} for run in (lines, others)
    )
    return {scene: (line, others[scene]) for scene, line in lines.items() if scene in others}


def agreement(pairs):
    """{scenes, spearman, mean, recorded}: rank correlation over scenes and the two means."""
    judge, recorded = ([pair[side]["score"] for pair in pairs] for side in (0, 1))
    means = {"mean": mean(judge), "recorded": mean(recorded)}
    return {"scenes": len(pairs), "spearman": spearman(judge, recorded)} | means


def better_of_two(pairs, key):
    """How often `key` agrees with the recorded score on the better of two models; a tie is half."""
    agree, scenes = [], []
    for one, two in itertools.combinations(pairs.values(), 2):
        for scene in one.keys() & two.keys():
            (a, recorded_a), (b, recorded_b) = one[scene], two[scene]
            if recorded_a["score"] != recorded_b["score"]:
                order = np.sign(recorded_a["score"] - recorded_b["score"])
                agree.append((np.sign(a[key] - b[key]) * order + 1) / 2)
                scenes.append(str(scene))
    share, low, high = bootstrap(agree, scenes=scenes)
    return {"share": share, "low": low, "high": high, "pairs": len(agree)}


def calibration_text(summary):
    """Yields the lines and tables of a calibration."""
    yield f"judge: {summary['judge']}, {summary['rubric']}, against recorded verdicts"
    rows = [
        (name, *(number(row[key]) for key in ("spearman", "mean", "recorded")), row["scenes"])
        for name, row in summary["models"].items()
    ]
    yield table(("over scenes", "Spearman", "mean", "recorded", "scenes"), rows)
    yield "\nwhich of two models did better on a scene"
    shares = summary["better_of_two"].items()
    rows = [(name, number(r["share"], ".1%"), interval(r, ".1%"), r["pairs"]) for name, r in shares]
    yield table(("", "agrees", "95% interval", "pairs"), rows)
    if controls := summary["controls"]:
        original, mixed, difference = (number(controls[name]) for name in ("ours", "theirs", "difference"))
        spread = interval(controls, "+.2f")
        yield f"\ncontrols: original {original}, shuffled {mixed}, difference {difference} ({spread})"
        passed = controls["low"] is not None and controls["low"] > 0
        result, does = ("passed", "prefers") if passed else ("FAILED", "does not prefer")
        yield f"controls {result}: the judge {does} the original to its shuffled messages, on these scenes"
