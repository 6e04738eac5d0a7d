"""Curation: a scripted reader that knows the answers, the traps of the release, hostile books, kills."""

import json
import random
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT, usage_error
from test_benchmarks import killed
from test_llm import Script, Server

from data.curate import __main__ as command
from data.curate import ask, assemble, extract
from data.curate.ask import PROMPTS, TRIES, Question, read_json
from data.curate.chunks import cut, headings, read_books
from data.curate.fidelity import FOUND, Words, measure, words_of
from data.records import Report
from data.scenes import find_scenes, load_book
from llm.reply import Reply

BOOK = ROOT / "tests" / "curate_book.txt"
TEXT = BOOK.read_text(encoding="utf-8")
FULL = {"Ruth": "Ruth Calder", "Miss Calder": "Ruth Calder", "Pike": "Jonas Pike", "Hale": "Inspector Hale"}
FLAGS = ["--chunk-tokens", 400, "--min-messages", 2]


def blocks_of(text):
    """The plots of a book in the form of ours: what two blank lines or a bare numeral part."""
    return [block.strip() for block in re.split(r"\n\n\n|^[IV]+$", text, flags=re.MULTILINE) if block.strip()]


BLOCKS = blocks_of(TEXT)


def messages_of(block):
    """[(speaker, speech)] of a block, by the words "said NAME"."""
    found = []
    for line in block.splitlines():
        if speaker := re.search(r"said (?:the )?((?:[A-Z]\w+ ?)+|sailor)", line):
            found.append((speaker[1].strip(), " ".join(re.findall('"([^"]*)"', line))))
    return found


def material_of(messages):
    """The text between the fences of a prompt."""
    content = messages[-1]["content"]
    fence = re.search(r"^(=====\w+) BEGIN\n", content, re.MULTILINE)[1]
    return content.split(f"\n{fence} BEGIN\n")[1].split(f"\n{fence} END")[0]


def plot_of(block, passage):
    """What a perfect reader says of a plot that begins in a passage."""
    whole = block in passage
    part = block if whole else passage[passage.index(block.split("\n")[0]) :]
    said = messages_of(part)
    cast = list(dict.fromkeys(name for name, _ in said))
    ends = re.findall(r"[^.!?]*[.!?]+\"?", " ".join(part.split())) or [part]
    talk = {
        "scenario": "At the light.",
        "topic": "oil",
        "key_characters": [{"name": name, "motivation": f"{name} wants."} for name in cast],
        "dialogues": [{"character": name, "message": f"[hm] (nods) {speech}"} for name, speech in said],
    }
    return {
        "first_sentence": ends[0],
        "last_sentence": ends[-1],
        "finished": whole,
        "summary": f"Summary: {ends[0]}",
        "prominence": 50,
        "key_characters": [{"name": n, "description": f"{n} then.", "experience": f"{n} did."} for n in cast],
        "conversations": [talk] if said else [],
    }


def reader(messages, params, blocks=BLOCKS):
    """A model that knows the book: it answers each question as the schema asks."""
    text, schema = material_of(messages), params.json_schema
    if schema == extract.PLOTS:
        return json.dumps({"plots": [plot_of(b, text) for b in blocks if b.split("\n")[0] in text]})
    if schema == assemble.PROFILE:
        name = re.search(r"profile of (.*?),", messages[-1]["content"])[1]
        return json.dumps({"profile": f"{name} in {text.count('Summary:')} plots."})
    if schema == assemble.FLAGS:
        severe = (
            [{"category": "violence", "severity": 2, "quote": "your arms"}] if "arms come off" in text else []
        )
        return json.dumps({"flags": severe})
    names = re.findall(r"^- ([^:\n]+)", text, re.MULTILINE)
    entries = [{"name": name, "official": FULL.get(name, name), "person": name != "sailor"} for name in names]
    return json.dumps({"names": entries})


def changing(change, kind):
    """A reader whose answers to one kind of question go through change(value, text of the question)."""

    def say(messages, params):
        answer = reader(messages, params)
        if params.json_schema != kind and (
            kind != "names" or "names" not in params.json_schema["properties"]
        ):
            return answer
        changed = change(json.loads(answer), material_of(messages))
        return changed if isinstance(changed, str | Reply) else json.dumps(changed)

    return say


class Model(Script):
    """A Script whose say() may return a Reply, such as an error."""

    def chat(self, conversations, params, *_):
        self.asked += zip(conversations, params, strict=True)
        said = [self.say(*pair) for pair in zip(conversations, params, strict=True)]
        return [text if isinstance(text, Reply) else Reply(text, "stop") for text in said]


@pytest.fixture
def curated(script, tmp_path, monkeypatch, stage_tokenizer):
    """Runs the command with a scripted model: run(*flags) -> (model, --out, lines of the report)."""

    def run(*flags, say=reader, book=BOOK, out=None, code=0):
        out, model = out or tmp_path / "out", Model(say)
        model.tokenizer = stage_tokenizer
        monkeypatch.setattr(command, "open_model", lambda spec, **options: model)
        model.result = script("data.curate.__main__", book, "--model", "m", "--out", out, *FLAGS, *flags)
        assert model.result[0] == code, model.result
        return model, out, load(out / "report.json")

    return run


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def the_book(out):
    [file] = (out / "books").glob("*.json")
    return load(file)


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def kinds(model):
    """How often a model was asked for plots, flags, names and profiles."""
    names = [next(iter(params.json_schema["properties"])) for _, params in model.asked]
    return {name: names.count(name) for name in ("plots", "flags", "names", "profile")}


