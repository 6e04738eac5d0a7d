"""Asks the judge about every performance, and writes verdicts.jsonl."""

import contextlib
import time
from collections import Counter
from dataclasses import dataclass

from common import terminal
from common.files import UsageError, append_line, make_dir, read_lines, write_lines
from engine.params import SamplingParams
from evals.rubric import digest, flaw_schema, judge_messages, load_rubric, parse_flaws, writable
from evals.verdicts import VERDICT_KEYS, rescore, verdict_line
from llm import open_model

TRIES = 3  # for a valid verdict
GROUP = 8  # scenes judged together, at least
MAX_TOKENS = 1024, 2048  # of a local judge, whose verdict is complete within any number, and of an endpoint
ANSWERS = "answers"  # directory beside the verdicts for an endpoint's answers


@dataclass
class Question:
    """One dimension of one performance in one repeat, and what the judge answered."""

    key: str  # of the performance
    dimension: str
    repeat: int
    prompt: list  # of messages
    tries: int  # answered so far, in earlier runs too; each try has a seed of its own
    flaws: list | None = None  # of a valid verdict
    error: str = ""  # why there is no valid verdict
    failed: bool = False  # the model could not answer, after all the retries of `llm`
    reasoning: str = ""


def open_judge(args, directory):
    """The model of --judge, or None. An endpoint's answers are kept in `directory`, so none is paid twice."""
    if not args.judge:
        return None
    options = {name: getattr(args, name) for name in ("chat_format", "dtype") if getattr(args, name)}
    options |= {"concurrency": args.concurrency, "per_minute": args.requests_per_minute}
    model = open_model(args.judge, answers=directory / ANSWERS, **options)
    if model.local and args.repeats > 1 and not args.temperature:
        terminal.note("at temperature 0 a local judge's repeats are all the same; add --temperature 1")
    return model


def judge_all(
    wanted, model, rubric, seed=0, repeats=1, temperature=0.0, group=GROUP, before=None, on_reply=lambda: None
):
    """Judges performances, a group at a time, in every dimension, `repeats` times; yields (key, dimensions).

    wanted: {key: (scene, messages, settings)}. before: {key: dimensions} of an earlier run; what was invalid
    in it is asked again with other seeds. dimensions: {name: {flaws, scores, ...}}; `scores` has 0.0, to be
    computed, for each repeat, or None where there is no valid verdict; then there are `error` and the number
    of `tries`.
    """
    keys = list(wanted)
    for start in range(0, len(keys), group):
        questions = []
        for key in keys[start : start + group]:
            scene, messages, settings = wanted[key]
            for name in rubric["dimensions"]:
                prompt = judge_messages(scene, messages, name, rubric, settings)
                earlier = (before or {}).get(key, {}).get(name, {})
                for r in range(repeats):
                    invalid = earlier.get("scores", [])[r : r + 1] == [None]
                    tries = earlier.get("tries", 0) if invalid else 0
                    questions.append(Question(key, name, r, prompt, tries))
        _ask(questions, model, rubric, seed, temperature, on_reply)
        for key in keys[start : start + group]:
            asked = [q for q in questions if q.key == key]
            names = rubric["dimensions"]
            yield key, {name: _verdict([q for q in asked if q.dimension == name]) for name in names}


def _ask(questions, model, rubric, seed, temperature, on_reply):
    """Asks each question until its verdict is valid, at most TRIES times, retries at a temperature >= 1."""
    shared = {"max_tokens": MAX_TOKENS[not model.local], "json_schema": flaw_schema(rubric)}
    for _ in range(TRIES):
        pending = [q for q in questions if q.flaws is None and not q.failed]
        params = []
        for q in pending:
            heat = max(temperature, 1.0) if q.tries else temperature
            params.append(SamplingParams(heat, seed=seed + 1000 * q.repeat + q.tries, **shared))
        replies = model.chat([q.prompt for q in pending], params, on_reply=on_reply) if pending else []
        for q, reply in zip(pending, replies, strict=True):
            if reply.error is not None:  # not answered, so a later run asks with the same seed
                q.error, q.failed = writable(reply.error), True
                continue
            q.tries += 1
            q.reasoning = writable(getattr(reply, "reasoning", None) or "")
            try:
                q.flaws = parse_flaws(reply.text, q.dimension, rubric["severity"])
            except (ValueError, RecursionError) as error:
                q.error = writable(str(error))


