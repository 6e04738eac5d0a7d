"""Asks the judge about every performance, and writes verdicts.jsonl."""

from dataclasses import dataclass

from common import terminal
from common.files import UsageError, append_line, make_dir, read_lines, write_lines
from engine.params import SamplingParams
from evals.rubric import flaw_schema, judge_messages, parse_flaws, writable
from evals.verdicts import VERDICT_KEYS, by_digest, rescore, verdict_line
from llm import open_model

TRIES = 3  # for a valid verdict
GROUP = 8  # scenes judged together, at least
MAX_TOKENS = 1024, 2048  # of a local judge, whose verdict is complete within any number, and of an endpoint
ANSWERS = "answers"  # directory beside the verdicts for an endpoint's answers


@dataclass
class Question:
    """One dimension of a performance in one repeat, and what the judge answered."""

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


def judge_run(performances, out, args, model, rubric):
    """Verdict lines of performances, in order; they are written to `out`, and complete ones there are kept.

    Lines that are judged again stay in the file until their new ones follow. Every line is scored with
    args.length_weight. Without a model only the metrics are computed.
    """
    fields = {"judge": model and model.name, "rubric": rubric["name"], "seed": args.seed}
    fields["temperature"] = args.temperature
    wanted, recorded = by_digest(performances), _recorded(out, args.length_weight, fields)
    repeats = args.repeats if model else 0
    left = {key: wanted[key] for key in wanted if not _is_complete(recorded.get(key), repeats)}
    lines, answers, complete = dict(recorded), 0, len(wanted) - len(left)
    make_dir(out.parent)
    write_lines(out, lines.values())
    try:
        with terminal.reporting(len(wanted), "scenes") as update:

            def on_reply():
                nonlocal answers
                answers += 1
                update(complete, f"judging, {answers:,} answers")

            judged = ((key, {}) for key in left)
            if model:
                sampling = args.seed, args.repeats, args.temperature, max(GROUP, args.concurrency)
                before = {key: line["dimensions"] for key, line in recorded.items()}
                judged = judge_all(left, model, rubric, *sampling, before, on_reply)
            for key, dimensions in judged:
                if model and model.adaptations:  # to what the endpoint accepts
                    fields["adaptations"] = list(model.adaptations)
                lines[key] = verdict_line(key, left[key], fields, args.length_weight, dimensions)
                append_line(out, lines[key])
                complete += 1
                update(complete, f"judging, {answers:,} answers" if model else "computing metrics")
    except (KeyboardInterrupt, UsageError) as error:
        reason = f"{error}. " if str(error) else ""
        hint = f"{complete} verdicts are in {out}; the same command goes on from there"
        raise type(error)(f"{reason}{hint}") from None
    in_order = [lines[key] for key in wanted]
    write_lines(out, [line for key, line in lines.items() if key not in wanted] + in_order)
    return in_order


def _recorded(out, weight, fields):
    """{performance: line} of a verdicts.jsonl; UsageError if of another judge, rubric or sampling."""
    lines = rescore(out, weight)[0] if read_lines(out, VERDICT_KEYS) else []
    for line in lines:
        differing = [f"{name} {line.get(name)}" for name in fields if line.get(name) != fields[name]]
        if fields["judge"] and line["judge"] and differing:
            raise UsageError(f"{out}: holds verdicts of {', '.join(differing)}; name another file with --out")
    return {line["performance"]: line for line in lines}


def _is_complete(line, repeats):
    """Whether a line has a valid verdict in each repeat and dimension; with 0 repeats, whether it exists."""
    if line is None or not repeats:
        return line is not None
    scores = [verdict["scores"] for verdict in line["dimensions"].values()]
    return bool(scores) and all(len(s) >= repeats and None not in s[:repeats] for s in scores)


def judge_all(
    wanted, model, rubric, seed=0, repeats=1, temperature=0.0, group=GROUP, before=None, on_reply=lambda: None
):
    """Judges performances, `group` at a time; yields (key, {dimension: {flaws, scores, ...}}).

    wanted: {key: (scene, messages, settings)}. before: {key: dimensions} of an earlier run; what was invalid
    in it is asked again with other seeds. `scores` has for each repeat 0.0, to be computed, or None where
    there is no valid verdict; then there are `error` and the number of `tries`.
    """
    before, keys = before or {}, list(wanted)
    for start in range(0, len(keys), group):
        asked = {
            key: _questions(*wanted[key], rubric, repeats, before.get(key, {}))
            for key in keys[start : start + group]
        }
        every = [question for questions in asked.values() for question in questions]
        _ask(every, model, rubric, seed, temperature, on_reply)
        for key, questions in asked.items():
            names = rubric["dimensions"]
            yield key, {name: _verdict([q for q in questions if q.dimension == name]) for name in names}


def _questions(scene, messages, settings, rubric, repeats, before):
    """A Question for each dimension and repeat. before: {dimension: verdict} of an earlier run."""
    questions = []
    for name in rubric["dimensions"]:
        prompt, earlier = judge_messages(scene, messages, name, rubric, settings), before.get(name, {})
        tries = [earlier.get("tries", 0) * (score is None) for score in earlier.get("scores", [])]
        tries += [0] * repeats
        questions += [Question(name, r, prompt, tries[r]) for r in range(repeats)]
    return questions


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
            q.reasoning = writable(reply.reasoning)
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
