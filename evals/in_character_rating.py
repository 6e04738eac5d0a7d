"""The rating of InCharacter's interviews: anonymous answers, calls to the judge, values of 1 to 5."""

import json
import re
from dataclasses import dataclass, field

from data.prompts import fill
from engine.params import SamplingParams
from evals import benchmark_prompts as prompts
from evals.benchmark_report import note_errors
from evals.judging import TRIES
from evals.rubric import digest, writable
from evals.runner import ask_all, make_ask

METHODS = ("groups", "options")
LONGEST = 500  # of an answer that the judge reads: words, or in Chinese characters
MAX_TOKENS = 512, 2048  # of a local judge, whose JSON is complete within any number, and of an endpoint
NUMBERS = [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]
OPTIONS = ["1", "2", "3", "4", "5", "x"]


@dataclass(eq=False)
class Rating:
    """A call to the judge. values: one for the group, or one for each item, 1 to 5; None is no rating."""

    subject: object
    dimension: str
    items: list
    messages: list | None  # None where the interview has no answer to any of the items
    values: list | None = None
    said: str = field(default="")  # by the judge, or why it said nothing
    failed: bool = False


def groups_of(items):
    """Items in chunks of four, of which the last takes one from each of the others until it has three;
    fewer than six items are one group."""
    if len(items) < 6:
        return [items]
    groups = [items[i : i + 4] for i in range(0, len(items), 4)]
    for donor in range(max(0, 3 - len(groups[-1]))):
        groups[-1].append(groups[donor % (len(groups) - 1)].pop())
    return groups


def names_pattern(names):
    """Matches any of the names, the longest first; a name in Latin letters only as whole words."""
    ordered = sorted(filter(None, names), key=len, reverse=True)
    return "|".join(
        rf"(?<!\w){re.escape(name)}(?!\w)" if name.isascii() else re.escape(name) for name in ordered
    )


def anonymous(text, subject):
    """The text with the names of the character and of the interviewer replaced."""
    own, other = names_pattern(subject.aliases), names_pattern([subject.experimenter])
    return re.sub(
        rf"({own})|{other}", lambda name: prompts.PARTICIPANT if name[1] else prompts.EXPERIMENTER, text
    )


def clean(answer, subject):
    """What the judge reads of an answer: without the speaker's name before it, without further turns of the
    interviewer that the model made up, and cut to LONGEST."""
    answer = re.sub(rf"\A\s*(?:{names_pattern(subject.aliases)})\s*[:：]\s*", "", answer)
    answer = re.split(rf"(?m)^\s*{re.escape(subject.experimenter)}\s*[:：]", answer)[0].strip()
    if subject.language == "zh":
        return answer[:LONGEST]
    words = list(re.finditer(r"\S+", answer))
    return answer[: words[LONGEST - 1].end()] if len(words) > LONGEST else answer


def make_rating(subject, dimension, items, answers, method):
    """answers: {item number: answer} of the subject."""
    parts, answered = [], [item for item in items if answers.get(item.number) is not None]
    for item in answered:
        answer = anonymous(clean(answers[item.number], subject), subject) or prompts.NO_ANSWER
        question = item.questions[subject.language]
        lines = [f"{prompts.EXPERIMENTER}: {question}", f"{prompts.PARTICIPANT}: {answer}"]
        parts.append("\n".join([f"{item.number}. {item.statement}"] * (method == "options") + lines))
    fields = {"dimension": dimension, "description": prompts.DIMENSIONS[dimension]}
    fields |= {"participant": prompts.PARTICIPANT, "experimenter": prompts.EXPERIMENTER}
    fields |= {
        "interview": "\n\n".join(parts),
        "example": json.dumps({item.number: "4" for item in answered[:2]}),
    }
    text = fill(prompts.RATE if method == "groups" else prompts.CONVERT, fields)
    messages = [{"role": "user", "content": text}] if answered else None
    return Rating(subject, dimension, answered or items, messages)


def schema_of(rating, method):
    """The JSON schema that a judge is held to."""
    if method == "groups":
        properties = {"analysis": {"type": "string"}, "result": {"type": "number", "enum": NUMBERS}}
    else:
        properties = {item.number: {"type": "string", "enum": OPTIONS} for item in rating.items}
    shape = {"type": "object", "properties": properties, "required": list(properties)}
    return shape | {"additionalProperties": False}


def parse(text, rating, method):
    """The values in a judge's reply. ValueError where it is not the JSON that was asked for."""
    keys, decoder = (
        {"result"} if method == "groups" else {item.number for item in rating.items},
        json.JSONDecoder(),
    )
    for opening in re.finditer(r"\{", text):
        try:
            found, _ = decoder.raw_decode(text, opening.start())
        except ValueError:
            continue
        if keys <= found.keys():
            break
    else:
        raise ValueError("no JSON object with " + ", ".join(sorted(keys)))
    if method == "groups":
        return [number_of(found["result"])]
    values = []
    for item in rating.items:
        value = None if found[item.number] == "x" else number_of(found[item.number])
        values.append(6 - value if item.negative and value is not None else value)
    return values


def number_of(value):
    """A number from 1 to 5, which may be a string."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is no number")
    if not 1 <= (number := float(value)) <= 5:
        raise ValueError(f"{number:g} is not from 1 to 5")
    return number


def rate(subjects, items, answers, judge, journal, args):
    """The Ratings of subjects in every dimension. answers: {subject key: {item number: answer}}."""
    ratings, method = [], args.rating
    for subject in subjects:
        for dimension in prompts.DIMENSIONS:
            own = [item for item in items if item.dimension == dimension]
            for group in groups_of(own) if method == "groups" else [own]:
                ratings.append(make_rating(subject, dimension, group, answers.get(subject.key, {}), method))
    for attempt in range(TRIES):
        pending = [r for r in ratings if r.messages and r.values is None and not r.failed]
        asks = []
        for r in pending:
            limits = {"max_tokens": MAX_TOKENS[not judge.local], "json_schema": schema_of(r, method)}
            params = SamplingParams(1.0 if attempt else 0.0, seed=args.seed + attempt, **limits)
            occasion = f"{method} {digest(judge.identity, r.messages)} {attempt}"
            asks.append(make_ask(f"{r.subject.key}|{r.dimension}", occasion, "judge", r.messages, params))
        replies = ask_all(asks, judge, journal, "rating")
        if not attempt:
            note_errors(replies, "ratings")
        for r, reply in zip(pending, replies, strict=True):
            r.said, r.failed = writable(reply.error or reply.text), reply.error is not None
            try:
                r.values = None if r.failed else parse(reply.text, r, method)
            except (ValueError, RecursionError) as error:
                r.said += f"\n[no rating: {error}]"
    for r in ratings:
        r.values = r.values or [None] * (1 if method == "groups" else len(r.items))
    return ratings
