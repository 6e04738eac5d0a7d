"""Books to chats to packed rows: what is read, what each character perceives, what is drawn, and what a row
holds."""

import copy
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, usage_error
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files import UsageError
from data import prompts
from data.brackets import as_thought, remove_thoughts
from data.chats import (
    END_CHAT,
    START,
    draw_options,
    next_speaker_chat,
    next_speaker_perspective,
    perspective,
    scene_to_chats,
)
from data.records import LONGEST, Report
from data.scenes import Scene, load_book, load_scenes, read_scenes, to_test_scene

BOOKS = ("King Lear", "Othello")
HI, HO = {"character": "A", "message": "hi"}, {"character": "B", "message": "ho"}


@pytest.fixture(scope="module")
def plays(shared):
    """The scenes of King Lear and Othello."""
    return [scene for name in BOOKS for scene in load_book(shared / "coser" / "books" / f"{name}.json")]


@pytest.fixture
def read(tmp_path):
    """Writes data as JSON (bytes as they are) and reads it: read(data) -> (scenes, report)."""

    def read(data, name="book.json"):
        file = tmp_path / name
        file.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        report = Report()
        return load_scenes(file, report), report

    return read


def book(*dialogues, **conversation):
    return {"plots": [{"conversation": [{"dialogues": list(dialogues) or [HI, HO], **conversation}]}]}


# ---- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "train", "held_out", "messages", "without"),
    [("King Lear", 17, 2, 193, 2), ("Othello", 13, 1, 137, 0)],
)
def test_a_real_book_is_read_whole(shared, name, train, held_out, messages, without):
    """Every conversation of the file, word for word and in order, split where the file says, and nothing
    repaired."""
    file, report = shared / "coser" / "books" / f"{name}.json", Report()
    raw, scenes = json.loads(file.read_text("utf-8")), load_book(file, report)
    assert +report == Counter({"dropped: plot without a conversation": without} if without else {})
    assert Counter(scene.tag for scene in scenes) == {"train": train, "id": held_out}
    assert sum(len(scene.dialogues) for scene in scenes) == messages
    found = [(i, j, c, p) for i, p in enumerate(raw["plots"]) for j, c in enumerate(p["conversation"])]
    for scene, (i_p, i_c, conversation, plot) in zip(scenes, found, strict=True):
        assert (scene.book, scene.i_p, scene.i_c) == (name, i_p, i_c)
        assert scene.tag == ("train" if i_p < raw["split_plot_index"] else "id")
        assert scene.dialogues == [
            {k: turn[k] for k in ("character", "message")} for turn in conversation["dialogues"]
        ]
        assert (scene.scenario, scene.topic) == (conversation["scenario"], conversation["topic"])
        assert scene.plot_summary == plot["summary"]
        assert scene.motivations == {k["name"]: k["motivation"] for k in conversation["key_characters"]}
        counts = [
            Counter(turn["character"] for turn in scene.dialogues)[name] for name in scene.speaking_characters
        ]
        assert counts == sorted(counts, reverse=True) and sum(counts) == len(scene.dialogues)
        profiled = [
            n for n in scene.speaking_characters if raw["character_datasets"].get(n, {}).get("profile")
        ]
        assert scene.major_characters == profiled
        assert all(scene.profiles[n] == raw["character_datasets"][n]["profile"] for n in profiled)


def test_the_test_file_is_read_whole(shared):
    """All 100 scenes: same messages, same order of speakers, same profiles; 238 motivations found under
    `thought`."""
    file, report = shared / "coser" / "test" / "id.json", Report()
    raw, scenes = json.loads(file.read_text("utf-8")), load_scenes(file, report)
    assert len(scenes) == 100 and report["repaired: `thought` read as `motivation`"] == 238
    assert not any(what.startswith("dropped: ") for what in +report)
    for scene, item in zip(scenes, raw, strict=True):
        assert (scene.i_p, scene.i_c, scene.tag) == (item["i_p"], item["i_c"], "id")
        assert scene.book.replace("’", "'") == item["book"].replace("’", "'")
        assert scene.dialogues == item["dialogues"]
        assert scene.speaking_characters == item["speaking_characters_w_env"]
        assert scene.profiles == {name: text for name, text in item["character_profiles"].items() if text}
        assert scene.motivations == {k["name"]: k["thought"] for k in item["key_characters"]}
        assert (scene.scenario, scene.plot_summary) == (item["scenario"], item["plot"]["summary"])


def test_major_characters_are_those_the_test_file_names(shared):
    """`major_characters` of the test file is kept, also for those of them whose profile is empty."""
    file = shared / "coser" / "test" / "id.json"
    named = [item["major_characters"] for item in json.loads(file.read_text("utf-8"))]
    wrong = [
        (s.key, s.major_characters, n)
        for s, n in zip(load_scenes(file), named, strict=True)
        if s.major_characters != n
    ]
    assert not wrong, f"{len(wrong)} of {len(named)} scenes, the first: {wrong[0]}"


def test_a_directory_is_all_its_books(shared):
    """A directory reads as its files in order of name."""
    both = [scene for name in BOOKS for scene in load_scenes(shared / "coser" / "books" / f"{name}.json")]
    assert load_scenes(shared / "coser" / "books") == both


