"""The directory of a run: settings, transcripts, failures, and the script to read."""

import contextlib
import fcntl
import hashlib
import html
import itertools
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

from common import files, terminal
from common.files import UsageError, append_line, read_json, read_lines, write_json, write_lines, write_whole
from data.brackets import SPEECH, BracketParser
from data.chats import NEXT_SPEAKER
from data.scenes import ENVIRONMENT, load_stage

TRANSCRIPTS, FAILURES, SETTINGS = "transcripts.jsonl", "failures.jsonl", "settings.json"
REPLIES, ANSWERS, SCRIPT = "replies.jsonl", "answers", "script.md"
TRANSCRIPT_KEYS = ("book", "i_p", "i_c", "scene", "settings", "messages", "stats")


def default_directory(scene_spec, options):
    """A path under out/plays that does not exist yet, named after the scene and a hash of the options."""
    name = scene_spec if scene_spec in load_stage() else Path(scene_spec).name
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    paths = (files.OUT / "plays" / f"{name}.{digest}.{number}" for number in itertools.count(1))
    return next(path for path in paths if not path.exists())


@contextlib.contextmanager
def locked(directory):
    """Keeps other runs out of a directory; UsageError if one is in it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        hint = "wait for it or choose another --out"
        raise UsageError(f"{directory}: another run is writing there; {hint}") from None
    finally:
        os.close(descriptor)


def claim(directory, settings, resume, holds_results=False):
    """Writes the settings of a run into its directory.

    UsageError if the directory holds a run that this one may not continue: without resume any run, else one
    with other settings. The name of a model may differ where its identity is the same.
    """
    file = directory / SETTINGS
    if holds_results or file.exists():
        if not resume:
            hint = "add --resume to go on with it, or choose another --out"
            raise UsageError(f"{directory}: holds a run already; {hint}")
        old = read_json(file)
        identified = {name for name in settings if f"{name}_identity" in settings}
        names = sorted({*settings, *old} - identified)
        changed = [name for name in names if settings.get(name) != old.get(name)]
        if changed:
            # an identity has a model's dtype, which --dtype chooses
            shown = (f"{name} was {old.get(name)}" if "_identity" in name else name for name in changed)
            what = f"made with other settings ({', '.join(shown)})"
            raise UsageError(f"{directory}: {what}; choose another --out")
    write_json(file, settings)


def settings_of(models, scenes, preset, protocol):
    """All that decides the result of a run."""
    settings = {role: model.name for role, model in models.items()}
    settings |= {f"{role}_identity": model.identity for role, model in models.items()}
    settings |= {
        f"{role}_chat_format": model.chat_format_reason for role, model in models.items() if model.local
    }
    contents = json.dumps([scene.to_dict() for scene in scenes], sort_keys=True)
    digest = hashlib.sha256(contents.encode()).hexdigest()[:16]
    return settings | {"scenes": digest, "protocol": preset, **asdict(protocol)}


class Transcripts:
    """The transcripts of a run, written to its directory as scenes end.

    `finished` and `failed` are lines, the finished ones of the run that is resumed included. UsageError if
    the directory holds a run and `resume` is False, or one with other settings.
    """

    def __init__(self, directory, settings, models, resume):
        self.directory, self.settings, self.models = directory, settings, models
        self.finished, self.failed = read_lines(directory / TRANSCRIPTS, TRANSCRIPT_KEYS), []
        claim(directory, settings, resume, bool(self.finished))
        write_lines(directory / TRANSCRIPTS, self.finished)  # without the torn line a kill may have left
        (directory / FAILURES).unlink(missing_ok=True)

    def missing(self, scenes):
        """The scenes without a transcript."""
        finished = {place_of(line) for line in self.finished}
        return [scene for scene in scenes if place_of(vars(scene)) not in finished]

    def add_finished(self, scene, messages, stats, seconds):
        self.finished.append(self._line(scene, messages, {**stats, "seconds": round(seconds, 3)}))
        append_line(self.directory / TRANSCRIPTS, self.finished[-1])

    def add_failed(self, scene, messages, error):
        self.failed.append(self._line(scene, messages, {}) | {"error": error})
        append_line(self.directory / FAILURES, self.failed[-1])

    def _line(self, scene, messages, stats):
        """A scene's line. adaptations: how an endpoint's requests were changed, by role, if they were."""
        line = {"book": scene.book, "i_p": scene.i_p, "i_c": scene.i_c, "scene": scene.to_dict()}
        line["settings"] = self.settings
        adaptations = {role: list(model.adaptations) for role, model in self.models.items()}
        if any(adaptations.values()):
            line["adaptations"] = {role: changes for role, changes in adaptations.items() if changes}
        return line | {"messages": messages, "stats": stats}

    def complete(self, scenes, script=False):
        """Puts the lines in the order of the scenes and drops the journal; with `script`, writes SCRIPT."""
        order = {place_of(vars(scene)): i for i, scene in enumerate(scenes)}
        self.finished.sort(key=lambda line: order.get(place_of(line), len(order)))
        write_lines(self.directory / TRANSCRIPTS, self.finished)
        (self.directory / REPLIES).unlink(missing_ok=True)
        if script:
            with write_whole(self.directory / SCRIPT) as file:
                file.write("\n".join(map(markdown, self.finished)))


def place_of(line):
    """What identifies a scene."""
    return line["book"], line["i_p"], line["i_c"]


def markdown(line):
    """A played scene as Markdown, in which nothing that was said is markup or HTML."""
    scene = line["scene"]
    scenario = f"*{escaped(scene['scenario'])}*" if scene["scenario"].strip() else ""
    parts = [f"## {escaped(scene['book'])}", scenario]
    for message in line["messages"]:
        if message["role"] == ENVIRONMENT:
            parts.append(f"> {escaped(message['content'])}")
        elif message["role"] != NEXT_SPEAKER:
            spans = []
            for channel, group in itertools.groupby(BracketParser().feed(message["content"]), lambda s: s[1]):
                text = "".join(part for part, _ in group)
                spans.append(f"*{escaped(text)}*" if channel != SPEECH and text.strip() else escaped(text))
            parts.append(f"**{escaped(message['role'])}:** {' '.join(filter(None, spans))}")
    return "\n\n".join(filter(None, parts)) + "\n"


def escaped(text):
    """Text as one line of Markdown that shows it literally."""
    text = html.escape(terminal.plain(" ".join(text.split())), quote=False)
    text = re.sub(r"([\\`*_\[\]#|~])", r"\\\1", text)
    return re.sub(r"^(\d*)([-+.)])", r"\1\\\2", text)  # not the beginning of a list or a rule
