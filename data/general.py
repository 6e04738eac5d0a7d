"""Reads general SFT data: a JSON list or JSON lines of ShareGPT rows (`conversations` of `from` and `value`)
or `messages` rows (of `role` and `content`). Unusable rows are dropped and reported."""

from pathlib import Path

from common.files import UsageError
from data.records import LONGEST, mend_surrogates, read_rows

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def read_general(path, report):
    """Yields (messages, place, share of the file read) for each usable row. UsageError if there is none."""
    found = False
    for _, row, where, done in read_rows(Path(path), report):
        try:
            messages = row_messages(row, report)
        except ValueError as problem:
            report.note(f"dropped: row {problem}", where)
            continue
        length = 1 + max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        if length < len(messages):
            report.note("repaired: messages after the last answer left out", where)
        found = True
        yield mend_surrogates(messages[:length], where, report), where, done
    if not found:
        raise UsageError(f"{path}: no usable row in it ({'; '.join(report.lines()) or 'it is empty'})")


def row_messages(row, report):
    """The messages of a row, at least one of them the assistant's. ValueError for an unusable row."""
    if not isinstance(row, dict):
        raise ValueError("that is not an object")
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError("without `messages` or `conversations`")
    if isinstance(row.get("id"), (str, int)) and not report.is_new(("row", row["id"])):
        raise ValueError("whose `id` was read before")
    messages, system = [], row.get("system")
    if isinstance(system, str) and system.strip():
        messages.append({"role": "system", "content": system})
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError("with a message that is not an object")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError("with a role that is not system, user (human) or assistant (gpt)")
        if not isinstance(content, str):
            raise ValueError("with a message that is not text")
        if not content.strip():
            raise ValueError("with an empty message")
        if len(content) > LONGEST:
            raise ValueError(f"with a message of more than {LONGEST:,} characters")
        messages.append({"role": ROLES[role], "content": content})
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise ValueError("with a system text that is not the first message")
    if "assistant" not in roles:
        raise ValueError("without an answer")
    return messages
