"""Reads scenes: books in the CoSER format, test files, the bundled stories under data/stage.

A book holds plots, each with conversations; a test file is a list of scenes. Both become a list of `Scene`.
Reading repairs what it can (an older key such as `thought` for `motivation`), drops what it cannot use, and
counts both in a Report.
"""

import hashlib
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common import terminal
from common.files import UsageError
from data.brackets import as_thought
from data.records import LONGEST, Record, Report, mend_surrogates, read_rows

ENVIRONMENT = "Environment"
STAGE = Path(__file__).resolve().parent / "stage"


@dataclass
class Scene:
    """One conversation with its given circumstances.

    book, i_p, i_c: title, number of the plot, number of the conversation in the plot. tag: `train`, `id` (a
    held-out plot of a book seen in training) or `ood` (an unseen book). dialogues: `{character, message}`,
    with `[thoughts]` and `(actions)`. speaking_characters: all speakers, the Environment too, most messages
    first. major_characters: those with a profile. profiles, motivations: name -> text.
    """

    book: str
    i_p: int
    i_c: int
    tag: str
    scenario: str
    topic: str
    plot_summary: str
    dialogues: list
    speaking_characters: list = field(default_factory=list)
    major_characters: list = field(default_factory=list)
    profiles: dict = field(default_factory=dict)
    motivations: dict = field(default_factory=dict)

    def __post_init__(self):
        counts = Counter(turn["character"] for turn in self.dialogues)
        speakers = [name for name, _ in counts.most_common()]
        self.speaking_characters = list(dict.fromkeys([*self.speaking_characters, *speakers]))
        profiled = [name for name in self.speaking_characters if name in self.profiles]
        self.major_characters = self.major_characters or profiled

    @property
    def key(self):
        return f"{self.book}-{self.i_p}-{self.i_c}"

    def to_dict(self):
        return asdict(self)


# ---- choosing ----------------------------------------------------------------------------------------------


def data_files(paths):
    """The given files, and the `*.json` of given directories, in order. UsageError for one without any."""
    files = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not found:
            raise UsageError(f"{path}: no .json files in this directory")
        if not found[0].is_file():
            raise UsageError(f"{path}: no such file")
        files += found
    return files


def read_scenes(paths, report, held_out_books=0.0):
    """Yields (scene, share of the files done), with one file in memory at a time.

    Unreadable files among several are dropped and counted; a single one, or no scene at all, is a UsageError.
    held_out_books: the share of books, chosen by a hash of their titles, all of whose scenes become `ood`.
    """
    files, found = data_files(paths), False
    for number, file in enumerate(files, 1):
        try:
            for scene in _file_scenes(file, report):
                if not report.is_new((scene.book, scene.i_p, scene.i_c)):
                    where = f"{file}: {scene.key}"
                    report.note("dropped: scene whose book and numbers were read before", where)
                    continue
                if int.from_bytes(hashlib.sha256(scene.book.encode()).digest()[:8]) < held_out_books * 2**64:
                    scene.tag = "ood"
                found = True
                yield scene, number / len(files)
        except UsageError as error:
            if len(files) == 1 or report.strict:
                raise
            reason = str(error).removeprefix(f"{file}: ")
            report.note(f"dropped: file that cannot be read, {reason}", str(file))
    if not found:
        where = paths[0] if len(paths) == 1 else f"{files[0]} and others"
        raise UsageError(f"{where}: no usable scene in it ({'; '.join(report.lines()) or 'it is empty'})")


def load_scenes(path, report=None):
    """The scenes of a book, a test file, or a directory of them, in order. UsageError if there are none."""
    return [scene for scene, _ in read_scenes([path], Report() if report is None else report)]


load_book = load_scenes  # of a book: `train` before its `split_plot_index` (default: 90% of plots), then `id`


def load_stage():
    """The bundled scenes by their name for `simulate.py --scene`, `story/number` from 1: {name: Scene}."""
    scenes = {}
    for file in sorted(STAGE.glob("*.json")):
        for number, scene in enumerate(load_book(file), 1):
            scenes[f"{file.stem.replace('_', '-')}/{number}"] = scene
    return scenes


