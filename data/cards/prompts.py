"""What of a card goes into prompts: macros expanded, the lorebook entries that a conversation calls up."""

import math
import random
import re
import time
from datetime import datetime

import regex

from common.files import UsageError
from data.records import LONGEST

NESTING = 8  # macros within each other; deeper ones stay as they are
SCAN_DEPTH = 4  # messages searched for keys, unless the lorebook says otherwise
TOKEN_BUDGET = 2048  # of all entries, likewise
DEPTH = 4  # of a note that is inserted into the conversation, unless it says otherwise
MOST_SEARCHED = 10**9  # characters, over all keys: about a second
LONGEST_REGEX, MOST_REPEATS, SECONDS = 500, 1000, 1.0  # of a regex key; SECONDS: of all together

# ---- macros ------------------------------------------------------------------------------------------------


class Macros:
    """Expands the macros of a card's texts, once: what a macro is replaced by is not searched for macros.

    char, user: the two names. seed: of what `random` and `roll` draw, the same in a text every time; `pick`
    does not depend on it. Unknown macros stay as they are. UsageError where the replacements are too long.
    """

    def __init__(self, char, user, seed=0):
        now = datetime.now()
        self.fields = {"char": char, "bot": char, "user": user, "persona": "", "newline": "\n"}
        self.fields |= {"time": f"{now:%H:%M}", "date": f"{now:%Y-%m-%d}"}
        self.seed, self.written = seed, 0  # characters

    def expand(self, text, **fields):
        """The text as prompts have it. fields: further macros and their values."""
        text, rng = text.replace("\r\n", "\n"), random.Random(f"{self.seed}|{text}")
        text = re.sub(r"(?i)(?:(?<!\n)\n++)?\{\{trim\}\}\n*", "", text)
        open_macros = [[]]  # the text so far, then that of each macro begun and not ended
        for part in re.split(r"(?i)(\{\{|\}\}|<(?:bot|char|user)>)", text):
            if part == "{{" and len(open_macros) <= NESTING:
                open_macros.append([])
                continue
            value = None
            if part == "}}" and len(open_macros) > 1:
                body = "".join(open_macros.pop())
                value, part = self.value(body, rng, fields), "{{" + body + "}}"
            elif part.lower() in ("<bot>", "<char>", "<user>"):
                value = self.fields.get(part[1:-1].lower())
            self.written += len(value or "")
            if self.written > LONGEST:
                raise UsageError(f"the card's macros write more than {LONGEST:,} characters")
            open_macros[-1].append(part if value is None else value)
        return "{{".join("".join(parts) for parts in open_macros)

    def value(self, body, rng, fields):
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
        return {"reverse": argument[::-1], "hidden_key": "", "comment": ""}.get(name)


# ---- the lorebook ------------------------------------------------------------------------------------------

PLACES = ("before", "after", "scenario")  # the description and the personality; at the end of the scenario
POSITIONS = {"before_desc": "before", "after_desc": "after", "personality": "after", "scenario": "scenario"}


def called_up(book, heard, macros, count):
    """The entries of a `character_book` that a conversation calls up: (place, text) pairs in the order of
    insertion. A place is one of PLACES, or a depth in the conversation.

    heard: the texts of its messages, the latest last. count: text -> number of tokens. Of entries beyond the
    lorebook's token budget those of the lowest priority are left out.
    """
    depth = min(max(0, int(number(book.get("scan_depth"), SCAN_DEPTH))), len(heard))
    search = Search("\n".join(heard[len(heard) - depth :]), macros)
    values = book.get("entries") if isinstance(book.get("entries"), list) else []
    found = [entry for value in values if isinstance(value, dict) and (entry := read_entry(value, search))]
    budget, kept = number(book.get("token_budget"), 0), []
    left = budget if budget > 0 else TOKEN_BUDGET
    for _, order, i in sorted((-priority, order, i) for i, (priority, order, *_) in enumerate(found)):
        text = macros.expand(found[i][3]).strip()
        left -= count(text)
        if left < 0:
            break
        kept.append((order, i, found[i][2], text))
    return [(place, text) for *_, place, text in sorted(kept)]


