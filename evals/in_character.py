"""InCharacter (Wang et al. 2024) on the Big Five Inventory: has a character the personality it is known for?

Data: a directory with `BFI.json` (44 items), `characters.json` (names and interviewers) and
`characters_labels.json`. The profiles are our own (in_character_profiles.json), since those of the published
results are not public. Interview: each open question in a chat of its own. Rating: a judge reads the
anonymous answers in groups of three or four, 13 calls a character, or turns each answer into an option. A
dimension is high (H) above 3, else low (L).
"""

from collections import defaultdict
from pathlib import Path

from common import terminal
from common.files import write_lines
from data.prompts import fill
from engine.params import SamplingParams
from evals import benchmark_prompts as prompts
from evals.benchmark_report import note_errors, published
from evals.in_character_data import files, load, load_items, read_interview
from evals.in_character_rating import TRIES, rate
from evals.in_character_scores import baselines, cells_of, page_items, row
from evals.report import short
from evals.runner import ask_all, make_ask

__all__ = ["files", "load", "run"]
INTERVIEW = "interview.jsonl"


def interview(subjects, items, model, journal, args):
    """[{character, item, question, answer}]: each question in its own chat; answer None where it failed."""
    params, asks, lines = SamplingParams(0.0, max_tokens=args.max_tokens, seed=args.seed), [], []
    for subject in subjects:
        fields = {
            "character": subject.aliases[0],
            "profile": subject.profile,
            "experimenter": subject.experimenter,
        }
        system = fill(prompts.INTERVIEW[subject.language], fields)
        for item in items:
            question = item.questions[subject.language]
            messages = [{"role": "system", "content": system}]
            messages.append({"role": "user", "content": f"{subject.experimenter}: {question}"})
            asks.append(make_ask(f"{subject.key}|{item.number}", "interview", "actor", messages, params))
            lines.append({"character": subject.key, "item": item.number, "question": question})
    replies = ask_all(asks, model, journal, "interview")
    note_errors(replies, "answers")
    return [
        line | {"answer": reply.text if reply.error is None else None}
        for line, reply in zip(lines, replies, strict=True)
    ]


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
    totals = {"Dim": (157, "cells"), "Full": (32, "characters")}
    others = published({"Dim": "incharacter_dim", "Full": "incharacter_full"}, totals)
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