def test_our_own_form_comes_back_as_it_was(stage, read):
    """Scenes written by `to_dict`, as transcripts keep them, are read back equal."""
    scenes = list(stage.values())
    assert read([scene.to_dict() for scene in scenes]) == (scenes, Counter())


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"name": "A", "message": "m"}, "m"),
        ({"character": "A", "thought": "m"}, "[m]"),
        ({"character": "A", "description": "m"}, "m"),
        ({"character": "A", "dialogues": "m"}, "m"),
        ({"character": "A", "[I wait] (sits)": "m"}, "[I wait] (sits) m"),
        ({"character": "A", "message": None, "thought": "m"}, "[m]"),
        ({"character": "A", "message": ""}, None),
        ({"character": "A", "message": " \n"}, None),
        ({"character": "A", "message": ["m"]}, None),
        ({"character": "", "message": "m"}, None),
        ({"character": ["A"], "message": "m"}, None),
        ({"message": "m"}, None),
        ({}, None),
        ("A: m", None),
        (None, None),
    ],
)
def test_a_messy_message_is_repaired_or_dropped_and_counted(read, turn, expected):
    """One odd message among good ones: what it says is kept or it goes, and the report has exactly one line
    on it."""
    (scene,), report = read(book(HI, turn, HO))
    assert scene.dialogues == [HI, *([{"character": "A", "message": expected}] if expected else []), HO]
    assert sum(report.values()) == 1 and next(iter(report)).startswith(
        "repaired: " if expected else "dropped: "
    )


def test_both_repairs_of_one_message_are_counted(read):
    """`name` for `character` and `thought` for `message` in the same message: two repairs."""
    (scene,), report = read(book(HO, {"name": "A", "thought": "m"}))
    assert scene.dialogues[1] == {"character": "A", "message": "[m]"} and sum(report.values()) == 2


@pytest.mark.parametrize(
    ("key_character", "repairs"),
    [
        ({"name": "A", "motivation": "m"}, 0),
        ({"name": "A", "thought": "m"}, 1),
        ({"character": "A", "motivation": "m"}, 1),
        ({"character": "A", "thought": "m"}, 2),
    ],
)
def test_a_messy_motivation_is_repaired_and_counted(read, key_character, repairs):
    """`thought` for `motivation` and `character` for `name`: the motivation reaches its owner, each repair is
    counted."""
    (scene,), report = read(book(key_characters=[key_character, "B", None]))
    assert scene.motivations == {"A": "m"}
    assert sum(count for what, count in report.items() if what.startswith("repaired: ")) == repairs


@pytest.mark.parametrize("key", ["name", "character"])
def test_a_silent_key_characters_profile_is_kept(read, key):
    """One who is named by the plot but does not speak keeps the profile, under either name of the key."""
    data = book() | {"character_datasets": {"C": {"profile": "p"}, "D": {"profile": "q"}}}
    data["plots"][0]["key_characters"] = [{key: "C"}]
    assert read(data)[0][0].profiles == {"C": "p"}


@pytest.mark.parametrize(
    "plot",
    [
        {"text": "no conversation"},
        {"conversation": None},
        {"conversation": []},
        {"conversation": {"dialogues": [HI]}},
        {"conversation": ["A: m"]},
        {"conversation": [{"scenario": "nobody speaks"}]},
        {"conversation": [{"dialogues": []}]},
        {"conversation": [{"dialogues": "A: m"}]},
    ],
)
def test_a_plot_without_a_conversation_is_dropped_and_counted(read, plot):
    """It gives no scene and one line of the report; the plots around it keep their numbers."""
    good = book()["plots"][0]
    scenes, report = read({"plots": [good, plot, good]})
    assert [scene.i_p for scene in scenes] == [0, 2]
    assert sum(report.values()) == 1 and next(iter(report)).startswith("dropped: ")


def test_a_plot_that_is_no_object_moves_no_other_across_the_split(read):
    """Plots keep the file's numbers, so the held-out ones stay held out whatever is dropped before them."""
    good = book()["plots"][0]
    scenes, report = read({"plots": ["odd", good, good], "split_plot_index": 2})
    assert sum(report.values()) == 1
    assert [(scene.i_p, scene.tag) for scene in scenes] == [(1, "train"), (2, "id")]


@pytest.mark.parametrize("number", [1, 5, 10, 19, 30])
def test_without_a_split_the_last_tenth_is_held_out(read, number):
    """A book that does not say where to split holds out what lies behind 90% of its plots."""
    scenes, _ = read({"plots": book()["plots"] * number})
    assert [scene.tag for scene in scenes] == ["train"] * (number * 9 // 10) + ["id"] * (
        number - number * 9 // 10
    )


@pytest.mark.parametrize("form", ["book", "test file"])
def test_titles_that_differ_in_quotes_alone_are_one_book(read, form):
    """Curly and straight quotes make two titles look alike: in a book or a test file, they are read as the
    same book, and that is counted."""
    (expected,), _ = read({"title": 'Howl\'s "Castle"', **book()})
    for title, repairs in (('Howl\'s "Castle"', 0), ("Howl’s “Castle”", 1)):
        item = {"book": title, "i_p": 0, "i_c": 0, "dialogues": [HI, HO]}
        (scene,), report = read({"title": title, **book()} if form == "book" else [item])
        assert (scene.key, sum(report.values())) == (expected.key, repairs)


