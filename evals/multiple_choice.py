"""Multiple-choice questions about characters, by likelihood and by generation."""

import json
import random
import re
from concurrent.futures import Future
from dataclasses import dataclass, replace

from common.files import UsageError
from data.prompts import fill
from engine.params import SamplingParams
from evals.benchmark_prompts import ANSWER, CHOOSE
from evals.benchmarks import GENERATION, LIKELIHOOD, Ask, ask_all, note_errors, note_left_out, percent
from evals.report import short
from evals.shapes import check
from llm.reply import Reply

LETTERS = "ABCD"
SHAPE = {"Scenario": str, "Question": str, "Options": [str], "Correct Answer": str}
LIKELIHOODS = ("sum", "mean", "PMI", "blind")
# "Answer: B", "**Choice:** (B)", "the answer is option (B)", {"Choice": "B"}, "Answer: $\\boxed{B}$"
_OPENING = r"[\s:：*_\"'(\[<{$\\]*"
_CHOICE = re.compile(
    rf"(?i:answer|choice)(?i:\s+is)?{_OPENING}(?:(?i:option |boxed|text){_OPENING})*([{LETTERS}])(?![\w'])"
)
_LETTER = re.compile(rf"[\s*_\"'(\[]*([{LETTERS}])[\s*_\"'.)\]]*")


@dataclass
class Question:
    """A question; `right` is the index of the right one of its options, which have no letters.

    key: unique in the file. cheat: the chance to find the right option by the only space after a letter in
    the raw file, else by a guess.
    """

    key: str
    book: str
    character: str
    profile: str
    scenario: str
    text: str
    options: list
    right: int
    cheat: float


def without_letters(options):
    """Options without "A.", "B. " and so on, and with single spaces, so that their form tells nothing."""
    texts = [" ".join(option.split()) for option in options]
    lettered = [re.match(rf"{letter} ?[.):] ?", text) for letter, text in zip(LETTERS, texts, strict=True)]
    return (
        [text[found.end() :] for found, text in zip(lettered, texts, strict=True)] if all(lettered) else texts
    )


def load_questions(entries, args):
    """(questions, [(where, reason)] of those left out), in the order of the file.

    entries: (where, key, book, character, profile, entry) of each; profile None: not in the file. where: for
    messages. entry: the object that both data files hold.
    """
    questions, left_out = [], []
    for where, key, book, character, profile, entry in entries:
        try:
            if args.profile == "none":
                profile = profile or ""
            elif profile is None:
                raise ValueError("an unknown character, without a profile")
            check([character, profile], [str], "character")
            if args.profile != "none" and not profile.strip():
                raise ValueError("an empty profile")
            questions.append(shuffled(read_question(key, book, character, profile, entry), args.seed))
        except ValueError as error:
            left_out.append((where, str(error)))
    note_left_out(left_out, len(questions) + len(left_out), "questions")
    return questions, left_out


def read_question(key, book, character, profile, entry):
    """A Question. ValueError says why it cannot be asked."""
    check(entry, {"Multiple Choice Question": SHAPE}, "question")
    entry = entry["Multiple Choice Question"]
    if len(entry["Options"]) != len(LETTERS):
        raise ValueError(f"{len(entry['Options'])} options in place of {len(LETTERS)}")
    options, letter = without_letters(entry["Options"]), entry["Correct Answer"].strip()
    if letter not in [*LETTERS]:
        raise ValueError(f"the right answer {letter[:20]!r} is not among its options")
    if not all(options) or len({option.casefold() for option in options}) < len(options):
        raise ValueError("two equal options" if all(options) else "an empty option")
    if not (entry["Question"].strip() and character.strip()):
        raise ValueError("an empty question" if character.strip() else "a character without a name")
    texts = book, character, profile, entry["Scenario"], entry["Question"]
    "".join([*texts, *options]).encode()  # a ValueError where there is half a surrogate pair
    right = LETTERS.index(letter)
    spaced = [bool(re.match(r"\s*[A-Z]\.\s", option)) for option in entry["Options"]]
    cheat = float(spaced[right]) if sum(spaced) == 1 else 1 / len(options)
    return Question(key, *(text.strip() for text in texts), options, right, cheat)


