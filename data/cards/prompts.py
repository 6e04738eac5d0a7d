"""What of a card goes into prompts: macros expanded, the lorebook entries that a conversation calls up."""

import math
import random
import re
import time
from dataclasses import dataclass, field
from datetime import datetime

import regex

from common.files import UsageError
from data.records import LONGEST

NESTING = 8  # macros within each other; deeper ones stay as they are
SCAN_DEPTH = 4  # messages searched for keys, unless the lorebook says otherwise
TOKEN_BUDGET = 2048  # of all entries, likewise
DEPTH = 4  # of a note that is inserted into the conversation, unless it says otherwise
ROUNDS = 10  # of recursive scanning
MOST_SEARCHED = 10**9  # characters, over all keys and rounds: about a second
LONGEST_REGEX, MOST_REPEATS, SECONDS = 500, 1000, 1.0  # of a regex key; SECONDS: of all together

# ---- macros ------------------------------------------------------------------------------------------------


class Macros:
    """Expands the macros of a card's texts, once: what a macro is replaced by is not searched for macros.

    char, user: the two names. seed: of what `random` and `roll` draw, the same in a text every time; `pick`
    does not depend on it. Unknown macros stay as they are. UsageError where the replacements are too long.
    """

    def __init__(self, char, user, seed=0):
        now = datetime.now()
        self.fields = {"char": char, "bot": char, "user": user, "newline": "\n"}
        self.fields |= {"time": f"{now:%H:%M}", "date": f"{now:%Y-%m-%d}"}
        self.seed, self.written = seed, 0  # characters

    def expand(self, text, scanning=False, **fields):
        """The text as prompts have it, or (scanning) as it is searched for keys: with the hidden ones."""
        if "{{" not in text and "<" not in text:
            return text.replace("\r\n", "\n")
        rng = random.Random(f"{self.seed}|{text}")
        parts = re.split(r"\{\{trim\}\}", text.replace("\r\n", "\n"), flags=re.IGNORECASE)
        last = len(parts) - 1
        parts = [part.lstrip("\n") if i else part for i, part in enumerate(parts)]
        parts = [part.rstrip("\n") if i < last else part for i, part in enumerate(parts)]
        open_macros = [[]]  # the text so far, then that of each macro begun and not ended
        for part in re.split(r"(\{\{|\}\}|<(?:bot|char|user)>)", "".join(parts), flags=re.IGNORECASE):
            if part == "{{" and len(open_macros) <= NESTING:
                open_macros.append([])
            elif part == "}}" and len(open_macros) > 1:
                body = "".join(open_macros.pop())
                value = self.value(body, rng, scanning, fields)
                open_macros[-1].append("{{" + body + "}}" if value is None else self.counted(value))
            elif part[:1] == "<" and (value := self.fields.get(part[1:-1].lower())) is not None:
                open_macros[-1].append(self.counted(value))
            else:
                open_macros[-1].append(part)
        return "{{".join("".join(parts) for parts in open_macros)

    def counted(self, value):
        self.written += len(value)
        if self.written > LONGEST:
            raise UsageError(f"the card's macros write more than {LONGEST:,} characters")
        return value

    def value(self, body, rng, scanning, fields):
        """What `{{body}}` is replaced by; None where it is no macro."""
        if body.startswith("//"):
            return ""
        name, colon, argument = re.fullmatch(r"\s*(\w*)\s*(:{0,2})(.*)", body, re.DOTALL).groups()
        name, argument = name.lower(), argument.strip()
        if not colon:
            return {**self.fields, **fields}.get(name) if not argument else None
        if name in ("random", "pick"):
            rng = rng if name == "random" else random.Random(f"{self.fields['char']}|{body}")
            options = argument.split("::") if "::" in argument else re.split(r"(?<!\\),", argument)
            return rng.choice(options).replace("\\,", ",").strip()
        if name == "roll" and (dice := re.fullmatch(r"(?:(\d{1,3})?d)?0*([1-9]\d{0,8})", argument, re.I)):
            return str(sum(rng.randint(1, int(dice[2])) for _ in range(int(dice[1] or 1))))
        values = {"reverse": argument[::-1], "hidden_key": argument if scanning else "", "comment": ""}
        return values.get(name)