def characters(text):
    return len(text)


# ---- the whole way -----------------------------------------------------------------------------------------


def test_a_reader_that_knows_the_book_gets_all_of_it(curated, script):
    model, out, [line] = curated()
    book = the_book(out)
    assert [plot["text"] for plot in book["plots"]] == BLOCKS
    assert [plot["chapter"] for plot in book["plots"]] == ["I"] * 3 + ["II"] * 3 + ["III"] * 4
    assert {plot["state"] for plot in book["plots"]} == {"finished"} and book["split_plot_index"] == 9
    said = [[turn["character"] for turn in plot["conversation"][0]["dialogues"]] for plot in book["plots"]]
    assert said == [[FULL.get(name, name) for name, _ in messages_of(block)] for block in BLOCKS]
    for plot in book["plots"]:
        for turn in plot["conversation"][0]["dialogues"]:
            a, b = turn["at"]
            spoken = turn["message"].removeprefix("[hm] (nods) ")
            assert turn["found"] == 1 and words_of(TEXT[a:b])[0] == words_of(spoken)[0]
            assert plot["start"] <= a < b <= plot["end"] and TEXT[plot["start"] : plot["end"]] == plot["text"]
    people = book["character_datasets"]
    assert list(people) == ["Jonas Pike", "Ruth Calder", "Tam", "Inspector Hale"]  # no crowd, no alias
    assert (
        people["Ruth Calder"]["profile"] == "Ruth Calder in 9 plots."
        and not people["Inspector Hale"]["profile"]
    )
    assert line["missing"] == 0 and line["failures"] == [] and line["figures"]["verbatim"] == 42
    assert line["notes"] == {
        "plots carried over the end of a chunk": 1,
        "conversations flagged with severity 2": 1,
    }
    assert kinds(model) == {"plots": 4, "flags": 10, "names": 2, "profile": 3}
    steps = out / "steps" / "curate_book"
    assert {file.stem for file in steps.iterdir()} == {
        "chunks",
        "plots",
        "safety",
        "dropped",
        "names",
        "profiles",
    }
    assert "".join(chunk["text"] for chunk in lines(steps / "chunks.jsonl")) == TEXT
    scenes = load_book(out / "books" / "curate_book.json", Report(strict=True))  # nothing to repair or drop
    assert [scene.tag for scene in scenes] == ["train"] * 9 + ["id"]
    [played] = find_scenes(f"{out / 'test.json'}:all")
    assert (
        played.key == "curate_book-9-0"
        and played.tag == "id"
        and played.major_characters == ["Ruth Calder", "Tam"]
    )
    code, said, _ = script("data.show", out / "books")
    assert code == 0 and "nothing repaired or dropped" in said


@pytest.mark.parametrize("size", [*range(110, 260, 30), 300, 5000])
def test_no_plot_is_lost_at_the_border_of_a_chunk(curated, size):
    """Trap: a cut-off plot is carried from its very beginning, so its text and all its messages are there."""
    model, out, [line] = curated("--chunk-tokens", size)
    assert [plot["text"] for plot in the_book(out)["plots"]] == BLOCKS
    assert line["figures"]["utterances"] == 42
    passages = [material_of(m) for m, p in model.asked if p.json_schema == extract.PLOTS]
    assert len(passages) == 1 or any(
        passages[i + 1].split("\n")[0] in passages[i] for i in range(len(passages) - 1)
    )


@pytest.mark.parametrize("size", [220, 300])
def test_first_lines_of_a_scene_that_a_reply_leaves_out_are_shown_again(curated, size):
    """Trap: a model that sees two lines of a scene at the end of a chunk may not see a plot in them."""

    def whole_only(answer, text):
        return {"plots": [plot for plot in answer["plots"] if plot["finished"]]}

    _, out, [line] = curated("--chunk-tokens", size, say=changing(whole_only, extract.PLOTS))
    assert [plot["text"] for plot in the_book(out)["plots"]] == BLOCKS and line["missing"] == 0


def test_what_a_cut_off_reply_leaves_out_is_shown_again_or_counted(curated):
    """Trap: of a reply that reached max_tokens the whole plots were kept, and the others lost unseen."""

    def brief(answer, text):
        return Reply(json.dumps(answer | {"plots": answer["plots"][:keep]})[:-2], "length")

    keep = 2
    _, out, [line] = curated("--chunk-tokens", 5000, say=changing(brief, extract.PLOTS))
    assert [plot["text"] for plot in the_book(out)["plots"]] == BLOCKS[:2]
    assert line["notes"]["replies cut off at --max-tokens"] == 1
    assert line["in_no_plot"] == 1 - len(BLOCKS[0] + BLOCKS[1]) / len(TEXT)

    def first_brief(answer, text):
        return brief(answer, text) if text.startswith("I\n") else answer

    keep = 2  # of three and the beginning of a fourth
    _, out, [line] = curated(say=changing(first_brief, extract.PLOTS), out=out.parent / "carried")
    assert [plot["text"] for plot in the_book(out)["plots"]] == BLOCKS and line["in_no_plot"] < 0.02


