"""Constrained decoding: which tokens keep a text on the way to a JSON document of a given schema.

    grammar = Grammar(schema, Vocabulary(tokenizer))
    ids, costs = grammar.allowed(state)     # the tokens that may follow, and the cost of the state after each

A schema becomes a stack of frames that accepts a text byte by byte; a token may follow if all its bytes are
accepted. A state is that stack as a tuple, the top frame last, so that states can be compared and kept:

    ("text", options)                    one of these byte strings
    ("string", escaped)                  the inside of a JSON string, to its closing quote
    ("integer", low, high, digits)       an integer within bounds, of which these digits are written
    ("items", frames, low, high, n)      the rest of an array after n elements, to its closing bracket

Supported: objects (every property, in the schema's order), arrays (minItems, maxItems), strings, integers
(minimum, maximum), booleans, null, enum and const. The layout is that of `json.dumps`. The cost of a state is
the number of bytes of the shortest text that completes the document. Each of these bytes is a token, so the
cost is never less than the tokens needed: a text that only takes tokens whose cost fits into what is left of
its token budget always ends as a whole document.
"""

import functools
import json
import re
from bisect import bisect_left

import numpy as np

from common.files import UsageError

STRING, QUOTE = ("string", False), ord('"')
INSIDE = re.compile(rb'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*(\\)?')  # as far as a text stays within a string
DIGITS = 15  # the most an integer without bounds has
MAX_STATES = 256  # whose allowed tokens are kept: at most 16 bytes for each token of the vocabulary
KNOWN = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": set(),
    "integer": {"minimum", "maximum"},
    "boolean": set(),
    "null": set(),
}
ANYWHERE = {"type", "title", "description", "$schema"}


class Vocabulary:
    """The bytes of a tokenizer's tokens, sorted: words[i] belongs to ids[i]. Special tokens have none."""

    def __init__(self, tokenizer):
        words = sorted((word, i) for i in range(tokenizer.vocab_size) if (word := tokenizer.token_bytes(i)))
        self.words, self.ids = [word for word, _ in words], np.array([i for _, i in words])
        self.known = {}  # state -> what `Grammar.allowed` says
        self.bytes = {word[0] for word in self.words if len(word) == 1}  # those that are tokens
        if missing := {*range(32, 127)} - self.bytes:
            characters = ", ".join(repr(chr(byte)) for byte in sorted(missing)[:3])
            raise UsageError(
                f"JSON needs a token for each printable character; this tokenizer lacks {characters}"
            )

    def walk(self, state):
        """(index, state after it) of each word that a state accepts; a common beginning is stepped through
        once."""
        words, todo = self.words, [(state, 0, len(self.words), 0)]  # words low to high share depth bytes
        while todo:
            state, low, high, depth = todo.pop()
            while low < high and len(words[low]) == depth:
                yield low, state
                low += 1
            while low < high:
                byte = words[low][depth]
                end = (
                    bisect_left(words, words[low][:depth] + bytes([byte + 1]), low, high)
                    if byte < 255
                    else high
                )
                after = step(state, byte)
                if after is not None:
                    todo.append((after, low, end, depth + 1))
                low = end

    @functools.cached_property
    def inside(self):
        """`within` for both states of a string: [not after a backslash, after one]."""
        return [self.within(escaped) for escaped in (False, True)]

    def within(self, escaped):
        """Indices of the words that stay in the string; for each, whether it ends on a backslash; and for
        each text that follows a closing quote within a word, the indices of such words."""
        stay, ends, leave = [], [], {}
        for index, word in enumerate(self.words):
            word = b"\\" * escaped + word
            match = INSIDE.match(word)
            if match.end() == len(word):
                stay.append(index)
                ends.append(match[1] is not None)
            elif match[1] is None and word[match.end()] == QUOTE:
                leave.setdefault(word[match.end() + 1 :], []).append(index)
        return np.array(stay, int), np.array(ends, int), leave


class Grammar:
    """A JSON schema over a Vocabulary. UsageError names what is not in the subset."""

    def __init__(self, schema, vocabulary):
        self.vocabulary = vocabulary
        frames = compile_schema(schema)
        for option in literals(frames):
            if not vocabulary.bytes.issuperset(option):
                raise UsageError(f"json_schema: this tokenizer has no tokens to write {option.decode()}")
        # SentencePiece begins words, thus texts, with a space
        self.start = *frames[::-1], ("text", (b"", b" "))

    def allowed(self, state):
        """(ids, costs): the tokens that a state accepts and the cost of the state after each, int arrays."""
        known = self.vocabulary.known
        if state not in known:
            words, out = self.vocabulary, []
            stay = ends = np.array([], int)
            if state and state[-1][0] == "string":
                stay, ends, leave = words.inside[state[-1][1]]
                for text, indices in leave.items():
                    if (after := advance(state[:-1], text)) is not None:
                        out += [(i, cost(after)) for i in indices]
            else:
                out = [(i, cost(after)) for i, after in words.walk(state)]
            indices = np.concatenate((stay, np.array([i for i, _ in out], int)))
            costs = np.concatenate((ends + cost((*state[:-1], STRING)), np.array([c for _, c in out], int)))
            if len(known) >= MAX_STATES:
                known.pop(next(iter(known)))
            known[state] = words.ids[indices], costs
        return known[state]