def test_half_a_character_does_not_reach_the_tokenizer(read, stage_tokenizer):
    """JSON may escape half of a surrogate pair: it is mended or refused, and what is read can be encoded."""
    try:
        odd = book({"character": "A", "message": "hi \ud83d there"}, HO)
        (scene,), _ = read({"title": "\ud83d", "character_datasets": {"A": {"profile": "\ud83d"}}, **odd})
    except UsageError:
        return
    for chat in scene_to_chats(scene):
        stage_tokenizer.render(chat.messages)


TEXT = st.text(
    st.characters(codec="utf-8") | st.sampled_from("[](){}\n\r\t \ufeff\u2028\x00’“"), min_size=1, max_size=20
).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, min_size=8, max_size=8), st.booleans())
def test_any_text_survives_reading(tmp_path_factory, texts, escaped):
    """Whatever stands in title, scenario, topic, summary, names, profile, motivation and messages is read as
    it is, apart from what the report counts: white space in names, curly quotes in titles."""
    title, scenario, topic, summary, name, profile, motivation, message = texts
    turns = [
        {"character": name, "message": message},
        {"character": f"{name}2", "message": message + motivation},
    ]
    conversation = {
        "scenario": scenario,
        "topic": topic,
        "key_characters": [{"name": name, "motivation": motivation}],
    }
    data = {
        "title": title,
        "plots": [{"summary": summary, "conversation": [conversation | {"dialogues": turns}]}],
    }
    data["character_datasets"] = {name: {"profile": profile}}
    file, report = tmp_path_factory.getbasetemp() / "any.json", Report()
    file.write_bytes(json.dumps(data, ensure_ascii=escaped).encode())
    (scene,) = load_scenes(file, report)
    trimmed, straight = (
        " ".join(name.split()),
        title.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}),
    )
    assert (scene.book, scene.scenario, scene.topic, scene.plot_summary) == (
        straight,
        scenario,
        topic,
        summary,
    )
    other = " ".join(f"{name}2".split())
    assert scene.dialogues == [turns[0] | {"character": trimmed}, turns[1] | {"character": other}]
    assert scene.profiles == {trimmed: profile} and scene.motivations == {trimmed: motivation}
    assert set(report) <= {"repaired: white space in a name", "repaired: curly quotes in a title"}
    assert bool(report) == (name != trimmed or title != straight)


OWN = Scene("b", 0, 0, "id", "s", "t", "p", [HI, HO], profiles={"A": "p"}, motivations={"A": "m"}).to_dict()
TEST_SCENE = {
    **{"book": "b", "i_p": 1, "i_c": 2, "tag": "id", "scenario": "s", "topic": "t"},
    **{"plot": {"summary": "p", "key_characters": [{"name": "C"}]}, "dialogues": [HI, HO]},
    **{"key_characters": [{"name": "A", "thought": "m"}], "character_profiles": {"A": "p", "C": "q"}},
    **{"speaking_characters_w_env": ["A", "B"], "major_characters": ["A"]},
}
BOOK = {
    "title": "b",
    "plots": [
        {"summary": "p", "key_characters": [{"name": "A"}], **book(scenario="s", topic="t")["plots"][0]}
    ],
    "character_datasets": {"A": {"profile": "p"}},
    "split_plot_index": 1,
}


def nodes(value, path=()):
    yield path
    for key, child in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from nodes(child, (*path, key))


@pytest.mark.parametrize("form", [BOOK, [TEST_SCENE], [OWN]], ids=["book", "test file", "own form"])
def test_any_value_anywhere_is_read_or_refused(form, tmp_path):
    """Each node of a good file replaced by each kind of JSON value: chats can be made of what is read, or
    UsageError."""
    file, broken = tmp_path / "odd.json", []
    for path in nodes(form):
        for odd in (None, True, 5, -1.5, "", "x", [], ["x"], [None], [["x"]], {}, {"x": 1}):
            data = {"file": copy.deepcopy(form)}
            place = data
            for key in ("file", *path)[:-1]:
                place = place[key]
            place[("file", *path)[-1]] = odd
            file.write_text(json.dumps(data["file"]))
            try:
                for scene in load_scenes(file):
                    scene_to_chats(scene, next_speaker_share=1)
            except UsageError:
                pass
            except Exception as error:  # whatever else comes out of it is the finding
                broken.append((path, odd, repr(error)))
    assert not broken, f"{len(broken)} of them, the first: {broken[:3]}"


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b" \n",
        b"{",
        b"once upon a time",
        b"\xff\xfe{}",
        b'{"plots": "caf\xe9"}',
        b"5",
        b'"plots"',
        b"null",
        b"{}",
        b'{"plots": {}}',
        b'{"plots": []}',
        b"[]",
        b'["a", null]',
        b'{"plots": [{"conversation": []}]}',
        b'[{"plot_summary": "", "speaking_characters": []}]',
        b"[" * 200_000,
    ],
    ids=lambda content: repr(content)[:40],
)
def test_a_file_that_cannot_be_read_is_a_usage_error(script, tmp_path, content):
    """Missing, empty, not JSON, not UTF-8, of the wrong kind, nothing usable: one line that names the file,
    exit code 2."""
    file, out = tmp_path / "book.json", tmp_path / "tokenizer.model"
    if content is not None:
        file.write_bytes(content)
    assert str(file) in usage_error(script("tokenizer", "train", "--data", file, "--out", out))
    assert not out.exists()


def test_a_directory_without_books_is_a_usage_error(script, tmp_path):
    """The line names the directory."""
    (tmp_path / "notes.txt").write_text("{}")
    assert str(tmp_path) in usage_error(
        script("tokenizer", "train", "--data", tmp_path, "--out", tmp_path / "x")
    )


