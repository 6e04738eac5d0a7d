"""Reads scenes: books in the CoSER format, test files, and the project's own stories under data/stage.

A book file holds plots, each with conversations; a test file is a list of scenes. Both become a list of `Scene`, the one
shape the rest of the project knows. Real files are messy, so reading normalises (an older key such as `thought` for
`motivation`), drops what cannot be used, and counts both in a `Report`, which knows where the first of each kind stands:

    report = Report()
    scenes = load_scenes("books/Othello.json", report)
    print(*report.lines(), sep="\n")
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common import terminal
from common.files import UsageError, read_json

ENVIRONMENT = "Environment"
LONGEST = (
    1_000_000  # characters of a message; a longer one is an accident, and would take a tokenizer minutes
)
STAGE = Path(__file__).resolve().parent / "stage"


@dataclass
class Scene:
    """One conversation with its given circumstances.

    book, i_p, i_c identify it (title, plot number, conversation number within the plot). `tag` is `train`, `id` (a
    held-out plot of a book seen in training) or `ood` (a book not seen). `dialogues` are `{character, message}` with
    `[thoughts]` and `(actions)`. `speaking_characters` are all who speak, the Environment included, most messages first.
    `major_characters` are those of them with a profile. `profiles` and `motivations` map a name to text.
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
        self.major_characters = self.major_characters or [
            name for name in self.speaking_characters if name in self.profiles
        ]

    @property
    def key(self):
        return f"{self.book}-{self.i_p}-{self.i_c}"

    def to_dict(self):
        return asdict(self)


class Report(Counter):
    """What reading repaired and dropped: kind -> count. examples: kind -> where the first one stands. With strict, the first
    of any kind is a UsageError."""

    def __init__(self, strict=False):
        super().__init__()
        self.strict, self.examples, self.seen = strict, {}, set()

    def note(self, what, where):
        if self.strict:
            raise UsageError(f"{where}: {what} (--strict stops here)")
        self[what] += 1
        self.examples.setdefault(what, where)

    def first(self, key):
        """Whether this key has not been met before; eight bytes of it are kept."""
        before = len(self.seen)
        self.seen.add(hash(key))
        return len(self.seen) > before

    def lines(self):
        """One line for each kind, the most frequent first."""
        return [f"{count} {what}, the first at {self.examples[what]}" for what, count in self.most_common()]


def data_files(paths):
    """The files that paths mean: themselves, and the `*.json` of directories, in order. UsageError where there are none."""
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
    """Yields (scene, share of the files done), a file in memory at a time.

    Among several files, one that cannot be read is dropped and counted; UsageError where it is the only one, or no scene is
    left. held_out_books: the share of books, by a hash of their titles, all of whose scenes become `ood`.
    """
    files, found = data_files(paths), False
    for number, file in enumerate(files, 1):
        try:
            scenes = _file_scenes(file, report)
        except UsageError as error:
            if len(files) == 1 or report.strict:
                raise
            report.note(
                f"dropped: file that cannot be read, {str(error).removeprefix(f'{file}: ')}", str(file)
            )
            continue
        for scene in filter(None, scenes):
            if not report.first((scene.book, scene.i_p, scene.i_c)):
                report.note("dropped: scene whose book and numbers were read before", f"{file}: {scene.key}")
                continue
            if _book_hash(scene.book) < held_out_books:
                scene.tag = "ood"
            found = True
            yield scene, number / len(files)
    if not found:
        where = paths[0] if len(paths) == 1 else f"{files[0]} and others"
        raise UsageError(f"{where}: no usable scene in it ({'; '.join(report.lines()) or 'it is empty'})")


def load_scenes(path, report=None):
    """Scenes of a book file, a test file, or every `*.json` of a directory, in order. UsageError if there are none."""
    return [scene for scene, _ in read_scenes([path], Report() if report is None else report)]


def _file_scenes(path, report):
    """An iterator over the scenes of a file, None for one that is dropped."""
    data = read_json(path, (dict, list))
    if isinstance(data, dict) and isinstance(data.get("plots"), list):
        return _book_scenes(data, path, report)
    if isinstance(data, list):
        return (
            _test_scene(item, i, where, report)
            for i, where, item in _objects(data, "scene", f"{path}: ", report)
        )
    raise UsageError(f"{path}: neither a book (an object with `plots`) nor a test file (a list of scenes)")


def load_book(path, report=None):
    """Scenes of one book file: `tag` is `train` before `split_plot_index` (else the first 90% of plots), `id` after."""
    return load_scenes(path, report)


def load_stage():
    """The bundled scenes by name, `story/number` from 1, as `simulate.py --scene` takes them: {name: Scene}."""
    scenes = {}
    for file in sorted(STAGE.glob("*.json")):
        for number, scene in enumerate(load_book(file), 1):
            scenes[f"{file.stem.replace('_', '-')}/{number}"] = scene
    return scenes


