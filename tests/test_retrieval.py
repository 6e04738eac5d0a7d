"""Retrieval for acting: nothing of the scene or of later is ever retrieved; what is found, where it goes, and
what it costs."""

import json
import math
import random
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import ROOT, usage_error
from test_llm import Script, Server
from test_simulate import read_lines, stage_answer, without_seconds

import simulate
from common import files
from data.chats import START
from data.scenes import load_book, to_test_scene
from llm.reply import Reply
from play.perform import TokenCounts, perform
from play.protocol import Call, Performance, Protocol
from play.retrieval import PIECE, Retrieval, parse_sources, split

pytest.importorskip("bm25s")

ALL = "raw:99+experience:99+conversation:99"
REPEATED = "Once again the old bell rang over the harbour, and nobody came."
CAST = ("Ada", "Ben", "Environment")


@pytest.fixture(autouse=True)
def _out(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "OUT", tmp_path / "out")


def told(plot, kind, n):
    """A text of n sentences of which each third word says in which plot it stands, and in what."""
    return " ".join(f"The wind {kind}{i}p{plot}x blew and p{plot}x fell." for i in range(n))


def make_plot(n, text=None):
    turns = [(name, f"[secret p{n}x] Hear, {name}: {told(n, name.lower(), 1)}") for name in CAST * 2]
    return {
        "text": told(n, "text", 40) if text is None else text,
        "summary": told(n, "summary", 2),
        "key_characters": [{"name": "Ada", "experience": told(n, "experience", 1)}],
        "conversation": [
            {
                "scenario": told(n, "scenario", 1),
                "topic": f"p{n}x",
                "key_characters": [{"name": "Ben", "motivation": "None."}],
                "dialogues": [{"character": name, "message": message} for name, message in turns],
            }
        ],
    }


def write_book(path, plots, split_plot_index=None):
    profiles = {name: {"profile": f"{name} is tall."} for name in ("Ada", "Ben")}
    value = {"title": "The Test", "plots": plots, "character_datasets": profiles}
    value |= {} if split_plot_index is None else {"split_plot_index": split_plot_index}
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def found(retrieval, scene, character, query="the wind blew and the old bell rang"):
    return retrieval.find(scene, character, [{"role": "user", "content": query}])


def plots_in(passages):
    """The plots that the words of passages are from."""
    return {int(n) for passage in passages for n in re.findall(r"p(\d+)x", passage["text"])}


# ---- no leak -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(9))
def test_nothing_of_the_scene_or_of_later_is_ever_retrieved(tmp_path, seed):
    """Every word says where it is from; plots may repeat a paragraph, or run on into later ones."""
    rng = random.Random(seed)
    texts = [told(n, "text", rng.randrange(60, 90)) for n in range(8)]
    for n in rng.sample(range(8), 5):
        at = rng.choice([0, len(texts[n]), texts[n].index("The wind text9")])
        texts[n] = f"{texts[n][:at]} {REPEATED} {texts[n][at:]}".strip()
    for n in rng.sample(range(7), 3):
        texts[n] += f" {texts[n + 1][: rng.randrange(200, 900)]}"
    plots = [make_plot(n, own) for n, own in enumerate(texts)]
    split_at = rng.randrange(3, 9)
    book = write_book(tmp_path / "b.json", plots, split_at)
    retrieval = Retrieval(ALL, load_book(book), book)
    reached = Counter()
    for scene in load_book(book):
        limit = min(scene.i_p, split_at)
        for character in ("Ada", "Ben"):
            passages = found(retrieval, scene, character)
            assert plots_in(passages) <= set(range(limit)), (scene.key, character)
            reached.update(p["source"] for p in passages)
            if limit > 1:
                later = f"p{limit - 1}x"
                assert any(later in p["text"] for p in passages if p["source"] != "raw")
    assert min(reached[source] for source in ("raw", "experience", "conversation")) > 10


def test_a_paragraph_that_a_later_plot_repeats_is_left_out_until_then(tmp_path):
    """Plots 1 and 4 have it: it is retrieved after both alone."""
    plots = [make_plot(n) for n in range(6)]
    for n in (1, 4):
        plots[n]["text"] = f"{told(n, 'before', 30)} {REPEATED} {told(n, 'after', 30)}"
    book = write_book(tmp_path / "b.json", plots, 6)
    scenes = load_book(book)
    retrieval = Retrieval("raw:99", scenes, book)
    holders = {
        scene.i_p: {p["plot"] for p in found(retrieval, scene, "Ada") if "old bell" in p["text"]}
        for scene in scenes
    }
    assert holders == {**{n: set() for n in range(5)}, 5: {1, 4}}