LONG = "a" * (LONGEST + 1)
PLAIN = {**TEST_SCENE, "key_characters": []}
MESSAGE = "plot 0, conversation 0, message 1"
BAD = [  # what stands in a book, the kind it is counted as, where the report says it is
    (book(HI, "A: m", HO), "dropped: message that is not an object", MESSAGE),
    (book(HI, {"message": "m"}, HO), "dropped: message without a name", MESSAGE),
    (book(HI, {"character": ["A"], "message": "m"}, HO), "dropped: `character` that is not text", MESSAGE),
    (book(HI, {"character": "A", "message": " \n"}, HO), "dropped: message without a text", MESSAGE),
    (book(HI, {"character": "A", "message": ["m"]}, HO), "dropped: `message` that is not text", MESSAGE),
    (book(HI, {"character": "A", "message": 5}, HO), "dropped: `message` that is not text", MESSAGE),
    (
        book(HI, {"character": "A", "message": LONG}, HO),
        "dropped: message of more than 1,000,000 characters",
        MESSAGE,
    ),
    (book(HI, {"name": "A", "message": "m"}, HO), "repaired: `name` read as `character`", MESSAGE),
    (book(HI, {"character": "A", "thought": "m"}, HO), "repaired: `thought` read as `message`", MESSAGE),
    (
        book(HI, {"character": "A", "description": "m"}, HO),
        "repaired: `description` read as `message`",
        MESSAGE,
    ),
    (book(HI, {"character": "A", "dialogues": "m"}, HO), "repaired: `dialogues` read as `message`", MESSAGE),
    (book(HI, {"character": "A", "[x] y": "m"}, HO), "repaired: `[...]` read as `message`", MESSAGE),
    (book(HI, {"character": "A", "message": "\ud83d"}, HO), "repaired: half of a surrogate pair", "plot 0"),
    (book(HI, {"character": " A\n", "message": "m"}, HO), "repaired: white space in a name", MESSAGE),
    (book(scenario=5), "dropped: `scenario` that is not text", "plot 0, conversation 0"),
    (book(topic=["t"]), "dropped: `topic` that is not text", "plot 0, conversation 0"),
    (book(key_characters="A"), "dropped: `key_characters` that is not a list", "plot 0, conversation 0"),
    (
        book(key_characters=["A"]),
        "dropped: key character that is not an object",
        "plot 0, conversation 0, key character 0",
    ),
    (
        book(key_characters=[{}]),
        "dropped: key character without a name",
        "plot 0, conversation 0, key character 0",
    ),
    (
        book(key_characters=[{"character": "A"}]),
        "repaired: `character` read as `name`",
        "plot 0, conversation 0, key character 0",
    ),
    (
        book(key_characters=[{"name": "A", "thought": "m"}]),
        "repaired: `thought` read as `motivation`",
        "plot 0, conversation 0, key character 0",
    ),
    ({"title": 5, **book()}, "dropped: `title` that is not text", ""),
    ({"title": "Howl\u2019s", **book()}, "repaired: curly quotes in a title", ""),
    (
        {"split_plot_index": "x", **book()},
        "repaired: `split_plot_index` that is no number, the last tenth of plots held out",
        "",
    ),
    ({"character_datasets": [], **book()}, "dropped: `character_datasets` that is not an object", ""),
    (
        {"character_datasets": {"A": {"profile": 5}}, **book()},
        "dropped: profile that is not text",
        "character A",
    ),
    ({"plots": ["odd", *book()["plots"]]}, "dropped: plot that is not an object", "plot 0"),
    ({"plots": [{}, *book()["plots"]]}, "dropped: plot without a conversation", "plot 0"),
    (
        {"plots": [{"conversation": "x"}, *book()["plots"]]},
        "dropped: `conversation` that is not a list",
        "plot 0",
    ),
    (
        {"plots": [{"summary": 5, **book()["plots"][0]}]},
        "dropped: `summary` that is not text",
        "plot 0",
    ),
    (
        {"plots": [{"conversation": [[], *book()["plots"][0]["conversation"]]}]},
        "dropped: conversation that is not an object",
        "plot 0, conversation 0",
    ),
    (
        {"plots": [{"conversation": [{"dialogues": "A: m"}, *book()["plots"][0]["conversation"]]}]},
        "dropped: `dialogues` that is not a list",
        "plot 0, conversation 0",
    ),
    (
        {"plots": [{"conversation": [{"dialogues": []}, *book()["plots"][0]["conversation"]]}]},
        "dropped: conversation without messages",
        "plot 0, conversation 0",
    ),
    ([{**PLAIN, "plot": "p"}], "dropped: `plot` that is not an object", "scene 0"),
    (["odd", PLAIN], "dropped: scene that is not an object", "scene 0"),
    ([PLAIN, PLAIN], "dropped: scene whose book and numbers were read before", "b-1-2"),
    ([{**PLAIN, "tag": 5}], "dropped: `tag` that is not text", "scene 0"),
]


