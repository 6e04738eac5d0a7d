"""Says how true a performance was: BLEU and ROUGE-L against the original, and the flaws a judge finds.

    python judge.py out/plays/DIR                                    BLEU and ROUGE-L
    python judge.py out/plays/DIR --judge openai:gpt-4o --html r.html     the four dimensions, judged, and a report to show
    python judge.py out/plays/DIR --versus out/plays/OTHER           who played the same scenes better, and how sure that is
    python judge.py --table out/plays/*                              a leaderboard, and where its ranking turns
    python judge.py gpt-4o.simulation.json --scenes test.json        what the CoSER release acted
    python judge.py --rescore gpt-4o.evaluation.json                 scores from recorded verdicts, recomputed
    python judge.py --calibrate --judge DIR                          can this judge be trusted? against recorded verdicts

Penalty scoring (coser paper, section 4.3): for each dimension the judge lists flaws with a severity of 1 to 5, and the score is
100 - 5 * (sum of severities - 0.3 * turns), not below 0. It is computed here, from the flaws, never by the judge. A reply that
is no valid verdict is asked for again; one that stays invalid is left out of the means, and counted. Answers of an endpoint are
kept in `answers` beside the verdicts, so that none is paid for twice.
"""

import hashlib
import itertools
import json
import math
import re
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

import cli
import report
from cli import UsageError
from data import prompts
from data.chats import NEXT_SPEAKER, remove_thoughts
from data.scenes import ENVIRONMENT, Scene, load_scenes, straighten
from generate import SamplingParams
from llm import open_model
from metrics import LENGTH_WEIGHT, bleu, rouge_l, score_flaws, weigh  # noqa: F401 (score_flaws: judge.score_flaws is a contract)
from simulate import EVERY, TRANSCRIPT_KEYS, TRANSCRIPTS

VERDICTS, VERDICT_KEYS = (
    "verdicts.jsonl",
    ("book", "i_p", "i_c", "judge", "seed", "performance", "turns", "dimensions", "score"),
)
TRIES = 3  # for a valid verdict
SIDE_BY_SIDE = 8  # scenes
FIELDS = ("book", "plot_summary", "scenario", "character_profiles", "major_characters", "original_conversation", "fence")
FIELDS += ("simulated_conversation", "dimension_name", "dimension_brief", "dimension_criteria", "additional_instructions")


# ---- performances -------------------------------------------------------------------------------------------------------


