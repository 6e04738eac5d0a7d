"""The terminal: the argument parser, errors in one line, notes, progress bars, text that cannot move the cursor."""

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


EVERY = 10  # seconds between two lines of progress where stderr is no terminal


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
        if hasattr(
            stream, "reconfigure"
        ):  # what a terminal's encoding lacks is a question mark, not an error
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
    columns = columns or (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal, **kwargs)


@contextlib.contextmanager
def reporting(total, what):
    """Yields `update(completed, description)`, which moves a progress bar; where stderr is no terminal, it prints
    the description and "COMPLETED of TOTAL WHAT" as a plain line, at most every EVERY seconds."""
    printed = time.monotonic()
    with progress() as bar:
        task = bar.add_task("", total=total)

        def update(completed, description):
            nonlocal printed
            bar.update(task, completed=completed, description=description)
            if not stderr.is_terminal and time.monotonic() - printed > EVERY:
                printed = time.monotonic()
                note(f"{description}, {completed:,} of {total:,} {what}")

        yield update


def plain(text):
    """Text without the control characters that could move a cursor, ring a bell, change colours or the direction of a line."""
    text = text.replace("\u00ad", "")  # where a word may be broken: no sign of its own
    return "".join(
        c if c.isprintable() or c in "\n\t\u200c\u200d" or category(c) == "Zs" else "\ufffd" for c in text
    )


def put(text, style=""):
    """Text on stdout as it is, without a line end; styled where stdout is a terminal."""
    if stdout.is_terminal:
        stdout.print(Text(plain(text), style, tab_size=8), end="", soft_wrap=True)
    else:
        sys.stdout.write(plain(text))
    sys.stdout.flush()


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