def shuffled(question, seed):
    """The question with its options in an order that depends on the seed and its key alone."""
    order = list(range(len(question.options)))
    random.Random(f"{seed}|{question.key}").shuffle(order)
    options = [question.options[i] for i in order]
    return replace(question, options=options, right=order.index(question.right))


def parse_choice(text):
    """The index of the option that a reply chooses, the last if it names several; None if it names none."""
    found = _CHOICE.findall(text) or [match[1] for match in [_LETTER.fullmatch(text)] if match]
    return LETTERS.index(found[-1]) if found else None


def conversation(question, templates, profile, template, **more):
    """The messages that ask a question. profile: "gold" or "none"; template: of the user's message."""
    fields = {name: getattr(question, name) for name in ("book", "character", "profile", "scenario")}
    fields["question"] = question.text
    system = fill(templates["system"] + templates["profile"] * (profile == "gold"), fields)
    fields["question"] = fill(templates["question"], fields)
    user = fill(template, fields | more)
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def generate(questions, templates, profile, model, journal, args):
    """Asks for reasons and then a letter. Returns one answer for each question: {way, choice, said}."""
    params = SamplingParams(0.0, max_tokens=args.max_tokens, seed=args.seed)
    asks = []
    for question in questions:
        options = "\n".join(
            f"{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=True)
        )
        more = {"options": options, "letters": ", ".join(LETTERS)}
        messages = conversation(question, templates, profile, CHOOSE, **more)
        asks.append(Ask(question.key, f"{GENERATION} {profile}", "actor", messages, params))
    replies = ask_all(asks, model, journal, f"{GENERATION}, profile: {profile}")
    note_errors(replies, "answers")
    way = f"{GENERATION} (reasons, then the choice), profile: {profile}"
    return [
        {"way": way, "choice": parse_choice(reply.text), "said": reply.error or reply.text}
        for reply in replies
    ]


class Likelihoods:
    """A model for `ask_all` that answers a question with the scores of its options, which are not shown.

    For each of LIKELIHOODS: the log-probability of an option as the answer, that per token, its gain over the
    prompt without scenario and question (pointwise mutual information), and its log-probability after that
    prompt, which tells how much of a choice needs no question. The Reply's text is their JSON.
    """

    local = True

    def __init__(self, model, templates, profile):
        self.model, self.templates, self.profile = model, templates, profile

    def submit(self, question, _):
        future = Future()
        try:
            future.set_result(Reply(json.dumps(self.score(question)), "stop"))
        except UsageError as error:
            future.set_result(Reply("", "error", error=str(error)))
        return future

    def step(self):
        pass

    def score(self, question):
        asked = conversation(question, self.templates, self.profile, ANSWER)
        alone = conversation(question, self.templates, self.profile, self.templates["alone"])
        n, options = len(question.options), question.options
        scores = self.model.score([asked] * n + [alone] * n, [""] * 2 * n, options * 2)
        with_question, without = scores[:n], scores[n:]
        return {
            "sum": [total for total, _ in with_question],
            "mean": [total / max(1, tokens) for total, tokens in with_question],
            "PMI": [total - base for (total, _), (base, _) in zip(with_question, without, strict=True)],
            "blind": [base for base, _ in without],
        }


def choose_likeliest(questions, templates, profile, model, journal):
    """Chooses the likeliest option. Yields, for each question, an answer by each of LIKELIHOODS."""
    asks = [Ask(question.key, f"{LIKELIHOOD} {profile}", "actor", question, None) for question in questions]
    model = Likelihoods(model, templates, profile)
    replies = ask_all(asks, model, journal, f"{LIKELIHOOD}, profile: {profile}")
    note_errors(replies, "likelihoods")
    for reply in replies:
        scores, answers = json.loads(reply.text) if reply.text else {}, []
        for name in LIKELIHOODS:
            values = scores.get(name)
            said = ", ".join(f"{x} {value:.2f}" for x, value in zip(LETTERS, values or (), strict=False))
            choice = values.index(max(values)) if values else None
            way = f"{LIKELIHOOD} ({name}), profile: {profile}"
            answers.append({"way": way, "choice": choice, "said": reply.error or said})
        yield answers