# ---- the lorebook ------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """An entry of a lorebook. keys, excluded: any of them; required: any of each."""

    content: str
    keys: list
    required: list = field(default_factory=list)
    excluded: list = field(default_factory=list)
    case_sensitive: bool = False
    use_regex: bool = False
    constant: bool = False
    scan_depth: int = SCAN_DEPTH
    order: float = 0
    priority: float = 0
    place: str | int = "after"  # of PLACES, or a depth in the conversation


def entries_of(book):
    """The enabled entries of a `character_book`, in the order of insertion."""
    entries = [entry for value in _list(book.get("entries")) if (entry := _entry(value, book))]
    return sorted(entries, key=lambda entry: entry.order)


def _entry(value, book):
    """The Entry of a JSON object; None where it is disabled, empty, or no entry."""
    value = value if isinstance(value, dict) else {}
    own = value.get("extensions") if isinstance(value.get("extensions"), dict) else {}
    said, content = decorators(value["content"] if isinstance(value.get("content"), str) else "")
    never = "dont_activate" in said and "activate" not in said
    if never or not content or value.get("enabled") is False:
        return None
    entry = Entry(content, _texts(value.get("keys")), excluded=said.get("exclude_keys", []))
    secondary = _texts(value.get("secondary_keys")) if value.get("selective") else []
    entry.required = [keys for keys in (secondary, said.get("additional_keys")) if keys]
    entry.case_sensitive = value.get("case_sensitive") is True
    entry.use_regex = value.get("use_regex") is True
    entry.constant = value.get("constant") is True or "activate" in said
    entry.scan_depth = said.get("scan_depth", int(_number(book.get("scan_depth"), SCAN_DEPTH)))
    entry.order = _number(value.get("insertion_order"), 0)
    entry.priority = _number(value.get("priority"), entry.order)
    if own.get("position") == 4:  # SillyTavern's "at depth"
        entry.place = max(0, int(_number(own.get("depth"), DEPTH)))
    elif own.get("position", value.get("position")) in (0, "before_char"):
        entry.place = "before"
    entry.place = said.get("position", said.get("depth", entry.place))
    return entry


PLACES = ("before", "after", "scenario")  # the description and the personality; at the end of the scenario
POSITIONS = {"before_desc": "before", "after_desc": "after", "personality": "after", "scenario": "scenario"}
DECORATORS = {  # name: its value, or None where the text is none
    "activate": lambda text: True,
    "dont_activate": lambda text: True,
    "depth": lambda text: int(text) if re.fullmatch(r"\d{1,9}", text) else None,
    "scan_depth": lambda text: int(text) if re.fullmatch(r"\d{1,9}", text) else None,
    "position": POSITIONS.get,
    "additional_keys": lambda text: _texts(text) or None,
    "exclude_keys": lambda text: _texts(text) or None,
}


def decorators(content):
    """({name: value}, the content without them) of the lines `@@name value` at the top of an entry.

    A line `@@@name value` counts where the one above it does not, being unknown or without a proper value.
    """
    found, understood, lines = {}, True, content.split("\n")
    for number, line in enumerate(lines):
        match = re.fullmatch(r"(@@@?)(\w+)\b(.*)", line.strip())
        if line.strip() and not match:
            return found, "\n".join(lines[number:]).strip()
        if match and not (match[1] == "@@@" and understood):
            value = DECORATORS.get(match[2], lambda text: None)(match[3].strip())
            understood = value is not None
            if understood:
                found.setdefault(match[2], value)
    return found, ""


