"""Reads messy JSON: lists and lines, fields under older names, a report of all repairs and drops."""

import json
from collections import Counter
from dataclasses import dataclass

from common.files import UsageError, read_json

LONGEST = 1_000_000  # characters of a message; a longer one is a mistake and would take minutes to tokenise
LONGEST_LINE = 2**25  # bytes


class Report(Counter):
    """Counts what reading repaired and dropped, by description. `examples`: description -> first place.

    strict: the first repair or drop is a UsageError instead.
    """

    def __init__(self, strict=False):
        super().__init__()
        self.strict, self.examples, self.seen = strict, {}, set()

    def note(self, what, where):
        if self.strict:
            raise UsageError(f"{where}: {what} (--strict stops here)")
        self[what] += 1
        self.examples.setdefault(what, where)

    def is_new(self, key):
        """Whether this key was not passed before. Only its hash is kept."""
        new = hash(key) not in self.seen
        self.seen.add(hash(key))
        return new

    def lines(self):
        """One line for each description, the most frequent first."""
        return [f"{count} {what}, the first at {self.examples[what]}" for what, count in self.most_common()]


# ---- files -------------------------------------------------------------------------------------------------


def read_rows(path, report, what="row"):
    """Yields (number, value, place, share of the file read) for each value of a JSON list or of JSON lines.

    The content decides which it is, not the name; a file with one JSON object yields that object. JSON lines
    are read one at a time, so such a file may exceed memory; lines that cannot be read are dropped.
    UsageError for a file that is not JSON.
    """
    if _holds_lines(path):
        yield from _read_lines(path, report)
    elif isinstance(values := read_json(path, (dict, list)), dict):
        yield 0, values, str(path), 1.0
    else:
        for i, value in enumerate(values):
            yield i, value, f"{path}: {what} {i}", (i + 1) / len(values)


def _holds_lines(path):
    """Whether a file has several lines, the first a JSON object. If the first is broken, the name decides."""
    try:
        with open(path, "rb") as file:
            first = b""
            while not first.strip() and (line := file.readline(LONGEST_LINE)):
                first = line
            if not any(line.strip() for line in file) or first.strip(b"\xef\xbb\xbf \t").startswith(b"["):
                return False
            return isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except OSError:
        return False  # read_json explains
    except (ValueError, RecursionError):
        return str(path).endswith(".jsonl")


def _read_lines(path, report):
    size, number, read = path.stat().st_size, 0, 0
    with open(path, "rb") as file:
        while line := file.readline(LONGEST_LINE):
            number, read = number + 1, read + len(line)
            where, complete = f"{path}: line {number}", line.endswith(b"\n")
            if not complete and len(line) == LONGEST_LINE:
                while (more := file.readline(LONGEST_LINE)) and not more.endswith(b"\n"):
                    read += len(more)
                report.note(f"dropped: line of more than {LONGEST_LINE:,} bytes", where)
            elif line.strip():
                try:
                    yield number - 1, json.loads(line.decode("utf-8-sig")), where, read / size
                except UnicodeDecodeError:
                    report.note("dropped: line that is not UTF-8", where)
                except (ValueError, RecursionError):
                    kind = "line that is not JSON" if complete else "last line, incomplete"
                    report.note(f"dropped: {kind}", where)


def mend_surrogates(value, where, report):
    """Replaces lone surrogates, which no tokenizer accepts, by question marks."""
    text = json.dumps(value, ensure_ascii=False)
    mended = text.encode("utf-8", errors="replace").decode()
    if mended == text:
        return value
    report.note("repaired: half of a surrogate pair", where)
    return json.loads(mended)


# ---- fields ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """kind: its type. older: its names in other versions of the format. missing: what to report when there is
    no value; None: it is optional. item: what an item of a list is called in the report."""

    kind: type = str
    older: tuple = ()
    missing: str | None = None
    item: str = ""


KINDS = {str: "text", list: "a list", dict: "an object"}
FIELDS = {
    "plots": Field(list, item="plot"),
    "conversation": Field(list, missing="plot without a conversation", item="conversation"),
    "dialogues": Field(list, missing="conversation without messages", item="message"),
    "character": Field(older=("name",), missing="message without a name"),
    "message": Field(older=("thought", "description", "dialogues"), missing="message without a text"),
    "key_characters": Field(list, item="key character"),
    "name": Field(older=("character",), missing="key character without a name"),
    "motivation": Field(older=("thought",)),
    **dict.fromkeys(("character_datasets", "character_profiles", "motivations", "plot"), Field(dict)),
    **dict.fromkeys(("speaking_characters_w_env", "major_characters"), Field(list)),
}  # all others are optional text


@dataclass
class Record:
    """A JSON object and its place in a file. Whatever reading a field repairs or drops goes to the report."""

    value: dict
    where: str
    report: Report
    separator: str = ", "  # between its place and that of an item

    def note(self, what):
        self.report.note(what, self.where)

    def get(self, name):
        """The value of a field, or an empty one of its type if it has none or one of another type."""
        return self.find(name)[0]

    def find(self, name):
        """(value, name) of a field, under its own name or an older one."""
        field = FIELDS.get(name, Field())
        for key in (name, *field.older):
            value = self.value.get(key)
            if isinstance(value, field.kind) and (value.strip() if field.kind is str else value):
                if key != name:
                    self.note(f"repaired: `{key}` read as `{name}`")
                return value, key
        value = self.value.get(name)
        if value is not None and not isinstance(value, field.kind):
            self.note(f"dropped: `{name}` that is not {KINDS[field.kind]}")
        elif field.missing:
            self.note(f"dropped: {field.missing}")
        return field.kind(), name

    def records(self, name):
        """The objects in a list as records, with their numbers; other items are dropped."""
        what = FIELDS[name].item
        for i, value in enumerate(self.get(name)):
            where = f"{self.where}{self.separator}{what} {i}"
            if isinstance(value, dict):
                yield i, Record(value, where, self.report)
            else:
                self.report.note(f"dropped: {what} that is not an object", where)
