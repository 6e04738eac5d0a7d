"""InCharacter (Wang et al. 2024) on the Big Five Inventory: has a character the personality it is known for?

Data: a directory with `BFI.json` (44 items), `characters.json` (names and interviewers) and
`characters_labels.json`. The profiles are our own (in_character_profiles.json), since those of the published
results are not public. Interview: each open question in a chat of its own. Rating: a judge reads the
anonymous answers in groups of three or four, 13 calls a character, or turns each answer into an option. A
dimension is high (H) above 3, else low (L).
"""

import json
import re
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from common import terminal
from common.files import UsageError, read_json, read_lines, write_lines
from data.prompts import fill
from engine.params import SamplingParams
from evals import benchmark_prompts as prompts
from evals.benchmarks import Ask, ask_all, note_errors, note_left_out, percent, published
from evals.judging import TRIES
from evals.report import short
from evals.rubric import digest, writable
from evals.shapes import check

INTERVIEW = "interview.jsonl"
INTERVIEW_KEYS = ("character", "item", "question", "answer")
PROFILES = Path(__file__).with_name("in_character_profiles.json")
METHODS = ("groups", "options")
LONGEST = 500  # of an answer that the judge reads: words, or in Chinese characters
MAX_TOKENS = 512, 2048  # of a local judge, whose JSON is complete within any number, and of an endpoint
NUMBERS = [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]
OPTIONS = ["1", "2", "3", "4", "5", "x"]


# ---- the data ----------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A character; labels: {dimension: "H", "L" or "X", which is not counted}."""

    key: str
    aliases: list  # the first is shown
    experimenter: str
    language: str
    profile: str
    labels: dict


@dataclass
class Item:
    number: str
    statement: str
    questions: dict  # by language
    dimension: str
    negative: bool


def files(args):
    names = ("BFI.json", "characters.json", "characters_labels.json")
    own = [Path(args.interview)] if args.interview else []
    return [*(Path(args.data) / name for name in names), PROFILES, *own]


def load_items(args):
    """The Items of the inventory."""
    file = files(args)[0]
    texts = ("origin_en", "rewritten_en", "rewritten_zh", "dimension", "category")
    questions = read_json(file).get("questions")
    try:
        check(questions, dict, "questions")
        check([*questions.values()], [dict.fromkeys(texts, str)], "question")
    except ValueError as error:
        raise UsageError(f"{file}: not the items of the BFI: {error}") from None
    items = []
    for number, q in questions.items():
        if q["dimension"] not in prompts.DIMENSIONS:
            raise UsageError(f"{file}: question {number} is of {q['dimension']!r}, which is no dimension")
        texts = {"en": q["rewritten_en"], "zh": q["rewritten_zh"]}
        items.append(Item(number, q["origin_en"], texts, q["dimension"], q["category"] == "negative"))
    return items


def load(args):
    """(Subjects, [(name, reason)] of characters left out)."""
    _, characters, labels, profiles = (read_json(file) for file in files(args)[:4])
    if not isinstance(labels.get(args.labels), dict):
        raise UsageError(f"{files(args)[2]}: no labels {args.labels!r} in it")
    subjects, left_out = [], []
    for key, character in characters.items():
        try:
            subjects.append(read_subject(key, character, labels[args.labels], profiles))
        except ValueError as error:
            left_out.append((key, str(error)))
    note_left_out(left_out, len(characters), "characters")
    return subjects, left_out


def read_subject(key, character, labels, profiles):
    """A Subject. ValueError says why the character cannot be asked."""
    check(character, {"alias": [str], "experimenter": str}, "character")
    if not any(character["alias"]):
        raise ValueError("a character without a name")
    if key not in labels or key not in profiles:
        raise ValueError(f"an unknown character, without {'labels' if key not in labels else 'a profile'}")
    check(profiles, {key: str}, "profiles")
    if not profiles[key].strip():
        raise ValueError("an empty profile")
    check(labels[key], {"BFI": {name: {"type": str} for name in prompts.DIMENSIONS}}, "labels")
    types = {name: labels[key]["BFI"][name]["type"] for name in prompts.DIMENSIONS}
    if unknown := [label for label in types.values() if label not in ("H", "L", "X")]:
        raise ValueError(f"a label {unknown[0]!r}, not H, L or X")
    language = "zh" if key.endswith("-zh") else "en"
    names = [name for name in character["alias"] if name]
    return Subject(key, names, character["experimenter"], language, profiles[key].strip(), types)


