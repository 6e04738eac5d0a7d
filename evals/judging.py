"""Asks the judge about every performance and writes the verdicts."""

import itertools
import time
from collections import Counter

from common import terminal
from common.files import UsageError, append_line, make_dir, read_lines, write_lines
from engine.params import SamplingParams
from evals.metrics import weigh
from evals.rubric import _whole, digest, flaw_schema, judge_messages, load_rubric, parse_flaws
from evals.verdicts import VERDICT_KEYS, rescore, verdict_line
from llm import open_model

TRIES = 3  # for a valid verdict


SIDE_BY_SIDE = 8  # scenes


def judge_all(
    wanted, model, rubric, keep, seed=0, repeats=1, temperature=0.0, group=8, before=(), on_reply=lambda: None
):
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
                    max_tokens=1024
                    if model.local
                    else 2048,  # held to the schema, a verdict ends whole within any number
                    seed=seed + 1000 * call[2] + tries[call],
                    json_schema=schema,
                )
                for call in todo
            ]
            for call, reply in zip(
                todo, model.chat(asked, params, on_reply=on_reply) if todo else (), strict=True
            ):
                tries[call] += (
                    reply.error is None
                )  # what never was answered is asked as if for the first time
                try:
                    found[call] = parse_flaws(reply.text, call[1], rubric["severity"])
                except (ValueError, RecursionError) as error:
                    found[call] = _whole(reply.error or str(error))
                    lost |= {call} if reply.error else set()  # llm.py has tried what can be tried
        for key in keys[start : start + group]:
            dimensions = {}
            for name in rubric["dimensions"]:
                replies = [found[key, name, r] for r in range(repeats)]
                flaws = [
                    f | {"repeat": r} if r else f
                    for r, fs in enumerate(replies)
                    if isinstance(fs, list)
                    for f in fs
                ]
                dimensions[name] = {
                    "flaws": flaws,
                    "scores": [0.0 if isinstance(fs, list) else None for fs in replies],
                }
                if errors := [fs for fs in replies if isinstance(fs, str)]:
                    dimensions[name] |= {
                        "error": errors[0],
                        "tries": max(tries[key, name, r] for r in range(repeats)),
                    }
            keep(key, dimensions)


def open_judge(args, directory):
    """The model that --judge names, its answers kept in a directory; None without --judge."""
    options = {
        "answers": directory / "answers",
        "concurrency": args.concurrency,
        "per_minute": args.requests_per_minute,
    }
    model = open_model(args.judge, **options) if args.judge else None
    if model and model.local and args.repeats > 1 and not args.temperature:
        terminal.note(
            "a local judge says the same again at temperature 0; add --temperature 1 for repeats that differ"
        )
    return model


def judge_run(performances, out, args, model):
    """Verdict lines of performances, in order, and in the file `out`; what is there already is not done again."""
    rubric = load_rubric(args.rubric)
    wanted = {
        digest(scene.to_dict(), messages): (scene, messages, settings)
        for scene, messages, settings in performances
    }
    recorded = {
        line["performance"]: line for line in (rescore(out)[0] if read_lines(out, VERDICT_KEYS) else ())
    }
    who = {
        "judge": model and model.name,
        "rubric": rubric["name"],
        "seed": args.seed,
        "temperature": args.temperature,
    }
    for line in recorded.values() if model else ():
        differs = [
            f"{name} {line.get(name)}"
            for name, value in who.items()
            if line["judge"] and line.get(name) != value
        ]
        if differs:
            raise UsageError(
                f"{out}: holds verdicts of {line['judge']}, {', '.join(differs)}; name another file with --out"
            )

    def complete(line):
        scores = [verdict["scores"] for verdict in line["dimensions"].values()]
        return not model or (scores and all(len(s) >= args.repeats and None not in s for s in scores))

    done = {key for key in wanted if key in recorded and complete(recorded[key])}
    before = {key: line["dimensions"] for key, line in recorded.items()}
    make_dir(out.parent)
    write_lines(out, [line for key, line in recorded.items() if key in done or key not in wanted])
    with terminal.progress() as bar:
        task, told, answers = (
            bar.add_task("judging", total=len(wanted), completed=len(done)),
            time.monotonic(),
            [],
        )

        def update():
            nonlocal told
            bar.update(
                task,
                completed=len(done),
                description=f"judging, {len(answers)} answers" if model else "judging",
            )
            if not terminal.stderr.is_terminal and time.monotonic() - told > terminal.EVERY:
                terminal.note(
                    f"{len(done)} of {len(wanted)} scenes judged" + f", {len(answers)} answers" * bool(model)
                )
                told = time.monotonic()

        def heard():
            answers.append(True)
            update()

        def keep(key, dimensions=()):
            recorded[key] = verdict_line(key, wanted[key], who, args.length_weight, dict(dimensions))
            append_line(out, recorded[key])
            done.add(key)
            update()

        try:
            left = {key: performance for key, performance in wanted.items() if key not in done}
            if model:
                group = max(SIDE_BY_SIDE, args.concurrency)
                judge_all(
                    left, model, rubric, keep, args.seed, args.repeats, args.temperature, group, before, heard
                )
            for key in () if model else left:
                keep(key)
        except (KeyboardInterrupt, UsageError) as error:
            why = str(error) + ". " if str(error) else ""
            raise type(error)(
                f"{why}{len(done)} verdicts are in {out}; the same command goes on from there"
            ) from None
    for key in wanted:
        recorded[key] = weigh(recorded[key], args.length_weight)
    write_lines(
        out, [line for key, line in recorded.items() if key not in wanted] + [recorded[key] for key in wanted]
    )
    return [recorded[key] for key in wanted]