def test_words_that_repeat_are_placed_in_their_plot():
    """Trap: the first "Yes" of a passage was the place of all of them, and the last one stretched a plot."""
    text = 'He came. "Yes," said Ann. He left. She sat. "Yes," said Ann. She slept. '
    text += "It rained. " * 60 + '"Never!"'
    plot = plot_of(BLOCKS[0], TEXT) | {"first_sentence": "She sat.", "last_sentence": "She slept."}
    said = [{"character": "Ann", "message": message} for message in ("Yes.", "Never!")]
    plot["conversations"] = [plot["conversations"][0] | {"dialogues": said}]
    made = extract.read_plot(plot, [], Words(text), 0, SimpleNamespace(number=0, end=len(text)))
    assert made["conversation"][0]["dialogues"][0]["at"][0] == text.rindex("Yes")
    assert text[made["start"] : made["end"]] == 'She sat. "Yes," said Ann. She slept.'


def test_a_plot_longer_than_a_chunk_ends_with_it(curated):
    _, out, [line] = curated("--chunk-tokens", 60, "--min-messages", 1)
    assert line["notes"]["plots longer than a chunk, ended with it"] > 0
    passages = [plot["passage"] for plot in the_book(out)["plots"]]
    assert max(b - a for a, b in passages) < 60 * 2 * 6  # characters: two chunks at most


def test_a_cut_off_plot_that_nobody_continues_is_kept(curated):
    def first_only(answer, text):
        return answer if text.startswith("I\n") else {"plots": []}

    _, out, [line] = curated("--chunk-tokens", 200, say=changing(first_only, extract.PLOTS))
    assert (
        line["notes"]["plots cut off and never continued"] == 1 and line["notes"]["chunks without a plot"] > 2
    )
    assert the_book(out)["plots"][-1]["state"] == "truncated"


def test_a_plot_told_twice_is_dropped(curated):
    def twice(answer, text):
        return {"plots": answer["plots"] * 2}

    _, out, [line] = curated(say=changing(twice, extract.PLOTS))
    assert line["figures"]["plots"] == 10 and line["notes"]["plots told twice, dropped"] >= 10


# ---- the other traps of the release ------------------------------------------------------------------------


def test_bare_numerals_are_headings_where_they_count_up():
    """Trap: a missing comma between two patterns, so that "IV" and "12" were none."""
    text = "\n".join(f"{n}\n\nText of it, 14 of them.\n\n99\n" for n in ("I", "II", "III", "IV", "V"))
    assert [name for _, name in headings(text)] == ["I", "II", "III", "IV", "V"]
    assert [name for _, name in headings("1\n\nA.\n\n2.\n\nB.\n\n3\n\nC.\n\n7\n")] == ["1", "2.", "3"]
    text = "Chapter\xa01.\n\nA\n\nCHAPTER THE SECOND\r\n\r\nB\n\nAct IV, Scene 2\n\n"
    text += "part of 1 thing\n\n## The End\n\nEpilogue\n"
    assert [name for _, name in headings(text)] == [
        "Chapter 1.",
        "CHAPTER THE SECOND",
        "Act IV, Scene 2",
        "The End",
        "Epilogue",
    ]


def test_a_resumed_run_uses_what_it_kept(curated):
    """Trap: a cache that is never found. And options of later steps do not ask for the plots again."""
    model, out, _ = curated()
    files = contents(out)
    assert "--resume" in usage_error(curated(out=out, code=2)[0].result)
    again, _, _ = curated("--resume", out=out)
    assert again.asked == [] and contents(out) == files
    flagged, _, _ = curated("--resume", "--drop-flagged", 2, out=out)
    assert kinds(flagged)["plots"] == kinds(flagged)["flags"] == 0
    other, _, _ = curated("--resume", "--chunk-tokens", 300, out=out)
    assert kinds(other)["flags"] == kinds(other)["names"] == 0 < kinds(other)["plots"]


def contents(out):
    """{file: bytes} of all that a run made, without its replies and answers."""
    made = [*out.glob("steps/**/*"), *out.glob("books*/*"), out / "test.json", out / "report.json"]
    return {
        file.relative_to(out): file.read_bytes() for file in made if file.is_file() and file.suffix != ".tmp"
    }


def test_every_failed_chunk_is_reported(curated):
    """Trap: only the last chunk's failures were counted, and a failed chunk's plots were gone unseen."""

    def broken(answer, text):
        return answer if text.startswith("I\n") or "What paper?" in text else "no JSON"

    model, out, [line] = curated(say=changing(broken, extract.PLOTS))
    assert [failure["chunk"] for failure in line["failures"]] == [1, 2]
    chunks = lines(out / "steps" / "curate_book" / "chunks.jsonl")
    assert line["missing"] == sum(len(chunk["text"]) for chunk in chunks[1:3]) / len(TEXT) > 0.3
    assert "no JSON object" in model.result[1] and f"{line['missing']:.1%}" in model.result[1]
    assert kinds(model)["plots"] == 2 + 2 * TRIES


def test_a_chunk_the_model_could_not_answer_is_asked_again_on_resumption(curated):
    def down(answer, text):
        return Reply("", "error", error="out of memory") if "letter with three seals" in text else answer

    _, out, [line] = curated(say=changing(down, extract.PLOTS))
    assert curated("--limit", 1, out=out.parent / "one")[2][0]["chunks"] == 1
    assert [failure["error"] for failure in line["failures"]] == ["out of memory"]
    model, _, [line] = curated("--resume", out=out)
    assert line["failures"] == [] and [plot["text"] for plot in the_book(out)["plots"]] == BLOCKS


