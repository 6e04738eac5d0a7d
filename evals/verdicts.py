"""Reads performances and recorded verdicts, ours or the release's, and makes the lines of verdicts.jsonl."""

from pathlib import Path

from common import terminal
from common.files import UsageError, read_json, read_lines, read_text
from data.chats import NEXT_SPEAKER
from data.scenes import ENVIRONMENT, Scene, load_scenes, straighten
from evals.metrics import LENGTH_WEIGHT, METRICS, bleu, rouge_l, with_scores
from evals.rubric import FLAW, digest, scripts
from evals.shapes import check
from play.transcripts import TRANSCRIPT_KEYS, TRANSCRIPTS

VERDICTS = "verdicts.jsonl"
VERDICT_KEYS = ("book", "i_p", "i_c", "judge", "seed", "performance", "turns", "dimensions", "score")

# shapes of JSON, for `check`
CASE = {"book": str, "i_p": int, "i_c": int}
MESSAGES = [{"role": str, "content": str}]
SETTINGS = {"actor?": str | None}
SCENE = CASE | dict.fromkeys(("tag", "scenario", "topic", "plot_summary"), str)
SCENE |= {"dialogues": [{"character": str, "message": str}], "profiles?": dict, "motivations?": dict}
SCENE |= {"speaking_characters?": [str], "major_characters?": [str]}
VERDICT = {"flaws?": [FLAW | {"repeat?": int}], "scores?": [int | float | None], "score?": int | float | None}
VERDICT_LINE = CASE | {"turns": int, "dimensions": dict, "settings?": SETTINGS, "seed?": int | None}
VERDICT_LINE |= dict.fromkeys(("judge?", "rubric?", "performance?"), str | None)
VERDICT_LINE |= {f"{key}?": int | float for key in METRICS.values()}


def read_performances(path, scenes_file=None):
    """[(scene, messages, settings)] of our directory or transcripts.jsonl, or the release's simulation file.

    messages: `{role, content}`, with `named` where a content of the release begins with the speaker's name.
    Duplicates and performances in which nobody says a word are left out.
    """
    path = Path(path)
    file = path / TRANSCRIPTS if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path}: no {TRANSCRIPTS}; make one: python simulate.py --scene NAME --out {path}")
    try:
        if file.suffix == ".jsonl":
            lines = read_lines(file, TRANSCRIPT_KEYS)
            check(lines, [{"scene": SCENE, "messages": MESSAGES, "settings": SETTINGS}], "line")
            performances = [(Scene(**line["scene"]), line["messages"], line["settings"]) for line in lines]
        else:
            performances = _release_performances(file, scenes_file)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file}: neither a transcript nor a simulation of the release: {error}") from None
    spoken = [
        p for p in performances if any(m["role"] != NEXT_SPEAKER and m["content"].strip() for m in p[1])
    ]
    if not spoken:
        raise UsageError(f"{file}: no finished scene in it; python simulate.py ... --resume finishes one")
    if silent := len(performances) - len(spoken):
        terminal.note(f"{file}: left out {silent} scene(s) in which nobody says a word")
    return list(by_digest(spoken).values())


def by_digest(performances):
    """{digest of scene and messages (the `performance` of verdict lines): performance}; one of duplicates."""
    return {digest(scene.to_dict(), messages): (scene, messages, s) for scene, messages, s in performances}


def _release_performances(file, scenes_file):
    if not scenes_file:
        raise UsageError(f"{file}: holds no scenes; give the test file with the originals: --scenes FILE")
    cases = read_json(file, list)
    check(cases, [CASE | {"simulation": MESSAGES}], "case")
    scenes = {(scene.book, scene.i_p, scene.i_c): scene for scene in load_scenes(scenes_file)}
    settings, performances = {"actor": file.name.split(".simulation")[0], "protocol": "release"}, []
    for case in cases:
        key = (straighten(case["book"]), case["i_p"], case["i_c"])
        if key not in scenes:
            where = f"{key[0]}, plot {key[1]}, conversation {key[2]}"
            raise UsageError(f"{scenes_file}: lacks the scene {where}, which is played in {file}")
        # the release takes a speaker as named if "Name:" stands anywhere in the content
        messages = [{**m, "named": f"{m['role']}:" in m["content"]} for m in case["simulation"]]
        performances.append((scenes[key], messages, settings))
    return performances