@pytest.mark.parametrize(
    ("data", "kind", "place"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_bad_is_counted_and_located_and_strict_stops_there(data, kind, place, read, tmp_path):
    """One bad thing among good ones: read all the same, one line of the report with its kind and place;
    --strict says both."""
    scenes, report = read(data)
    where = report.examples.get(kind, "")
    assert scenes and report == {kind: 1}
    assert where.startswith(str(tmp_path / "book.json")) and where.endswith(place)
    assert report.lines() == [f"1 {kind}, the first at {where}"]
    with pytest.raises(UsageError) as error:
        load_scenes(tmp_path / "book.json", Report(strict=True))
    assert str(error.value).startswith(f"{where}: {kind}")


def test_the_content_says_whether_a_file_is_one_list_or_lines(tmp_path):
    """A test file, and books, as JSON lines or as one list, under either name: the same scenes, numbered the
    same."""
    scenes = [{**TEST_SCENE, "i_c": None, "i_p": None}] * 3
    books = [{**BOOK, "title": f"b{i}", "plots": BOOK["plots"] * 2} for i in range(2)]
    for rows, number in ((scenes, 3), (books, 4)):
        forms = [json.dumps(rows), json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))]
        found = []
        for i, (form, suffix) in enumerate((form, suffix) for form in forms for suffix in ("json", "jsonl")):
            file = tmp_path / f"{i}.{suffix}"
            file.write_text(form)
            found.append(load_scenes(file))
        assert len(found[0]) == number and all(other == found[0] for other in found)
    file.write_text("\n".join([json.dumps(books[0]), '{"a', json.dumps(books[1])[:-3]]))
    load_scenes(file, report := Report())
    expected = {"line that is not JSON": 2, "last line, incomplete": 3}
    assert report.examples == {f"dropped: {what}": f"{file}: line {n}" for what, n in expected.items()}


def test_a_bad_file_among_books_is_counted(tmp_path):
    """In a directory, a file that is not UTF-8, not JSON, torn or of another kind is dropped, counted and
    named; the books beside it are read. Alone it is a UsageError."""
    good = json.dumps(book()).encode()
    bad = {
        "a": b"\xff",
        "b": b"{",
        "c": good[:-1],
        "d": b"5",
        "e": b"",
        "f": b'{"x": 1}',
        "g": b"[" * 200_000,
        "h": b"1" * 9999,
    }
    for name, content in bad.items():
        (tmp_path / f"{name}.json").write_bytes(content)
        with pytest.raises(UsageError, match=str(tmp_path / f"{name}.json")):
            load_scenes(tmp_path / f"{name}.json")
    (tmp_path / "good.json").write_bytes(b"\xef\xbb\xbf" + good)  # a byte order mark is no fault
    report = Report()
    assert [scene.book for scene in load_scenes(tmp_path, report)] == ["good"]
    assert sum(report.values()) == len(bad)
    assert set(report.examples.values()) <= {str(tmp_path / f"{name}.json") for name in bad}


@given(st.text("[]() ab\n", min_size=1).filter(str.strip))
def test_what_stands_under_thought_is_hidden_whole(text):
    """A message read from `thought` is a thought of its owner, word for word, whatever brackets it has;
    others see nothing."""
    made = as_thought(text)
    assert text in made and not set(made.replace(text, "", 1)) - set("[]")
    assert remove_thoughts(made) == "" and remove_thoughts(made + "x") == "x"


def test_held_out_books_stay_held_out(tmp_path):
    """By a hash of the title alone: the share is met, another book moves none, those written down here are
    still held out."""
    for i in range(300):
        (tmp_path / f"{i:03}.json").write_text(json.dumps(book()))
    held = {scene.book for scene, _ in read_scenes([tmp_path], Report(), 0.1) if scene.tag == "ood"}
    assert abs(len(held) / 300 - 0.1) < 4.5 * math.sqrt(0.09 / 300)
    assert sorted(held)[:3] == ["010", "023", "042"]
    (tmp_path / "one more.json").write_text(json.dumps(book()))
    assert {scene.book for scene, _ in read_scenes([tmp_path], Report(), 0.1) if scene.tag == "ood"} - {
        "one more"
    } == held
    assert held < {scene.book for scene, _ in read_scenes([tmp_path], Report(), 0.2) if scene.tag == "ood"}


def test_scenes_written_as_a_test_file_are_read_back_equal(plays, stage, read):
    """`to_test_scene` loses nothing."""
    scenes = [*plays, *stage.values()]
    found, report = read([to_test_scene(scene) for scene in scenes])
    assert found == scenes and not report


# ---- what each character perceives -------------------------------------------------------------------------


def release_rows(shared):
    """Rows of the release without their system prompts: lists of (role, text)."""
    rows = json.loads((shared / "coser" / "sft_sharegpt.json").read_text("utf-8"))
    roles = {"human": "user", "assistant": "assistant"}
    return [
        [(roles[t["from"]], t["value"]) for t in row["conversations"] if t["from"] != "system"]
        for row in rows
    ]


def test_perspective_equals_the_release(shared, plays):
    """All 420 rows of characters and Environment, up to their last assistant turn, are ours, with and without
    thoughts."""

    def up_to_last_own(turns):
        return tuple(turns[: max(i for i, (role, _) in enumerate(turns) if role == "assistant") + 1])

    theirs = [row for row in release_rows(shared) if row[-1][1] != END_CHAT]
    assert len(theirs) == 420
    ours = Counter()
    for scene in (scene for scene in plays if scene.tag == "train"):
        for character in scene.speaking_characters:
            for thoughts in (True, False):
                turns = perspective(scene.dialogues, character, thoughts)
                ours[up_to_last_own([(turn["role"], turn["content"]) for turn in turns])] += 2
    assert ours == Counter(map(up_to_last_own, theirs))


