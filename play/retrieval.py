"""Passages of the book that an actor is reminded of at each turn, found by BM25 (CoSER paper, section 5.5).

Searched are the plots in which the character appears, before the scene's own and before the held-out ones,
without passages that stand in the scene's own plot as well. `leaky` searches all plots, as the release does.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from common.files import UsageError, read_json, read_text
from data import prompts
from data.brackets import SPEECH, BracketParser
from data.chats import START
from data.records import Record, Report, mend_surrogates, read_rows
from data.scenes import data_files, load_book, split_plot_index, straighten

SOURCES = ("raw", "experience", "conversation")
PIECE, OVERLAP = 1000, 200  # characters, as in the release
QUERY = 3  # messages
SHARED = 6  # words in a row that make a passage the scene's own
LANDMARK = 40  # characters in a row that show where in a text a plot stands
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")  # a CJK character is one


@dataclass
class Plot:
    """told: all that it says, the messages too; experiences: {each of its characters: text}; scenes: its
    conversations; landmarks: lines that show where in a text it stands, its text's ends and what is said."""

    text: str
    summary: str
    told: list
    experiences: dict
    scenes: list
    landmarks: list


def read_plots(value, file):
    """{number: Plot} of a book."""
    plots, scenes = {}, load_book(file)
    for number, plot in Record(mend_surrogates(value, file, Report()), str(file), Report()).records("plots"):
        text, summary = flat(plot.get("text")), plot.get("summary")
        own = [scene for scene in scenes if scene.i_p == number]
        messages = [turn["message"] for scene in own for turn in scene.dialogues]
        told = [text, summary, *messages, *(t for scene in own for t in (scene.scenario, scene.topic))]
        names = [name for scene in own for name in (*scene.speaking_characters, *scene.motivations)]
        people = [record for _, record in plot.records("key_characters")]
        experiences = dict.fromkeys(names, "")
        experiences |= {" ".join(who.get("name").split()): who.get("experience") for who in people}
        spoken = ["".join(t for t, kind in BracketParser().feed(m) if kind == SPEECH) for m in messages]
        landmarks = [line for line in (text[:200], text[-200:], *map(flat, spoken)) if len(line) >= LANDMARK]
        plots[number] = Plot(text, summary, told, experiences, own, landmarks)
    return plots


class Retrieval:
    """The retrieval of a run. `settings`: what decides it. UsageError where a scene's book is missing.

    spec: SOURCE:N[+...], N pieces of each source. books: a file or directory. text: the book's whole text, or
    JSON lines with `title` and `content`.
    """

    def __init__(self, spec, scenes, books, text=None, leaky=False):
        if find_spec("bm25s") is None:
            raise UsageError("--retrieve needs bm25s: pip install -c constraints.txt -e .[retrieval]")
        self.sources, self.leaky = parse_sources(spec), leaky
        self.plots, self.splits, self.texts, self.corpora = {}, {}, {}, {}  # the first three by title
        texts, titles, digest = read_texts(text), {scene.book for scene in scenes}, hashlib.sha256()
        for file in data_files([books]):
            value = read_json(file, (dict, list))
            if not isinstance(value, dict) or not isinstance(value.get("plots"), list):
                continue  # a test file
            title = straighten(value["title"] if isinstance(value.get("title"), str) else file.stem)
            if title in titles:
                whole = texts.get(title.lower()) or texts.get(None, "")
                self.texts[title], self.splits[title] = flat(whole), split_plot_index(value)
                self.plots[title] = read_plots(value, file)
                digest.update(json.dumps([title, value, whole]).encode())
        for scene in scenes:
            self.check(scene, books)
        self.settings = {"retrieve": spec, "retrieve_leaky": leaky, "retrieve_from": digest.hexdigest()[:16]}

    def check(self, scene, books):
        """UsageError where a scene has no sure place in its book, or nothing raw is known of the book."""
        plots = self.plots.get(scene.book, {})
        told = plots[scene.i_p].told if scene.i_p in plots else []
        if 2 * sum(turn["message"] in told for turn in scene.dialogues) < len(scene.dialogues):
            what = f"plot {scene.i_p} of {scene.book} with the messages of the scene"
            raise UsageError(f"--book {books}: does not hold {what}; give the book that it is from")
        if "raw" in self.sources and not self.texts[scene.book] and not any(p.text for p in plots.values()):
            raise UsageError(f"--retrieve raw: {books} has no text of {scene.book}; give it with --text FILE")

    def find(self, scene, character, messages):
        """The best pieces of each source for a chat (without its system prompt), in the order of the book:
        `{source, plot, text}`. A piece without any word of the query is none."""
        query, found = words(" ".join(m["content"].replace(START, "") for m in messages[-QUERY:])), []
        for source, count in self.sources.items():
            whole = source == "raw" and self.texts[scene.book]  # whoever remembers it
            key = source, scene.key, None if whole else character
            if key not in self.corpora:
                self.corpora[key] = self.corpus(source, scene, character)
            pieces, index = self.corpora[key]
            scores = index.get_scores(query) if query and index else [0] * len(pieces)
            best = sorted(range(len(pieces)), key=lambda i: (-scores[i], i))[:count]
            found += [{"source": source, **pieces[i]} for i in sorted(best) if scores[i] > 0]
        return found

    def corpus(self, source, scene, character):
        """(pieces, their BM25 index) that a character of a scene may be reminded of."""
        own = set() if self.leaky else runs([*self.plots[scene.book][scene.i_p].told, scene.scenario])
        pieces = [(n, piece) for n, text in self.documents(source, scene, character) for piece in split(text)]
        pieces = [{"plot": n, "text": piece} for n, piece in pieces if own.isdisjoint(runs([piece]))]
        return pieces, index_of([words(piece["text"]) for piece in pieces])

    def documents(self, source, scene, character):
        """[(plot number, text)] of a source; the number is None of the whole text."""
        plots, whole = self.plots[scene.book], self.texts[scene.book]
        limit = float("inf") if self.leaky else min(scene.i_p, self.splits[scene.book])
        earlier = {n: plot for n, plot in plots.items() if n < limit and character in plot.experiences}
        if source == "conversation":
            return [(n, prompts.conversation(s)) for n, plot in earlier.items() for s in plot.scenes]
        if source == "experience":
            texts = {n: (plot.summary, character, plot.experiences[character]) for n, plot in earlier.items()}
            return [(n, prompts.experience(*told)) for n, told in texts.items()]
        later = [line for n, plot in plots.items() if n >= limit for line in plot.landmarks]
        if not whole:  # the text of a plot may run on into that of a later one
            return [(n, plot.text[: first_place(later, plot.text)]) for n, plot in earlier.items()]
        if self.leaky:
            return [(None, whole)]
        before = [line for n, plot in plots.items() if n < limit for line in plot.landmarks]
        return [(None, told_before(whole, before, plots[scene.i_p].landmarks, later))]