def test_what_is_said_in_the_scene_is_not_remembered_from_an_earlier_one(tmp_path):
    """An earlier conversation with the scene's own line is left out; without it, it is found."""
    plots = [make_plot(n) for n in range(4)]
    line = "I have waited for you under the clock since noon."
    plots[1]["conversation"][0]["dialogues"][0]["message"] = f"(waves) {line}"
    book = write_book(tmp_path / "b.json", plots, 4)
    assert 1 in plots_in(found(Retrieval("conversation:9", load_book(book), book), load_book(book)[3], "Ada"))
    plots[3]["conversation"][0]["dialogues"][2]["message"] = f"[At last.] {line.upper()}"
    book = write_book(tmp_path / "b.json", plots, 4)
    passages = found(
        Retrieval("conversation:9", load_book(book), book), load_book(book)[3], "Ada", "the wind blew"
    )
    assert passages and not any("under the clock" in p["text"].lower() for p in passages)


def test_a_scene_must_be_of_the_book(tmp_path, monkeypatch, script):
    """A wrong number of its plot would give away its end, so its messages must stand there."""
    book = write_book(tmp_path / "b.json", [make_plot(n) for n in range(5)], 5)
    items = [to_test_scene(scene) for scene in load_book(book)]
    items[1]["i_p"] = 4
    (tmp_path / "s.json").write_text(json.dumps(items))
    (tmp_path / "other.json").write_text(book.read_text().replace("The Test", "Other"))
    for scenes, books in ((tmp_path / "s.json", book), (book, tmp_path / "other.json")):
        with pytest.raises(files.UsageError, match="does not hold plot . of The Test"):
            Retrieval("experience:1", load_book(scenes), books)
    items[1]["i_p"] = 1
    (tmp_path / "s.json").write_text(json.dumps(items))
    assert Retrieval("experience:1", load_book(tmp_path / "s.json"), tmp_path).settings


@pytest.mark.parametrize("title", ["", " ", 7, None, "The \u201cTest\u201d"])
def test_a_book_is_found_by_the_title_that_its_scenes_have(tmp_path, title):
    """The file's name where it has none."""
    book = write_book(tmp_path / "b.json", [make_plot(n) for n in range(3)], 3)
    book.write_text(json.dumps(json.loads(book.read_text()) | {"title": title}))
    scenes = load_book(book)
    assert found(Retrieval("experience:1", scenes, tmp_path), scenes[2], "Ada")


def test_the_real_books(shared):
    """King Lear and Othello, all scenes: earlier plots alone, no six words in a row of the scene's own plot
    or a later one; and the release's leak, for as many characters as were counted in its files."""
    books = shared / "coser" / "books"
    if not books.is_dir():
        pytest.skip("no books")
    for title, leaking in (("King Lear", (9, 15)), ("Othello", (3, 9))):
        file = books / f"{title}.json"
        value, scenes = json.loads(file.read_text()), load_book(file)
        clean, leaky = Retrieval(ALL, scenes, books), Retrieval("conversation:1", scenes, books, leaky=True)
        counts = Counter()
        for scene in scenes:
            limit = min(scene.i_p, value["split_plot_index"])
            told = [plot["text"] for plot in value["plots"][limit:]]
            talks = [talk for plot in value["plots"][limit:] for talk in plot["conversation"]]
            told += [turn["message"] for talk in talks for turn in talk["dialogues"]]
            later = {six for text in told for six in sixes(text)}
            for character in scene.speaking_characters:
                for passage in found(clean, scene, character):
                    counts[passage["source"]] += 1
                    assert passage["plot"] < limit
                    assert not sixes(passage["text"]) & later
                line = next(turn["message"] for turn in scene.dialogues if turn["character"] == character)
                counts["leak"] += any(p["plot"] == scene.i_p for p in found(leaky, scene, character, line))
        assert min(counts.values()) > 20, counts
        names, split_at = value["character_datasets"], value["split_plot_index"]
        passages = Retrieval("experience:1", scenes, books).books[title].passages
        held_out = {name for passage, who, _ in passages for name in who if passage["plot"] >= split_at}
        holders = held_out & names.keys()
        assert (len(holders), len(names)) == leaking