def _verdict(questions):
    """The verdict on one dimension of one performance, from the questions of its repeats."""
    flaws = [flaw | ({"repeat": q.repeat} if q.repeat else {}) for q in questions for flaw in q.flaws or []]
    verdict = {"flaws": flaws, "scores": [None if q.flaws is None else 0.0 for q in questions]}
    if errors := [q.error for q in questions if q.flaws is None]:
        verdict |= {"error": errors[0], "tries": max(q.tries for q in questions)}
    if any(q.reasoning for q in questions):
        verdict["reasoning"] = [q.reasoning for q in questions]
    return verdict


def judge_run(performances, out, args, model):
    """Verdict lines of performances, in order; they are written to `out`, and complete ones there are kept.

    Every line of the file is scored with args.length_weight. Without a model only the metrics are computed.
    """
    rubric = load_rubric(args.rubric)
    judge_fields = {"judge": model and model.name, "rubric": rubric["name"], "seed": args.seed}
    judge_fields["temperature"] = args.temperature
    wanted = {digest(scene.to_dict(), messages): (scene, messages, s) for scene, messages, s in performances}
    recorded = _recorded(out, args.length_weight, judge_fields)
    repeats = args.repeats if model else 0
    left = {key: wanted[key] for key in wanted if not _is_complete(recorded.get(key), repeats)}
    lines = {key: line for key, line in recorded.items() if key not in left}
    make_dir(out.parent)
    write_lines(out, lines.values())
    try:
        with _progress(len(wanted), len(wanted) - len(left)) as count:
            for line in _new_lines(left, recorded, model, rubric, judge_fields, args, count):
                lines[line["performance"]] = line
                append_line(out, line)
                count("scenes")
    except (KeyboardInterrupt, UsageError) as error:
        reason, done = f"{error}. " if str(error) else "", sum(key in lines for key in wanted)
        hint = f"{done} verdicts are in {out}; the same command goes on from there"
        raise type(error)(f"{reason}{hint}") from None
    in_order = [lines[key] for key in wanted]
    write_lines(out, [line for key, line in lines.items() if key not in wanted] + in_order)
    return in_order


def _new_lines(left, recorded, model, rubric, judge_fields, args, count):
    """Yields the verdict line of each performance left to judge. recorded: lines of an earlier run."""
    judged = ((key, {}) for key in left)
    if model:
        sampling = (args.seed, args.repeats, args.temperature, max(GROUP, args.concurrency))
        before = {key: line["dimensions"] for key, line in recorded.items()}
        judged = judge_all(left, model, rubric, *sampling, before, lambda: count("answers"))
    for key, dimensions in judged:
        adaptations = list(getattr(model, "adaptations", []))  # of requests to what the endpoint accepts
        judge_fields = judge_fields | ({"adaptations": adaptations} if adaptations else {})
        yield verdict_line(key, left[key], judge_fields, args.length_weight, dimensions)


def _recorded(out, weight, judge_fields):
    """{performance: line} of a verdicts.jsonl; UsageError if of another judge, rubric or sampling."""
    lines = rescore(out, weight)[0] if read_lines(out, VERDICT_KEYS) else []
    for line in lines:
        differing = [
            f"{name} {line.get(name)}" for name in judge_fields if line.get(name) != judge_fields[name]
        ]
        if judge_fields["judge"] and line["judge"] and differing:
            found = f"{line['judge']}, {', '.join(differing)}"
            raise UsageError(f"{out}: holds verdicts of {found}; name another file with --out")
    return {line["performance"]: line for line in lines}


def _is_complete(line, repeats):
    """Whether a line has a valid verdict in each repeat and dimension; with 0 repeats, whether it exists."""
    if line is None or not repeats:
        return line is not None
    scores = [verdict["scores"] for verdict in line["dimensions"].values()]
    return bool(scores) and all(len(s) >= repeats and None not in s for s in scores)


@contextlib.contextmanager
def _progress(scenes, done):
    """Yields count("scenes" or "answers"): a bar on a terminal, elsewhere a line every few seconds."""
    counts, shown_at = Counter(scenes=done), time.monotonic()
    with terminal.progress() as bar:
        task = bar.add_task("judging", total=scenes, completed=done)

        def count(what):
            nonlocal shown_at
            counts[what] += 1
            answers = f", {counts['answers']} answers" if counts["answers"] else ""
            bar.update(task, completed=counts["scenes"], description=f"judging{answers}")
            if not terminal.stderr.is_terminal and time.monotonic() - shown_at > terminal.EVERY:
                terminal.note(f"{counts['scenes']} of {scenes} scenes judged{answers}")
                shown_at = time.monotonic()

        yield count