def test_next_speaker_perspective_equals_the_release(shared, plays):
    """All 14 next-speaker rows are ours, once their shown thoughts are gone; `random` stands only for a minor
    speaker."""
    rows = [row for row in release_rows(shared) if row[-1] == ("assistant", END_CHAT)]
    assert len(rows) == 14
    for row in rows:
        shown = [re.sub(r"\[[^\]]*\]", "", text).split(": ", 1) for role, text in row if role == "user"]
        shown = [": ".join(part.strip() for part in parts) for parts in shown]
        names = [text for role, text in row if role == "assistant"]
        matches = []
        for scene in plays:
            turns = next_speaker_perspective(scene.dialogues)
            if [turn["content"].strip() for turn in turns if turn["role"] == "user"] == shown:
                matches.append(
                    (scene, [turn["content"] for turn in turns if turn["role"] == "assistant"] + [END_CHAT])
                )
                assert [turn["role"] for turn in turns] == [role for role, _ in row[:-1]]
        assert len(matches) == 1, row
        scene, ours = matches[0]
        for theirs, name in zip(names, ours, strict=True):
            assert theirs == name or (
                theirs == "random" and name not in scene.major_characters and name != "Environment"
            )


@pytest.mark.parametrize(
    ("message", "visible"),
    [
        ("plain", "plain"),
        ("[a] b [c]", "b"),
        ("b (does [c]) d", "b (does ) d"),
        ("[a [b] c] d", "d"),
        ("x [a\n\nb]\n y", "x\ny"),
        ("x\n\n\n  y  ", "x\ny"),
        ("x [a", "x"),
        ("x [a [b] c", "x"),
        ("x [a\ny] z [b\nw", "x  z"),
        ("[a]", ""),
        ("", ""),
    ],
)
def test_thoughts_are_removed(message, visible):
    """Nested and over several lines, whole; an unclosed one hides all that follows; lines stripped, blank
    ones gone."""
    assert remove_thoughts(message) == visible


@given(st.text("[[]] \nab(", max_size=30))
def test_thought_removal_equals_innermost_first(message):
    """The same as taking out innermost pairs until none is left, then all from the first `[` on, then tidying
    lines."""
    plain, before = message, None
    while plain != before:
        plain, before = re.sub(r"\[[^\[\]]*\]", "", plain), plain
    plain = "\n".join(line.strip() for line in plain.split("[")[0].split("\n"))
    assert remove_thoughts(message) == re.sub(r"\n+", "\n", plain).strip()


THINKS = {
    "P": "αβγ",
    "Q": "жзи",
    "R": "אבג",
    "Environment": "ɐɔə",
}  # what each one thinks in; they speak in digits


@st.composite
def dialogues(draw):
    """Messages of digits, brackets and lines to be seen, and of thoughts, nested and unclosed too, to be
    hidden."""
    turns = []
    for name in draw(st.lists(st.sampled_from(list(THINKS)), min_size=1, max_size=8)):
        letters = st.text(THINKS[name] + " \n", max_size=4)
        nested = st.recursive(
            letters, lambda inside, t=letters: st.builds("{}[{}]{}".format, t, inside, t), max_leaves=3
        )
        thought = st.builds("[{}]".format, nested)
        parts = draw(st.lists(st.text("0123 ().\n", max_size=6) | thought, max_size=5))
        unclosed = draw(st.just("") | st.builds("[{}".format, nested))
        turns.append({"character": name, "message": "".join(parts) + unclosed})
    return turns


@settings(max_examples=150, deadline=None)
@given(dialogues(), st.integers(0, 5), st.booleans())
def test_no_thought_of_another_reaches_any_chat(turns, epoch, thoughts):
    """Not one letter of another's thoughts is in any chat; one's own are in one's own turns alone, and only
    if drawn."""
    profiles = {"P": "one", "Q": "two"}
    scene = Scene(
        "book", 0, 0, "train", "where", "what", "how", turns, profiles=profiles, motivations={"Q": "why"}
    )
    for chat in scene_to_chats(scene, epoch, thoughts=thoughts, next_speaker_share=1):
        for message in chat.messages:
            for name, letters in THINKS.items():
                own = name == chat.character and message["role"] == "assistant" and chat.options["thoughts"]
                assert own or not set(letters) & set(message["content"]), (chat.character, message)
        assert thoughts or not chat.options.get("thoughts")


@settings(max_examples=100, deadline=None)
@given(dialogues(), st.sampled_from(list(THINKS)))
def test_nothing_else_is_lost(turns, character):
    """All that is visible is in the perspective of each, in order, and of the own messages every letter of
    thought."""
    seen = "".join(turn["content"] for turn in perspective(turns, character))
    letters = THINKS[character]
    kept = [
        m if (m := turn["message"]) and turn["character"] == character else m.translate(OTHERS)
        for turn in turns
    ]
    assert re.sub(f"[^0-9(){letters}]", "", seen) == re.sub(f"[^0-9(){letters}]", "", "".join(kept))
    shown = "".join(turn["content"] for turn in next_speaker_perspective(turns))
    assert re.sub("[^0-9()]", "", shown) == re.sub("[^0-9()]", "", "".join(turn["message"] for turn in turns))


OTHERS = {ord(letter): None for letters in THINKS.values() for letter in letters}


