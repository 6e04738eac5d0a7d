"""Asks the judge about every performance, and writes verdicts.jsonl."""

import time
from dataclasses import dataclass

from common import terminal
from common.files import UsageError, append_line, make_dir, read_lines, write_lines
from engine.params import SamplingParams
from evals.rubric import digest, flaw_schema, judge_messages, load_rubric, parse_flaws, writable
from evals.verdicts import VERDICT_KEYS, rescore, verdict_line
from llm import open_model

TRIES = 3  # for a valid verdict
GROUP = 8  # scenes judged together, at least
ANSWERS = "answers"  # directory beside the verdicts for an endpoint's answers


@dataclass
class Question:
    """One dimension of one performance in one repeat, and what the judge said to it."""

    key: str
    dimension: str
    repeat: int
    prompt: list  # of messages
    tries: int  # answered so far, in earlier runs too; each try has a seed of its own
    flaws: list | None = None  # of a valid verdict
    error: str = ""  # why there is no valid verdict
    failed: bool = False  # the model could not answer: llm has retried all that can be retried
    reasoning: str = ""


def open_judge(args, directory):
    """The model of --judge, or None; an endpoint's answers are kept in `directory`, so that none is paid for twice."""
    if not args.judge:
        return None
    options = {"answers": directory / ANSWERS, "concurrency": args.concurrency}
    options["per_minute"] = args.requests_per_minute
    options |= {name: getattr(args, name) for name in ("chat_format", "dtype") if getattr(args, name)}
    model = open_model(args.judge, **options)
    if model.local and args.repeats > 1 and not args.temperature:
        terminal.note(
            "a local judge repeats itself at temperature 0; for repeats that differ add --temperature 1"
        )
    return model


def judge_all(
    wanted, model, rubric, seed=0, repeats=1, temperature=0.0, group=GROUP, before=None, on_reply=lambda: None
):
    """Yields (key, dimensions) for each performance, judged in every dimension, `repeats` times, a group at a time.

    wanted: {key: (scene, messages, settings)}. before: {key: dimensions} of an earlier run; what was invalid in it is
    asked again with other seeds. dimensions: {name: {flaws, scores, ...}}; `scores` has an entry for each repeat, 0.0
    until it is computed, or None where there is no valid verdict; then there are `error` and the number of `tries`.
    """
    keys = list(wanted)
    for start in range(0, len(keys), group):
        questions = []
        for key in keys[start : start + group]:
            scene, messages, settings = wanted[key]
            for name in rubric["dimensions"]:
                prompt = judge_messages(scene, messages, name, rubric, settings)
                earlier = (before or {}).get(key, {}).get(name)
                questions += [
                    Question(key, name, r, prompt, _earlier_tries(earlier, r)) for r in range(repeats)
                ]
        _ask(questions, model, rubric, seed, temperature, on_reply)
        for key in keys[start : start + group]:
            asked = [q for q in questions if q.key == key]
            yield (
                key,
                {name: _verdict([q for q in asked if q.dimension == name]) for name in rubric["dimensions"]},
            )


def _earlier_tries(verdict, repeat):
    invalid = verdict is not None and verdict["scores"][repeat : repeat + 1] == [None]
    return verdict.get("tries", 0) if invalid else 0


def _ask(questions, model, rubric, seed, temperature, on_reply):
    """Asks until each question has a valid verdict, has failed or was tried TRIES times; retries are sampled at 1.0 or more."""
    schema = flaw_schema(rubric)
    for _ in range(TRIES):
        pending = [q for q in questions if q.flaws is None and not q.failed]
        if not pending:
            return
        params = [
            SamplingParams(
                max(temperature, 1.0) if q.tries else temperature,
                # constrained to the schema, a local verdict is complete within any number of tokens
                max_tokens=1024 if model.local else 2048,
                seed=seed + 1000 * q.repeat + q.tries,
                json_schema=schema,
            )
            for q in pending
        ]
        replies = model.chat([q.prompt for q in pending], params, on_reply=on_reply)
        for question, reply in zip(pending, replies, strict=True):
            if reply.error is not None:  # never answered, so the next run asks with the same seed
                question.error, question.failed = writable(reply.error), True
                continue
            question.tries += 1
            question.reasoning = writable(getattr(reply, "reasoning", None) or "")
            try:
                question.flaws = parse_flaws(reply.text, question.dimension, rubric["severity"])
            except (ValueError, RecursionError) as error:
                question.error = writable(str(error))