def called_up(book, heard, macros, count):
    """The entries that a conversation calls up: (place, text) pairs in the order of insertion.

    heard: the texts of its messages, the latest last. count: text -> number of tokens. Of entries beyond the
    lorebook's token budget those of the lowest priority are left out.
    """
    search, entries, found = Search(heard, macros), entries_of(book), []
    waiting = entries
    for _ in range(ROUNDS if book.get("recursive_scanning") is True else 1):
        new = [entry for entry in waiting if entry.constant or search.finds(entry)]
        if not new:
            break
        chosen = {id(entry) for entry in new}
        found, waiting = found + new, [entry for entry in waiting if id(entry) not in chosen]
        search.add(new)
    budget, kept = _number(book.get("token_budget"), 0), {}
    left = budget if budget > 0 else TOKEN_BUDGET
    for entry in sorted(found, key=lambda entry: -entry.priority):
        text = macros.expand(entry.content).strip()
        left -= count(text)
        if left < 0:
            break
        kept[id(entry)] = text
    return [(entry.place, kept[id(entry)]) for entry in entries if id(entry) in kept]


class Search:
    """Looks for keys in the last messages, and in the entries they call up. What it costs is bounded: beyond
    that, nothing is found."""

    def __init__(self, heard, macros):
        self.macros, self.messages, self.recalled = macros, list(heard), []
        self.texts = {}  # (scan depth, case folded) -> what is searched
        self.left, self.seconds = MOST_SEARCHED, SECONDS

    def add(self, entries):
        self.recalled += [self.macros.expand(entry.content, scanning=True) for entry in entries]
        self.texts = {}

    def finds(self, entry):
        required = [entry.keys, *entry.required]
        if not all(any(self.has(key, entry) for key in keys) for keys in required):
            return False
        return not any(self.has(key, entry) for key in entry.excluded)

    def has(self, key, entry):
        folded = not (entry.case_sensitive or entry.use_regex)
        depth = min(entry.scan_depth, len(self.messages))
        if (depth, folded) not in self.texts:
            text = "\n".join([*self.messages[len(self.messages) - depth :], *self.recalled])
            self.texts[depth, folded] = text.casefold() if folded else text
        text = self.texts[depth, folded]
        self.left -= len(text)
        if self.left < 0:
            return False
        if entry.use_regex:
            return self.has_match(key, text, entry.case_sensitive)
        key = self.macros.expand(key)
        return (key.casefold() if folded else key) in text

    def has_match(self, pattern, text, case_sensitive):
        """Whether a pattern, plain or as `/pattern/flags`, is found; False if it is invalid or slow."""
        if len(pattern) > LONGEST_REGEX or self.seconds <= 0:
            return False
        started, flags = time.monotonic(), 0 if case_sensitive else regex.IGNORECASE
        if slashed := re.fullmatch(r"/(.+)/([a-z]*)", pattern, re.DOTALL):
            pattern, letters = slashed.groups()
            known = {"i": regex.IGNORECASE, "m": regex.MULTILINE, "s": regex.DOTALL}
            flags = sum(flag for letter, flag in known.items() if letter in letters)
        # compiling writes repeats out: `a{99}{99}{99}` would take minutes
        counts = re.findall(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}", pattern)
        repeats = math.prod(int(n) for pair in counts for n in pair if n.strip("0"))
        if repeats > MOST_REPEATS:
            return False
        try:
            return regex.search(pattern, text, flags, timeout=self.seconds / 4) is not None
        except (regex.error, TimeoutError, RecursionError, ValueError, OverflowError, MemoryError):
            return False
        finally:
            self.seconds -= time.monotonic() - started


def _list(value):
    return value if isinstance(value, list) else []


def _texts(value):
    """The texts that are not blank, of a list or of a text with commas."""
    values = value.split(",") if isinstance(value, str) else _list(value)
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


def _number(value, default):
    return value if isinstance(value, int | float) and abs(value) < 1e9 else default