def test_own_and_others_messages_are_merged_into_turns():
    """Others' messages share a user turn, each with its name; a second own message joins the first without
    the name."""
    dialogue = [(n, m) for n, m in zip("BCAAB", ("[x] one", "two", "[y] three", "four", "five"), strict=True)]
    turns = perspective([{"character": n, "message": m} for n, m in dialogue], "A")
    assert turns == [
        {"role": "user", "content": START + "B: one\n\nC: two\n\n"},
        {"role": "assistant", "content": "A: [y] three\n\nfour\n\n"},
        {"role": "user", "content": "B: five\n\n"},
    ]


# ---- training chats ----------------------------------------------------------------------------------------


def test_a_chat_ends_with_what_is_learnt(plays, stage):
    """System first, then user and assistant by turns from the start of the conversation on, an assistant turn
    at the end."""
    for scene in [*plays, *stage.values()]:
        for epoch in range(3):
            for chat in scene_to_chats(scene, epoch, next_speaker_share=1):
                roles = [message["role"] for message in chat.messages]
                assert roles == ["system"] + ["user", "assistant"] * (len(roles) // 2) and len(roles) >= 3
                assert chat.messages[1]["content"].startswith(START)


def test_a_scene_gives_one_chat_for_each_who_speaks(plays, stage):
    """One for each speaker, of the right kind, and one for the next speaker where its share says so."""
    for scene in [*plays, *stage.values()]:
        chats = [(chat.character, chat.kind) for chat in scene_to_chats(scene, next_speaker_share=1)]
        kinds = {"Environment": "environment"}
        assert chats == [(n, kinds.get(n, "character")) for n in scene.speaking_characters] + [
            ("NSP", "next_speaker")
        ]
        assert len(scene_to_chats(scene, next_speaker_share=0)) == len(chats) - 1


def test_one_with_nothing_to_say_gives_no_chat():
    """Where thoughts are removed, one who only thinks has no chat; one who says something once has."""
    turns = [("A", "hi"), ("B", "[mm]"), ("C", "[mm]"), ("B", "[never\n closed"), ("C", "yes")]
    scene = Scene("b", 0, 0, "train", "", "", "", [{"character": n, "message": m} for n, m in turns])
    assert {chat.character for chat in scene_to_chats(scene, thoughts=False, next_speaker_share=0)} == {
        "A",
        "C",
    }
    drawn = [
        (c.character, c.options["thoughts"])
        for e in range(40)
        for c in scene_to_chats(scene, e, next_speaker_share=0)
    ]
    assert ("B", True) in drawn and ("B", False) not in drawn and ("C", False) in drawn


def test_the_same_seed_is_the_same_draw(stage):
    """Chats depend on seed and epoch alone: not on the process, its hash seed, or the state of `random`."""
    scene = stage["ward-c/1"]
    random.seed(1)
    ours = [chat.__dict__ for chat in scene_to_chats(scene, 2, 7)]
    random.seed(2)
    assert ours == [chat.__dict__ for chat in scene_to_chats(scene, 2, 7)]
    assert ours != [chat.__dict__ for chat in scene_to_chats(scene, 3, 7)]
    assert ours != [chat.__dict__ for chat in scene_to_chats(scene, 2, 8)]
    code = (
        "import json; from data.scenes import load_stage; from data.chats import scene_to_chats;"
        "print(json.dumps([c.__dict__ for c in scene_to_chats(load_stage()['ward-c/1'], 2, 7)]))"
    )
    for hash_seed in "12":
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        there = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert json.loads(there.stdout) == json.loads(json.dumps(ours))


def test_adding_a_scene_changes_no_other_chat(stage, read):
    """A book with one more plot, and more books before it, give the same chats for the scenes that were
    there."""
    plot = book(scenario="s")["plots"][0]
    short, _ = read({"title": "b", "plots": [plot] * 10, "split_plot_index": 9})
    other = list(stage.values())[:3]
    long, _ = read({"title": "b", "plots": [plot] * 11, "split_plot_index": 9})
    alone = {scene.key: scene_to_chats(scene, 1) for scene in short}
    among = {scene.key: scene_to_chats(scene, 1) for scene in [*other, *long]}
    assert all(among[key] == chats for key, chats in alone.items()) and len(among) == 14


def test_options_are_drawn_in_the_published_shares(stage):
    """Over many epochs: styles 40/30/20/10, each of 20 openers 5%, plot summary, motivation, others and
    thoughts 50%."""
    drawn = [
        chat.options
        for e in range(500)
        for chat in scene_to_chats(stage["ward-c/1"], e, next_speaker_share=0)
    ]
    assert len({json.dumps(options) for options in drawn}) > 0.4 * len(
        drawn
    )  # they are drawn apart from each other
    drawn += [draw_options(random.Random(f"{i}")) for i in range(20_000)]
    expected = {("style", s): p for s, p in {"natural": 0.4, "=": 0.3, "#": 0.2, "*": 0.1}.items()}
    expected |= {("opener", i): 0.05 for i in range(20)}
    expected |= {(name, True): 0.5 for name in ("plot_summary", "motivation", "others", "thoughts")}
    for (name, value), share in expected.items():
        found = sum(options[name] == value for options in drawn) / len(drawn)
        assert abs(found - share) < 4.5 * math.sqrt(share * (1 - share) / len(drawn)), (name, value, found)
    assert {options["opener"] for options in drawn} == set(range(20))


def test_variants_all_are_the_four_of_the_release(stage):
    """With and without thoughts and the others' profiles, each pair once for each who speaks; in the ablation
    two. What else varies is drawn for each of them, in the published shares."""
    for thoughts, number in ((True, 4), (False, 2)):
        drawn, pairs = [], Counter()
        for scene in stage.values():
            for chat in scene_to_chats(scene, thoughts=thoughts, next_speaker_share=0, variants="all"):
                drawn.append(chat.options)
                pairs[scene.key, chat.character, chat.options["thoughts"], chat.options["others"]] += 1
                assert (
                    chat.messages[2:]
                    == perspective(scene.dialogues, chat.character, chat.options["thoughts"])[1:][
                        : len(chat.messages) - 2
                    ]
                )
        assert set(pairs.values()) == {1}
        assert len(drawn) == number * sum(len(scene.speaking_characters) for scene in stage.values())
        share = sum(options["style"] == "natural" for options in drawn) / len(drawn)
        assert abs(share - 0.4) < 4.5 * math.sqrt(0.24 / len(drawn))
        assert len({options["opener"] for options in drawn}) == 20


def test_next_speaker_chats_are_kept_and_random_in_the_published_shares():
    """One in ten is kept; the minor speaker is `random` a quarter of the time, others never; thoughts are not
    shown."""
    turns = [
        {"character": name, "message": f"[hush] {name} speaks"} for name in ("P", "Environment", "minor", "Q")
    ]
    scene = Scene("b", 0, 0, "train", "s", "", "", turns, profiles={"P": "p", "Q": "q"})
    epochs = 4000
    kept = sum(chat.kind == "next_speaker" for e in range(epochs) for chat in scene_to_chats(scene, e))
    assert abs(kept / epochs - 0.1) < 4.5 * math.sqrt(0.09 / epochs)
    said = Counter()
    for seed in range(epochs):
        chat = next_speaker_chat(scene, random.Random(seed))
        assert "hush" not in str(chat.messages)
        said[tuple(m["content"] for m in chat.messages if m["role"] == "assistant")] += 1
    assert said.keys() == {("P", "Environment", third, "Q", END_CHAT) for third in ("minor", "random")}
    share = said["P", "Environment", "random", "Q", END_CHAT] / epochs
    assert abs(share - 0.25) < 4.5 * math.sqrt(0.1875 / epochs)


def test_a_prompt_holds_what_was_drawn_and_nothing_more(plays, stage):
    """Own profile and scenario always; plot summary, own motivation and others' profiles as drawn; another's
    motivation never, that of the first key character included."""
    for scene in [*plays, *stage.values()]:
        for epoch in range(4):
            for chat in scene_to_chats(scene, epoch, next_speaker_share=0):
                prompt, options, name = chat.messages[0]["content"], chat.options, chat.character
                assert scene.book in prompt and scene.scenario in prompt
                if chat.kind == "environment":
                    assert not any(
                        text in prompt for text in [*scene.motivations.values(), scene.plot_summary]
                    )
                    continue
                assert name in prompt and (
                    name not in scene.profiles or prompt.count(scene.profiles[name]) == 1
                )
                assert (scene.plot_summary in prompt) == options["plot_summary"]
                for who, text in scene.motivations.items():
                    assert (text in prompt) == (who == name and options["motivation"]), (scene.key, name, who)
                for who in set(scene.major_characters) - {name}:
                    assert (scene.profiles[who] in prompt) == options["others"]
                assert ("[square brackets]" in prompt) == options["thoughts"]


def test_experience_stays_out_of_every_prompt(shared):
    """What a character goes through in the plot gives the outcome away: no chat of the plays holds it."""
    for name in BOOKS:
        file = shared / "coser" / "books" / f"{name}.json"
        plots = json.loads(file.read_text("utf-8"))["plots"]
        for scene in load_book(file):
            told = [k["experience"] for k in plots[scene.i_p]["key_characters"] if k["experience"]]
            text = "".join(chat.messages[0]["content"] for e in range(3) for chat in scene_to_chats(scene, e))
            assert told and not any(experience in text for experience in told)


@pytest.mark.parametrize(
    "odd", ["{character}", "{0} {}", "{{x}}", "{", "%s %(x)d 100%", "$name \\1 {book!r:>{x}}"]
)
def test_braces_and_percent_signs_survive_templates(odd):
    """Whatever stands in names, title, scenario, profiles and the rest stands in the prompts, in every
    style."""
    name, book_, where, how, own, other, why = (f"{odd} {i}" for i in range(7))
    turns = [{"character": n, "message": f"{odd} said"} for n in (name, "B", "Environment")]
    profiles, motivations = {name: own, "B": other}, {name: why}
    scene = Scene(book_, 0, 0, "train", where, "", how, turns, profiles=profiles, motivations=motivations)
    for style in prompts.STYLES:
        for opener in range(len(prompts.OPENERS)):
            options = {name: True for name in draw_options(random.Random(0))} | {
                "opener": opener,
                "style": style,
            }
            prompt = prompts.actor(scene, name, options, concise=True)
            assert all(text in prompt for text in (name, book_, where, how, own, other, why)), prompt
    for prompt in (prompts.environment(scene), prompts.next_speaker(scene)):
        assert all(text in prompt for text in (name, book_, where)), prompt
    assert all(f"{odd} said" in str(turn["content"]) for turn in perspective(turns, name)[1:])