def test_a_model_that_answers_nothing_is_asked_a_bounded_number_of_times(curated):
    """Trap: None was asked for again without end."""
    model, _, [line] = curated(say=lambda *_: "", code=1)
    assert kinds(model)["plots"] == 4 * TRIES and line["missing"] == 1


def test_no_plot_after_unusable_answers_is_a_failure(curated):
    """A weak model's way out, seen with SmolLM2: nonsense, and when asked again an empty list."""

    def tired(answer, text):
        return {"plots": []} if tired.asked.count(text) else tired.asked.append(text) or "nonsense"

    tired.asked = []
    _, _, [line] = curated(say=changing(tired, extract.PLOTS), code=1)
    assert line["missing"] == 1 and {failure["error"] for failure in line["failures"]} == {
        "no plot, after unusable answers"
    }


def test_an_empty_second_reply_replaces_no_better_first_one(curated):
    """A reply with one plot too many in it, then empty ones: the good plots of the first are kept."""

    def tired(answer, text):
        if text in seen:
            return {"plots": []}
        seen.append(text)
        wrong = answer["plots"][0] | {"first_sentence": "Nothing like it in here."}
        return {"plots": [*answer["plots"], wrong]}

    seen = []
    _, out, [line] = curated(say=changing(tired, extract.PLOTS))
    assert [plot["text"] for plot in the_book(out)["plots"]] == BLOCKS and line["failures"] == []


def test_short_names_stay_persons(curated):
    """Trap: a name of one or two words that the mapping left out became nobody."""

    def forgetful(answer, text):
        return {"names": [entry for entry in answer["names"] if entry["name"] not in ("Tam", "Ruth Calder")]}

    _, out, [line] = curated(say=changing(forgetful, "names"))
    assert line["notes"]["names that the model left out"] == 2
    assert the_book(out)["character_datasets"]["Tam"]["profile"].startswith("Tam in")
    [tam] = [d for d in lines(out / "steps" / "curate_book" / "names.jsonl") if d["name"] == "Tam"]
    assert tam == {"name": "Tam", "official": "Tam", "person": True, "by": "left out by the model"}


def test_two_speakers_of_a_conversation_are_not_one(curated):
    """A mapping of everybody to one name is refused where they speak with each other, and recorded."""

    def lazy(answer, text):
        return {"names": [entry | {"official": answer["names"][0]["name"]} for entry in answer["names"]]}

    _, out, _ = curated(say=changing(lazy, "names"))
    decisions = {d["name"]: d for d in lines(out / "steps" / "curate_book" / "names.jsonl")}
    assert decisions["Tam"]["official"] == "Tam" and decisions["Tam"]["by"].startswith(
        "speaks with Jonas Pike"
    )
    assert decisions["Pike"]["official"] == "Jonas Pike"


def test_a_silent_key_character_gets_the_conversation_in_its_profile():
    """Trap: names were compared with objects, so that only speakers saw their conversations."""
    plot = plot_of(BLOCKS[0], TEXT)
    plot["conversation"] = plot.pop("conversations")
    plot["conversation"][0]["key_characters"].append({"name": "Ghost", "motivation": "to listen"})
    told = assemble.story("Ghost", [plot], characters, 10_000)
    assert "I can burn the chairs" in told and "At the light." in told
    assert assemble.story("Nobody", [plot], characters, 10_000) == ""
    assert len(assemble.story("Ghost", [plot], characters, 100)) <= 100


def test_a_sentence_that_repeats_is_found_after_the_first(curated):
    """Trap: the first occurrence won, so that a plot could end before it began. "The lamp went round." ends
    five plots of the book; those in one passage have the right text."""
    _, out, _ = curated("--chunk-tokens", 5000)
    assert [plot["text"] for plot in the_book(out)["plots"]] == BLOCKS
    words = Words("He rose. He sat. Tea came. He rose. He sat. They left. Tea came.")
    assert words.find("He sat.", 20)[1:] == (36, 42) and words.find("Tea came", 45)[1] == 55
    assert words.find("He rose", 50)[0] < 1 and Words("").find("a") == (0, None, None)


def test_one_wrong_plot_does_not_lose_the_others(curated):
    """Trap: one sentence that was not found failed the whole chunk."""

    def wrong(answer, text):
        for plot in answer["plots"]:
            if "Sunday" in plot["first_sentence"]:
                plot["first_sentence"] = "Nothing of the kind is anywhere in here."
        return answer

    model, out, [line] = curated(say=changing(wrong, extract.PLOTS))
    assert [plot["text"] for plot in the_book(out)["plots"]] == BLOCKS[:1] + BLOCKS[2:]
    assert line["notes"]["plots given up, their place or their form is wrong"] == 1
    asked = [m[-1]["content"] for m, p in model.asked if p.json_schema == extract.PLOTS]
    assert sum("is not in the passage" in content for content in asked) == TRIES - 1  # it was told why


def test_conversations_of_fewer_messages_than_asked_are_left_out(curated):
    """Trap: the rule of ten messages was only asked for."""
    _, out, [line] = curated("--min-messages", 5, out=None)
    dropped = lines(out / "steps" / "curate_book" / "dropped.jsonl")
    assert all(len(one["conversation"]["dialogues"]) == 4 for one in dropped)
    expected = [block for block in BLOCKS if len(messages_of(block)) >= 5]
    assert [plot["text"] for plot in the_book(out)["plots"]] == expected and len(expected) + len(
        dropped
    ) == 10
    assert line["notes"]["conversations dropped, fewer than 5 messages"] == len(dropped)