def answer_all(questions, templates, model, journal, args):
    """[[answer, ...] of each question], in each way and with each profile that is asked for."""
    columns = []
    for profile in ("gold", "none") if args.profile == "both" else (args.profile,):
        if LIKELIHOOD in args.by:
            columns.append(list(choose_likeliest(questions, templates, profile, model, journal)))
        if GENERATION in args.by:
            answers = generate(questions, templates, profile, model, journal, args)
            columns.append([[answer] for answer in answers])
    return [sum(parts, []) for parts in zip(*columns, strict=True)]


def row(name, questions, scores, parsed=None):
    """A row of the table. scores: of each question, 0 to 1; parsed: how many replies chose an option."""
    mean, spread = percent(scores, [question.book for question in questions])
    cells = {"": name, "accuracy": mean, "95% interval": spread, "questions": len(questions)}
    cells["parsed"] = None if parsed is None else 100 * parsed / len(questions)
    for i, letter in enumerate(LETTERS):
        at = [value for question, value in zip(questions, scores, strict=True) if question.right == i]
        cells[f"right at {letter}"] = 100 * sum(at) / len(at) if at else None
    return cells


def rows(questions, answers, actor):
    """The rows of a model, of chance, and of a cheat where the file allows it."""
    for i, first in enumerate(answers[0]):
        own = [of_question[i] for of_question in answers]
        right = [a["choice"] == question.right for a, question in zip(own, questions, strict=True)]
        chosen = sum(a["choice"] is not None for a in own)
        parsed = chosen if first["way"].startswith(GENERATION) else None
        yield row(f"{actor}: {first['way']}", questions, list(map(float, right)), parsed)
    yield row("baseline: a guess", questions, [1 / len(q.options) for q in questions])
    yield row("baseline: the first option", questions, [float(q.right == 0) for q in questions])
    if any(question.cheat != 1 / len(question.options) for question in questions):
        name = "cheat: the option set apart in the raw file, else a guess"
        yield row(name, questions, [question.cheat for question in questions])


def results(questions, templates, models, journal, args, published, note):
    """(results for `report`, items of the page) of the actor on the questions."""
    actor = models["actor"]
    answers = answer_all(questions, templates, actor, journal, args)
    books = len({question.book for question in questions})
    notes = [
        "accuracy: percent of all questions asked; a reply that makes no choice is wrong (`parsed`: share "
        "that chose); 95% intervals: books drawn whole; `right at`: accuracy where that is the right letter",
        note,
    ]
    found = {
        "title": f"{args.benchmark}: {len(questions)} questions from {books} books, seed {args.seed}",
        "rows": [*rows(questions, answers, short(actor.name)), *published],
        "notes": notes,
    }
    return found, list(page_items(questions, answers))


def page_items(questions, answers):
    """What the page shows of each question; `wrong`: any answer is not the right one."""
    for question, own in zip(questions, answers, strict=True):
        shown = []
        for answer in own:
            right = answer["choice"] == question.right
            letter = "no choice" if answer["choice"] is None else LETTERS[answer["choice"]]
            shown.append({"label": answer["way"], "verdict": letter, "right": right, "text": answer["said"]})
        options = zip(LETTERS, question.options, strict=True)
        yield {
            "key": question.key,
            "title": question.character,
            "where": question.book,
            "text": f"{question.scenario}\n\n{question.text}".strip(),
            "options": [[f"{x}. {text}", i == question.right] for i, (x, text) in enumerate(options)],
            "answers": shown,
            "wrong": not all(answer["right"] for answer in shown),
        }
