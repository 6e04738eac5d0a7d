"""What of a reply is played, and which name a next-speaker answer holds."""

import json
import re

from data.chats import END_CHAT
from data.scenes import straighten

LABEL = r"\b(?:next|speaker|answer|name|character)\b[^\n.]{0,40}?(?:\bis\b|\bbe\b|[:=\u2013\u2014-])"


OPINION = r"\b(?:think|choose|pick|say)\b(?: that)?(?: it(?:'s| is))?"


STOPS = r"(?=\s*(?:$|\n|[^\w\s]|(?:because|since|as|is|should|will|would|next)\b))"  # behind a name that is the answer


TITLES = frozenset(re.findall(r"\w+", "mr mrs ms miss sir dr lady lord madam master the and old young"))


def parse_next_speaker(text, cast):
    """A name of the cast, END_CHAT, or None, out of whatever a model wrapped around it.

    In this order: the value in a JSON object; what follows `Next speaker:` or `I think`; what the answer, or its last line,
    begins with, a reason after it aside; END_CHAT anywhere; the last whole name in it; in an answer of a few words, a part of a
    name that only one of the cast has (`Darcy`, `Mr. Bennet`).
    """
    if text.strip() in cast:
        return text.strip()
    text = straighten(text).strip()
    if value := _json_value(text):
        text = value
    names = "|".join(
        re.escape(straighten(name)) for name in sorted(cast, key=len, reverse=True)
    )  # the longest that fits
    one = rf"(?<!\w)({names}|end[ _-]?chat)(?!\w)"
    begins = rf"[\W_]*{one}{STOPS}"
    found = (
        re.findall(rf"(?:{LABEL}|{OPINION})[\W_]*{one}", text, re.IGNORECASE)
        or re.findall(rf"\A{begins}", text, re.IGNORECASE)
        or re.findall(rf"\A{begins}", text.rsplit("\n", 1)[-1], re.IGNORECASE)
        or re.findall(r"(?<!\w)(end[ _-]?chat)(?!\w)", text, re.IGNORECASE)
        or re.findall(one, text, re.IGNORECASE)
    )
    if found:
        known = {straighten(name).casefold(): name for name in reversed(cast)}
        return known.get(
            found[-1].casefold(), END_CHAT if re.match("end", found[-1], re.IGNORECASE) else None
        )
    words = re.findall(r"\w+", text.casefold())
    if len(words) > 8:
        return None
    parts = {name: set(re.findall(r"\w+", name.casefold())) & set(words) for name in cast}
    scores = sorted(((len(part), name) for name, part in parts.items() if part - TITLES), reverse=True)
    return scores[0][1] if scores and (len(scores) == 1 or scores[0][0] > scores[1][0]) else None


def _json_value(text):
    """The string in a JSON object in the text that a key calls the next speaker, or the only one; None where there is none."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        value = json.loads(found[0]) if found else None
    except (ValueError, RecursionError):
        return None
    strings = {key: v for key, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}
    fitting = [
        v for key, v in strings.items() if re.search("next|speaker|name|character|answer", key, re.IGNORECASE)
    ]
    return (fitting or [*strings.values(), None])[0]


def clean_reply(text, character, cast):
    """What an actor's reply adds to the play: its own part without its name, and without what it repeats."""
    names = "|".join(
        re.escape(straighten(name)) for name in sorted({*cast, character}, key=len, reverse=True)
    )
    heads = rf"^[ \t]*[-*#>]*[ \t]*({names})[*]*[ \t]*(\([^)\n]*\))?[ \t]*[:\uff1a][*]*[ \t]*"
    own, begin, mine = [], 0, True
    for head in re.finditer(
        heads, straighten(text), re.MULTILINE | re.IGNORECASE
    ):  # of the same length as the text
        own += [text[begin : head.start()]] if mine else []
        begin, mine = head.end(), head[1].casefold() == straighten(character).casefold()
        own += [text[slice(*head.span(2))]] if mine and head[2] else []
    own += [text[begin:]] if mine else []
    return cut_repetition("\n".join(part.strip() for part in own if part.strip()))


def cut_repetition(text):
    """Cuts what a model stuck in a loop says: long runs of letters, phrases said five times over, passages said again.

    A run of 100 letters or more keeps 20; of a sequence of 5 to 30 words five times in a row the first is kept; at the second
    occurrence of 15 words the rest goes.
    """
    text = re.sub(r"[A-Za-z]{100,}", lambda run: run[0][:20], text)
    while True:
        spans = [match.span() for match in re.finditer(r"\S+", text)]
        words = [text[first:last] for first, last in spans]
        found = next(((i, n) for i in range(len(words)) for n in range(5, 31) if repeated(words, i, n)), None)
        if found is None:
            break
        start, size = found
        end = start + 5 * size
        while words[end : end + size] == words[start : start + size]:
            end += size
        text = text[: spans[start + size - 1][1]] + text[spans[end - 1][1] :]
    seen = set()
    for start in range(len(words) - 14):
        passage = tuple(words[start : start + 15])
        if passage in seen:
            return text[: spans[start][0]].rstrip()
        seen.add(passage)
    return text


def repeated(words, start, size):
    """Whether so many words from here stand there five times in a row."""
    return (
        start + 5 * size <= len(words) and words[start : start + 5 * size] == words[start : start + size] * 5
    )