def test_nothing_behind_the_split_decides_anything_before_it(curated, tmp_path):
    """Trap: names were unified over the whole book. Another ending, with other names and other aliases of
    known ones, changes no byte before the split, no profile and no decision."""
    ending = BLOCKS[-1].replace("Inspector Hale", "Tamsin Ruth").replace("Hale", "Ruth Tamsin")
    other = tmp_path / "other" / BOOK.name
    other.parent.mkdir()
    other.write_text(TEXT.replace(BLOCKS[-1], ending), encoding="utf-8")
    one, another = curated(), curated(
        say=lambda *a: reader(*a, blocks=[*BLOCKS[:-1], ending]), book=other, out=tmp_path / "other" / "out"
    )  # fmt: skip
    before = []
    for model, out, _ in (one, another):
        book, names = the_book(out), lines(out / "steps" / "curate_book" / "names.jsonl")
        profiles = lines(out / "steps" / "curate_book" / "profiles.jsonl")
        early = [d for d in names if not {"Hale", "Tamsin"} & set(d["name"].split())]
        assert len(early) == len(names) - 2
        for plot in book["plots"]:
            del plot["passage"]
        before.append((book["plots"][:9], profiles, early))
        asked = [m[-1]["content"] for m, p in model.asked if "plots" not in p.json_schema["properties"]]
        seen = [content for content in asked if re.search("Hale|Tamsin", content)]
        assert len(seen) == 2 and sum("Settled before: Jonas Pike" in content for content in seen) == 1
    assert before[0] == before[1]


def test_chunks_lose_no_text(stage_tokenizer):
    """Traps: tabs, copyright lines and windows. Over random texts of hostile parts the chunks joined are the
    text, and none is longer than asked for."""
    rng = random.Random(0)
    parts = ["\t", "word ", "All rights reserved.\n", "\r\n", "\n\n", "\r", " \n \n", "12\n", "Chapter 1\n"]
    parts += [
        "a" * 3000,
        "\0",
        "漢字。",
        "שלום ",
        "\u202e",
        "{title}",
        "x. Y",
        "\ufeff",
        "🎭",
        "IV\n",
        "\n=====\n",
    ]
    for _ in range(60):
        text = "".join(rng.choice(parts) for _ in range(rng.randrange(1, 120)))
        size = rng.choice([7, 40, 300])
        chunks = cut(text, size, lambda part: len(stage_tokenizer.encode(part)))
        assert "".join(text[chunk.start : chunk.end] for chunk in chunks) == text
        assert all(a.end == b.start for a, b in zip(chunks, chunks[1:], strict=False))
        assert all(chunk.tokens <= size or chunk.end - chunk.start == 1 for chunk in chunks)


def test_chunks_end_with_paragraphs_and_chapters():
    text = "".join(f"Chapter {n}\n\n" + "Some words stand here.\n\n" * 6 for n in range(1, 9))
    chunks = cut(text, 320, characters)
    assert all(text[chunk.end - 2 : chunk.end] == "\n\n" for chunk in chunks)
    assert all(text[chunk.start :].startswith("Chapter") for chunk in chunks) and len(chunks) == 4
    [whole] = cut(text, 10**6, characters)
    assert (whole.start, whole.end) == (0, len(text))


# ---- prompts and replies -----------------------------------------------------------------------------------


def test_the_shape_of_an_answer_holds_nothing_to_copy():
    """A small model gave back an example, "..." and all, as its answer: prompts name fields, and no value."""

    def fields(schema):
        inner = schema.get("properties", {}) | ({"": schema["items"]} if "items" in schema else {})
        return {*inner}.union(*map(fields, inner.values())) - {""}

    names = assemble.record(names=assemble.many(name={}, official={}, person={}))
    kinds = {"extract": extract.PLOTS, "safety": assemble.FLAGS, "names": names, "profile": assemble.PROFILE}
    for name, schema in kinds.items():
        assert {*re.findall(r'"(\w+)"', PROMPTS[name])} == fields(schema), name
        assert not re.search(r'": *["\d<.]|\.\.\.', PROMPTS[name]), name


def test_json_is_found_and_repaired():
    plots = [{"a": 'one, ] "two"'}, {"a": "line\nend"}]
    text = json.dumps({"plots": plots}).replace("\\n", "\n")
    assert read_json(f"Here {{you}} are:\n```json\n{text}\n```", "plots") == (plots, False)
    assert read_json(text.replace("}]", "},\n]"), "plots") == (plots, True)
    assert read_json(json.dumps({"x": {"plots": [1]}}), "plots")[0] == [1]
    assert read_json('{"plots": "\\ud800"}', "plots")[0] == "?"
    for bad in (
        "",
        "[1]",
        "{" * 5000,
        '{"plots": ' * 3000,
        '{"other": 1}',
        "[" * 10**5,
        '{"plots": 1' + "0" * 5000,
    ):
        with pytest.raises(ValueError, match="no JSON object with `plots`"):
            read_json(bad, "plots")


def test_of_a_reply_that_is_cut_off_what_was_whole_remains():
    """Cut at every character: all that is kept was said, in order, and from the first whole message on
    something is kept."""
    answer = {"plots": [plot_of(block, TEXT) for block in BLOCKS[:2]]}
    text, longest = json.dumps(answer), 0
    words = Words(TEXT)
    for end in range(0, len(text), 7):
        question = Question(
            "", [], extract.PLOTS, 1, lambda plot, before: extract.read_plot(plot, before, words, 0, CHUNK)
        )
        question.take(Reply(text[:end], "length"))
        kept = [t["message"] for p in question.value or () for c in p["conversation"] for t in c["dialogues"]]
        said = [t["message"] for p in answer["plots"] for c in p["conversations"] for t in c["dialogues"]]
        assert kept == said[: len(kept)] and len(kept) >= longest
        longest = len(kept)
    assert longest > 6


