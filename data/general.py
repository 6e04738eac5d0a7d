"""Reads general SFT data: ShareGPT rows (`conversations` of `from` and `value`) and `messages` rows (of
`role` and `content`).

A file is a JSON list or JSON lines. Rows that cannot be used are dropped, counted and located in the report.
"""

from pathlib import Path

from common.files import UsageError
from data.records import LONGEST, mend_surrogates, read_rows

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def read_general(path, report):
    """Yields (messages, place, share of the file read) for each usable row. UsageError if there is none."""
    path, found = Path(path), False
    for _, row, where, done in read_rows(path, report):
        problem, messages = row_messages(row, report)
        if problem:
            report.note(f"dropped: row {problem}", where)
            continue
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if answers[-1] < len(messages) - 1:
            report.note("repaired: messages after the last answer left out", where)
        found = True
        yield mend_surrogates(messages[: answers[-1] + 1], where, report), where, done
    if not found:
        raise UsageError(f"{path}: no usable row in it ({'; '.join(report.lines()) or 'it is empty'})")


def row_messages(row, report):
    """(what is wrong with a row, or None; its messages)."""
    if not isinstance(row, dict):
        return "that is not an object", None
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "without `messages` or `conversations`", None
    if isinstance(row.get("id"), (str, int)) and not report.is_new(("row", row["id"])):
        return "whose `id` was read before", None
    messages, system = [], row.get("system")
    if isinstance(system, str) and system.strip():
        messages.append({"role": "system", "content": system})
    for turn in turns:
        if not isinstance(turn, dict):
            return "with a message that is not an object", None
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            return "with a role that is not system, user (human) or assistant (gpt)", None
        if not isinstance(content, str):
            return "with a message that is not text", None
        if not content.strip():
            return "with an empty message", None
        if len(content) > LONGEST:
            return f"with a message of more than {LONGEST:,} characters", None
        messages.append({"role": ROLES[role], "content": content})
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        return "with a system text that is not the first message", None
    return (None, messages) if "assistant" in roles else ("without an answer", None)