def literals(frames):
    """Every byte string that a stack of frames may have to write as it is."""
    for kind, *fields in frames:
        if kind in ("text", "items"):
            yield from fields[0] if kind == "text" else literals(fields[0])


def advance(state, text):
    """The state after these bytes; None if they are not accepted."""
    for byte in text:
        state = step(state, byte)
        if state is None:
            return None
    return state


def step(state, byte):
    """The state after one byte; None if it is not accepted."""
    while state:
        (kind, *fields), rest = state[-1], state[:-1]
        if kind == "text":
            left = tuple(option[1:] for option in fields[0] if option[:1] == bytes([byte]))
            if left:
                return rest if left == (b"",) else (*rest, ("text", left))
            if b"" not in fields[0]:
                return None
            state = rest
        elif kind == "string":
            if fields[0]:
                return (*rest, STRING) if byte in b'"\\/bfnrt' else None
            if byte in b'"\\':
                return rest if byte == QUOTE else (*rest, ("string", True))
            return state if byte >= 32 else None
        elif kind == "integer":
            low, high, digits = fields
            longer = digits + bytes([byte])
            if digits_left(low, high, longer) is not None:
                return (*rest, ("integer", low, high, longer))
            if digits_left(low, high, digits) != 0:
                return None
            state = rest
        else:
            frames, low, high, n = fields
            if byte == ord("]"):
                return rest if n >= low else None
            if n == high:
                return None
            n_after = n + 1 if high is not None or n < low else max(n, 1)
            comma = (("text", (b", ",)),) if n else ()
            state = (*rest, ("items", frames, low, high, n_after), *frames[::-1], *comma)
    return None


def cost(state):
    """Bytes of the shortest text that completes a state; at 0 the text may end."""
    return sum(map(frame_cost, state))


@functools.lru_cache(maxsize=65_536)
def frame_cost(frame):
    kind, *fields = frame
    if kind == "text":
        return min(map(len, fields[0]))
    if kind == "string":
        return 1 + fields[0]
    if kind == "integer":
        return digits_left(*fields)
    frames, low, _, n = fields
    missing = max(0, low - n)
    return 1 + missing * cost(frames) + 2 * (missing - (n == 0 and missing > 0))


@functools.lru_cache(maxsize=65_536)
def digits_left(low, high, digits):
    """The fewest digits that complete an integer in [low, high] after these; None if none begins with
    them."""
    if digits in (b"", b"-"):
        options = [n for n in (low, high, 0, -1) if low <= n <= high and (not digits or n < 0)]
        return min(len(str(n)) for n in options) - len(digits) if options else None
    negative, number = digits[:1] == b"-", digits.lstrip(b"-")
    if (
        not number.isdigit()
        or len(digits) - len(number) > 1
        or (number[:1] == b"0" and (len(number) > 1 or negative))
    ):
        return None
    smallest, largest = (-high, -low) if negative else (low, high)
    for more in range(1 if number == b"0" else DIGITS + 4):
        first = int(number) * 10**more
        if first <= largest and first + 10**more > smallest:
            return more
    return None


def compile_schema(schema, path="schema"):
    """A schema as a tuple of frames, in the order of writing. UsageError names what is not supported."""
    if not isinstance(schema, dict):
        raise UsageError(f"json_schema: {path} is {schema!r}, not an object")
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if not isinstance(values, list) or not values:
            raise UsageError(f"json_schema: {path}.enum is {values!r}, not a list of at least one value")
        return (text(*sorted({as_json(value, path) for value in values})),)
    kind = schema.get("type")
    if not isinstance(kind, str) or kind not in KNOWN:
        raise UsageError(
            f"json_schema: {path}.type is {kind!r}; supported are {', '.join(KNOWN)}, or give enum"
        )
    if unknown := sorted(schema.keys() - KNOWN[kind] - ANYWHERE):
        raise UsageError(f"json_schema: {path}.{unknown[0]} is not supported")
    if kind == "object":
        frames, before, properties = [], "{", schema.get("properties", {})
        if not isinstance(properties, dict):
            raise UsageError(f"json_schema: {path}.properties is {properties!r}, not an object")
        for name, value in properties.items():
            frames += [text(f"{before}{as_json(name, path)}: "), *compile_schema(value, f"{path}.{name}")]
            before = ", "
        return (*frames, text("}" if frames else "{}"))
    if kind == "array":
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        check_bounds(path, low, high if high is not None else low)
        return text("["), ("items", compile_schema(schema.get("items"), f"{path}.items"), low, high, 0)
    if kind == "integer":
        low, high = schema.get("minimum", -(10**DIGITS) + 1), schema.get("maximum", 10**DIGITS - 1)
        check_bounds(path, low, high)
        return (("integer", low, high, b""),)
    return {"string": (text('"'), STRING), "boolean": (text("true", "false"),), "null": (text("null"),)}[kind]


def as_json(value, path):
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        written.encode()
        return written
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"json_schema: {path}: {value!r} cannot be written as JSON ({error})") from None


def check_bounds(path, low, high):
    if not (type(low) is type(high) is int and low <= high and max(abs(low), abs(high)) < 10 ** (DIGITS + 3)):
        raise UsageError(
            f"json_schema: {path} has bounds {low!r} and {high!r}; integers are needed, the lower first"
        )


def text(*options):
    return "text", tuple(option.encode() for option in options)
