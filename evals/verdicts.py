"""Performances and recorded verdicts, read from files."""

from dataclasses import fields
from pathlib import Path

from common import terminal
from common.files import UsageError, read_json, read_lines, read_text
from data.chats import NEXT_SPEAKER
from data.scenes import ENVIRONMENT, Scene, load_scenes, straighten
from evals import report
from evals.metrics import LENGTH_WEIGHT, bleu, rouge_l, weigh
from evals.rubric import digest, scripts
from play.transcripts import TRANSCRIPT_KEYS, TRANSCRIPTS

VERDICTS, VERDICT_KEYS = (
    "verdicts.jsonl",
    ("book", "i_p", "i_c", "judge", "seed", "performance", "turns", "dimensions", "score"),
)


def read_performances(path, scenes_file=None):
    """[(scene, messages, settings)] of a directory of ours, a transcripts.jsonl, or a simulation file of the release.

    messages: `{role, content}`; in the release's files most contents begin with the speaker's name.
    """
    path = Path(path)
    file = path / TRANSCRIPTS if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"{path}: no {TRANSCRIPTS} here; python simulate.py --scene NAME --out {path} makes one"
        )
    try:
        if file.suffix == ".jsonl":
            lines = read_lines(file, TRANSCRIPT_KEYS)
            found = [(Scene(**line["scene"]), line["messages"], dict(line["settings"])) for line in lines]
        else:
            found = _release_performances(read_json(file, list), file, scenes_file)
        for scene, messages, settings in found:
            scripts(scene, messages)
            for each in fields(Scene):
                _check(each.name, getattr(scene, each.name), each.type)
            _check("actor", settings.get("actor"), (str, type(None)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{file}: not what simulate.py or the release writes ({type(error).__name__}: {error})"
        ) from None
    played = [p for p in found if any(m["role"] != NEXT_SPEAKER and m["content"].strip() for m in p[1])]
    if not played:
        raise UsageError(f"{file}: no finished scene in it; python simulate.py ... --resume finishes one")
    if len(played) < len(found):
        terminal.note(f"{file}: {len(found) - len(played)} scene(s) where nobody says a word are left out")
    return list(
        {digest(scene.to_dict(), messages): (scene, messages, s) for scene, messages, s in played}.values()
    )


def _release_performances(data, file, scenes_file):
    if not scenes_file:
        raise UsageError(f"{file}: holds no scenes; give the test file they come from with --scenes FILE")
    scenes = {(scene.book, scene.i_p, scene.i_c): scene for scene in load_scenes(scenes_file)}
    found = []
    for case in data:
        key = (straighten(case["book"]), case["i_p"], case["i_c"])
        if key not in scenes:
            raise UsageError(
                f"{scenes_file}: no scene {key[0]}, plot {key[1]}, conversation {key[2]}, which {file} plays"
            )
        # where the speaker's name stands anywhere in a content, the release takes it to be named
        messages = [
            {**message, "named": f"{message['role']}:" in message["content"]}
            for message in case["simulation"]
        ]
        found.append(
            (scenes[key], messages, {"actor": file.name.split(".simulation")[0], "protocol": "release"})
        )
    return found


def count_turns(messages):
    """Simulated messages that are not the Environment's: what the length term counts."""
    return sum(message["role"] not in (ENVIRONMENT, NEXT_SPEAKER) for message in messages)


def verdict_line(key, performance, who, weight, dimensions):
    """One line of verdicts.jsonl. Without a judge (dimensions is empty) only the metrics."""
    scene, messages, settings = performance
    texts, unnamed = scripts(scene, messages), scripts(scene, messages, names=False)
    line = {"book": scene.book, "i_p": scene.i_p, "i_c": scene.i_c, **who, "settings": settings}
    line |= {"performance": key, "turns": count_turns(messages), "dimensions": dimensions}
    scores = {"bleu": bleu(*texts), "bleu_without_names": bleu(*unnamed), "rouge_l": rouge_l(*texts)}
    return weigh(line, weight) | scores | {"rouge_l_release": rouge_l(*texts, "release")}


def rescore(path, weight=LENGTH_WEIGHT):
    """Recomputes every score of a recorded evaluation: the release's file, or a verdicts.jsonl of ours.

    Returns verdict lines whose scores are computed anew, and the number of recorded scores that came out the same (to 1e-9)
    of all. Of the release's flaws only those with an integer severity count, as it counted them.
    """
    path = Path(path)
    read_text(path)  # there, and not empty
    try:
        if path.suffix == ".jsonl":
            lines = read_lines(path, VERDICT_KEYS)
        else:
            lines = [_recorded_case(key, case, path) for key, case in read_json(path)["cases"].items()]
        for line in lines:
            _check_types(line)
        before = [verdict.get("score") for line in lines for verdict in line["dimensions"].values()]
        lines = [weigh(line, weight) for line in lines]
        after = [verdict["score"] for line in lines for verdict in line["dimensions"].values()]
        pairs = [(old, new) for old, new in zip(before, after, strict=True) if new is not None]
        same = sum(abs(old - new) <= 1e-9 for old, new in pairs)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(
            f"{path}: not a file of recorded verdicts ({type(error).__name__}: {error})"
        ) from None
    if not lines:
        raise UsageError(f"{path}: no recorded verdict in it")
    return lines, same, len(pairs)


def _check_types(line):
    """ValueError where a line of verdicts holds what no score can be computed from, such as a severity that is no integer."""
    kinds = dict(book=str, i_p=int, i_c=int, turns=int, dimensions=dict, settings=(dict, type(None)))
    kinds |= dict.fromkeys(("judge", "rubric", "performance"), (str, type(None))) | {
        "seed": (int, type(None))
    }
    for name, kind in kinds.items():
        _check(name, line.get(name), kind)
    _check("actor", (line.get("settings") or {}).get("actor"), (str, type(None)))
    for name in report.METRICS.values():
        _check(name, line.get(name, 0.0), (int, float))
    for flaw in (flaw for verdict in line["dimensions"].values() for flaw in verdict.get("flaws", ())):
        for name, kind in dict(severity=int, instance=str, type=str).items():
            _check(name, flaw[name], kind)


def _check(name, value, kind):
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is of a wrong type")


def _recorded_case(key, case, path):
    book, i_p, i_c = key.rsplit("-", 2)
    dimensions = {
        name: dict(verdict) for name, verdict in case["critique"].items() if isinstance(verdict, dict)
    }
    for verdict in dimensions.values():
        verdict["flaws"] = [flaw for flaw in verdict["flaws"] if type(flaw.get("severity")) is int]
    line = {
        "book": straighten(book),
        "i_p": int(i_p),
        "i_c": int(i_c),
        "judge": "recorded",
        "rubric": "release",
    }
    settings = {"actor": path.name.split(".evaluation")[0], "protocol": "release"}
    return line | {"settings": settings, "turns": count_turns(case["simulation"]), "dimensions": dimensions}


def read_verdicts(path, weight):
    """Recorded verdict lines of a directory that was judged, of what is there now; or of a file of verdicts."""
    file = Path(path) / VERDICTS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UsageError(f"{path}: not judged yet; python judge.py {path} --judge MODEL does it")
    lines = rescore(file, weight)[0]
    if not (file.parent / TRANSCRIPTS).exists() or file.name != VERDICTS:
        return lines
    there = {digest(scene.to_dict(), messages) for scene, messages, _ in read_performances(file.parent)}
    return [line for line in lines if line["performance"] in there]