def read_interview(file, subjects):
    """The lines of an interview.jsonl about these subjects; others are counted and left out."""
    lines = read_lines(file, INTERVIEW_KEYS)
    known, good = {subject.key for subject in subjects}, []
    for line in lines:
        right_types = isinstance(line["item"], str) and isinstance(line["answer"], str | None)
        if line["character"] in known and right_types:
            good.append(line)
    if wrong := len(lines) - len(good):
        terminal.note(f"{file}: {wrong} of {len(lines)} lines left out, about other characters")
    if not good:
        raise UsageError(f"{file}: no answer of a character of this benchmark in it")
    return [line | {"answer": line["answer"] and writable(line["answer"])} for line in good]


# ---- the interview -----------------------------------------------------------------------------------------


def interview(subjects, items, model, journal, args):
    """[{character, item, question, answer}]: each question in its own chat; answer None where it failed."""
    params, asks, lines = SamplingParams(0.0, max_tokens=args.max_tokens, seed=args.seed), [], []
    for subject in subjects:
        fields = {"character": subject.aliases[0], "profile": subject.profile}
        fields |= {"experimenter": subject.experimenter}
        system = fill(prompts.INTERVIEW[subject.language], fields)
        for item in items:
            question = item.questions[subject.language]
            messages = [{"role": "system", "content": system}]
            messages.append({"role": "user", "content": f"{subject.experimenter}: {question}"})
            asks.append(Ask(f"{subject.key}|{item.number}", "interview", "actor", messages, params))
            lines.append({"character": subject.key, "item": item.number, "question": question})
    replies = ask_all(asks, model, journal, "interview")
    note_errors(replies, "answers")
    return [
        line | {"answer": reply.text if reply.error is None else None}
        for line, reply in zip(lines, replies, strict=True)
    ]


# ---- the rating: anonymous answers, calls to the judge, values of 1 to 5 -----------------------------------


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
    stands_for = {True: prompts.PARTICIPANT, False: prompts.EXPERIMENTER}
    return re.sub(rf"({own})|{other}", lambda name: stands_for[bool(name[1])], text)


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
    example = json.dumps({item.number: "4" for item in answered[:2]})
    fields = {"dimension": dimension, "description": prompts.DIMENSIONS[dimension], "example": example}
    fields |= {"participant": prompts.PARTICIPANT, "experimenter": prompts.EXPERIMENTER}
    fields |= {"interview": "\n\n".join(parts)}
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
    keys = {"result"} if method == "groups" else {item.number for item in rating.items}
    decoder = json.JSONDecoder()
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
            asks.append(Ask(f"{r.subject.key}|{r.dimension}", occasion, "judge", r.messages, params))
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


# ---- the scores: whether a dimension is high or low as labelled --------------------------------------------


@dataclass
class Cell:
    """A dimension of a character. label: H, L or X, which is not counted; predicted: H, L or None."""

    character: str
    dimension: str
    label: str
    predicted: str | None
    score: float | None = None


def cells_of(subjects, ratings, as_published):
    """The Cells of all characters: the mean over the ratings of a dimension, H above 3. A missing rating is
    left out; as published, it counts as 3."""
    values = {(s.key, name): [] for s in subjects for name in prompts.DIMENSIONS}
    for rating in ratings:
        values[rating.subject.key, rating.dimension] += rating.values
    for subject in subjects:
        for name in prompts.DIMENSIONS:
            own = [3 if value is None and as_published else value for value in values[subject.key, name]]
            own = [value for value in own if value is not None]
            score = statistics.mean(own) if own else None
            predicted = None if score is None else "H" if score > 3 else "L"
            yield Cell(subject.key, name, subject.labels[name], predicted, score)


def row(name, cells, missing=None):
    """A row of the table: Dim over all counted cells, Full over characters with every counted cell right."""
    counted = [cell for cell in cells if cell.label != "X"]
    right = [cell.predicted == cell.label for cell in counted]
    full = {}
    for cell, good in zip(counted, right, strict=True):
        full[cell.character] = full.get(cell.character, True) and good
    dim, full_mean = percent(right, [cell.character for cell in counted]), percent(full.values(), [*full])
    found = {
        "": name,
        "Dim": dim[0],
        "Dim, 95% interval": dim[1],
        "cells": len(counted),
        "Full": full_mean[0],
    }
    return found | {"Full, 95% interval": full_mean[1], "characters": len(full), "missing ratings": missing}


