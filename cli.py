"""What every script shares at its edges: usage errors, whole files, the terminal.

A `UsageError` is anything the person at the keyboard can put right; `run` prints it as one line and leaves with
code 2. `write_whole` writes a file that is there whole or not at all; `append_line` adds a line that a kill can only tear.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from pathlib import Path
from unicodedata import category

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

ROOT = Path(__file__).resolve().parent
OUT = ROOT / "out"  # everything that is made goes here unless --out says otherwise

stdout = Console(highlight=False, emoji=False, soft_wrap=not sys.stdout.isatty())
stderr = Console(stderr=True, highlight=False, emoji=False, soft_wrap=not sys.stderr.isatty())


class UsageError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do, in one line."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors take one line; `--help` shows the module docstring's first paragraph and an example."""

    def __init__(self, doc, example):
        super().__init__(
            description=doc.strip().split("\n\n")[0],
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        raise UsageError(f"{message} (see {self.prog} --help)")


def run(main):
    """Runs `main()`, turning usage errors into one line and exit code 2, and Ctrl-C into exit code 130.

    Of the ranks on a machine only the first speaks.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a terminal's encoding lacks is a question mark, not an error
            stream.reconfigure(errors="replace")
    try:
        sys.exit(main())
    except UsageError as error:
        if first:
            stderr.print("error:", style="bold red", end=" ")
            note(" ".join(str(error).split()))
        sys.exit(2)
    except OSError as error:  # a disk that is full, a directory where a file should be, no permission
        if isinstance(error, BrokenPipeError):  # the reader of our stdout (head, less) has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        if first:
            stderr.print("error:", style="bold red", end=" ")
            note(f"{error.filename2 or error.filename or 'system'}: {error.strerror or error}")
        sys.exit(2)
    except KeyboardInterrupt as error:
        if first:
            note(f"\nstopped. {error}")
        sys.exit(130)


def note(message):
    """A plain message on stderr."""
    stderr.print(plain(message), markup=False)


def progress(*columns, **kwargs):
    """A progress bar on stderr that vanishes when done, and stays silent where stderr is not a terminal."""
    columns = columns or (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal, **kwargs)


@contextlib.contextmanager
def write_whole(path, mode="w"):
    """Opens a temporary neighbour of `path`; on success it is flushed, synced and renamed to `path`, else removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)
        temporary.unlink(missing_ok=True)
        raise


def read_text(path):
    """The text of a file the user named, or a UsageError that says why not."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if not text.strip():
        raise UsageError(f"{path}: the file is empty")
    return text


def read_json(path, kind=dict):
    """The JSON of a file the user named, of the given kind (or kinds), or a UsageError that says why not."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except (RecursionError, ValueError) as error:  # too deep, or an integer of thousands of digits
        raise UsageError(f"{path}: JSON that cannot be read ({error})") from None
    if not isinstance(value, kind):
        raise UsageError(f"{path}: holds a {type(value).__name__} where something else is expected")
    return value


def read_lines(path, keys):
    """The objects of a JSONL file of ours, each with these keys; [] where there is no file.

    A torn last line, as a kill leaves it, is left out; anything else that is not such an object is a UsageError.
    """
    *whole, last = Path(path).read_bytes().split(b"\n") if Path(path).exists() else [b""]
    read = []
    for number, line in enumerate([*whole, last] if last else whole, 1):
        try:
            read.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number > len(whole):
                break
            raise UsageError(f"{path}: line {number} is not JSON ({error}); mend or remove it") from None
        if not isinstance(read[-1], dict) or not read[-1].keys() >= set(keys):
            raise UsageError(f"{path}: line {number} is not an object with {', '.join(keys)}; mend or remove it")
    return read


def append_line(path, value):
    """Adds a JSON value as a line to a file, on the disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_lines(path, values):
    """Writes a JSONL file whole."""
    with write_whole(path) as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def make_dir(path):
    """Creates an output directory, or says why it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot make this directory: {error.strerror}; choose another --out") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"{path}: not writable; choose another --out")
    return Path(path)


# ---- what is said on stage ----------------------------------------------------------------------------------------------

THOUGHT, ACTION = "dim", "italic"


def plain(text):
    """Text without the control characters that could move a cursor, ring a bell, change colours or the direction of a line."""
    text = text.replace("\u00ad", "")  # where a word may be broken: no sign of its own
    return "".join(c if c.isprintable() or c in "\n\t\u200c\u200d" or category(c) == "Zs" else "\ufffd" for c in text)


def put(text, style=""):
    """Text on stdout as it is, without a line end; styled where stdout is a terminal."""
    if stdout.is_terminal:
        stdout.print(Text(plain(text), style, tab_size=8), end="", soft_wrap=True)
    else:
        sys.stdout.write(plain(text))
    sys.stdout.flush()


class Painter:
    """Styles a message as it comes, piece by piece, by the rule of data/channels.py: thoughts dim, actions in italics."""

    def __init__(self):
        self.thinking = self.acting = 0  # how many brackets are open

    def spans(self, text):
        """The next piece of the message as (text, style) pairs."""
        for part in re.split(r"([\[\]()])", plain(text)):
            self.thinking += part == "["
            self.acting += part == "(" and not self.thinking
            yield part, THOUGHT if self.thinking else ACTION if self.acting else ""
            self.thinking -= part == "]" and self.thinking > 0
            self.acting -= part == ")" and self.acting > 0 and not self.thinking


def lines(prompt, keep=False):
    """Lines typed by a person or piped in, stripped, until an empty one or the end; with keep as they are, until the end.

    The prompt shows on terminals only.
    """
    while True:
        try:
            line = input(prompt if sys.stdin.isatty() else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin: not UTF-8 text (byte {error.start} of a line)") from None
        if not (keep or line.strip()):
            return
        yield line if keep else line.strip()
