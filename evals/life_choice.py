"""LifeChoice (Xu et al. 2024): which of four courses a character takes at a turning point of a novel.

Data, which is not part of this project: `data/data.json` of airaer1998/LifeChoice on GitHub, or a file of its
shape: a list of books, each a list of {character_name, input_text (who the character is, up to the decision),
"Multiple Choice Question": {Scenario, Question, Options [4], "Correct Answer": "A" to "D"}}.
"""

from pathlib import Path

from common.files import UsageError, read_json
from evals import multiple_choice
from evals.benchmark_prompts import LIFE_CHOICE as PROMPTS
from evals.benchmarks import published
from evals.shapes import check


def files(args):
    file = Path(args.data)
    return [file / "data.json" if file.is_dir() else file]


def entries(args):
    """What `load_questions` takes, of each question of the file."""
    [file] = files(args)
    books = read_json(file, list)
    try:
        check(books, [[dict]], "book")
    except ValueError as error:
        raise UsageError(f"{file}: not a list of books, each a list of characters: {error}") from None
    for number, book in enumerate(books, 1):
        for place, entry in enumerate(book, 1):
            name, title = entry.get("character_name"), f"book {number}"
            where = f"{title}, character {place} ({str(name)[:60]})"
            yield where, f"{number}.{place}", title, name, entry.get("input_text"), entry


def load(args):
    return multiple_choice.load_questions(entries(args), args)


def run(questions, models, journal, args):
    """(results for `report`, items of the page)."""
    rows = published({"accuracy": ("life_choice", "questions")})
    note = "published: not comparable; neither the number of questions nor the models' input is known"
    return multiple_choice.results(questions, PROMPTS, models, journal, args, rows, note)
