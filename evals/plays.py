"""Figures of whole plays that need no judge: repetition, who speaks, and the form of the turns.

Words are runs of letters and digits, case ignored. Every figure of a performance stands beside the same
figure of the original scene, of which as many turns are read as were played.
"""

import re

from data.brackets import BracketParser
from data.chats import NEXT_SPEAKER
from data.scenes import ENVIRONMENT
from evals.metrics import bootstrap, mean
from play.replies import clean_reply

FIGURES = {  # label in tables: key; shares in percent
    "4-grams said before, by oneself (%)": "repeats_self",
    "4-grams said before, by others (%)": "repeats_others",
    "turns equal to an earlier one (%)": "equal_turns",
    "characters who speak (%)": "speaking",
    "longest run of two alternating": "alternation",
    "thoughts a turn": "thoughts",
    "actions a turn": "actions",
    "words a turn": "words",
    "turns in form (%)": "in_form",
    "turns": "turns",
}


def words_of(text):
    return re.findall(r"[^\W_]+", text.casefold())


def said_before(turns):
    """(by oneself, by others): the mean share of a turn's 4-grams that stand before in the play, over the
    turns that have any; an earlier place in the same turn counts as said before by oneself."""
    said, shares = {}, ([], [])
    for name, text in turns:
        words = words_of(text)
        grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
        own, by_self = said.setdefault(name, set()), 0
        others = set().union(*(grams_of for speaker, grams_of in said.items() if speaker != name))
        for gram in grams:
            by_self += gram in own
            own.add(gram)
        if grams:
            shares[0].append(by_self / len(grams))
            shares[1].append(sum(gram in others for gram in grams) / len(grams))
    return tuple(mean(column) for column in shares)


def equal_turns(turns):
    """The share of turns with the words of an earlier one, whoever says it; empty turns are left out."""
    texts = [" ".join(words_of(text)) or text for _, text in turns if text]
    return 1 - len(set(texts)) / len(texts) if texts else None


def longest_alternation(names):
    """The most turns in a row in which two speakers take turns; 1 where nobody answers anybody."""
    longest = run = 0
    for i, name in enumerate(names):
        answers = i > 0 and name != names[i - 1]
        run = run + 1 if answers and (run < 2 or name == names[i - 2]) else 1 + answers
        longest = max(longest, run)
    return longest


def count_brackets(text):
    """(thoughts, actions) of a message, and whether all its brackets are closed."""
    parser, thoughts, actions = BracketParser(), 0, 0
    for part, _ in parser.feed(text):
        thoughts += part == "[" and parser.thoughts == 1
        actions += part == "(" and parser.actions == 1 and not parser.thoughts
    return thoughts, actions, not (parser.thoughts or parser.actions)


def in_form(name, text, cast):
    """Whether a turn, its own name aside, has words, closed brackets, nobody's name before a part of it, no
    repetition that would be cut, and no end within a sentence (a letter or a comma)."""
    if not words_of(text) or text[-1].isalnum() or text[-1] == ",":
        return False
    return count_brackets(text)[2] and clean_reply(text, name, cast) == text


def figures(turns, characters):
    """{key of FIGURES: value, or None where nothing is to be counted} of one play.

    turns: (speaker, message) in order, without the choices of the next speaker. characters: the cast without
    the Environment, whose turns have neither thoughts nor actions and are left out there.
    """
    turns = [(name, text.strip().removeprefix(f"{name}:").strip()) for name, text in turns]
    acted = [count_brackets(text) for name, text in turns if name != ENVIRONMENT]
    names, (by_self, by_others) = [name for name, _ in turns], said_before(turns)
    cast = [*characters, ENVIRONMENT]
    shares = {
        "repeats_self": by_self,
        "repeats_others": by_others,
        "equal_turns": equal_turns(turns),
        "speaking": mean([name in names for name in characters]),
        "in_form": mean([in_form(name, text, cast) for name, text in turns]),
    }
    return {key: None if share is None else 100 * share for key, share in shares.items()} | {
        "alternation": longest_alternation(names),
        "thoughts": mean([thoughts for thoughts, _, _ in acted]),
        "actions": mean([actions for _, actions, _ in acted]),
        "words": mean([len(words_of(text)) for _, text in turns]),
        "turns": len(turns),
    }


def play_figures(performances):
    """{label: {played, original: {mean, low, high, scenes}}} over scenes, of (scene, messages, settings)."""
    played, original = [], []
    for scene, messages, _ in performances:
        characters = [name for name in scene.speaking_characters if name != ENVIRONMENT]
        turns = [(m["role"], m["content"]) for m in messages if m["role"] != NEXT_SPEAKER]
        written = [(turn["character"], turn["message"]) for turn in scene.dialogues]
        played.append(figures(turns, characters))
        original.append(figures(written[: len(turns)], characters))
    return {
        label: {"played": _over_scenes(played, key), "original": _over_scenes(original, key)}
        for label, key in FIGURES.items()
    }


def _over_scenes(plays, key):
    column = [play[key] for play in plays if play[key] is not None]
    return dict(zip(("mean", "low", "high"), bootstrap(column), strict=True)) | {"scenes": len(column)}