def _verdict(questions):
    """The verdict on one dimension of one performance, from the questions of its repeats."""
    flaws = [
        q.flaws and [{**flaw, "repeat": q.repeat} if q.repeat else flaw for flaw in q.flaws]
        for q in questions
    ]
    verdict = {"flaws": [flaw for repeat in flaws for flaw in repeat or []]}
    verdict["scores"] = [None if q.flaws is None else 0.0 for q in questions]
    if errors := [q.error for q in questions if q.flaws is None]:
        verdict |= {"error": errors[0], "tries": max(q.tries for q in questions)}
    if any(q.reasoning for q in questions):
        verdict["reasoning"] = [q.reasoning for q in questions]
    return verdict


def judge_run(performances, out, args, model):
    """Verdict lines of performances, in order, which are also written to `out`; complete ones found there are kept.

    Every line of the file is scored with args.length_weight. Without a model only the metrics are computed.
    """
    rubric = load_rubric(args.rubric)
    wanted = {digest(scene.to_dict(), messages): (scene, messages, s) for scene, messages, s in performances}
    judge_fields = {"judge": model and model.name, "rubric": rubric["name"], "seed": args.seed}
    judge_fields["temperature"] = args.temperature
    recorded = _recorded(out, args.length_weight, judge_fields)
    unfinished = [key for key in wanted if not _is_complete(recorded.get(key), args.repeats if model else 0)]
    lines = {key: line for key, line in recorded.items() if key not in unfinished}
    make_dir(out.parent)
    write_lines(out, lines.values())
    try:
        with Progress(len(wanted), len(wanted) - len(unfinished)) as progress:
            left = {key: wanted[key] for key in unfinished}
            before = {key: line["dimensions"] for key, line in recorded.items()}
            group, judged = max(GROUP, args.concurrency), ((key, {}) for key in left)
            if model:
                sampling = (args.seed, args.repeats, args.temperature)
                judged = judge_all(left, model, rubric, *sampling, group, before, progress.on_reply)
            for key, dimensions in judged:
                adaptations = list(getattr(model, "adaptations", None) or [])
                fields = judge_fields | ({"adaptations": adaptations} if adaptations else {})
                lines[key] = verdict_line(key, wanted[key], fields, args.length_weight, dimensions)
                append_line(out, lines[key])
                progress.on_scene()
    except (KeyboardInterrupt, UsageError) as error:
        reason = f"{error}. " if str(error) else ""
        done = sum(key in lines for key in wanted)
        raise type(error)(
            f"{reason}{done} verdicts are in {out}; the same command goes on from there"
        ) from None
    in_order = [lines[key] for key in wanted]
    write_lines(out, [line for key, line in lines.items() if key not in wanted] + in_order)
    return in_order


def _recorded(out, weight, judge_fields):
    """{performance: line} of a verdicts.jsonl; UsageError where its verdicts are of another judge, rubric or seed."""
    lines = rescore(out, weight)[0] if read_lines(out, VERDICT_KEYS) else []
    for line in lines:
        differing = [name for name, value in judge_fields.items() if line.get(name) != value]
        if judge_fields["judge"] and line["judge"] and differing:
            found = ", ".join(f"{name} {line.get(name)}" for name in differing)
            raise UsageError(
                f"{out}: holds verdicts of {line['judge']}, {found}; name another file with --out"
            )
    return {line["performance"]: line for line in lines}


def _is_complete(line, repeats):
    """Whether a line has a valid verdict for each repeat of each dimension; with 0 repeats, whether there is a line."""
    scores = [verdict["scores"] for verdict in line["dimensions"].values()] if line else []
    return line is not None and (
        not repeats or (scores and all(len(s) >= repeats and None not in s for s in scores))
    )


class Progress:
    """Scenes judged and replies received: a bar on a terminal, elsewhere a line every few seconds."""

    def __init__(self, scenes, done):
        self.scenes, self.done, self.replies, self.shown_at = scenes, done, 0, time.monotonic()
        self.bar = terminal.progress()

    def __enter__(self):
        self.bar.__enter__()
        self.task = self.bar.add_task("judging", total=self.scenes, completed=self.done)
        return self

    def __exit__(self, *error):
        self.bar.__exit__(*error)

    def on_reply(self):
        self.replies += 1
        self._show()

    def on_scene(self):
        self.done += 1
        self._show()

    def _show(self):
        replies = f", {self.replies} replies" if self.replies else ""
        self.bar.update(self.task, completed=self.done, description=f"judging{replies}")
        if not terminal.stderr.is_terminal and time.monotonic() - self.shown_at > terminal.EVERY:
            terminal.note(f"{self.done} of {self.scenes} scenes judged{replies}")
            self.shown_at = time.monotonic()