def find_scenes(spec, limit=None, which="0"):
    """Scenes by the name of a bundled one, or FILE, FILE:INDEX, FILE:FIRST-LAST (both included), FILE:all; the first `limit`
    of them. which: what of a FILE is meant where nothing is said and no limit given."""
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
        terminal.note(f"{file}: its scenes are counted without those that are dropped")
    if which != "all":
        first, last = which.split("-") if re.fullmatch(r"\d+-\d+", which) else (which, which)
        if not 0 <= int(first) <= int(last) < len(scenes):
            raise UsageError(f"--scene {spec}: {file} has scenes 0 to {len(scenes) - 1}")
        scenes = scenes[int(first) : int(last) + 1]
    if len({scene.key for scene in scenes}) < len(scenes):
        raise UsageError(
            f"--scene {spec}: two scenes with the same book, plot and conversation number; play them one by one"
        )
    return scenes[:limit]


def _book_hash(title):
    """A number in [0, 1) that is the same for a title on every machine."""
    return int.from_bytes(hashlib.sha256(title.encode()).digest()[:8]) / 2**64


def mend_surrogates(data, where, report):
    """JSON can escape half of a surrogate pair, which is no character and no tokenizer takes: it becomes a question mark."""
    text = json.dumps(data, ensure_ascii=False)
    if text.isascii():
        return data
    whole = text.encode("utf-8", errors="replace").decode()
    if whole == text:
        return data
    report.note("repaired: half of a surrogate pair", where)
    return json.loads(whole)


def straighten(title):
    """Curly quotes become straight ones, so that two spellings of a title are one book."""
    return title.translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\""))


def _title(record, name, otherwise, where, report):
    text = _field(record, name, where, report) or otherwise
    if straighten(text) != text:
        report.note("repaired: curly quotes in a title", where)
    return straighten(text)


def _book_scenes(data, path, report):
    where = str(path)
    title = _title(data, "title", path.stem, where, report)
    plots = data["plots"]
    split = data.get("split_plot_index", int(0.9 * len(plots)))
    if not isinstance(split, int):
        report.note("repaired: `split_plot_index` that is no number, the last tenth of plots held out", where)
        split = int(0.9 * len(plots))
    profiles = _profiles(data.get("character_datasets"), where, report)
    for i_p, where, plot in _objects(plots, "plot", f"{path}: ", report):
        conversations = plot.get("conversation")
        if conversations and not isinstance(conversations, list):
            report.note("dropped: plot whose conversations are not a list", where)
            continue
        if not conversations:
            report.note("dropped: plot without a conversation", where)
            continue
        plot = mend_surrogates(
            {name: plot.get(name) for name in ("summary", "key_characters", "conversation")}, where, report
        )
        for i_c, here, conversation in _objects(plot["conversation"], "conversation", f"{where}, ", report):
            tag = "train" if i_p < split else "id"
            yield _scene(conversation, title, i_p, i_c, tag, plot, profiles, here, report)


def _profiles(characters, where, report):
    """{name: profile} of a book's `character_datasets` or a test scene's `character_profiles`."""
    profiles = {}
    for name, character in _of(dict, characters, "characters that are not an object", where, report).items():
        profile = character.get("profile") if isinstance(character, dict) else character
        if text_of(profile) and name.strip():
            profiles[_trimmed(name, where, report)] = profile
        elif profile is not None and not isinstance(profile, str):
            report.note("dropped: profile that is not text", f"{where}, character {name}")
    return mend_surrogates(profiles, where, report)


def _test_scene(item, index, where, report):
    item = mend_surrogates(item, where, report)
    if "plot_summary" in item:  # our own form, as transcripts keep it
        motivations = _of(dict, item.get("motivations"), "motivations that are not an object", where, report)
        item = {
            **item,
            "plot": {"summary": item["plot_summary"]},
            "key_characters": [{"name": name, "motivation": text} for name, text in motivations.items()],
            "character_profiles": item.get("profiles"),
            "speaking_characters_w_env": item.get("speaking_characters"),
        }
    plot = _of(dict, item.get("plot"), "plot that is not an object", where, report)
    profiles = _profiles(item.get("character_profiles"), where, report)
    book = _title(item, "book", "untitled", where, report)
    i_p, i_c = (item[k] if isinstance(item.get(k), int) else d for k, d in (("i_p", index), ("i_c", 0)))
    scene = _scene(
        item, book, i_p, i_c, _field(item, "tag", where, report) or "ood", plot, profiles, where, report
    )
    if scene:  # what the file says of its cast stands, where it says anything
        scene.profiles = profiles
        scene.speaking_characters = _names(item.get("speaking_characters_w_env")) or scene.speaking_characters
        scene.major_characters = _names(item.get("major_characters")) or scene.major_characters
    return scene


def to_test_scene(scene):
    """A scene in the form of a test file, which is a list of these."""
    return {
        **{
            name: getattr(scene, name)
            for name in ("book", "i_p", "i_c", "tag", "scenario", "topic", "dialogues")
        },
        "plot": {"summary": scene.plot_summary},
        "key_characters": [{"name": name, "motivation": text} for name, text in scene.motivations.items()],
        "character_profiles": scene.profiles,
        "speaking_characters_w_env": scene.speaking_characters,
        "major_characters": scene.major_characters,
    }


