"""Measures curated books against the text they come from: whether what is said in them stands there."""

import difflib
import re
from bisect import bisect_left
from collections import Counter

import numpy as np

from data.brackets import ACTION, SPEECH, THOUGHT, BracketParser
from data.scenes import ENVIRONMENT

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")  # or a CJK character
# A quote with a smaller share of its words found is flagged: put in other words, or made up. In a play that
# it is not from, one quote in a hundred of more than six words has more, but half of the shorter ones.
FOUND = 0.6
VERBATIM = 0.9
NEAR = 300  # characters around a quote in which its speaker is named
FEWEST = 10  # messages of a conversation, as the paper asks for
COUNTS = "plots", "conversations", "short", "utterances", "characters"
SHARES = dict.fromkeys(("words found", "verbatim", "not found", "speaker near"), "quotes")
SHARES |= {"thoughts": "turns", "actions": "turns"}


def words_of(text):
    return [match[0].casefold() for match in WORD.finditer(text)]


class Words:
    """The words of a text, and where each stands, to find quotes in it."""

    def __init__(self, text):
        matches = list(WORD.finditer(text))
        self.text, self.words, self.places = text, [match[0].casefold() for match in matches], {}
        self.starts, self.ends = [match.start() for match in matches], [match.end() for match in matches]
        for i, word in enumerate(self.words):
            self.places.setdefault(word, []).append(i)

    def find(self, quote, begin=0):
        """(share of a quote's words found in order, start, end) at the best place from character `begin` on.

        A place is a window of twice the words of the quote and 20 more, so that what stands between its parts
        (he said, and rose) does not count against it. Three windows are tried, those with most of its words,
        rare words counting more. Of equal places the first is taken; (0, None, None) if none has any.
        """
        quote, best, n = words_of(quote), (0.0, None, None), len(self.words)
        low, width, score = bisect_left(self.starts, begin), 2 * len(quote) + 20, np.zeros(n + 1)
        ends = np.minimum(np.arange(n + 1) + width, n)
        for word in set(quote) & self.places.keys():
            before = np.bincount(np.add(self.places[word], 1), minlength=n + 1).cumsum()
            score += (before[ends] > before) * np.log(1 + n / len(self.places[word]))
        score[:low] = 0
        for _ in range(3):
            first = int(score.argmax())
            if score[first] <= 0 or best[0] == 1:
                break
            matcher = difflib.SequenceMatcher(None, quote, self.words[first : first + width], autojunk=False)
            blocks = [block for block in matcher.get_matching_blocks() if block.size]
            if (share := sum(block.size for block in blocks) / len(quote)) > best[0]:
                last = first + blocks[-1].b + blocks[-1].size - 1
                best = share, self.starts[first + blocks[0].b], self.ends[last]
            score[max(0, first - width // 2) : first + width // 2 + 1] = 0
        return best


def quote_of(turn):
    """What a character says aloud in a message; "" where it holds no word or is the Environment's."""
    message = turn["message"] if turn["character"] != ENVIRONMENT else ""
    spoken = "".join(part for part, channel in BracketParser().feed(message) if channel == SPEECH)
    return spoken if WORD.search(spoken) else ""


def is_near(name, text, at):
    """Whether a part of a name, of three letters or not Latin, stands near a place."""
    around = set(words_of(text[max(0, at - NEAR) : at + NEAR]))
    return any(part in around for part in words_of(name) if len(part) > 2 or not part.isascii())


def measure(book, text):
    """The figures of a book, {what: number}. Quotes are looked for in their plot's `passage` of the text, in
    the whole text where there are no passages (in the release's books)."""
    figures, known = Counter(plots=len(book["plots"]), characters=len(book["character_datasets"])), {}
    for plot in book["plots"]:
        a, b = plot.get("passage") or (0, len(text))
        known = {(a, b): known.get((a, b)) or Words(text[a:b])}  # of the last passage alone
        for talk in plot["conversation"]:
            turns = [turn for turn in talk["dialogues"] if isinstance(turn.get("message"), str)]
            figures.update(conversations=1, utterances=len(turns), short=len(turns) < FEWEST)
            for turn in (turn for turn in turns if turn["character"] != ENVIRONMENT):
                channels = {channel for _, channel in BracketParser().feed(turn["message"])}
                figures.update(turns=1, thoughts=THOUGHT in channels, actions=ACTION in channels)
                if quote := quote_of(turn):
                    share, start, _ = known[a, b].find(quote)
                    near = start is not None and is_near(turn["character"], text[a:b], start)
                    found = {"quotes": 1, "words found": share, "verbatim": share >= VERBATIM}
                    figures.update(found | {"not found": share < FOUND, "speaker near": near})
    return dict(figures)


def row(name, figures):
    """A row of the table: counts; shares of the quotes; shares of the characters' messages."""
    pairs = ((figures.get(part, 0), figures.get(of, 0)) for part, of in SHARES.items())
    counts = (f"{figures.get(name, 0):,}" for name in COUNTS)
    return [name, *counts, *(f"{part / total:.1%}" if total else "-" for part, total in pairs)]