def sixes(text):
    own = re.findall(r"[a-z0-9]+", text.lower().replace("_", " "))
    return {tuple(own[i : i + 6]) for i in range(len(own) - 5)}


# ---- what is found -----------------------------------------------------------------------------------------


def test_the_best_by_bm25_in_the_order_of_the_book(tmp_path):
    """The pieces with the highest scores of the formula (k1 1.5, b 0.75), computed here."""
    rng = random.Random(3)
    vocabulary = [f"word{i}" for i in range(60)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randrange(20, 60))) for _ in range(12)]
    plots = [make_plot(n, text) for n, text in enumerate(texts)] + [make_plot(12)]
    book = write_book(tmp_path / "b.json", plots, 13)
    query = ["word3", "word5", "word8", "word3", "unknown"]
    documents = [text.split() for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            df, tf = sum(word in other for other in documents), document.count(word)
            idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        scores.append(score)
    best = sorted(sorted(range(12), key=lambda i: -scores[i])[:4])
    retrieval = Retrieval("raw:4", load_book(book), book)
    passages = found(retrieval, load_book(book)[12], "Ada", " ".join(query))
    assert [passage["plot"] for passage in passages] == best and best != list(range(4))


def test_the_last_three_messages_are_the_query(tmp_path):
    """Not the one before them, nor the mark that starts a conversation; without a word in common nothing."""
    plots = [make_plot(n, f"Unique{n} is told here.") for n in range(5)] + [make_plot(5)]
    book = write_book(tmp_path / "b.json", plots, 6)
    retrieval, scene = Retrieval("raw:9", load_book(book), book), load_book(book)[5]
    chat = [
        {"role": "user", "content": text} for text in ("unique0", f"{START}unique1", "unique2", "UNIQUE3!")
    ]
    assert {passage["plot"] for passage in retrieval.find(scene, "Ada", chat)} == {1, 2, 3}
    assert retrieval.find(scene, "Ada", [{"role": "user", "content": START}]) == []
    assert retrieval.find(scene, "Ada", [{"role": "user", "content": "zzz"}]) == []


def test_a_character_remembers_its_own_plots(tmp_path):
    """Not those without it, and others' thoughts in none; its experience where the book has one."""
    plots = [make_plot(n) for n in range(4)]
    plots[1]["key_characters"] = []
    talk = plots[1]["conversation"][0]
    talk["dialogues"] = [turn for turn in talk["dialogues"] if turn["character"] != "Ada"]
    book = write_book(tmp_path / "b.json", plots, 4)
    retrieval, scene = Retrieval(ALL, load_book(book), book), load_book(book)[3]
    assert plots_in(found(retrieval, scene, "Ada")) == {0, 2}
    assert plots_in(found(retrieval, scene, "Ben")) == {0, 1, 2}
    assert not any("secret" in passage["text"] for passage in found(retrieval, scene, "Ben"))
    experience = {p["text"] for p in found(retrieval, scene, "Ada") if p["source"] == "experience"}
    assert all("Ada's part in it: The wind experience0" in text for text in experience)
    assert found(retrieval, scene, "Nobody") == []


@pytest.mark.parametrize("form", ["", "{}x", "{} ", "One {}. Two, {}. ", "\n\n{}\n"])
def test_pieces_cover_a_text_and_overlap(form):
    """At most PIECE characters each, every word in one of them, in order."""
    text = "".join(form.replace("{}", str(i)) for i in range(2000))
    pieces = [text[start:end].strip() for start, end in split(text)]
    assert len(pieces) >= len(text.strip()) / PIECE and all(len(piece) <= PIECE for piece in pieces)
    at, end = 0, 0
    for piece in pieces:
        at = text.index(piece, at)
        assert not text[end:at].strip() and at < max(end - 50, 3)
        end = at + len(piece)
    assert not text[end:].strip()


@pytest.mark.parametrize(
    "spec", ["", "raw", "raw:0", "raw:x", "raw:1+raw:2", "book:1", "raw:1+", "raw:100", "raw:-1"]
)
def test_a_spec_that_is_none_is_refused(spec):
    with pytest.raises(files.UsageError, match="--retrieve"):
        parse_sources(spec)


# ---- where it goes -----------------------------------------------------------------------------------------


def in_scene(tmp_path, n=5):
    book = write_book(tmp_path / "b.json", [make_plot(i) for i in range(n + 1)], n + 1)
    return Retrieval("experience:2+conversation:1", load_book(book), book), load_book(book)[n]


def test_actors_are_reminded_before_what_they_answer_and_nobody_else(tmp_path):
    """The passages stand in front of the last user turn alone, so all before it is as without retrieval; the
    Environment and the next-speaker model get none."""
    retrieval, scene = in_scene(tmp_path)
    chats = {}
    for used in (retrieval, None):
        model = Script(lambda messages, _: f"The wind blew {len(messages)} and fell.")
        turns = iter(["Ben", "Ada", "Environment", "Ben", "Ada", "Ben", "Environment", "Ada"] * 2)
        director = Script(lambda *_, turns=turns: next(turns))
        ends = []
        models = {"actor": model, "environment": Script(lambda *_: "Wind."), "next_speaker": director}
        perform(
            [scene],
            models,
            Protocol(max_rounds=9),
            on_end=lambda *end, ends=ends: ends.append(end),
            retrieval=used,
        )
        chats["with" if used else "without"] = (
            model.asked,
            models["environment"].asked,
            director.asked,
            ends[0],
        )
    assert chats["with"][1:3] == chats["without"][1:3] and len(chats["with"][0]) > 5
    reminded = 0
    for (with_, _), (without, _) in zip(chats["with"][0], chats["without"][0], strict=True):
        assert with_[:-1] == without[:-1] and with_[-1]["role"] == "user"
        assert with_[-1]["content"].endswith(without[-1]["content"])
        reminded += with_ != without
    said = [message for message in chats["with"][3][1] if message.get("retrieved")]
    assert reminded == len(said) >= 5
    assert all(message["role"] in ("Ada", "Ben") for message in said)
    first = next(chat for chat, _ in chats["with"][0] if chat[-1]["content"].startswith("===What You"))
    assert all(passage["text"] in first[-1]["content"] for passage in said[0]["retrieved"])
    assert "(1):" in first[-1]["content"] and "A conversation before this one:" in first[-1]["content"]
    assert "retrieved" not in chats["without"][3][2] and chats["with"][3][2]["retrieved"] > 0


def test_who_answers_oneself_is_reminded_before_the_others_last_words(tmp_path):
    """A chat whose last turn is one's own, since another was silent, keeps its roles in turn."""
    retrieval, scene = in_scene(tmp_path)
    performance = Performance(scene, Protocol(), retrieval)
    performance.speaker = "Ada"
    chat = [{"role": role, "content": "The wind blew."} for role in ("system", "user", "assistant")]
    passages, share = performance.remind(chat)
    assert (
        passages and chat[2]["content"] == "The wind blew." and chat[1]["content"].endswith("The wind blew.")
    )
    assert 0 < share < 1 and share == pytest.approx(1 - 42 / sum(len(m["content"]) for m in chat))


# ---- the command line --------------------------------------------------------------------------------------


STORY = [
    "--scene",
    "ward-c/5",
    "--retrieve",
    "raw:1+experience:2+conversation:1",
    "--book",
    ROOT / "data" / "stage",
]


def test_with_an_endpoint(script, tmp_path, monkeypatch):
    """What was retrieved is in the request and in the transcript, its tokens are counted; --resume refuses
    other settings of the retrieval, and another book."""
    out = tmp_path / "a"
    args = [*STORY, "--actor", "openai:m", "--max-rounds", 6, "--out", out]
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        code, _, err = script("simulate", *args, "--continue-from", 3)
        assert code == 0 and "tokens of prompts were retrieved" in err
        [line] = read_lines(out)
        passages = [passage for message in line["messages"] for passage in message.get("retrieved", ())]
        sent = json.dumps([request.body for request in server.requests])
        assert passages and all(json.dumps(passage["text"])[1:-1] in sent for passage in passages)
        assert {passage["source"] for passage in passages} == {"raw", "experience", "conversation"}
        assert all(passage["plot"] < line["i_p"] for passage in passages)
        assert script("simulate", *args, "--continue-from", 3, "--resume")[0] == 0
        asked = len(server.requests)
        for change in (["--retrieve-leaky"], ["--retrieve", "raw:2"], ["--book", tmp_path / "other"]):
            if "--book" in change:
                (tmp_path / "other").mkdir()
                book = json.loads((ROOT / "data" / "stage" / "ward_c.json").read_text())
                book["plots"][0]["summary"] += " And so on."
                (tmp_path / "other" / "ward_c.json").write_text(json.dumps(book))
            result = script("simulate", *args, "--continue-from", 3, "--resume", *change)
            assert "made with other settings (retrieve" in usage_error(result)
        plain = ["--scene", "ward-c/5", "--actor", "openai:m", "--max-rounds", 6, "--out", out]
        result = script("simulate", *plain, "--continue-from", 3, "--resume")
        assert "retrieve" in usage_error(result) and len(server.requests) == asked


def test_with_a_checkpoint(script, stage_tokenizer, tiny_actor, tmp_path, monkeypatch):
    """The estimate of what retrieved tokens cost is near the truth; a run that is resumed from its journal
    counts as the whole run did."""
    monkeypatch.setattr(
        simulate, "Protocol", lambda **options: Protocol(max_tokens=24, next_speaker_tokens=4, **options)
    )
    args = [*STORY, "--actor", tiny_actor, "--max-rounds", 12, "--continue-from", 3, "--temperature", 0.9]
    assert script("simulate", *args, "--out", tmp_path / "a")[0] == 0
    [line] = whole = read_lines(tmp_path / "a")
    passages = [message["retrieved"] for message in line["messages"] if message.get("retrieved")]
    tokens = sum(len(stage_tokenizer.encode(p["text"])) for found in passages for p in found)
    assert len(passages) > 3 and tokens < line["stats"]["retrieved"] < 1.4 * tokens
    keep, kept = simulate.Journal.keep, []

    def keep_five(journal, answered, errors=False):
        keep(journal, answered, errors)
        kept.extend(answered)
        if len(kept) >= 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(simulate.Journal, "keep", keep_five)
    code, _, err = script("simulate", *args, "--out", tmp_path / "b")
    assert code != 0 and "--resume plays the rest" in err
    monkeypatch.setattr(simulate.Journal, "keep", keep)
    assert script("simulate", *args, "--out", tmp_path / "b", "--resume")[0] == 0
    assert without_seconds(read_lines(tmp_path / "b")) == without_seconds(whole)


def test_a_resumed_run_counts_what_the_cache_would_have_had():
    """Where an agent's last prompt had a passage that the next has not: the tokens that both begin with."""
    letters = SimpleNamespace(prompt=lambda messages, opening: ([ord(c) for c in messages + opening], 0))
    counts = TokenCounts()
    before, after = (Call("actor", "Ada", "", text, None, ":") for text in ("abcREADd", "abcdefREADg"))
    counts.add(before, Reply("", "stop", 9, 2, 0, [5, 6]), 1, letters)
    counts.add(after, Reply("", "stop", 12, 2, 0, [7]), 2, letters)
    assert counts.stats()["cached"] == 3 and counts.stats()["prefilled"] == 9 + 12 - 3


@pytest.mark.parametrize(
    "args",
    [
        ["--retrieve", "raw:1"],
        ["--book", "b"],
        ["--retrieve-leaky"],
        ["--retrieve", "raw:1", "--book", "nosuch.json"],
        ["--retrieve", "raw:1", "--book", "empty"],
        ["--retrieve", "book:1", "--book", "b"],
        ["--retrieve", "raw:1", "--book", ROOT / "data" / "stage" / "three_keys.json"],
    ],
)
def test_a_command_that_cannot_be_is_one_line(script, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with Server(stage_answer) as server:
        server.use(monkeypatch)
        usage_error(script("simulate", "--scene", "ward-c/5", "--actor", "openai:m", "--out", "a", *args))
    assert not server.requests


def test_raw_needs_a_book_with_text(tmp_path):
    book = write_book(tmp_path / "b.json", [make_plot(n, "") for n in range(3)], 3)
    with pytest.raises(files.UsageError, match="have no `text`"):
        Retrieval("raw:1", load_book(book), book)
    assert Retrieval("conversation:1", load_book(book), book).settings["retrieve"] == "conversation:1"


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(files.UsageError, match="bm25s: pip install"):
        in_scene(tmp_path)