def read_performances(path, scenes_file=None):
    """[(scene, messages, settings)] of a directory of ours, a transcripts.jsonl, or a simulation file of the release.

    messages: `{role, content}`; in the release's files most contents begin with the speaker's name.
    """
    path = Path(path)
    file = path / TRANSCRIPTS if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path}: no {TRANSCRIPTS} here; python simulate.py --scene NAME --out {path} makes one")
    try:
        if file.suffix == ".jsonl":
            lines = cli.read_lines(file, TRANSCRIPT_KEYS)
            found = [(Scene(**line["scene"]), line["messages"], dict(line["settings"])) for line in lines]
        else:
            found = _release_performances(cli.read_json(file, list), file, scenes_file)
        for scene, messages, settings in found:
            scripts(scene, messages)
            for each in fields(Scene):
                _check(each.name, getattr(scene, each.name), each.type)
            _check("actor", settings.get("actor"), (str, type(None)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{file}: not what simulate.py or the release writes ({type(error).__name__}: {error})") from None
    played = [p for p in found if any(m["role"] != NEXT_SPEAKER and m["content"].strip() for m in p[1])]
    if not played:
        raise UsageError(f"{file}: no finished scene in it; python simulate.py ... --resume finishes one")
    if len(played) < len(found):
        cli.note(f"{file}: {len(found) - len(played)} scene(s) where nobody says a word are left out")
    return list({digest(scene.to_dict(), messages): (scene, messages, s) for scene, messages, s in played}.values())


def _release_performances(data, file, scenes_file):
    if not scenes_file:
        raise UsageError(f"{file}: holds no scenes; give the test file they come from with --scenes FILE")
    scenes = {(scene.book, scene.i_p, scene.i_c): scene for scene in load_scenes(scenes_file)}
    found = []
    for case in data:
        key = (straighten(case["book"]), case["i_p"], case["i_c"])
        if key not in scenes:
            raise UsageError(f"{scenes_file}: no scene {key[0]}, plot {key[1]}, conversation {key[2]}, which {file} plays")
        # where the speaker's name stands anywhere in a content, the release takes it to be named
        messages = [{**message, "named": f"{message['role']}:" in message["content"]} for message in case["simulation"]]
        found.append((scenes[key], messages, {"actor": file.name.split(".simulation")[0], "protocol": "release"}))
    return found


def count_turns(messages):
    """Simulated messages that are not the Environment's: what the length term counts."""
    return sum(message["role"] not in (ENVIRONMENT, NEXT_SPEAKER) for message in messages)


def script_line(name, text, named=False, names=True):
    """`Name: text`, thoughts removed but for the Environment, whose text stays as it is. named: the text says who speaks."""
    shown = text if name == ENVIRONMENT else remove_thoughts(text)
    if not names:
        return shown.replace(f"{name}:", "", 1).strip() if named else shown
    return shown if named else f"{name}: {shown}"


def scripts(scene, messages, names=True):
    """(original, simulated) as one text each, a blank line between messages."""
    original = [script_line(turn["character"], turn["message"], names=names) for turn in scene.dialogues]
    spoken = [message for message in messages if message["role"] != NEXT_SPEAKER]
    simulated = [script_line(m["role"], m["content"], m.get("named", False), names) for m in spoken]
    return "\n\n".join(original), "\n\n".join(simulated)


def digest(*values):
    """What tells a performance, or a rubric, from every other."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


# ---- what the judge is asked, and what it says ----------------------------------------------------------------------------


def load_rubric(path=None):
    """Ours, or that of a JSON file: `template` and, if wanted, `system`, with FIELDS in braces; `dimensions`, {name: {brief,
    criteria}}; `severity`, its least and greatest value. Adds `name`, which tells it from every other rubric.
    """
    rubric = cli.read_json(path) if path else prompts.RUBRIC
    texts = [rubric.get("system", ""), rubric.get("template")]
    dimensions, bounds = rubric.get("dimensions"), rubric.get("severity")
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{path}: `template` (and `system`, where given) has to be a text")
    unknown = [field for field in re.findall(r"\{([a-z_]+)\}", "\n".join(texts)) if field not in FIELDS]
    if unknown or "{simulated_conversation}" not in texts[1]:
        what = f"knows no field {{{unknown[0]}}}" if unknown else "lacks {simulated_conversation}"
        raise UsageError(f"{path}: the template {what}; there are {', '.join(FIELDS)}")
    good = isinstance(dimensions, dict) and dimensions and all(isinstance(d, dict) for d in dimensions.values())
    if not good or not all(isinstance(d.get(key), str) for d in dimensions.values() for key in ("brief", "criteria")):
        raise UsageError(f"{path}: `dimensions` has to hold, for each name, a `brief` and `criteria`")
    if not isinstance(bounds, list) or [type(b) for b in bounds] != [int, int] or not 0 <= bounds[0] <= bounds[1]:
        raise UsageError(f"{path}: `severity` has to be the least and the greatest, such as [1, 5]")
    if "{fence}" not in texts[1]:
        cli.note(f"{path}: without {{fence}} round the played scene, what characters say may pose as instructions")
    return {**rubric, "name": f"{Path(path).stem if path else 'coser'}-{digest(rubric)[:8]}"}


def judge_messages(scene, messages, dimension, rubric=prompts.RUBRIC, settings=None):
    """What the judge is asked about one dimension. The fence depends on both texts, so no character can close it."""
    original, simulated = scripts(scene, messages)
    profiles = "\n\n".join(f"{name}: {text}" for name, text in scene.profiles.items() if name in scene.speaking_characters)
    given = (settings or {}).get("continue_from")
    fields = dict(
        book=scene.book,
        plot_summary=scene.plot_summary or "(not given)",
        scenario=scene.scenario or "(not given)",
        character_profiles=profiles or "(not given)",
        major_characters=", ".join(scene.major_characters) or "(none)",
        fence="=====" + digest(original, simulated),
        original_conversation=original,
        simulated_conversation=simulated,
        dimension_name=dimension,
        dimension_brief=rubric["dimensions"][dimension]["brief"],
        dimension_criteria=rubric["dimensions"][dimension]["criteria"],
        additional_instructions=prompts.CONTINUED.format(k=given) if given else "",
    )
    roles = {"system": rubric.get("system"), "user": rubric["template"]}
    return [{"role": role, "content": prompts.fill(text, fields)} for role, text in roles.items() if text]


def flaw_schema(rubric):
    """JSON schema of a verdict, to which a local judge is held."""
    low, high = rubric["severity"]
    text = {"type": "string"}
    flaw = {"instance": text, "type": text, "severity": {"type": "integer", "minimum": low, "maximum": high}}
    item = {"type": "object", "properties": flaw, "required": list(flaw), "additionalProperties": False}
    flaws = {"flaws": {"type": "array", "items": item, "maxItems": 10}}
    return {"type": "object", "properties": flaws, "required": ["flaws"], "additionalProperties": False}


def parse_flaws(text, dimension=None, severity=(1, 5)):
    """The flaws of a judge's reply; ValueError says what is wrong with it. An invalid severity is never just left out.

    What is mended: words and code fences around the JSON, commas before a closing bracket. The flaws may stand under the name
    of the dimension.
    """
    first, last = text.find("{"), text.rfind("}")
    if first < 0 or last < first:
        raise ValueError("no JSON object in the reply")
    mended = re.sub(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', lambda part: part[1] or "", text[first : last + 1], flags=re.DOTALL)
    found = json.loads(mended, object_pairs_hook=_unique)
    if "flaws" not in found and isinstance(found.get(dimension), dict):
        found = found[dimension]
    if not isinstance(found.get("flaws"), list):
        raise ValueError("no list of flaws in the reply")
    for flaw in found["flaws"]:
        if not isinstance(flaw, dict) or not all(isinstance(flaw.get(key), str) for key in ("instance", "type")):
            raise ValueError(f"not a flaw with instance, type and severity: {str(flaw)[:80]}")
        value = flaw.get("severity")
        if type(value) is not int or not severity[0] <= value <= severity[1]:
            raise ValueError(f"severity {str(value)[:20]!r} is not a whole number from {severity[0]} to {severity[1]}")
    return [{key: _whole(flaw[key]) for key in ("instance", "type", "severity")} for flaw in found["flaws"]]


def _unique(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in an object of the reply")
    return dict(pairs)


def _whole(value):
    """Half of a surrogate pair is no character and cannot be written: it becomes a question mark."""
    return value.encode("utf-8", errors="replace").decode() if isinstance(value, str) else value


# ---- judging ------------------------------------------------------------------------------------------------------------


def judge_all(wanted, model, rubric, keep, seed=0, repeats=1, temperature=0.0, group=8, before=(), on_reply=lambda: None):
    """Asks about every dimension of every performance, `repeats` times, a group of scenes at once; then keep(key, dimensions).

    wanted: {key: (scene, messages, settings)}. before: {key: dimensions} of an earlier run: what was invalid then is asked with
    other seeds now. dimensions: {name: {flaws, scores}}, scores one a repeat: 0 to be computed, or None where invalid, with an
    `error` and the number of `tries` so far.
    """
    schema, keys = flaw_schema(rubric), list(wanted)
    for start in range(0, len(keys), group):
        found, tries, lost = {}, Counter(), set()
        for call in itertools.product(keys[start : start + group], rubric["dimensions"], range(repeats)):
            found[call] = "not asked"
            old = before[call[0]].get(call[1], {}) if call[0] in before else {}
            tries[call] = old.get("tries", 0) if old.get("scores", [])[call[2] : call[2] + 1] == [None] else 0
        for _ in range(TRIES):
            todo = [call for call, flaws in found.items() if isinstance(flaws, str) and call not in lost]
            asked = [judge_messages(*wanted[key][:2], name, rubric, wanted[key][2]) for key, name, _ in todo]
            params = [
                SamplingParams(
                    max(temperature, 1.0) if tries[call] else temperature,
                    max_tokens=1024 if model.local else 2048,  # held to the schema, a verdict ends whole within any number
                    seed=seed + 1000 * call[2] + tries[call],
                    json_schema=schema,
                )
                for call in todo
            ]
            for call, reply in zip(todo, model.chat(asked, params, on_reply=on_reply) if todo else (), strict=True):
                tries[call] += reply.error is None  # what never was answered is asked as if for the first time
                try:
                    found[call] = parse_flaws(reply.text, call[1], rubric["severity"])
                except (ValueError, RecursionError) as error:
                    found[call] = _whole(reply.error or str(error))
                    lost |= {call} if reply.error else set()  # llm.py has tried what can be tried
        for key in keys[start : start + group]:
            dimensions = {}
            for name in rubric["dimensions"]:
                replies = [found[key, name, r] for r in range(repeats)]
                flaws = [f | {"repeat": r} if r else f for r, fs in enumerate(replies) if isinstance(fs, list) for f in fs]
                dimensions[name] = {"flaws": flaws, "scores": [0.0 if isinstance(fs, list) else None for fs in replies]}
                if errors := [fs for fs in replies if isinstance(fs, str)]:
                    dimensions[name] |= {"error": errors[0], "tries": max(tries[key, name, r] for r in range(repeats))}
            keep(key, dimensions)


def verdict_line(key, performance, who, weight, dimensions):
    """One line of verdicts.jsonl. Without a judge (dimensions is empty) only the metrics."""
    scene, messages, settings = performance
    texts, unnamed = scripts(scene, messages), scripts(scene, messages, names=False)
    line = {"book": scene.book, "i_p": scene.i_p, "i_c": scene.i_c, **who, "settings": settings}
    line |= {"performance": key, "turns": count_turns(messages), "dimensions": dimensions}
    scores = {"bleu": bleu(*texts), "bleu_without_names": bleu(*unnamed), "rouge_l": rouge_l(*texts)}
    return weigh(line, weight) | scores | {"rouge_l_release": rouge_l(*texts, "release")}


def open_judge(args, directory):
    """The model that --judge names, its answers kept in a directory; None without --judge."""
    options = {"answers": directory / "answers", "concurrency": args.concurrency, "per_minute": args.requests_per_minute}
    model = open_model(args.judge, **options) if args.judge else None
    if model and model.local and args.repeats > 1 and not args.temperature:
        cli.note("a local judge says the same again at temperature 0; add --temperature 1 for repeats that differ")
    return model


def judge_run(performances, out, args, model):
    """Verdict lines of performances, in order, and in the file `out`; what is there already is not done again."""
    rubric = load_rubric(args.rubric)
    wanted = {digest(scene.to_dict(), messages): (scene, messages, settings) for scene, messages, settings in performances}
    recorded = {line["performance"]: line for line in (rescore(out)[0] if cli.read_lines(out, VERDICT_KEYS) else ())}
    who = {"judge": model and model.name, "rubric": rubric["name"], "seed": args.seed, "temperature": args.temperature}
    for line in recorded.values() if model else ():
        differs = [f"{name} {line.get(name)}" for name, value in who.items() if line["judge"] and line.get(name) != value]
        if differs:
            raise UsageError(f"{out}: holds verdicts of {line['judge']}, {', '.join(differs)}; name another file with --out")

    def complete(line):
        scores = [verdict["scores"] for verdict in line["dimensions"].values()]
        return not model or (scores and all(len(s) >= args.repeats and None not in s for s in scores))

    done = {key for key in wanted if key in recorded and complete(recorded[key])}
    before = {key: line["dimensions"] for key, line in recorded.items()}
    cli.make_dir(out.parent)
    cli.write_lines(out, [line for key, line in recorded.items() if key in done or key not in wanted])
    with cli.progress() as bar:
        task, told, answers = bar.add_task("judging", total=len(wanted), completed=len(done)), time.monotonic(), []

        def update():
            nonlocal told
            bar.update(task, completed=len(done), description=f"judging, {len(answers)} answers" if model else "judging")
            if not cli.stderr.is_terminal and time.monotonic() - told > EVERY:
                cli.note(f"{len(done)} of {len(wanted)} scenes judged" + f", {len(answers)} answers" * bool(model))
                told = time.monotonic()

        def heard():
            answers.append(True)
            update()

        def keep(key, dimensions=()):
            recorded[key] = verdict_line(key, wanted[key], who, args.length_weight, dict(dimensions))
            cli.append_line(out, recorded[key])
            done.add(key)
            update()

        try:
            left = {key: performance for key, performance in wanted.items() if key not in done}
            if model:
                group = max(SIDE_BY_SIDE, args.concurrency)
                judge_all(left, model, rubric, keep, args.seed, args.repeats, args.temperature, group, before, heard)
            for key in () if model else left:
                keep(key)
        except (KeyboardInterrupt, UsageError) as error:
            why = str(error) + ". " if str(error) else ""
            raise type(error)(f"{why}{len(done)} verdicts are in {out}; the same command goes on from there") from None
    for key in wanted:
        recorded[key] = weigh(recorded[key], args.length_weight)
    cli.write_lines(out, [line for key, line in recorded.items() if key not in wanted] + [recorded[key] for key in wanted])
    return [recorded[key] for key in wanted]


# ---- recorded verdicts --------------------------------------------------------------------------------------------------


def rescore(path, weight=LENGTH_WEIGHT):
    """Recomputes every score of a recorded evaluation: the release's file, or a verdicts.jsonl of ours.

    Returns verdict lines whose scores are computed anew, and the number of recorded scores that came out the same (to 1e-9)
    of all. Of the release's flaws only those with an integer severity count, as it counted them.
    """
    path = Path(path)
    cli.read_text(path)  # there, and not empty
    try:
        if path.suffix == ".jsonl":
            lines = cli.read_lines(path, VERDICT_KEYS)
        else:
            lines = [_recorded_case(key, case, path) for key, case in cli.read_json(path)["cases"].items()]
        for line in lines:
            _check_types(line)
        before = [verdict.get("score") for line in lines for verdict in line["dimensions"].values()]
        lines = [weigh(line, weight) for line in lines]
        after = [verdict["score"] for line in lines for verdict in line["dimensions"].values()]
        pairs = [(old, new) for old, new in zip(before, after, strict=True) if new is not None]
        same = sum(abs(old - new) <= 1e-9 for old, new in pairs)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UsageError(f"{path}: not a file of recorded verdicts ({type(error).__name__}: {error})") from None
    if not lines:
        raise UsageError(f"{path}: no recorded verdict in it")
    return lines, same, len(pairs)


def _check_types(line):
    """ValueError where a line of verdicts holds what no score can be computed from, such as a severity that is no integer."""
    kinds = dict(book=str, i_p=int, i_c=int, turns=int, dimensions=dict, settings=(dict, type(None)))
    kinds |= dict.fromkeys(("judge", "rubric", "performance"), (str, type(None))) | {"seed": (int, type(None))}
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
    dimensions = {name: dict(verdict) for name, verdict in case["critique"].items() if isinstance(verdict, dict)}
    for verdict in dimensions.values():
        verdict["flaws"] = [flaw for flaw in verdict["flaws"] if type(flaw.get("severity")) is int]
    line = {"book": straighten(book), "i_p": int(i_p), "i_c": int(i_c), "judge": "recorded", "rubric": "release"}
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


# ---- can a judge be trusted? --------------------------------------------------------------------------------------------


def calibrate(args):
    """Runs a judge over the release's recorded simulations, and over two controls, and compares with the recorded verdicts.

    Controls: the original conversation as if it had been played, and its messages in another order.
    """
    folder = Path(args.calibrate)
    files = [f for f in sorted(folder.glob("*.simulation.json")) if f.with_name(evaluation_of(f)).is_file()]
    if not files:
        raise UsageError(f"{folder}: no MODEL.simulation.json with its MODEL.evaluation.json here")
    scenes_file = args.scenes or folder.parent / "test" / "id.json"
    runs = {file.name.removesuffix(".simulation.json"): read_performances(file, scenes_file) for file in files}
    chosen = {scene.key: scene for scene, *_ in next(iter(runs.values()))[: args.limit]}
    runs = {name: [p for p in run if p[0].key in chosen] for name, run in runs.items()}
    controls = {"original": report.as_played, "shuffled": report.shuffled}
    runs |= {name: [(scene, make(scene), {"actor": name}) for scene in chosen.values()] for name, make in controls.items()}
    out = Path(args.out) if args.out else cli.OUT / "calibration" / re.sub(r"[^A-Za-z0-9.]+", "-", args.judge).strip("-")
    model = open_judge(args, out)
    judged = {}
    for name, run in runs.items():
        cli.note(f"{name}, {len(run)} scenes")
        judged[name] = judge_run(run, out / f"{name}.jsonl", args, model)
    recorded = {
        f.name.removesuffix(".simulation.json"): rescore(f.with_name(evaluation_of(f)), args.length_weight)[0] for f in files
    }
    cli.note(f"verdicts are in {out}")
    return report.compare_judges(judged, recorded) | {"judge": model.name, "rubric": load_rubric(args.rubric)["name"]}


def evaluation_of(file):
    return file.name.replace(".simulation.json", ".evaluation.json")


# ---- command line -------------------------------------------------------------------------------------------------------


def parse_args():
    parser = cli.Parser(__doc__, "python simulate.py --scene the-last-ferry/1 --out out/play; python judge.py out/play")
    add = parser.add_argument
    add("performances", nargs="?", metavar="DIR", help="directory of simulate.py, or a simulation file of the release")
    add("--judge", help="checkpoint directory or openai:MODEL; without one there are no new flaw scores")
    add("--html", metavar="FILE", help="a report to open in a browser: scores, and every flaw beside the lines it quotes")
    add("--versus", metavar="DIR", help="compare with this judged directory, scene by scene")
    add("--table", nargs="+", metavar="DIR", help="leaderboard of judged directories, beside the published results")
    add("--rescore", metavar="FILE", help="recompute the scores of recorded verdicts")
    default = cli.ROOT.parent / "shared" / "data" / "coser" / "gca"
    add("--calibrate", nargs="?", const=default, metavar="DIR", help="compare --judge with the verdicts recorded in DIR")
    add("--scenes", help="test file with the originals, for simulation files of the release")
    add("--rubric", metavar="FILE", help="JSON with template, system, dimensions {name: {brief, criteria}}, severity [1, 5]")
    add("--length-weight", type=float, default=LENGTH_WEIGHT, help="severity points forgiven a message (default: 0.3)")
    add("--repeats", type=int, default=1, help="judge so many times, with other seeds (default: 1)")
    add("--temperature", type=float, default=0.0, help="of the judge's first try (default: 0)")
    add("--concurrency", type=int, default=8, help="requests to an endpoint at once (default: 8)")
    add("--requests-per-minute", type=float, metavar="N", help="requests to an endpoint a minute (default: any number)")
    add("--limit", type=int, metavar="N", help="only the first N scenes")
    add("--out", help=f"file for the verdicts (default: {VERDICTS} beside the transcripts); of --calibrate, a directory")
    add("--json", action="store_true", help="the summary as JSON")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if sum(map(bool, (args.performances, args.rescore, args.table, args.calibrate))) != 1:
        raise UsageError("give a directory of performances, or one of --rescore FILE, --table DIR..., --calibrate")
    if (args.html or args.versus) and not args.performances:
        raise UsageError("--html and --versus go with a directory of performances")
    if args.calibrate and not args.judge:
        raise UsageError("--calibrate: which judge? name it with --judge")
    if min(args.repeats, args.concurrency, 1 if args.limit is None else args.limit) < 1 or (args.requests_per_minute or 1) <= 0:
        raise UsageError("--repeats, --concurrency and --limit are at least 1, --requests-per-minute is more than 0")
    if not (0 <= args.temperature < math.inf and 0 <= args.length_weight < math.inf):
        raise UsageError("--temperature and --length-weight are at least 0")
    return args


def main():
    args = parse_args()
    if args.rescore:
        lines, same, of = rescore(args.rescore, args.length_weight)
        summary = report.summarise(lines) | {
            "recomputed": f"{same} of {of} recorded dimension scores recomputed exactly (to 1e-9)"
        }
    elif args.table:
        summary = report.leaderboard({path: read_verdicts(path, args.length_weight) for path in args.table})
    elif args.calibrate:
        summary = calibrate(args)
    else:
        path = Path(args.performances)
        performances = read_performances(path, args.scenes)[: args.limit]
        elsewhere = cli.OUT / "verdicts" / f"{path.stem}.{digest(str(path.resolve()))[:8]}.jsonl"
        out = Path(args.out) if args.out else path / VERDICTS if path.is_dir() else elsewhere
        theirs = read_verdicts(args.versus, args.length_weight) if args.versus else None
        model = open_judge(args, out.parent)
        if model and theirs:  # before anything is asked
            report.same_judge([{"judge": model.name, "rubric": load_rubric(args.rubric)["name"]}], theirs)
        if args.html:
            cli.make_dir(Path(args.html).parent)
        lines = judge_run(performances, out, args, model)
        summary = report.summarise(lines)
        if theirs:
            summary["versus"] = {"name": args.versus, "rows": report.compare(lines, theirs)}
        if args.html:
            with cli.write_whole(args.html) as file:
                file.write(report.html(lines, performances, summary))
            cli.note(f"the report is in {args.html}")
        cli.note(f"verdicts are in {out}")
        if summary["invalid"]:
            cli.note(f"{summary['invalid']} verdict(s) never became valid and are in no mean; judge again to retry them")
        if not any(line["judge"] for line in lines):
            cli.note("flaw scores need a judge: add --judge openai:MODEL or --judge DIR")
    for part in [json.dumps(summary)] if args.json else report.text(summary):
        line = isinstance(part, str)
        cli.stdout.print(cli.plain(part) if line else part, markup=False, soft_wrap=line)


if __name__ == "__main__":
    cli.run(main)
