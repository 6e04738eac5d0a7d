"""Compares a judge with recorded verdicts."""

import itertools
import random
import re
import statistics
from pathlib import Path

import numpy as np

from common import terminal
from common.files import UsageError
from evals.judging import judge_run, open_judge
from evals.metrics import bootstrap, paired, spearman
from evals.report import METRICS, invalid, scene_of
from evals.rubric import load_rubric
from evals.verdicts import read_performances, rescore


def calibrate(args):
    """Runs a judge over the release's recorded simulations, and over two controls, and compares with the recorded verdicts.

    Controls: the original conversation as if it had been played, and its messages in another order.
    """
    folder = Path(args.calibrate)
    files = [f for f in sorted(folder.glob("*.simulation.json")) if f.with_name(evaluation_of(f)).is_file()]
    if not files:
        raise UsageError(f"{folder}: no MODEL.simulation.json with its MODEL.evaluation.json here")
    scenes_file = args.scenes or folder.parent / "test" / "id.json"
    runs = {
        file.name.removesuffix(".simulation.json"): read_performances(file, scenes_file) for file in files
    }
    chosen = {scene.key: scene for scene, *_ in next(iter(runs.values()))[: args.limit]}
    runs = {name: [p for p in run if p[0].key in chosen] for name, run in runs.items()}
    controls = {"original": as_played, "shuffled": shuffled}
    runs |= {
        name: [(scene, make(scene), {"actor": name}) for scene in chosen.values()]
        for name, make in controls.items()
    }
    out = (
        Path(args.out)
        if args.out
        else files.OUT / "calibration" / re.sub(r"[^A-Za-z0-9.]+", "-", args.judge).strip("-")
    )
    model = open_judge(args, out)
    judged = {}
    for name, run in runs.items():
        terminal.note(f"{name}, {len(run)} scenes")
        judged[name] = judge_run(run, out / f"{name}.jsonl", args, model)
    recorded = {
        f.name.removesuffix(".simulation.json"): rescore(f.with_name(evaluation_of(f)), args.length_weight)[0]
        for f in files
    }
    terminal.note(f"verdicts are in {out}")
    return compare_judges(judged, recorded) | {
        "judge": model.name,
        "rubric": load_rubric(args.rubric)["name"],
    }


def evaluation_of(file):
    return file.name.replace(".simulation.json", ".evaluation.json")


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
        both[name] = {
            scene: pair for scene, pair in pairs.items() if None not in (pair[0]["score"], pair[1]["score"])
        }
        points += both[name].values()

    def agreement(pairs):
        scores = [[line["score"] for line in side] for side in zip(*pairs, strict=True)] or [[], []]
        ranks = {"scenes": len(pairs), "spearman": spearman(*scores)}
        return ranks | {
            name: bootstrap(side)[0] for name, side in zip(("mean", "recorded"), scores, strict=True)
        }

    length = {"turns": [line["turns"] for line, _ in points], "judge": [line["score"] for line, _ in points]}
    length["recorded"] = [old["score"] for _, old in points]
    length["difference"] = [round(x - y, 9) for x, y in zip(length["judge"], length["recorded"], strict=True)]
    names = ("original", "shuffled")
    original, mixed = ({scene_of(line): line["score"] for line in judged[name]} for name in names)
    controls = [
        (original[scene], mixed[scene]) for scene in original if None not in (original[scene], mixed[scene])
    ]
    told = paired(*zip(*controls, strict=True)) if controls else None
    for i, name in enumerate(names if controls else ()):
        told[name] = statistics.mean(pair[i] for pair in controls)
    return {
        "models": {name: agreement(list(pairs.values())) for name, pairs in both.items()}
        | {"pooled": agreement(points)},
        "better_of_two": {
            label: better_of_two(both, key) for label, key in (("judge", "score"), *METRICS.items())
        },
        "length": {
            name: spearman(length["turns"], length[name]) for name in ("judge", "recorded", "difference")
        },
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