def baselines(subjects):
    """Rows that need no model: always high, always low, and the more frequent label of each dimension."""
    labels = {name: Counter(s.labels[name] for s in subjects) for name in prompts.DIMENSIONS}
    majority = {name: max("HL", key=count.__getitem__) for name, count in labels.items()}
    guesses = {"always high": dict.fromkeys(labels, "H"), "always low": dict.fromkeys(labels, "L")}
    for name, guess in (guesses | {"the more frequent label of each dimension": majority}).items():
        cells = [Cell(s.key, d, s.labels[d], guess[d]) for s in subjects for d in prompts.DIMENSIONS]
        yield row(f"baseline: {name}", cells)


def page_items(cells, ratings, answers, labels):
    """What the page shows of each cell: its label, the judge's words, and the answers they are about."""
    for cell in cells:
        shown = []
        for rating in ratings:
            if (rating.subject.key, rating.dimension) == (cell.character, cell.dimension):
                values = ", ".join("missing" if value is None else f"{value:g}" for value in rating.values)
                asked = [
                    f"{item.number}. {item.questions[rating.subject.language]}\n"
                    f"{answers[cell.character].get(item.number) or prompts.NO_ANSWER}"
                    for item in rating.items
                ]
                text = "\n\n".join([*asked, f"The judge: {rating.said}"])
                right = None if cell.label == "X" else cell.predicted == cell.label
                shown.append({"label": "rated", "verdict": values, "right": right, "text": text})
        score = "no score" if cell.score is None else f"{cell.score:.2f}, so {cell.predicted}"
        yield {
            "key": f"{cell.character}|{cell.dimension}",
            "title": cell.character,
            "where": cell.dimension,
            "text": f"{labels}: {cell.label}; here: {score}",
            "options": [],
            "answers": shown,
            "wrong": cell.label not in ("X", cell.predicted),
        }


def run(subjects, models, journal, args):
    """(results for `report`, items of the page); (None, []) after an interview that nobody rates."""
    items, judge, file = load_items(args), models["judge"], Path(args.out) / INTERVIEW
    if args.interview:
        lines, actor = read_interview(args.interview, subjects), short(args.interview)
    else:
        lines, actor = interview(subjects, items, models["actor"], journal, args), short(models["actor"].name)
        write_lines(file, lines)
    if not judge:
        terminal.note(f"the interview is in {file}; the same command with --resume --judge M rates it")
        return None, []
    answers = defaultdict(dict)
    for line in lines:
        answers[line["character"]][line["item"]] = line["answer"]
    subjects = [subject for subject in subjects if subject.key in answers]
    ratings = rate(subjects, items, answers, judge, journal, args)
    cells = list(cells_of(subjects, ratings, args.as_published))
    values = [value for rating in ratings for value in rating.values]
    rated = "in groups" if args.rating == "groups" else "by options"
    own = row(
        f"{actor}, rated {rated} by {short(judge.name)}", cells, f"{values.count(None)} of {len(values)}"
    )
    others = published({"Dim": ("incharacter_dim", "cells"), "Full": ("incharacter_full", "characters")})
    missing = "counts as 3" if args.as_published else "is left out of the mean; a cell without any is wrong"
    notes = [
        "Dim: percent of all cells (a dimension of a character) that are H or L as labelled; Full: of "
        "characters with every cell right; 95% intervals: characters drawn whole",
        f"labels: {args.labels}; cells labelled X are not counted. profiles: written for this project, not "
        "those of the published results, which are not public",
        f"a missing rating has been asked for {TRIES} times, then {missing}",
        "published: pdb labels of the same 32 characters; `cells` and `characters` stand where the figure is "
        "a share of them; judge and profiles are not stated",
    ]
    answered = sum(answer is not None for own in answers.values() for answer in own.values())
    asked = f"{answered} of {len(subjects) * len(items)} questions answered"
    results = {"title": f"incharacter (BFI): {len(subjects)} characters, {asked}"}
    results |= {"rows": [own, *baselines(subjects), *others], "notes": notes}
    return results, list(page_items(cells, ratings, answers, args.labels))