def read_entry(value, search):
    """(priority, order, place, content) of a lorebook's entry; None where it is not called up."""
    own = value.get("extensions") if isinstance(value.get("extensions"), dict) else {}
    found, content = decorators(value["content"] if isinstance(value.get("content"), str) else "")
    if not content or value.get("enabled") is False:
        return None
    called = "dont_activate" not in found and (value.get("constant") is True or search.calls(value))
    if not (called or "activate" in found):
        return None
    place, order = "after", number(value.get("insertion_order"), 0)
    if own.get("position") == 4:  # SillyTavern's "at depth"
        place = max(0, int(number(own.get("depth"), DEPTH)))
    elif own.get("position", value.get("position")) in (0, "before_char"):
        place = "before"
    place = found.get("position", found.get("depth", place))
    return number(value.get("priority"), order), order, place, content


def decorators(content):
    """({name: value}, the content without them) of the lines `@@name value` at the top of an entry. Unknown
    ones and improper values do not count; of several the first does, so `@@@` is a fallback."""
    found, lines = {}, content.split("\n")
    for i, line in enumerate(lines):
        match = re.fullmatch(r"@@@?(\w+)\b(.*)", line.strip())
        if line.strip() and not match:
            return found, "\n".join(lines[i:]).strip()
        name, text = (match[1], match[2].strip()) if match else ("", "")
        if name in ("activate", "dont_activate"):
            found[name] = True
        elif name == "position" and text in POSITIONS:
            found.setdefault(name, POSITIONS[text])
        elif name == "depth" and re.fullmatch(r"[0-9]{1,9}", text):
            found.setdefault(name, int(text))
    return found, ""


class Search:
    """Looks for keys in a text. What all of them cost is bounded: beyond that, nothing is found."""

    def __init__(self, text, macros):
        self.text, self.folded, self.macros = text, text.casefold(), macros
        self.left, self.seconds = MOST_SEARCHED, SECONDS

    def calls(self, entry):
        """Whether an entry's keys are found: any of them and, if it is selective, any of the secondary."""
        groups = [texts(entry.get("keys"))]
        if entry.get("selective") and (secondary := texts(entry.get("secondary_keys"))):
            groups.append(secondary)
        has = self.has_match if entry.get("use_regex") is True else self.has
        return all(any(has(key, entry.get("case_sensitive") is True) for key in keys) for keys in groups)

    def has(self, key, case_sensitive):
        self.left -= len(self.text)
        if self.left < 0:
            return False
        key = self.macros.expand(key)
        return key in self.text if case_sensitive else key.casefold() in self.folded

    def has_match(self, pattern, case_sensitive):
        """Whether a pattern, plain or as `/pattern/flags`, is found; False if it is invalid or slow."""
        if len(pattern) > LONGEST_REGEX or self.seconds <= 0:
            return False
        started, flags = time.monotonic(), 0 if case_sensitive else regex.IGNORECASE
        if slashed := re.fullmatch(r"/(.+)/([a-z]*)", pattern, re.DOTALL):
            pattern, letters = slashed.groups()
            known = {"i": regex.IGNORECASE, "m": regex.MULTILINE, "s": regex.DOTALL}
            flags = sum(flag for letter, flag in known.items() if letter in letters)
        # compiling has no timeout, and writes repeats out: `a{99}{99}{99}`
        counts = re.findall(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}", pattern)
        if math.prod(int(n) for pair in counts for n in pair if n.strip("0")) > MOST_REPEATS:
            return False
        try:
            return regex.search(pattern, self.text, flags, timeout=self.seconds / 4) is not None
        except Exception:  # an invalid pattern raises what it likes
            return False
        finally:
            self.seconds -= time.monotonic() - started


def texts(value):
    """The texts of a list that are not blank."""
    values = value if isinstance(value, list) else []
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


def number(value, default):
    return value if isinstance(value, int | float) and abs(value) < 1e9 else default