def told_before(text, before, own, later):
    """A text as far as a plot before the scene surely reaches; "" where the scene's own plot is not found.

    before, own, later: landmarks. Of a line that is repeated the first occurrence counts, so the text may end
    too early, never too late.
    """
    begin = first_place(later, text)
    ends = [text.find(line) + len(line) for line in before if line in text]
    found = any(line in text for line in own)
    return text[: max((end for end in ends if end <= begin), default=0)] if found else ""


def first_place(lines, text):
    """Where the first of the lines that are in a text begins; the length of the text if none is."""
    return min((text.find(line) for line in lines if line in text), default=len(text))


def parse_sources(spec):
    """{source: number of pieces} of a --retrieve."""
    parts = [part.partition(":")[::2] for part in spec.split("+")]
    counts = {source: int(n) for source, n in parts if source in SOURCES and re.fullmatch(r"[1-9]\d?", n)}
    if len(counts) != len(parts):
        raise UsageError(f"--retrieve {spec}: give SOURCE:N[+SOURCE:N], a source being {', '.join(SOURCES)}")
    return counts


def read_texts(path):
    """{lower-case title: text} of JSON or JSON lines; {None: text} of any other file; {} of none."""
    if not str(path).endswith((".json", ".jsonl")):
        return {None: read_text(path)} if path else {}
    rows = [value for _, value, _, _ in read_rows(Path(path), Report()) if isinstance(value, dict)]
    pairs = [(row.get("title"), row.get("content")) for row in rows]
    return {straighten(title).lower(): text for title, text in pairs if isinstance(title and text, str)}


# ---- text --------------------------------------------------------------------------------------------------


def words(text):
    return WORD.findall(text.lower())


def runs(texts):
    """All runs of SHARED words in texts."""
    listed = map(words, texts)
    return {tuple(own[i : i + SHARED]) for own in listed for i in range(len(own) - SHARED + 1)}


def flat(text):
    """A text as one line with straight quotes: what is said is found in it, however it is broken up."""
    return straighten(" ".join(text.split()))


def split(text):
    """Yields pieces of a text that overlap, cut at lines, sentences or words."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            cuts = (text.rfind(mark, start + PIECE // 2, end) + 1 for mark in ("\n", ". ", " "))
            end = next(filter(None, cuts), end)
        yield text[start:end].strip()
        start = len(text) if end >= len(text) else text.find(" ", end - OVERLAP, end - 1) + 1 or end - OVERLAP


def index_of(documents):
    """A BM25 index of lists of words; None without a word."""
    import bm25s  # an extra, which no other run needs

    if not any(documents):
        return None
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    return index
