"""Reads general SFT data: ShareGPT rows (`conversations` of `from` and `value`) and `messages` rows (of `role` and `content`).

JSONL is read line by line, so a file may be larger than memory; a `.json` file is one list, read whole. A row that cannot be
used is dropped, and counted and located in the report, as books are (data/scenes.py).
"""

import json
from pathlib import Path

from common.files import UsageError, read_json
from data.scenes import LONGEST, mend_surrogates, text_of

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
LONGEST_LINE = 2**25  # bytes


def read_general(path, report):
    """Yields (messages, where, share of the file done) for each usable row. UsageError where there is none, or no file."""
    path, found = Path(path), False
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    for row, where, done in json_rows(path, report) if path.suffix == ".json" else jsonl_rows(path, report):
        messages = row_messages(row, where, report)
        if messages:
            found = True
            yield messages, where, done
    if not found:
        raise UsageError(f"{path}: no usable row in it ({'; '.join(report.lines()) or 'it is empty'})")


def json_rows(path, report):
    rows = read_json(path, list)
    for i, row in enumerate(rows):
        yield row, f"{path}: row {i}", (i + 1) / len(rows)


def jsonl_rows(path, report):
    size, number, read = path.stat().st_size, 0, 0
    with open(path, "rb") as file:
        while line := file.readline(LONGEST_LINE):
            number, read = number + 1, read + len(line)
            where, ended = f"{path}: line {number}", line.endswith(b"\n")
            if not ended and len(line) == LONGEST_LINE:
                while (more := file.readline(LONGEST_LINE)) and not more.endswith(b"\n"):
                    read += len(more)
                report.note(f"dropped: line of more than {LONGEST_LINE:,} bytes", where)
            elif line.strip():
                try:
                    yield json.loads(line.decode("utf-8-sig")), where, read / size
                except UnicodeDecodeError:
                    report.note("dropped: line that is not UTF-8", where)
                except (ValueError, RecursionError):
                    report.note(
                        "dropped: line that is not JSON" if ended else "dropped: last line, torn", where
                    )


def row_messages(row, where, report):
    """The messages of a row, from the first to the last answer; None where the row cannot be used."""

    def dropped(why):
        report.note(f"dropped: row {why}", where)

    if not isinstance(row, dict):
        return dropped("that is not an object")
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or not turns:
        return dropped("without `messages` or `conversations`")
    if isinstance(row.get("id"), (str, int)) and not report.first(("row", row["id"])):
        return dropped("whose `id` was read before")
    messages = [{"role": "system", "content": row["system"]}] if text_of(row.get("system")) else []
    for turn in turns:
        if not isinstance(turn, dict):
            return dropped("with a message that is not an object")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            return dropped("with a role that is not system, user (human) or assistant (gpt)")
        if not isinstance(content, str):
            return dropped("with a message that is not text")
        if not content.strip():
            return dropped("with an empty message")
        if len(content) > LONGEST:
            return dropped(f"with a message of more than {LONGEST:,} characters")
        messages.append({"role": ROLES[role], "content": content})
    if any(message["role"] == "system" for message in messages[1:]):
        return dropped("with a system text that is not the first message")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return dropped("without an answer")
    if answers[-1] < len(messages) - 1:
        report.note("repaired: what follows the last answer left out", where)
    return mend_surrogates(messages[: answers[-1] + 1], where, report)
