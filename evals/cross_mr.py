"""CroSS motivation recognition (Yuan et al. 2024): which of four motives explains what a character does.

Data: a directory with `motivation_dataset.json`, {book: {character: [question]}}, and
`truth_persona_all_dimension.json`, [{title, persona: {character: {summary}}}]. They are joined by book title,
since some names of characters differ. In the raw file a space after the letter sets the right option apart in
263 of 445 questions: options are normalised before a model sees them, and the row "cheat" says what the raw
ones give away.
"""

from pathlib import Path

from common.files import UsageError, read_json
from evals import multiple_choice
from evals.benchmark_prompts import CROSS_MR as PROMPTS
from evals.benchmarks import published
from evals.shapes import check

QUESTIONS_FILE, PROFILES_FILE = "motivation_dataset.json", "truth_persona_all_dimension.json"


def files(args):
    return [Path(args.data) / QUESTIONS_FILE, Path(args.data) / PROFILES_FILE]


def read_files(args):
    """({book: {character: [question]}}, {title: {character: {"summary": profile}}})."""
    questions, profiles = files(args)
    books, titles = read_json(questions), read_json(profiles, list)
    try:
        check([*books.values()], [dict], QUESTIONS_FILE)
        for characters in books.values():
            check([*characters.values()], [list], QUESTIONS_FILE)
        check(titles, [{"title": str, "persona": dict}], PROFILES_FILE)
        for book in titles:
            check([*book["persona"].values()], [{"summary": str}], f"{PROFILES_FILE}, {book['title']}")
    except ValueError as error:
        raise UsageError(f"{args.data}: not the files of CroSS: {error}") from None
    return books, {book["title"]: book["persona"] for book in titles}


def entries(args):
    """What `load_questions` takes, of each question of the file."""
    books, profiles = read_files(args)
    asked = [(book, name, entry) for book in books for name in books[book] for entry in books[book][name]]
    for number, (book, name, entry) in enumerate(asked, 1):
        where, known = f"question {number}, {name} in {book}", profiles.get(book, {})
        if name not in known and len(known) == 1:  # the only character of the book, whatever its name
            [name] = known
        yield where, str(number), book, name, known[name]["summary"] if name in known else None, entry


def load(args):
    return multiple_choice.load_questions(entries(args), args)


def run(questions, models, journal, args):
    """(results for `report`, items of the page)."""
    rows = published({"accuracy": ("cross_mr", "questions")})
    note = (
        "published: reasons, then the choice; the profile given is not stated; `questions` stands where the "
        "figure is a share of 445"
    )
    return multiple_choice.results(questions, PROMPTS, models, journal, args, rows, note)
