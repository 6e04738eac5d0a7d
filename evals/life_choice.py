"""LifeChoice (Xu et al. 2024): which of four courses a character takes at a turning point of a novel.

Data, which is not part of this project: `data/data.json` of airaer1998/LifeChoice on GitHub, or a file of its
shape: a list of books, each a list of {character_name, input_text (who the character is, up to the decision),
"Multiple Choice Question": {Scenario, Question, Options [4], "Correct Answer": "A" to "D"}}.
"""

from pathlib import Path

from common.files import UsageError, read_json
from evals import multiple_choice
from evals.benchmark_prompts import LIFE_CHOICE
from evals.benchmark_report import note_left_out, published
from evals.multiple_choice import read_question, shuffled
from evals.shapes import check

PROMPTS = LIFE_CHOICE


def files(args):
    file = Path(args.data)
    return [file / "data.json" if file.is_dir() else file]


def load(args):
    """(questions, [(name, reason)] of those left out), all of the file, in its order."""
    [file] = files(args)
    books = read_json(file, list)
    try:
        check(books, [[dict]], "book")
    except ValueError as error:
        raise UsageError(f"{file}: not a list of books, each a list of characters: {error}") from None
    questions, left_out = [], []
    for number, book in enumerate(books, 1):
        for place, entry in enumerate(book, 1):
            try:
                check(entry, {"character_name": str, "input_text": str}, "character")
                if args.profile != "none" and not entry["input_text"].strip():
                    raise ValueError("an empty profile")
                texts = f"book {number}", entry["character_name"], entry["input_text"]
                questions.append(shuffled(read_question(entry, f"{number}.{place}", *texts), args.seed))
            except ValueError as error:
                name = str(entry.get("character_name", "nobody"))[:60]
                left_out.append((f"book {number}, character {place} ({name})", str(error)))
    note_left_out(left_out, len(questions) + len(left_out), "questions")
    return questions, left_out


def run(questions, models, journal, args):
    """(results for `report`, items of the page)."""
    rows = published({"accuracy": "life_choice"}, {})
    results, items = multiple_choice.results(questions, PROMPTS, models, journal, args, rows)
    results["notes"] += [
        "published: not comparable; neither the number of questions nor what the models were given is known"
    ]
    return results, items