CHUNK = SimpleNamespace(number=0, end=len(TEXT))


def test_an_endpoint_without_schemas_is_parsed_repaired_and_asked_again(script, tmp_path, monkeypatch):
    """Over HTTP: response_format is refused, answers come in a fence with a comma too many, every first
    answer about a chunk is empty words; the book is the same."""
    seen = set()

    def answer(body, number):
        if "response_format" in body:
            return 400, {"error": {"message": "response_format is not supported"}}, {}
        text = reader(body["messages"], SimpleNamespace(json_schema=schema_of(body["messages"])))
        first = body["messages"][0]["content"].split("\nYour answer could not")[0]
        if "You turn passages" in first and first not in seen:
            seen.add(first)
            return "I had rather not."
        return f"Sure:\n```json\n{text[:-1]},}}\n```"

    with Server(answer) as server:
        server.use(monkeypatch)
        code, _, err = script(
            "data.curate.__main__", BOOK, "--model", "openai:m", "--out", tmp_path / "out", *FLAGS
        )
    assert code == 0, err
    assert [plot["text"] for plot in the_book(tmp_path / "out")["plots"]] == BLOCKS


def schema_of(messages):
    """The schema of a question that an endpoint was asked, by its prompt."""
    opening = messages[0]["content"][:20]
    kinds = {
        "extract": extract.PLOTS,
        "profile": assemble.PROFILE,
        "safety": assemble.FLAGS,
        "names": "names",
    }
    return next(schema for name, schema in kinds.items() if PROMPTS[name].startswith(opening[:12]))


# ---- safety, books, test scenes ----------------------------------------------------------------------------


def test_flagged_conversations_are_marked_and_dropped_only_on_request(curated, tmp_path):
    _, out, [line] = curated()
    safety = [plot["conversation"][0]["safety"] for plot in the_book(out)["plots"]]
    assert [one["severity"] for one in safety] == [0] * 6 + [2] + [0] * 3
    assert safety[6]["flags"] == [{"category": "violence", "severity": 2, "quote": "your arms"}]
    assert line["notes"]["conversations flagged with severity 2"] == 1
    _, _, [line] = curated("--drop-flagged", 3, "--resume", out=out)
    assert line["figures"]["plots"] == 10
    _, _, [line] = curated("--drop-flagged", 2, "--resume", out=out)
    assert (
        line["notes"]["conversations dropped, flagged with severity 2"] == 1 and line["figures"]["plots"] == 9
    )
    [dropped] = lines(out / "steps" / "curate_book" / "dropped.jsonl")
    assert "Ring the bell" in json.dumps(dropped)


def test_a_conversation_that_could_not_be_checked_counts_as_flagged(curated, tmp_path):
    say = changing(lambda answer, text: '{"flags": [{"category": "rude", "severity": 9}]}', assemble.FLAGS)
    _, out, [line] = curated(say=say)
    assert line["notes"]["conversations not checked for safety"] == 10 and line["figures"]["plots"] == 10
    _, _, [line] = curated("--drop-flagged", 3, "--resume", say=say, out=out, code=1)
    assert line["notes"]["conversations dropped, safety not checked"] == 10


def test_the_last_tenth_of_the_books_is_held_out(curated, tmp_path):
    books = tmp_path / "books.jsonl"
    rows = [{"title": f"Book {n % 9}", "author": "A", "content": TEXT} for n in range(10)]
    books.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model, out, report = curated(book=books)
    assert len(list((out / "books").iterdir())) == 9 and [f.name for f in (out / "books-ood").iterdir()] == [
        "Book-0-2.json"
    ]
    scenes = load_book(out / "test.json", Report(strict=True))
    assert [scene.tag for scene in scenes].count("ood") == 1 and len(scenes) == 10
    assert len({scene.book for scene in scenes}) == 10  # titles made different
    assert kinds(model)["plots"] == 40


def test_test_scenes_are_the_heavy_ones_and_five_a_book():
    plots = {"Star": {"plots": [0] * 100}, "Extra": {"plots": [0]}}
    books = {book: {"character_datasets": plots} for book in "AB"}

    def scene(book, number, name):
        return SimpleNamespace(book=book, key=f"{book}-{number}", speaking_characters=[name, "Environment"])

    scenes = [scene(book, n, "Star" if n < 20 else "Extra") for book in "AB" for n in range(40)]
    chosen = assemble.choose_scenes(books, scenes, 20, 0)
    assert len(chosen) == 10 and {one.speaking_characters[0] for one in chosen} == {"Star"}
    again, other = (assemble.choose_scenes(books, scenes, 20, seed) for seed in (0, 1))
    assert chosen == again != other
    few = [scene("A", 0, "Star"), *(scene("A", n, "Extra") for n in range(1, 4))]
    firsts = [assemble.choose_scenes(books, few, 2, seed)[0] for seed in range(1000)]
    assert 860 < sum(first is few[0] for first in firsts) < 950  # of two in the heavier half: 10 / 11
    alone = [assemble.choose_scenes(books, few, 1, seed) for seed in range(50)]
    assert 25 < sum(one == few[:1] for one in alone) < 50  # two are drawn from where one is wanted: 45