def _scene(conversation, book, i_p, i_c, tag, plot, profiles, where, report):
    turns = conversation.get("dialogues")
    if turns and not isinstance(turns, list):
        report.note("dropped: conversation whose messages are not a list", where)
        return None
    dialogues = [
        t
        for _, at, turn in _objects(turns or [], "message", f"{where}, ", report)
        if (t := _turn(turn, at, report))
    ]
    if not dialogues:
        report.note("dropped: conversation without messages", where)
        return None
    speaking = {turn["character"] for turn in dialogues}
    return Scene(
        book=book,
        i_p=i_p,
        i_c=i_c,
        tag=tag,
        scenario=_field(conversation, "scenario", where, report),
        topic=_field(conversation, "topic", where, report),
        plot_summary=_field(plot, "summary", where, report),
        dialogues=dialogues,
        profiles={
            name: profile for name, profile in profiles.items() if name in speaking or _named(name, plot)
        },
        motivations=_motivations(conversation.get("key_characters"), where, report),
    )


def _motivations(key_characters, where, report):
    motivations = {}
    key_characters = _of(list, key_characters, "key characters that are not a list", where, report)
    for _, here, key_character in _objects(key_characters, "key character", f"{where}, ", report):
        name = _trimmed(_either(key_character, "name", "character", here, report), here, report)
        motivation = _either(key_character, "motivation", "thought", here, report)
        if not name:
            report.note("dropped: key character without a name", here)
        elif motivation:
            motivations[name] = motivation
    return motivations


def _named(name, plot):
    records = plot.get("key_characters")
    named = [
        k.get(key)
        for k in (records if isinstance(records, list) else [])
        if isinstance(k, dict)
        for key in ("name", "character")
    ]
    return name in _names(named)


def _turn(turn, where, report):
    """One `{character, message}`; other keys that stand where these should are accepted, and counted. What stands under
    `thought` becomes a thought, so that the others never see it."""
    name, message = _either(turn, "character", "name", where, report), turn.get("message")
    if not isinstance(message, str):
        for other in ("thought", "description", "dialogues", *(k for k in turn if k.startswith("["))):
            if text_of(turn.get(other)):
                key = "[...]" if other.startswith("[") else other
                message = f"{other} {turn[other]}" if key == "[...]" else turn[other]
                message = as_thought(message) if key == "thought" else message
                report.note(f"repaired: `{key}` read as `message`", where)
                break
    if not name:
        report.note("dropped: message without a name", where)
    elif not text_of(message):
        empty = message is None or isinstance(message, str)
        report.note(f"dropped: message {'without a text' if empty else 'that is not text'}", where)
    elif len(message) > LONGEST:
        report.note(f"dropped: message of more than {LONGEST:,} characters", where)
    else:
        return {"character": _trimmed(name, where, report), "message": message}
    return None


def as_thought(text):
    """The text in square brackets that hide all of it, whatever brackets it has of its own."""
    depth = lowest = 0
    for c in text:
        depth += (c == "[") - (c == "]")
        lowest = min(lowest, depth)
    return "[" * (1 - lowest) + text + "]" * (1 - lowest + depth)


def _names(value):
    return [one_name(name) for name in value if text_of(name)] if isinstance(value, list) else []


def _trimmed(name, where, report):
    """A name without white space around it and in one line, so that it is one character however it is written."""
    if name != one_name(name):
        report.note(
            "repaired: white space in a name" if name != "NSP" else "repaired: a character called NSP", where
        )
    return one_name(name)


def one_name(name):
    name = " ".join(name.split())
    return "N.S.P." if name == "NSP" else name  # in transcripts NSP is who decides on the next speaker


def _either(record, name, other, where, report):
    """The text of a field which some files call otherwise; that is counted."""
    if not text_of(record.get(name)) and text_of(record.get(other)):
        report.note(f"repaired: `{other}` read as `{name}`", where)
        return record[other]
    return text_of(record.get(name))


def _field(record, name, where, report):
    """The text of a field, empty where there is none; what is no text is dropped, and counted."""
    return text_of(_of(str, record.get(name), f"`{name}` that is not text", where, report))


def _objects(items, what, before, report):
    """(number, where it stands, item) of each that is an object; the others are dropped, and counted."""
    for i, item in enumerate(items):
        if isinstance(item, dict):
            yield i, f"{before}{what} {i}", item
        else:
            report.note(f"dropped: {what} that is not an object", f"{before}{what} {i}")


def _of(kind, value, otherwise, where, report):
    """The value if it is of this kind, else an empty one, and what is of another is counted."""
    if value is not None and not isinstance(value, kind):
        report.note(f"dropped: {otherwise}", where)
    return value if isinstance(value, kind) else kind()


def text_of(value):
    """The value if it is a string with something in it, else the empty string."""
    return value if isinstance(value, str) and value.strip() else ""
