"""Reads scenes: books in the CoSER format, test files, and the project's own stories under data/stage.

A book file holds plots, each with conversations; a test file is a list of scenes. Both become a list of `Scene`, the one
shape the rest of the project knows. Real files are messy, so reading normalises (an older key such as `thought` for
`motivation`), drops what cannot be used, and counts both in a `Counter` whose keys say what happened:

    report = Counter()
    scenes = load_scenes("books/Othello.json", report)
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cli import UsageError, read_json

ENVIRONMENT = "Environment"
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
        self.speaking_characters = self.speaking_characters or [name for name, _ in counts.most_common()]
        self.major_characters = self.major_characters or [name for name in self.speaking_characters if name in self.profiles]

    @property
    def key(self):
        return f"{self.book}-{self.i_p}-{self.i_c}"

    def to_dict(self):
        return asdict(self)


def load_scenes(path, report=None):
    """Scenes of a book file, a test file, or every `*.json` of a directory, in order. UsageError if there are none."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise UsageError(f"{path}: no .json files in this directory")
        return [scene for file in files for scene in load_scenes(file, report)]
    report = Counter() if report is None else report
    data = _mend_surrogates(read_json(path, (dict, list)), report)
    if isinstance(data, dict) and isinstance(data.get("plots"), list):
        scenes = _book_scenes(data, path, report)
    elif isinstance(data, list):
        scenes = [scene for i, item in enumerate(data) if (scene := _test_scene(item, i, report))]
    else:
        raise UsageError(f"{path}: neither a book (an object with `plots`) nor a test file (a list of scenes)")
    if not scenes:
        raise UsageError(f"{path}: no usable scene in it ({dict(+report) or 'it is empty'})")
    return scenes


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


def _mend_surrogates(data, report):
    """JSON can escape half of a surrogate pair, which is no character and no tokenizer takes: it becomes a question mark."""
    text = json.dumps(data, ensure_ascii=False)
    whole = text.encode("utf-8", errors="replace").decode()
    if whole == text:
        return data
    report["repaired: half of a surrogate pair"] += 1
    return json.loads(whole)


def straighten(title):
    """Curly quotes become straight ones, so that two spellings of a title are one book."""
    return title.translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\""))


def _title(text, report):
    report["repaired: curly quotes in a title"] += straighten(text) != text
    return straighten(text)


def _book_scenes(data, path, report):
    title = _title(_text(data.get("title")) or path.stem, report)
    plots = data["plots"]
    split = data.get("split_plot_index")
    split = int(0.9 * len(plots)) if not isinstance(split, int) else split
    profiles = {}
    characters = data.get("character_datasets")
    for name, character in (characters if isinstance(characters, dict) else {}).items():
        if isinstance(character, dict) and _text(character.get("profile")):
            profiles[name] = character["profile"]
    scenes = []
    for i_p, plot in enumerate(plots):
        if not isinstance(plot, dict):
            report["dropped: plot that is not an object"] += 1
            continue
        conversations = plot.get("conversation")
        if not isinstance(conversations, list) or not conversations:
            report["dropped: plot without a conversation"] += 1
            continue
        for i_c, conversation in enumerate(conversations):
            if not isinstance(conversation, dict):
                report["dropped: conversation that is not an object"] += 1
                continue
            tag = "train" if i_p < split else "id"
            scene = _scene(conversation, title, i_p, i_c, tag, plot, profiles, report)
            if scene:
                scenes.append(scene)
    return scenes


def _test_scene(item, index, report):
    if not isinstance(item, dict):
        report["dropped: scene that is not an object"] += 1
        return None
    if "plot_summary" in item:  # our own form, as transcripts keep it
        motivations = item.get("motivations") if isinstance(item.get("motivations"), dict) else {}
        item = {
            **item,
            "plot": {"summary": item["plot_summary"]},
            "key_characters": [{"name": name, "motivation": text} for name, text in motivations.items()],
            "character_profiles": item.get("profiles"),
            "speaking_characters_w_env": item.get("speaking_characters"),
        }
    plot = item.get("plot") if isinstance(item.get("plot"), dict) else {}
    profiles = item.get("character_profiles")
    profiles = {n: p for n, p in profiles.items() if _text(p)} if isinstance(profiles, dict) else {}
    book = _title(_text(item.get("book")) or "untitled", report)
    i_p, i_c = (item[k] if isinstance(item.get(k), int) else d for k, d in (("i_p", index), ("i_c", 0)))
    scene = _scene(item, book, i_p, i_c, _text(item.get("tag")) or "ood", plot, profiles, report)
    if scene:  # what the file says of its cast stands, where it says anything
        scene.profiles = profiles
        scene.speaking_characters = _names(item.get("speaking_characters_w_env")) or scene.speaking_characters
        scene.major_characters = _names(item.get("major_characters")) or scene.major_characters
    return scene


def _scene(conversation, book, i_p, i_c, tag, plot, profiles, report):
    dialogues = []
    for turn in conversation.get("dialogues") if isinstance(conversation.get("dialogues"), list) else []:
        turn = _turn(turn, report)
        if turn:
            dialogues.append(turn)
    if not dialogues:
        report["dropped: conversation without messages"] += 1
        return None
    motivations = {}
    for key_character in _records(conversation.get("key_characters")):
        name = _text(key_character.get("name"))
        if not name and _text(key_character.get("character")):
            name = key_character["character"]
            report["repaired: `character` read as `name`"] += 1
        motivation = _text(key_character.get("motivation"))
        if not motivation and _text(key_character.get("thought")):
            motivation = key_character["thought"]
            report["repaired: `thought` read as `motivation`"] += 1
        if name and motivation:
            motivations[name] = motivation
    speaking = {turn["character"] for turn in dialogues}
    return Scene(
        book=book,
        i_p=i_p,
        i_c=i_c,
        tag=tag,
        scenario=_text(conversation.get("scenario")),
        topic=_text(conversation.get("topic")),
        plot_summary=_text(plot.get("summary")),
        dialogues=dialogues,
        profiles={name: profile for name, profile in profiles.items() if name in speaking or _named(name, plot)},
        motivations=motivations,
    )


def _named(name, plot):
    return any(name in (k.get("name"), k.get("character")) for k in _records(plot.get("key_characters")))


def _turn(turn, report):
    """One `{character, message}`; other keys that stand where these should are accepted, and counted."""
    if not isinstance(turn, dict):
        report["dropped: message that is not an object"] += 1
        return None
    name, message = _text(turn.get("character")), turn.get("message")
    if not name and _text(turn.get("name")):
        name = turn["name"]
        report["repaired: `name` read as `character`"] += 1
    if not isinstance(message, str):
        for other in ("thought", "description", "dialogues", *(k for k in turn if k.startswith("["))):
            if _text(turn.get(other)):
                key = "[...]" if other.startswith("[") else other
                message = f"{other} {turn[other]}" if key == "[...]" else turn[other]
                report[f"repaired: `{key}` read as `message`"] += 1
                break
    if not name or not _text(message):
        report["dropped: message without a name or a text"] += 1
        return None
    return {"character": name.strip(), "message": message}


def _names(value):
    return [name for name in value if _text(name)] if isinstance(value, list) else []


def _records(value):
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(value):
    """The value if it is a string with something in it, else the empty string."""
    return value if isinstance(value, str) and value.strip() else ""