# ---- fidelity ----------------------------------------------------------------------------------------------


def longest_common(x, y):
    """The length of the longest common subsequence, by the textbook."""
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_quotes_are_found_where_they_stand():
    words, rng = Words(TEXT), random.Random(0)
    for block in BLOCKS:
        for _, speech in messages_of(block):
            share, a, b = words.find(speech)
            assert share == 1 and words_of(TEXT[a:b])[0] == words_of(speech)[0]
    for _ in range(200):  # never more than any in-order match, and an invention is told from a quote
        quote = [rng.choice(words.words) for _ in range(rng.randrange(1, 15))]
        share, a, b = words.find(" ".join(quote))
        assert share * len(quote) <= longest_common(quote, words.words) + 1e-9
        assert round(share * len(quote)) <= longest_common(quote, words_of(TEXT[a:b]))
    assert words.find("Zounds! Quoth the raven nevermore, my liege.")[0] < FOUND
    assert Words("他说：你好。然后走了").find("你好")[:2] == (1, 3)
    assert Words("אמר שלום לכולם").find("שלום")[0] == 1


def test_the_release_measured_against_its_own_texts(script, shared):
    """The reference value: the release's King Lear and Othello in the texts they were made of, and as a
    control in each other's."""
    texts = {row["title"]: row["content"] for row in lines(shared / "books" / "classics.jsonl")}
    books = {name: load(shared / "coser" / "books" / f"{name}.json") for name in ("King Lear", "Othello")}
    for name, low, foreign in (("King Lear", 0.72, "Othello"), ("Othello", 0.84, "King Lear")):
        own, other = measure(books[name], texts[name]), measure(books[name], texts[foreign])
        assert low < own["words found"] / own["quotes"] < low + 0.04
        assert own["verbatim"] > 0.5 * own["quotes"] and other["verbatim"] < 0.06 * own["quotes"]
        assert own["speaker near"] > 0.8 * own["quotes"] and other["speaker near"] < 0.02 * own["quotes"]
    files = [shared / "coser" / "books" / f"{name}.json" for name in books]
    code, out, _ = script("data.curate.__main__", shared / "books" / "classics.jsonl", "--report", *files)
    assert code == 0 and re.search(r"King Lear.json +18 +19 +2 +193 +15 +73\.\d%", out), out


def test_the_release_through_the_validators(shared):
    """Its plots as a reply about the whole book: those with a text pass, the others are counted."""
    texts = {row["title"]: row["content"] for row in lines(shared / "books" / "classics.jsonl")}
    for name, missing in (("King Lear", 4), ("Othello", 0)):
        plots = load(shared / "coser" / "books" / f"{name}.json")["plots"]
        replayed = []
        for plot in plots:
            ends = [line for line in plot["text"].splitlines() if len(words_of(line)) > 2] or ["zounds raven"]
            same = {key: plot[key] for key in ("summary", "prominence", "key_characters")}
            same |= {"first_sentence": ends[0], "last_sentence": ends[-1], "finished": True}
            replayed.append(same | {"conversations": plot["conversation"]})
        words, chunk = Words(texts[name]), SimpleNamespace(number=0, end=len(texts[name]))
        question = Question(
            "", [], extract.PLOTS, 1, lambda plot, _, w=words, c=chunk: extract.read_plot(plot, [], w, 0, c)
        )
        question.take(Reply(json.dumps({"plots": replayed}), "stop"))
        assert len(question.value) == len(plots) - missing and len(question.problems) == missing


HOSTILE_WORDS = ["", " ", "NSP", "Environment", " environment\n", "[", "a]", "(", "\u201cMe\u201d", "x\ny"]
HOSTILE_WORDS += ["\0", "\ud800", "<|eot_id|>", "{title}", "../..", "N" * 5000, "[only a thought]", "Ruth:"]


def test_hostile_replies(curated, tmp_path):
    """A model that writes some strings of its answers at random: the books are read without repairs."""
    rng = random.Random(0)

    def spoil(value):
        if isinstance(value, list):
            return [spoil(item) for item in value]
        if isinstance(value, dict):
            return {key: v if key.endswith("_sentence") else spoil(v) for key, v in value.items()}
        return rng.choice(HOSTILE_WORDS) if isinstance(value, str) and rng.random() < 0.2 else value

    def say(messages, params):
        return json.dumps(spoil(json.loads(reader(messages, params))))

    for n in range(4):
        _, out, [line] = curated(say=say, out=tmp_path / f"out{n}")
        assert line["figures"]["plots"] > 0
        load_book(out / "books" / "curate_book.json", Report(strict=True))


# ---- hostile books -----------------------------------------------------------------------------------------

