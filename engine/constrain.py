"""JSON of a given schema and nothing else: which tokens may come next.

    grammar = Grammar(schema, Vocabulary(tokenizer))
    ids, costs = grammar.allowed(state)          # the tokens that may follow, and what closing the text takes after each

A schema becomes a stack of frames that accepts a text byte by byte; a token may follow if all its bytes are accepted. The
stack is a plain tuple, the top frame last, so that states can be compared, kept and gone back to:

    ("text", options)                    one of these byte strings
    ("string", escaped)                  the inside of a JSON string, to its closing quote
    ("integer", low, high, digits)       an integer within bounds, these digits of it written
    ("items", frames, low, high, n)      the rest of an array after n elements, to its closing bracket

The subset: objects (every property, in the schema's order), arrays (minItems, maxItems), strings, integers (minimum, maximum),
booleans, null, enum and const. Layout is that of `json.dumps`. A state's cost is the number of bytes of the shortest text that
closes it, and since each byte of it is a token, never less than the tokens needed: tokens whose cost fits into what is left of
the budget always lead to a whole document.
"""

import functools
import json
import re
from bisect import bisect_left

import numpy as np

from common.files import UsageError

STRING, QUOTE = ("string", False), ord('"')
INSIDE = re.compile(rb'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*(\\)?')  # as far as a text stays in a string
DIGITS = 15  # of an integer without bounds
KNOWN = {"object": {"properties", "required", "additionalProperties"}, "array": {"items", "minItems", "maxItems"},
         "string": set(), "integer": {"minimum", "maximum"}, "boolean": set(), "null": set()}  # fmt: skip
ANYWHERE = {"type", "title", "description", "$schema"}


class Vocabulary:
    """The bytes of a tokenizer's tokens, sorted: words[i] belongs to ids[i]. Special tokens have none."""

    def __init__(self, tokenizer):
        words = sorted((word, i) for i in range(tokenizer.vocab_size) if (word := tokenizer.token_bytes(i)))
        self.words, self.ids = [word for word, _ in words], np.array([i for _, i in words])
        self.bytes = {
            word[0] for word in self.words if len(word) == 1
        }  # any text of these has a token for each byte
        if missing := {*range(32, 127)} - self.bytes:
            signs = ", ".join(repr(chr(byte)) for byte in sorted(missing)[:3])
            raise UsageError(f"this tokenizer has no token for {signs}, so JSON cannot be promised")

    def walk(self, state):
        """(index, state after it) for the words that may come in a state, byte by byte, so each beginning once."""
        words, todo = self.words, [(state, 0, len(self.words), 0)]
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
        """What words do inside a string, [not after a backslash, after one]: see `within`."""
        return [self.within(escaped) for escaped in (False, True)]

    def within(self, escaped):
        """Indices of the words that stay in the string; for each, whether it ends on a backslash; and for each text that
        follows a closing quote within a word, the indices of such words."""
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
        self.start = (
            *frames[::-1],
            ("text", (b"", b" ")),
        )  # SentencePiece begins words, thus texts, with a space
        self.known = {}

    def allowed(self, state):
        """(ids, costs): the tokens that may come in a state and the cost of the state each leads to, int arrays."""
        if state not in self.known:
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
            self.known[state] = words.ids[indices], costs
        return self.known[state]


def literals(frames):
    """Every byte string that a stack of frames may have to write as it is."""
    for kind, *fields in frames:
        if kind in ("text", "items"):
            yield from fields[0] if kind == "text" else literals(fields[0])


def advance(state, text):
    """The state after these bytes, None where they do not fit."""
    for byte in text:
        state = step(state, byte)
        if state is None:
            return None
    return state


def step(state, byte):
    """The state after one byte, None where it does not fit."""
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
    """Bytes of the shortest text that closes a state; where that is 0, the text may end."""
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
    """How many digits an integer in [low, high] needs at least to follow these, None where none begins with them."""
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
    least, most = (-high, -low) if negative else (low, high)
    for more in range(1 if number == b"0" else DIGITS + 4):
        first = int(number) * 10**more
        if first <= most and first + 10**more > least:
            return more
    return None


def compile_schema(schema, path="schema"):
    """A schema as a tuple of frames, the first to be written first."""
    if not isinstance(schema, dict):
        raise UsageError(f"json_schema: {path} is {schema!r}, not an object")
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if not isinstance(values, list) or not values:
            raise UsageError(f"json_schema: {path}.enum is {values!r}, not a list with something in it")
        return (text(*sorted({as_json(value, path) for value in values})),)
    kind = schema.get("type")
    if not isinstance(kind, str) or kind not in KNOWN:
        raise UsageError(f"json_schema: {path}.type is {kind!r}; there are {', '.join(KNOWN)}, or give enum")
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
        raise UsageError(f"json_schema: {path} goes from {low!r} to {high!r}; integers in order are needed")


def text(*options):
    return "text", tuple(option.encode() for option in options)
