"""The data of InCharacter: the items of the inventory, the characters with their labels, and interviews."""

from dataclasses import dataclass
from pathlib import Path

from common import terminal
from common.files import UsageError, read_json, read_lines
from evals import benchmark_prompts as prompts
from evals.benchmark_report import note_left_out
from evals.rubric import writable
from evals.shapes import check

INTERVIEW_KEYS = ("character", "item", "question", "answer")
PROFILES = Path(__file__).with_name("in_character_profiles.json")


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
    try:
        data = read_json(file)
        check(data, {"questions": dict}, "file")
        check(
            data["questions"],
            {number: dict.fromkeys(texts, str) for number in data["questions"]},
            "questions",
        )
    except ValueError as error:
        raise UsageError(f"{file}: not the items of the BFI: {error}") from None
    items = []
    for number, q in data["questions"].items():
        if q["dimension"] not in prompts.DIMENSIONS:
            raise UsageError(f"{file}: question {number} is of {q['dimension']!r}, which is no dimension")
        questions = {"en": q["rewritten_en"], "zh": q["rewritten_zh"]}
        items.append(Item(number, q["origin_en"], questions, q["dimension"], q["category"] == "negative"))
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
    known = {subject.key for subject in subjects}
    good = [
        line
        for line in lines
        if line["character"] in known
        and isinstance(line["item"], str)
        and isinstance(line["answer"], str | None)
    ]
    if len(good) < len(lines):
        terminal.note(
            f"{file}: {len(lines) - len(good)} of {len(lines)} lines left out, about other characters"
        )
    if not good:
        raise UsageError(f"{file}: no answer of a character of this benchmark in it")
    return [line | {"answer": line["answer"] and writable(line["answer"])} for line in good]