def count_turns(messages):
    """Simulated messages that are not the Environment's: what the length term counts."""
    return sum(message["role"] not in (ENVIRONMENT, NEXT_SPEAKER) for message in messages)


def verdict_line(key, performance, judge_fields, weight, dimensions):
    """A line of verdicts.jsonl; without a judge `dimensions` is empty, and only the metrics are scored.

    key: identifies the performance. judge_fields: judge, rubric, seed and so on.
    """
    scene, messages, settings = performance
    texts, without_names = scripts(scene, messages), scripts(scene, messages, names=False)
    line = {"book": scene.book, "i_p": scene.i_p, "i_c": scene.i_c, **judge_fields, "settings": settings}
    line |= {"performance": key, "turns": count_turns(messages), "dimensions": dimensions}
    line = with_scores(line, weight) | {"bleu": bleu(*texts), "bleu_without_names": bleu(*without_names)}
    return line | {"rouge_l": rouge_l(*texts), "rouge_l_release": rouge_l(*texts, "release")}


def rescore(path, weight=LENGTH_WEIGHT):
    """Recomputes every score of a verdicts.jsonl of ours or an evaluation file of the release.

    Returns (verdict lines, how many dimension scores are as recorded to 1e-9, how many there are). Of the
    release's flaws only those with an integer severity count, as in the release.
    """
    path = Path(path)
    read_text(path)  # UsageError where it is missing or empty
    try:
        recorded = _recorded_lines(path)
        lines = [with_scores(line, weight) for line in recorded]
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{path}: not a file of recorded verdicts: {error}") from None
    if not lines:
        raise UsageError(f"{path}: no recorded verdict in it")
    same = total = 0
    for old, new in zip(recorded, lines, strict=True):
        for name, verdict in new["dimensions"].items():
            before, after = old["dimensions"][name].get("score"), verdict["score"]
            total += after is not None
            same += None not in (before, after) and abs(before - after) <= 1e-9
    return lines, same, total


def _recorded_lines(path):
    if path.suffix == ".jsonl":
        lines = read_lines(path, VERDICT_KEYS)
    else:
        record = read_json(path)
        check(record, {"cases": dict}, "record")
        lines = [_recorded_case(key, case, path) for key, case in record["cases"].items()]
    for line in lines:
        check(line, VERDICT_LINE, "line")
        line.setdefault("settings", {})
        for name, verdict in line["dimensions"].items():
            check(verdict, VERDICT, name)
            # older lines have no `scores`, or no `flaws` where the verdict was invalid
            verdict.setdefault("scores", [0.0] if "flaws" in verdict else [None])
            verdict.setdefault("flaws", [])
    # the last line of a performance counts: an interrupted run leaves earlier ones
    return list({line.get("performance") or i: line for i, line in enumerate(lines)}.values())


def _recorded_case(key, case, path):
    """A case of the release's evaluation file as a verdict line."""
    check(case, {"critique": dict, "simulation": [{"role": str}]}, key)
    book, i_p, i_c = key.rsplit("-", 2)
    line = {"book": straighten(book), "i_p": int(i_p), "i_c": int(i_c), "judge": "recorded"}
    line |= {"rubric": "release", "turns": count_turns(case["simulation"]), "dimensions": {}}
    for name, verdict in case["critique"].items():
        if isinstance(verdict, dict):
            check(verdict, {"flaws": [dict], "score": int | float}, f"{key}.{name}")
            flaws = [flaw for flaw in verdict["flaws"] if type(flaw.get("severity")) is int]
            line["dimensions"][name] = verdict | {"flaws": flaws}
    return line | {"settings": {"actor": path.name.split(".evaluation")[0], "protocol": "release"}}


def read_verdicts(path, weight=LENGTH_WEIGHT):
    """Verdict lines of a file, or of a judged directory, there only of performances that are still in it."""
    file = Path(path, VERDICTS) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UsageError(f"{path}: not judged yet; python judge.py {path} --judge MODEL does it")
    lines = rescore(file, weight)[0]
    if file.name != VERDICTS or not (file.parent / TRANSCRIPTS).exists():
        return lines
    current = by_digest(read_performances(file.parent))
    return [line for line in lines if line["performance"] in current]
