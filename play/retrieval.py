"""Passages of the book that an actor is reminded of at each turn, found by BM25 (CoSER paper, section 5.5).

Searched are the plots in which the character appears, before the scene's own and before the held-out ones,
without passages that stand in the scene's own plot or in a later one as well. `leaky` searches all plots, as
the release does.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from importlib.util import find_spec

from common.files import UsageError, read_json
from data import prompts
from data.chats import START
from data.records import Record, Report, mend_surrogates
from data.scenes import data_files, load_book, split_plot_index, straighten

SOURCES = ("raw", "experience", "conversation")
PIECE, OVERLAP = 1000, 200  # characters, as in the release
QUERY = 3  # messages
REPEATED = 6  # words in a row that make a passage part of another plot as well
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")  # a CJK character is one


@dataclass
class Book:
    """split: number of the first held-out plot. messages: {plot number: those of its conversations}.

    passages: [({source, plot, text}, the characters of that plot, the last plot that has some of it)].
    """

    split: int
    messages: dict
    passages: list


class Retrieval:
    """The retrieval of a run. `settings`: what decides it. UsageError where a scene's book is missing.

    spec: SOURCE:N[+...], N pieces of each source. books: a file or directory.
    """

    def __init__(self, spec, scenes, books, leaky=False):
        if find_spec("bm25s") is None:
            raise UsageError("--retrieve needs bm25s: pip install -c constraints.txt -e .[retrieval]")
        self.sources, self.leaky = parse_sources(spec), leaky
        self.books, self.corpora = {}, {}  # by title; by what they depend on
        titles, digest = {scene.book for scene in scenes}, hashlib.sha256()
        for file in data_files([books]):
            value = read_json(file, (dict, list))
            if not isinstance(value, dict) or not isinstance(value.get("plots"), list):
                continue  # a test file
            record = Record(mend_surrogates(value, file, Report()), str(file), Report())
            title = straighten(record.get("title") or file.stem)
            if title in titles:
                self.books[title] = read_book(record, load_book(file), self.sources)
                digest.update(json.dumps([title, value]).encode())
        for scene in scenes:
            self.check(scene, books)
        self.settings = {"retrieve": spec, "retrieve_leaky": leaky, "retrieve_from": digest.hexdigest()[:16]}

    def check(self, scene, books):
        """UsageError where a scene has no sure place in its book, or `raw` no text of it."""
        book = self.books.get(scene.book)
        messages = book.messages.get(scene.i_p, ()) if book else ()
        if 2 * sum(turn["message"] in messages for turn in scene.dialogues) < len(scene.dialogues):
            what = f"plot {scene.i_p} of {scene.book} with the messages of the scene"
            raise UsageError(f"--book {books}: does not hold {what}; give the book that it is from")
        if "raw" in self.sources and not any(passage["source"] == "raw" for passage, *_ in book.passages):
            raise UsageError(f"--retrieve raw: the plots of {scene.book} in {books} have no `text`")

    def find(self, scene, character, messages):
        """The best passages of each source for a chat (without its system prompt), in the order of the book:
        `{source, plot, text}`. A passage without any word of the query is left out."""
        query, found = words(" ".join(m["content"].replace(START, "") for m in messages[-QUERY:])), []
        limit = math.inf if self.leaky else min(scene.i_p, self.books[scene.book].split)
        for source, count in self.sources.items():
            key = scene.book, source, character, limit
            if key not in self.corpora:
                self.corpora[key] = self.corpus(*key)
            passages, index = self.corpora[key]
            scores = index.get_scores(query) if query and index else [0] * len(passages)
            best = sorted(range(len(passages)), key=lambda i: (-scores[i], i))[:count]
            found += [passages[i] for i in sorted(best) if scores[i] > 0]
        return found

    def corpus(self, title, source, character, limit):
        """(a character's passages of a source from plots before the limit, their BM25 index or None)"""
        import bm25s  # an extra, which no other run needs

        book = self.books[title]
        known = [p for p, who, last_plot in book.passages if character in who and last_plot < limit]
        known = [passage for passage in known if passage["source"] == source]
        texts, index = [words(passage["text"]) for passage in known], bm25s.BM25()
        if not any(texts):
            return known, None
        index.index(texts, show_progress=False)
        return known, index


def read_book(record, scenes, sources):
    """The Book of a file's Record and scenes, with the passages of some sources."""
    messages, documents, last = {}, [], {}  # last: {words in a row: the last plot with them}
    for n, plot in record.records("plots"):
        own, text, summary = [s for s in scenes if s.i_p == n], plot.get("text"), plot.get("summary")
        parts = {name: "" for s in own for name in (*s.speaking_characters, *s.motivations)}
        people = [person for _, person in plot.records("key_characters")]
        parts |= {" ".join(who.get("name").split()): who.get("experience") for who in people}
        messages[n] = [turn["message"] for s in own for turn in s.dialogues]
        told = [text, summary, *parts.values(), *messages[n]]
        last |= dict.fromkeys(runs(told + [t for s in own for t in (s.scenario, s.topic)]), n)
        documents.append(("raw", n, text, list(parts)))
        documents += [("experience", n, prompts.experience(summary, *p), [p[0]]) for p in parts.items()]
        documents += [("conversation", n, prompts.conversation(s), list(parts)) for s in own]
    passages = []
    for source, n, text, characters in documents:
        for start, end in split(text) if source in sources else ():
            around = runs([text[max(0, start - OVERLAP) : end + OVERLAP]])  # the last words may begin a run
            last_plot = max([n, *(last[run] for run in around & last.keys())])
            passage = {"source": source, "plot": n, "text": text[start:end].strip()}
            passages.append((passage, characters, last_plot))
    return Book(split_plot_index(record.value), messages, passages)


def parse_sources(spec):
    """{source: number of pieces} of a --retrieve."""
    parts = [part.partition(":")[::2] for part in spec.split("+")]
    counts = {source: int(n) for source, n in parts if source in SOURCES and re.fullmatch(r"[1-9]\d?", n)}
    if len(counts) != len(parts):
        raise UsageError(f"--retrieve {spec}: give SOURCE:N[+SOURCE:N], a source being {', '.join(SOURCES)}")
    return counts


# ---- text --------------------------------------------------------------------------------------------------


def words(text):
    return WORD.findall(text.lower())


def runs(texts):
    """All runs of REPEATED words in texts."""
    listed = map(words, texts)
    return {tuple(own[i : i + REPEATED]) for own in listed for i in range(len(own) - REPEATED + 1)}


def split(text):
    """Yields (start, end) of pieces of a text that overlap, cut at lines, sentences or words."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            cuts = (text.rfind(mark, start + PIECE // 2, end) + 1 for mark in ("\n", ". ", " "))
            end = next(filter(None, cuts), end)
        yield start, end
        start = len(text) if end >= len(text) else text.find(" ", end - OVERLAP, end - 1) + 1 or end - OVERLAP
