"""CroSS motivation recognition (Yuan et al. 2024): which of four motives explains what a character does.

Data: a directory with `motivation_dataset.json`, {book: {character: [question]}}, and
`truth_persona_all_dimension.json`, [{title, persona: {character: {summary}}}]. They are joined by book title,
since some names of characters differ. In the raw file a space after the letter sets the right option apart in
263 of 445 questions: options are normalised before a model sees them, and the row "cheat" says what the raw
ones give away.
"""

import re
from pathlib import Path

from common.files import UsageError, read_json
from evals import multiple_choice
from evals.benchmark_prompts import CROSS_MR
from evals.benchmark_report import note_left_out, published
from evals.multiple_choice import LETTERS, read_question, shuffled
from evals.shapes import check

QUESTIONS_FILE, PROFILES_FILE = "motivation_dataset.json", "truth_persona_all_dimension.json"
PROMPTS = CROSS_MR


def cheat(options, right):
    """The chance to pick the right one of raw options by the only space after a letter, else by guessing."""
    spaced = [bool(re.match(r"\s*[A-Z]\.\s", option)) for option in options]
    return float(spaced[right]) if sum(spaced) == 1 else 1 / len(options)


def read_profiles(file):
    """{title: {name: profile}} of all books."""
    books = read_json(file, list)
    try:
        check(books, [{"title": str, "persona": dict}], "book")
        profiles = {}
        for book in books:
            check(book["persona"], {name: {"summary": str} for name in book["persona"]}, book["title"])
            own = {name: persona["summary"].strip() for name, persona in book["persona"].items()}
            profiles[book["title"]] = own
    except ValueError as error:
        raise UsageError(f"{file}: not the profiles of CroSS: {error}") from None
    return profiles


def find_profile(profiles, name):
    """(name, profile) of a character; the profile of a book's only character, whatever its name there."""
    if name not in profiles and len(profiles) == 1:
        [(name, profile)] = profiles.items()
        return name, profile
    return name, profiles.get(name)


def entries(file):
    """(book, name, entry) of each question of the file."""
    for book, characters in read_json(file).items():
        if not isinstance(characters, dict) or not all(isinstance(x, list) for x in characters.values()):
            raise UsageError(
                f"{file}: {book!r} is not {{character: [question]}}, so this is no file of CroSS"
            )
        for name, questions in characters.items():
            for entry in questions:
                yield book, name, entry


def files(args):
    return [Path(args.data) / QUESTIONS_FILE, Path(args.data) / PROFILES_FILE]


def load(args):
    """(questions, [(name, reason)] of those left out), all of the file, in its order."""
    questions_file, profiles_file = files(args)
    profiles, questions, left_out = read_profiles(profiles_file), [], []
    for number, (book, name, entry) in enumerate(entries(questions_file), 1):
        try:
            display, profile = find_profile(profiles.get(book, {}), name)
            if args.profile != "none" and profile is None:
                raise ValueError("an unknown character, without a profile")
            if args.profile != "none" and not profile:
                raise ValueError("an empty profile")
            question = read_question(entry, str(number), book, display, profile or "")
            raw = entry["Multiple Choice Question"]["Options"]
            question.cheat = cheat(
                raw, LETTERS.index(entry["Multiple Choice Question"]["Correct Answer"].strip())
            )
            questions.append(shuffled(question, args.seed))
        except ValueError as error:
            left_out.append((f"question {number}, {name} in {book}", str(error)))
    note_left_out(left_out, len(questions) + len(left_out), "questions")
    return questions, left_out


def run(questions, models, journal, args):
    """(results for `report`, items of the page)."""
    rows = published({"accuracy": "cross_mr"}, {"accuracy": (445, "questions")})
    results, items = multiple_choice.results(questions, PROMPTS, models, journal, args, rows)
    results["notes"] += [
        "published: reasons, then the choice; the profile given is not stated; `questions` stands where the "
        "figure is a share of 445"
    ]
    return results, items
