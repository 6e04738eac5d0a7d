"""Compares a judge with the verdicts recorded in the release."""

import itertools
import random
import re
import statistics
from pathlib import Path

import numpy as np

from common import files, terminal
from common.files import UsageError
from evals.judging import judge_run, open_judge
from evals.metrics import METRICS, bootstrap, paired, spearman
from evals.report import count_verdicts, interval, number, scene_of, table
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
    judge, judged = open_judge(args, out), {}
    for name, run in runs.items():
        terminal.note(f"{name}, {len(run)} scenes")
        judged[name] = judge_run(run, out / f"{name}.jsonl", args, judge)
    recorded = {name: rescore(folder / f"{name}{EVALUATION}", args.length_weight)[0] for name in models}
    facts = {"judge": judge.name, "rubric": load_rubric(args.rubric)["name"], "out": str(out)}
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
    pooled = [pair for of_model in pairs.values() for pair in of_model.values()]
    models = {name: agreement(list(of_model.values())) for name, of_model in pairs.items()}
    keys = {"judge": "score"} | METRICS
    return {
        "models": models | {"pooled": agreement(pooled)},
        "better_of_two": {label: better_of_two(pairs, key) for label, key in keys.items()},
        "length": length_bias(pooled),
        "controls": compare_controls(judged["original"], judged["shuffled"]),
        **count_verdicts([line for lines in judged.values() for line in lines]),
    }


def _scored_pairs(lines, others):
    """{scene: (line, other line)} of the scenes that have a score in both."""
    others = {scene_of(line): line for line in others if line["score"] is not None}
    scored = {scene_of(line): line for line in lines if line["score"] is not None}
    return {scene: (line, others[scene]) for scene, line in scored.items() if scene in others}


def agreement(pairs):
    """{scenes, spearman, mean, recorded}: rank correlation over scenes and the two means."""
    judge, recorded = ([pair[side]["score"] for pair in pairs] for side in (0, 1))
    means = {"mean": bootstrap(judge)[0], "recorded": bootstrap(recorded)[0]}
    return {"scenes": len(pairs), "spearman": spearman(judge, recorded)} | means


def length_bias(pairs):
    """Rank correlation of the number of messages with both scores and with their difference."""
    turns = [line["turns"] for line, _ in pairs]
    judge, recorded = ([pair[side]["score"] for pair in pairs] for side in (0, 1))
    difference = [round(x - y, 9) for x, y in zip(judge, recorded, strict=True)]
    scores = {"judge": judge, "recorded": recorded, "difference": difference}
    return {name: spearman(turns, values) for name, values in scores.items()}


def compare_controls(original, mixed):
    """The paired comparison of the controls with both means, or None where no scene has both scores."""
    pairs = _scored_pairs(original, mixed).values()
    scores = [[pair[side]["score"] for pair in pairs] for side in (0, 1)]
    if not pairs:
        return None
    return paired(*scores) | dict(zip(("original", "shuffled"), map(statistics.mean, scores), strict=True))


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
    mean, low, high = bootstrap(agree, scenes=scenes)
    return {"share": mean, "low": low, "high": high, "pairs": len(agree)}


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
    yield "\nrank correlation with the number of messages"
    rows = [(name, number(value)) for name, value in summary["length"].items()]
    yield table(("score", "Spearman"), rows)
    if controls := summary["controls"]:
        original, mixed, difference = (number(controls[k]) for k in ("original", "shuffled", "difference"))
        spread = interval(controls, "+.2f")
        yield f"\ncontrols: original {original}, shuffled {mixed}, difference {difference} ({spread})"
        passed = controls["low"] is not None and controls["low"] > 0
        what = (
            "controls passed: the judge prefers" if passed else "CONTROLS FAILED: the judge does not prefer"
        )
        yield f"{what} the original to its shuffled messages, on these scenes"
