"""Reads raw books and cuts them into chunks; joined they are the text of the book again."""

import re
from dataclasses import dataclass
from pathlib import Path

from common.files import UsageError, read_text
from data.records import mend_surrogates, read_rows
from data.scenes import straighten

LONGEST = 20_000  # characters encoded at once: a line of a megabyte would take minutes
BLANK_LINES = re.compile(r"(?:\r\n|\r|\n)(?:[^\S\r\n]*(?:\r\n|\r|\n))+")
CUTS = (
    re.compile(r"[\r\n]+"),
    re.compile(r"[.!?][\"'”’)]*\s+|[。！？]+"),
    re.compile(r"\s+"),
)  # the best first
_PARTS = "Chapter|Book|Part|Act|Scene|Volume|Canto|Letter|Stave"
_ALONE = "Prologue|Epilogue|Preface|Introduction|Foreword|Afterword|Interlude"
_NUMBER = r"\d+|[ivxlc]+|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|[a-z]+teen|[a-z]+ty"
_NUMBER = rf"(?i:(?:the\s+)?(?:{_NUMBER}|[a-z]+ty-[a-z]+|first|second|third|[a-z]+th|last))\b[^\r\n]{{0,60}}"
HEADING = re.compile(
    rf"^[ \t#*_]*(?:(?:{_PARTS}|{_PARTS.upper()})\s+{_NUMBER}|{_ALONE}|{_ALONE.upper()}"
    r"|#{1,6} [^\r\n]{1,60}|(?P<number>\d{1,3}|[IVXLC]{1,8})\.?)[ \t*_]*\r?$",
    re.MULTILINE,
)
ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}


@dataclass
class Book:
    """title: in one line; slug: its file name. No other book has either."""

    title: str
    author: str
    text: str
    slug: str


@dataclass
class Chunk:
    """The characters start to end of a book's text. tokens: the sum over its paragraphs."""

    number: int
    start: int
    end: int
    tokens: int


def read_books(path, report):
    """The Books of JSON lines {title, author, content}, or of a text; those without a text are dropped.
    UsageError if none remains."""
    path, books, taken = Path(path), [], set()
    if path.suffix in (".json", ".jsonl"):
        rows = read_rows(path, report, "book")
    else:
        rows = [(0, {"title": path.stem, "content": read_text(path)}, str(path), 1)]
    for _, row, where, _ in rows:
        if not isinstance(row, dict) or not isinstance(row.get("content"), str) or not row["content"].strip():
            report.note("dropped: book without a text in `content`", where)
            continue
        row = mend_surrogates({name: row.get(name) for name in ("title", "author", "content")}, where, report)
        title, author = (" ".join(str(row[name] or "").split()) for name in ("title", "author"))
        title = unique(straighten(title) or "untitled", " ({})", taken)
        slug = unique(re.sub(r"[^\w.-]+", "-", title).strip("-.")[:80] or "book", "-{}", taken)
        books.append(Book(title, author, row["content"], slug))
    if not books:
        raise UsageError(f"{path}: no book with a text in it ({'; '.join(report.lines()) or 'it is empty'})")
    return books


def unique(name, form, taken):
    """The name, with a number where it is taken already; it is taken from then on."""
    new, number = name, 1
    while (form, new.casefold()) in taken:
        number += 1
        new = name + form.format(number)
    taken.add((form, new.casefold()))
    return new


def headings(text):
    """[(position, heading)] of a text. Bare numbers are headings only as they count up from 1."""
    found, last = [], 0
    for match in HEADING.finditer(text):
        if number := match["number"]:
            digits = [] if number.isdigit() else [ROMAN[letter] for letter in number]
            roman = sum(-a if a < b else a for a, b in zip(digits, [*digits[1:], 0], strict=False))
            if (value := roman or int(number)) not in (1, last + 1):
                continue
            last = value
        found.append((match.start(), " ".join(match[0].split()).strip("#*_ ")))
    return found


def cut(text, size, count):
    """The Chunks of a text, each of at most `size` tokens; count(text) is the number of tokens.

    A chunk ends with a paragraph, inside one only where it alone is longer than a chunk; from half the size
    on it ends where a chapter begins.
    """
    chapters = {position for position, _ in headings(text)}
    borders = sorted(chapters | {match.end() for match in BLANK_LINES.finditer(text)} | {0, len(text)})
    chunks, start, tokens = [], 0, 0
    for paragraph in zip(borders, borders[1:], strict=False):
        for a, _, n in pieces(text, *paragraph, size, count):
            if tokens and (tokens + n > size or (a in chapters and tokens >= size / 2)):
                chunks.append(Chunk(len(chunks), start, a, tokens))
                start, tokens = a, 0
            tokens += n
    return [*chunks, Chunk(len(chunks), start, len(text), tokens)]


def pieces(text, start, end, size, count):
    """Yields (start, end, tokens) of a paragraph, halved until no part has more than `size` tokens."""
    if end - start <= LONGEST and ((tokens := count(text[start:end])) <= size or end - start == 1):
        yield start, end, tokens
        return
    middle = (start + end) // 2
    found = (pattern.search(text, middle, end - 1) for pattern in CUTS)
    at = next((match.end() for match in found if match), middle)
    yield from pieces(text, start, at, size, count)
    yield from pieces(text, at, end, size, count)
