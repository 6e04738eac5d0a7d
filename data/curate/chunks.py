"""Reads raw books and cuts them into chunks. The chunks of a book joined are its text, character for character."""

import re
from dataclasses import dataclass
from pathlib import Path

from common.files import UsageError, read_text
from data.records import mend_surrogates, read_rows
from data.scenes import straighten

LONGEST = 20_000  # characters encoded at once: a line of a megabyte would take minutes
BLANK_LINES = re.compile(r"(?:\r\n|\r|\n)(?:[^\S\r\n]*(?:\r\n|\r|\n))+")
CUTS = re.compile(r"[\r\n]+"), re.compile(r"[.!?][\"'”’)]*\s+|[。！？]+"), re.compile(r"\s+")  # best first
_UNITS = "Chapter|Book|Part|Act|Scene|Volume|Canto|Letter|Stave"
_ALONE = "Prologue|Epilogue|Preface|Introduction|Foreword|Afterword|Interlude"
_WORDS = "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen"
_WORDS += "|(?:twen|thir|for|fif)ty(?:-[a-z]+)?|first|second|third|fourth|fifth|sixth|last"
HEADING = re.compile(
    rf"^[ \t#*_]*(?:(?:{_UNITS}|{_UNITS.upper()})\s+(?:(?i:the)\s+)?(?:\d+|(?i:[ivxlc]+|{_WORDS}))\b[^\r\n]{{0,60}}"
    rf"|(?:{_ALONE}|{_ALONE.upper()})|#{{1,6}} [^\r\n]{{1,60}}|(?P<number>\d{{1,3}}|[IVXLC]{{1,8}})\.?)[ \t*_]*\r?$",
    re.MULTILINE,
)
ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}


@dataclass
class Book:
    """title: in one line, unlike every other book's. slug: the title as a file name, unlike every other's."""

    title: str
    author: str
    text: str
    slug: str


@dataclass
class Chunk:
    """The characters start to end of a book's text. tokens: their number, its pieces counted one by one."""

    number: int
    start: int
    end: int
    tokens: int


def read_books(path, report):
    """The Books of a file of JSON lines {title, author, content}, or of a text, in order; those without text
    are dropped. UsageError if none remains."""
    path, books, taken = Path(path), [], set()
    is_rows = path.suffix in (".jsonl", ".json")
    rows = read_rows(path, report, "book") if is_rows else [(0, {"title": path.stem, "content": read_text(path)}, path, 1)]
    for _, row, where, _ in rows:
        if not isinstance(row, dict) or not isinstance(row.get("content"), str) or not row["content"].strip():
            report.note("dropped: book without a text in `content`", where)
            continue
        row = mend_surrogates({name: row.get(name) for name in ("title", "author", "content")}, where, report)
        title, author = (" ".join(str(row[name] or "").split()) for name in ("title", "author"))
        title = unique(straighten(title) or "untitled", taken, " ({})")
        slug = unique(re.sub(r"[^\w.-]+", "-", title).strip("-.")[:80] or "book", taken, "-{}")
        books.append(Book(title, author, row["content"], slug))
    if not books:
        raise UsageError(f"{path}: no book with a text in it ({'; '.join(report.lines()) or 'it is empty'})")
    return books


def unique(name, taken, form):
    """The name, or with the first number that makes it a new one; it is added to `taken`."""
    names = (name + form.format(n) if n > 1 else name for n in range(1, len(taken) + 2))
    new = next(n for n in names if (form, n.casefold()) not in taken)
    taken.add((form, new.casefold()))
    return new


def headings(text):
    """[(position, heading)] of a text. A bare number is one only where bare numbers count up from 1."""
    found, last = [], 0
    for match in HEADING.finditer(text):
        if number := match["number"]:
            value = int(number) if number.isdigit() else roman(number)
            if value not in (1, last + 1):
                continue
            last = value
        found.append((match.start(), " ".join(match[0].split()).strip("#*_ ")))
    return found


def roman(number):
    values = [ROMAN[letter] for letter in number]
    return sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))


def cut(text, size, count):
    """The Chunks of a text, each of at most `size` tokens; count(text) is the number of tokens.

    A chunk ends at the border of a paragraph; within one only where it alone is longer than a chunk. From
    half the size on it ends where a chapter begins.
    """
    starts = {position for position, _ in headings(text)}
    borders = sorted(starts | {match.end() for match in BLANK_LINES.finditer(text)} | {0, len(text)})
    chunks, start, tokens = [], 0, 0
    for paragraph in zip(borders, borders[1:], strict=False):
        for a, b, n in pieces(text, *paragraph, size, count):
            if tokens and (tokens + n > size or (a in starts and tokens >= size / 2)):
                chunks.append(Chunk(len(chunks), start, a, tokens))
                start, tokens = a, 0
            tokens += n
    return [*chunks, Chunk(len(chunks), start, len(text), tokens)]


def pieces(text, start, end, size, count):
    """Yields (start, end, tokens): a paragraph, halved until no part has more than `size` tokens."""
    fits = end - start <= LONGEST
    if fits and ((tokens := count(text[start:end])) <= size or end - start == 1):
        yield start, end, tokens
        return
    middle = (start + end) // 2
    found = (pattern.search(text, middle, end - 1) for pattern in CUTS)
    at = next((match.end() for match in found if match), middle)
    yield from pieces(text, start, at, size, count)
    yield from pieces(text, at, end, size, count)
