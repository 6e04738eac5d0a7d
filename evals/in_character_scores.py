"""The scores of InCharacter: whether each dimension of a character is high or low as labelled."""

import statistics
from collections import Counter
from dataclasses import dataclass

from evals import benchmark_prompts as prompts
from evals.benchmark_report import percent


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