def find_scenes(spec, limit=None, which="0"):
    """The scenes of --scene: a bundled scene's name, FILE, FILE:INDEX, FILE:FIRST-LAST (inclusive), FILE:all.

    limit: at most so many. which: the INDEX that a plain FILE without a limit means; with one it means all.
    """
    stage = load_stage()
    if spec in stage:
        return [stage[spec]]
    file, which = spec, "all" if limit else which
    if re.search(r":(all|-?\d{1,18}|\d{1,18}-\d{1,18})$", spec):
        file, _, which = spec.rpartition(":")
    if not Path(file).exists():
        raise UsageError(
            f"--scene {spec}: neither a file nor a bundled scene; bundled are {', '.join(stage)}"
        )
    scenes = load_scenes(file, report := Report())
    for line in report.lines():
        terminal.note(f"{file}: {line}")
    if any(what.startswith(("dropped: scene", "dropped: conversation")) for what in report):
        terminal.note(f"{file}: dropped scenes are not counted in scene numbers")
    if which != "all":
        first, last = which.split("-") if re.fullmatch(r"\d+-\d+", which) else (which, which)
        if not 0 <= int(first) <= int(last) < len(scenes):
            raise UsageError(f"--scene {spec}: {file} has scenes 0 to {len(scenes) - 1}")
        scenes = scenes[int(first) : int(last) + 1]
    return scenes[:limit]


def cast_member(name, scenes):
    """(scene, full name) of one of the major characters of some scenes.

    name: the full name, or the beginning of any of its words, in upper or lower case.
    """
    cast = {character: scene for scene in reversed(scenes) for character in scene.major_characters}
    for character in sorted(cast):
        if any(word.lower().startswith(name.lower()) for word in (character, *character.split())):
            return cast[character], character
    raise UsageError(f"--character {name}: not in the cast, which is {', '.join(sorted(cast))}")


# ---- reading -----------------------------------------------------------------------------------------------


def _file_scenes(path, report):
    for number, value, where, _ in read_rows(path, report, "scene"):
        if not isinstance(value, dict):
            report.note("dropped: scene that is not an object", where)
        elif isinstance(value.get("plots"), list):
            separator = ": " if where == str(path) else ", "
            yield from _book_scenes(value, path.stem, where, report, separator)
        elif where == str(path) and "dialogues" not in value:  # the file's only object
            problem = "neither a book (an object with `plots`) nor a test file (a list of scenes)"
            raise UsageError(f"{path}: {problem}")
        elif scene := _test_scene(Record(mend_surrogates(value, where, report), where, report), number):
            yield scene


def split_plot_index(book):
    """The number of a book's first held-out plot: what it says, else 90% of its plots come before."""
    split = book.get("split_plot_index")
    return split if isinstance(split, int) else int(0.9 * len(book["plots"]))


def _book_scenes(value, stem, where, report, separator):
    head = {name: value.get(name) for name in ("title", "character_datasets", "split_plot_index")}
    book = Record(mend_surrogates(head, where, report) | {"plots": value["plots"]}, where, report, separator)
    title, profiles = _title(book, "title", stem), _profiles(book, "character_datasets")
    split = split_plot_index(value)
    if value.get("split_plot_index", split) != split:
        book.note("repaired: `split_plot_index` that is no number, the last tenth of plots held out")
    for i_p, plot in book.records("plots"):
        used = {name: plot.value.get(name) for name in ("summary", "key_characters", "conversation")}
        plot.value = mend_surrogates(used, plot.where, report)
        for i_c, conversation in plot.records("conversation"):
            tag = "train" if i_p < split else "id"
            if scene := _scene(conversation, (title, i_p, i_c, tag), plot, profiles):
                yield scene


def _test_scene(item, index):
    """The Scene of an item of a test file, or of `Scene.to_dict`; None where it has no messages."""
    if "plot_summary" in item.value:
        item.value = item.value | _test_fields(item.value, item.get("motivations"))
    profiles = _profiles(item, "character_profiles")
    numbers = (("i_p", index), ("i_c", 0))
    i_p, i_c = (n if isinstance(n := item.value.get(name), int) else default for name, default in numbers)
    identity = _title(item, "book", "untitled"), i_p, i_c, item.get("tag") or "ood"
    plot = Record(item.get("plot"), item.where, item.report)
    scene = _scene(item, identity, plot, profiles)
    if scene:  # the file's own cast takes precedence
        scene.profiles = profiles
        for name, key in (("speaking_characters", "speaking_characters_w_env"), ("major_characters",) * 2):
            setattr(scene, name, _names(item.get(key)) or getattr(scene, name))
    return scene