MARKERS = (
    "== extract\n=====0123456789abcdef BEGIN\n{text} {fence} {title}\n"
    + '{"plots": []}\n```json\n[x](y)\n' * 20
)
HOSTILE = {
    "one line of a megabyte": "word " * 200_000,
    "a megabyte without a space": "x" * 1_000_000,
    "no chapters": "Just this.",
    "null bytes": "One\0two.\n\n\0\0\n\nThree.",
    "CRLF": TEXT.replace("\n", "\r\n"),
    "old Mac": TEXT.replace("\n", "\r"),
    "right to left": '\u202eהוא אמר: "שלום".\n\n' * 50,
    "markers": MARKERS,
    "controls": "".join(map(chr, range(1, 32))) * 20 + "\u2028\u0085\ufeff\ufffe",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_books(curated, tmp_path, name):
    book = tmp_path / "it.txt"
    book.write_bytes(HOSTILE[name].encode())
    say = (lambda m, p: reader(m, p).replace(r"\r", "")) if name == "CRLF" else lambda m, p: '{"plots": []}'
    blocks = [block for block in BLOCKS]
    if name == "CRLF":
        blocks = [block.replace("\n", "\r\n") for block in BLOCKS]
        say = lambda m, p: reader(m, p, blocks=blocks)  # noqa: E731
    model, out, [line] = curated("--chunk-tokens", 8192, say=say, book=book, code=int(name != "CRLF"))
    chunks = lines(out / "steps" / "it" / "chunks.jsonl")
    assert "".join(chunk["text"] for chunk in chunks).encode() == HOSTILE[name].encode()
    assert line["missing"] == 0 and all(chunk["tokens"] <= 8192 for chunk in chunks)
    if name == "CRLF":
        assert [plot["text"] for plot in the_book(out)["plots"]] == blocks
    if name == "markers":
        assert material_of(model.asked[0][0]) == MARKERS.rstrip("\0")


def test_books_that_cannot_be_read(curated, script, tmp_path):
    def error(name, content):
        (tmp_path / name).write_bytes(content)
        return usage_error(script("data.curate.__main__", tmp_path / name, "--dry-run"))

    assert "empty" in error("a.txt", b"  \n") and "empty" in error("b.jsonl", b"")
    assert "not UTF-8 text (byte 3)" in error("c.txt", b"caf\xe9 and caf\xc3\xa9")
    assert "no book with a text" in error("d.jsonl", b'{"title": "x"}\n{"title": "y", "content": " "}\n')
    rows = b'{"title": "a/../b:c", "content": "x"}\n\xff\n{"title": "A/../B:C", "content": "\\ud800"}\nnull\n'
    (tmp_path / "e.jsonl").write_bytes(rows)
    books = read_books(tmp_path / "e.jsonl", report := Report())
    assert [book.slug for book in books] == ["a-..-b-c", "A-..-B-C-2"] and books[1].text == "?"
    assert sum(report.values()) == 3


# ---- the command -------------------------------------------------------------------------------------------


def test_dry_run_asks_nothing(script, curated, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "open_model", None)
    code, said, _ = script("data.curate.__main__", BOOK, "--dry-run", *FLAGS)
    assert code == 0
    rows = {line[:22].strip(): line[22:].split() for line in said.splitlines()}
    assert rows["plots and conversation"][-3] == "4" and rows["names"][-3] == "2"
    model, _, _ = curated()
    tokens = sum(
        len(model.tokenizer.encode(m[0]["content"])) for m, p in model.asked if p.json_schema == extract.PLOTS
    )
    assert 0.8 < int(rows["plots and conversation"][-2].replace(",", "")) / tokens < 1.2


def test_usage_errors(script, tmp_path, shared):
    def error(*args):
        return usage_error(script("data.curate.__main__", *args))

    assert "--dry-run" in error(BOOK) and "go together" in error(BOOK, "--model", "m")
    assert "more than 0" in error(BOOK, "--dry-run", "--chunk-tokens", 0)
    assert "no book called Othello" in error(BOOK, "--report", shared / "coser" / "books" / "Othello.json")
    assert "no such file" in error(tmp_path / "none.txt", "--dry-run")
    (tmp_path / "curate_book.json").write_text(
        '{"plots": [{"conversation": [{}]}], "character_datasets": {}}'
    )
    assert "not a book in the CoSER format" in error(BOOK, "--report", tmp_path / "curate_book.json")


def test_the_time_left_is_told(monkeypatch):
    def ask_all(asks, model, journal, what):
        shown.append(what)
        clock.append(clock[-1] + 90)  # seconds
        return [Reply('{"field": "text"}', "stop") for _ in asks]

    def story():
        for n in range(3):
            yield [Question(str(n), [{"role": "user", "content": ""}], ask.record(field=ask.TEXT), 1)]

    shown, clock = [], [0]
    monkeypatch.setattr(ask, "ask_all", ask_all)
    monkeypatch.setattr(ask.time, "monotonic", lambda: clock[-1])
    ask.run_all([story()], None, None, 0, 3)
    assert shown == ["round 1 of 3", "round 2 of 3, about 3 min left", "round 3 of 3, about 2 min left"]


def test_a_killed_run_ends_with_the_same_files(script, tmp_path, monkeypatch):
    """SIGKILL at 15 of all writes, some in the middle of a line; only calls in flight are asked again."""

    def answer(body, number):
        return reader(body["messages"], SimpleNamespace(json_schema=schema_of(body["messages"])))

    with Server(answer) as server:
        server.use(monkeypatch)
        base = [BOOK, "--model", "openai:m", *FLAGS, "--out"]
        assert script("data.curate.__main__", *base, tmp_path / "whole")[0] == 0
        whole, calls = contents(tmp_path / "whole"), len(server.requests)
        assert calls == 4 + 10 + 2 + 3
        for at in sorted(random.Random(0).sample(range(2, 2 * calls), 15)):
            out, before = tmp_path / f"at{at}", len(server.requests)
            assert killed([*base, out], at, command.main)
            code, _, err = script("data.curate.__main__", *base, out, "--resume")
            assert code == 0, (at, err)
            assert contents(out) == whole and len(server.requests) - before <= calls + 8, at
