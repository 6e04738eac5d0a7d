"""The terminal: argument parsing, one-line errors, notes, progress bars, sanitised text."""

import argparse
import contextlib
import os
import sys
import time
from unicodedata import category

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from common.files import UsageError

stdout = Console(highlight=False, emoji=False, soft_wrap=not sys.stdout.isatty())
stderr = Console(stderr=True, highlight=False, emoji=False, soft_wrap=not sys.stderr.isatty())
EVERY = 10  # seconds between two progress lines where stderr is not a terminal


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors; `--help` shows the docstring's first paragraph and an example."""

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
    """Calls `main()` and exits: 2 after a UsageError or OSError, reported in one line; 130 after Ctrl-C.

    Under torchrun only the first rank of a machine prints.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # print `?` for what the terminal's encoding cannot show
            stream.reconfigure(errors="replace")
    try:
        sys.exit(main())
    except UsageError as error:
        fail(" ".join(str(error).split()))
    except BrokenPipeError:  # the reader of our stdout (head, less) has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # a full disk, a directory in place of a file, no permission
        fail(f"{error.filename2 or error.filename or 'system'}: {error.strerror or error}")
    except KeyboardInterrupt as error:
        if is_first_rank():
            note(f"\nstopped. {error}")
        sys.exit(130)


def fail(message):
    """Prints `error: message` and exits with code 2."""
    if is_first_rank():
        stderr.print("error:", style="bold red", end=" ")
        note(message)
    sys.exit(2)


def is_first_rank():
    return os.environ.get("LOCAL_RANK", "0") == "0"


def note(message):
    """Prints a plain message on stderr."""
    stderr.print(plain(message), markup=False)


def progress(*columns):
    """A progress bar on stderr that disappears when done; nothing if stderr is not a terminal."""
    if not columns:
        description = TextColumn("{task.description}", markup=False)
        columns = description, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


@contextlib.contextmanager
def reporting(total, what, *columns):
    """Yields `update(completed, description)`, which moves a progress bar; where stderr is no terminal, it
    prints the description and "COMPLETED of TOTAL WHAT" as a plain line, at most every EVERY seconds."""
    printed = time.monotonic()
    with progress(*columns) as bar:
        task = bar.add_task("", total=total)

        def update(completed, description):
            nonlocal printed
            bar.update(task, completed=completed, description=description)
            if not stderr.is_terminal and time.monotonic() - printed > EVERY:
                printed = time.monotonic()
                note(f"{description}, {completed:,} of {total:,} {what}")

        yield update


def plain(text):
    """Text without control characters, which could move the cursor, ring, or reverse a line."""
    text = text.replace("\u00ad", "")  # soft hyphens are invisible
    return "".join(
        c if c.isprintable() or c in "\n\t\u200c\u200d" or category(c) == "Zs" else "\ufffd" for c in text
    )


def put(text, style=""):
    """Prints text on stdout without a line end; styled where stdout is a terminal."""
    if stdout.is_terminal:
        stdout.print(Text(plain(text), style, tab_size=8), end="", soft_wrap=True)
    else:
        sys.stdout.write(plain(text))
    sys.stdout.flush()


def lines(prompt, keep=False):
    """Yields lines of stdin, stripped, up to the first empty one; with `keep` unchanged, up to the end.

    The prompt is printed only if stdin is a terminal.
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