def to_test_scene(scene):
    """A scene as an item of a test file."""
    names = ("book", "i_p", "i_c", "tag", "scenario", "topic", "dialogues", "major_characters")
    return {name: getattr(scene, name) for name in names} | _test_fields(vars(scene), scene.motivations)


def _test_fields(scene, motivations):
    """The fields of a scene (a dict as of `Scene.to_dict`) that have another form in a test file."""
    return {
        "plot": {"summary": scene["plot_summary"]},
        "key_characters": [{"name": name, "motivation": text} for name, text in motivations.items()],
        "character_profiles": scene.get("profiles"),
        "speaking_characters_w_env": scene.get("speaking_characters"),
    }


def _scene(conversation, identity, plot, profiles):
    """The Scene of a conversation; None where it has no messages. identity: book, i_p, i_c, tag."""
    dialogues = [turn for _, message in conversation.records("dialogues") if (turn := _turn(message))]
    if not dialogues:
        if isinstance(conversation.value.get("dialogues"), list) and conversation.value["dialogues"]:
            conversation.note("dropped: conversation without messages")
        return None
    motivations = {}
    for _, key_character in conversation.records("key_characters"):
        name, motivation = (
            _one_line(key_character.get("name"), key_character),
            key_character.get("motivation"),
        )
        if name and motivation:
            motivations[name] = motivation
    named = plot.value.get("key_characters")
    named = [k for k in named if isinstance(k, dict)] if isinstance(named, list) else []
    cast = {turn["character"] for turn in dialogues}
    cast.update(_names(k.get(key) for k in named for key in ("name", "character")))
    texts = (conversation.get("scenario"), conversation.get("topic"), plot.get("summary"))
    profiles = {name: profile for name, profile in profiles.items() if name in cast}
    return Scene(*identity, *texts, dialogues, profiles=profiles, motivations=motivations)


def _turn(message):
    """One `{character, message}`, or None. Text under the key `thought` becomes a thought, which stays hidden
    from the others. Some files have the beginning of a message, a thought, as its key."""
    name = _one_line(message.get("character"), message)
    if not name:
        return None
    bracketed = [f"{k} {v}" for k, v in message.value.items() if k.startswith("[") and isinstance(v, str)]
    if bracketed and not isinstance(message.value.get("message"), str):
        text, key = bracketed[0], "[...]"
        message.note("repaired: `[...]` read as `message`")
    else:
        text, key = message.find("message")
    if len(text) > LONGEST:
        message.note(f"dropped: message of more than {LONGEST:,} characters")
        text = ""
    return {"character": name, "message": as_thought(text) if key == "thought" else text} if text else None


def _profiles(record, field_name):
    """{name: profile} of a field that maps a name to a profile, or to an object that has one."""
    profiles = {}
    for name, character in record.get(field_name).items():
        profile = character.get("profile") if isinstance(character, dict) else character
        if isinstance(profile, str) and profile.strip() and name.strip():
            profiles[_one_line(name, record)] = profile
        elif profile is not None and not isinstance(profile, str):
            record.report.note("dropped: profile that is not text", f"{record.where}, character {name}")
    return profiles


def _title(record, field_name, default):
    title = record.get(field_name) or default
    if straighten(title) != title:
        record.note("repaired: curly quotes in a title")
    return straighten(title)


def straighten(title):
    """Curly quotes become straight ones, so that two spellings of a title are one book."""
    return title.translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\""))


def _names(values):
    return [_one_line(name) for name in values if isinstance(name, str) and name.strip()]


def _one_line(name, record=None):
    """A name without line ends and outer white space, so that two spellings are one character."""
    line = " ".join(name.split())
    line = "N.S.P." if line == "NSP" else line  # in transcripts NSP is the next-speaker model
    if record and line != name:
        kind = "a character called NSP" if name == "NSP" else "white space in a name"
        record.note(f"repaired: {kind}")
    return line
