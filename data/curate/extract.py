"""Takes plots and conversations out of chunks; a plot that a chunk cuts off goes on in the next."""

import re
from collections import Counter
from functools import partial
from operator import itemgetter

from data.curate.ask import BOOLEAN, PROMPTS, TEXT, Question, integer, many, material, record
from data.curate.chunks import headings
from data.curate.fidelity import FOUND, NEAR, Words, quote_of
from data.prompts import fill

MOTIVATIONS, MESSAGES = many(name=TEXT, motivation=TEXT), many(character=TEXT, message=TEXT)
PLOTS = record(plots=many(
    first_sentence=TEXT, last_sentence=TEXT, finished=BOOLEAN, summary=TEXT, prominence=integer(1, 100),
    key_characters=many(name=TEXT, description=TEXT, experience=TEXT),
    # last, so that of an answer that is cut off within them the beginning can be used
    conversations=many(scenario=TEXT, topic=TEXT, key_characters=MOTIVATIONS, dialogues=MESSAGES),
))  # fmt: skip


def extract(book, chunks, count, size, max_tokens):
    """Yields [Question] for each chunk; returns (plots in the order of the text, failures, notes).

    A plot that a chunk cuts off is told anew, from a passage that begins where the plot does, all of it, and
    ends with the next chunk. One that is longer than a chunk ends at the chunk's end instead. So is what
    follows the last plot of a reply, up to half a chunk: the first lines of a scene may look like nothing.
    """
    plots, held, failures, notes, start = [], [], [], Counter(), 0
    for chunk in chunks:
        passage, broken_off = book.text[start : chunk.end], "\n".join(plot["summary"] for plot in held)
        fields = {"title": book.title, "author": f" by {book.author}" if book.author else ""}
        fields["unfinished"] = fill(PROMPTS["unfinished"], {"plots": broken_off}) if held else ""
        accept = partial(read_plot, words=Words(passage), offset=start, chunk=chunk)
        label, messages = f"{book.title}: chunk {chunk.number + 1}", material("extract", passage, **fields)
        yield [question := Question(label, messages, PLOTS, max_tokens, accept)]
        if question.value is None or (question.tries > 1 and not question.value):
            reason = question.error or " ".join(question.problems) or "no plot, after unusable answers"
            failures.append({"chunk": chunk.number, "start": chunk.start, "end": chunk.end, "error": reason})
        else:
            notes["plots given up, their place or their form is wrong"] += len(question.problems)
        notes["replies repaired"] += question.repaired
        notes["replies cut off at --max-tokens"] += question.cut_off
        notes["chunks without a plot"] += question.value == [] and question.tries == 1
        new = carry_over(plots, held, question.value or [], notes)
        cut_off = [plot for plot in new if plot["state"] == "truncated" and chunk is not chunks[-1]]
        held = [plot for plot in cut_off if count(book.text[plot["start"] : chunk.end]) <= size]
        notes["plots longer than a chunk, ended with it"] += len(cut_off) - len(held)
        plots += [plot for plot in new if plot not in held]
        ends = [plot["end"] for plot in new] or [chunk.end]
        start = min([plot["start"] for plot in held] or [max(ends)])
        if not held and not 0 < count(book.text[start : chunk.end].strip()) <= size / 2:
            start = chunk.end
    found = headings(book.text)
    for plot in plots:
        plot["chapter"] = next((name for at, name in reversed(found) if at <= plot["start"]), "")
        plot["text"] = book.text[plot["start"] : plot["end"]]
    return sorted(plots, key=lambda plot: plot["start"]), failures, notes


def carry_over(plots, held, new, notes):
    """The new plots without those that were told before. A held plot that none of them continues is added to
    `plots` as it is."""
    continued = [plot for plot in held if any(overlap(plot, other) for other in new)]
    notes["plots carried over the end of a chunk"] += len(continued)
    notes["plots cut off and never continued"] += len(held) - len(continued)
    plots += [plot for plot in held if plot not in continued]
    fresh = {}
    for plot in new:
        if any(overlap(plot, p) for p in continued) or not any(overlap(plot, p) for p in plots):
            fresh.setdefault((plot["start"], plot["end"]), plot)
    notes["plots told twice, dropped"] += len(new) - len(fresh)
    return list(fresh.values())


def overlap(plot, other):
    """Whether two plots share more than half of the shorter one's text."""
    shared = min(plot["end"], other["end"]) - max(plot["start"], other["start"])
    return shared > min(plot["end"] - plot["start"], other["end"] - other["start"]) / 2


def mentions(owner):
    """[(entry, the key of its name)] of all characters in a plot, without its conversations, or in one."""
    turns = owner.get("dialogues", ())
    return [(entry, "name") for entry in owner["key_characters"]] + [(turn, "character") for turn in turns]


def read_plot(value, before, words, offset, chunk):
    """A plot in the book format, of a passage that stands at `offset` in the book; `before`: those before it.

    Each message of a character says which share of its words stands in the passage (`found`), and where
    (`at`). ValueError where the first sentence is not found, or the last one not after it.
    """
    after = before[-1]["start"] - offset if before else 0
    # a model may give plots out of their order
    share, start, _ = words.find(value["first_sentence"], after)
    if share < FOUND:
        share, start, _ = words.find(value["first_sentence"])
    share_of_last, _, end = words.find(value["last_sentence"], start or 0)
    if min(share, share_of_last) < FOUND:
        raise ValueError("first_sentence is not in the passage, or last_sentence not after it")
    talks = value["conversations"]
    for entry, key in [mention for owner in (value, *talks) for mention in mentions(owner)]:
        entry[key] = " ".join(entry[key].split())
        if entry[key] in ("", "NSP"):  # of the next-speaker model
            raise ValueError(f"{entry[key]!r} is not the name of a character")
    for talk in talks:
        talk["dialogues"] = [turn for turn in talk["dialogues"] if turn["message"].strip()]
        for turn in talk["dialogues"]:
            if quote := quote_of(turn):
                # in the plot rather than before it: "Yes" is everywhere
                share, a, b = max(words.find(quote, start), words.find(quote), key=itemgetter(0))
                turn |= {"found": round(share, 3), "not_found": share < FOUND}
                turn["at"] = None if a is None else [offset + a, offset + b]
                if not turn["not_found"] and end < b < end + NEAR:  # the last line may follow that sentence
                    end = b
    start -= len(re.search(r"[^\w\s]*$", words.text[:start])[0])
    end += len(re.match(r"[^\w\s]*", words.text[end:])[0])
    plot = {name: value[name] for name in ("summary", "prominence", "key_characters")}
    return plot | {
        "conversation": [talk for talk in talks if talk["dialogues"]],
        "state": "finished" if value["finished"] else "truncated",
        "i_chunk": chunk.number,
        "start": offset + start,
        "end": offset + end,
        "passage": [offset, chunk.end],
    }
