"""The directory of a run: settings, transcripts, the journal, the script to read."""

import contextlib
import fcntl
import hashlib
import html
import itertools
import json
import os
import re
from pathlib import Path

from common import files, terminal
from common.files import UsageError, make_dir, read_json, read_lines, write_lines, write_whole
from data.brackets import SPEECH, BracketParser
from data.chats import NEXT_SPEAKER
from data.scenes import ENVIRONMENT, load_stage

TRANSCRIPTS, SETTINGS, REPLIES, FAILURES = (
    "transcripts.jsonl",
    "settings.json",
    "replies.jsonl",
    "failures.jsonl",
)


SCRIPT = "script.md"


TRANSCRIPT_KEYS = ("book", "i_p", "i_c", "scene", "settings", "messages", "stats")


def output_directory(args, settings):
    """The directory of this run: `--out`, or a new one under out/plays, named after what is played and the settings."""
    if args.out:
        return make_dir(args.out)
    name = args.scene if args.scene in load_stage() else Path(args.scene).name
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    for number in itertools.count(1):
        directory = files.OUT / "plays" / f"{name}.{digest}.{number}"
        if not directory.exists():
            return make_dir(directory)


@contextlib.contextmanager
def held(directory):
    """Keeps a second run out of a directory for as long as this one is in it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(
            f"{directory}: another run is writing there; wait for it or choose another --out"
        ) from None
    finally:
        os.close(descriptor)


def begin(out, settings, resume):
    """The lines of the run that this directory holds; UsageError where it is none that can go on."""
    done = read_lines(out / TRANSCRIPTS, TRANSCRIPT_KEYS)
    begun = (out / SETTINGS).exists()
    if (done or begun) and not resume:
        raise UsageError(
            f"{out}: holds a run already; add --resume to go on with it, or choose another --out"
        )
    if done or begun:
        old = read_json(out / SETTINGS)
        known = {
            name for name in settings if f"{name}_identity" in settings
        }  # what a model is, not where it lies
        if changed := sorted(
            name for name in {*settings, *old} - known if settings.get(name) != old.get(name)
        ):
            raise UsageError(
                f"{out}: was played with other settings ({', '.join(changed)}); choose another --out"
            )
    with write_whole(out / SETTINGS) as file:
        json.dump(settings, file, indent=1)
    write_lines(out / TRANSCRIPTS, done)  # without the torn line a kill may have left
    (out / FAILURES).unlink(missing_ok=True)
    return done


def markdown(line):
    """A played scene as Markdown, in which nothing that was said is markup or HTML."""

    def plain(text):
        text = re.sub(
            r"([\\`*_\[\]#|~])", r"\\\1", html.escape(terminal.plain(" ".join(text.split())), quote=False)
        )
        return re.sub(r"^(\d*)([-+.)])", r"\1\\\2", text)  # no list, no line

    scene = line["scene"]
    parts = [
        f"## {plain(scene['book'])}",
        f"*{plain(scene['scenario'])}*" if scene["scenario"].strip() else "",
    ]
    for message in line["messages"]:
        if message["role"] == ENVIRONMENT:
            parts.append(f"> {plain(message['content'])}")
        elif message["role"] != NEXT_SPEAKER:
            spans = itertools.groupby(BracketParser().feed(message["content"]), lambda span: span[1])
            text = [("".join(part for part, _ in group), channel) for channel, group in spans]
            text = [
                f"*{plain(part)}*" if channel != SPEECH and part.strip() else plain(part)
                for part, channel in text
            ]
            parts.append(f"**{plain(message['role'])}:** {' '.join(filter(None, text))}")
    return "\n\n".join(filter(None, parts)) + "\n"
