"""From chats to rows: channels, general data, the cache, cutting, packing, the stream, and what data.show
shows."""

import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rich.console
import torch
from conftest import ROOT, pack_rows, usage_error
from hypothesis import given, settings
from hypothesis import strategies as st

import data.store
import data.stream
import tokenizer
from common.files import UsageError
from data.brackets import BracketParser, remove_thoughts
from data.channels import byte_channels, label
from data.chats import scene_to_chats
from data.general import read_general
from data.packing import IGNORE, best_fit, split_long
from data.records import LONGEST, LONGEST_LINE, Report
from data.scenes import STAGE, Scene, load_scenes
from data.stream import Stream, row_lengths
from text.export import save_tokenizer


def documents_of(row):
    """(ids, targets, channels) of each document of a row, cut where positions restart at 0; padding is a
    document of zeros."""
    starts = [*(row["positions"] == 0).nonzero()[:, 0].tolist(), len(row["positions"])]
    documents = []
    for start, end in zip(starts, starts[1:], strict=False):
        assert row["positions"][start:end].tolist() == list(range(end - start))
        ids, targets, channels = (row[name][start:end].tolist() for name in ("tokens", "targets", "channels"))
        assert [channel != 0 for channel in channels] == [target != IGNORE for target in targets]
        if start < row["used"]:
            documents.append((tuple(ids), tuple(targets), tuple(channels)))
        else:
            assert set(ids) == {0} and end == len(row["tokens"]) and set(targets) == {IGNORE}
    return documents


def learnt(ids, channels):
    """A document with what it should be in a row: at each place the next token of the same document, if that
    is under loss."""
    following = [(ids[i + 1], channels[i + 1]) if i + 1 < len(ids) else (0, 0) for i in range(len(ids))]
    targets = tuple(token if own else IGNORE for token, own in following)
    return tuple(ids), targets, tuple(int(own) for _, own in following)


# ---- channels ----------------------------------------------------------------------------------------------


def characters(text, lead):
    """The channel of each character, by taking out innermost brackets: 3 in square ones, 2 in round ones,
    else 1."""
    left, before = text[len(lead) :], None
    for brackets, sign in ((r"\[[^\[\]]*\]", "\0"), (r"\([^()]*\)", "\1")):
        while left != before:
            left, before = (
                re.sub(brackets, lambda match, s=sign: re.sub("[^\0]", s, match.group()), left),
                left,
            )
        before = None
        opened = left.find("[" if sign == "\0" else "(")
        if opened >= 0:
            left = left[:opened] + re.sub("[^\0]", sign, left[opened:])
    return [1] * len(lead) + [{"\0": 3, "\1": 2}.get(c, 1) for c in left]


@given(st.text("[]() ab\né😀", max_size=40), st.sampled_from(["A: ", "B (old) [x: ", ""]))
def test_channels_of_characters(text, lead):
    """Each byte has the channel of its character, found by innermost brackets; what is no thought is what
    others perceive."""
    expected = [
        channel
        for c, channel in zip(lead + text, characters(lead + text, lead), strict=True)
        for _ in c.encode()
    ]
    found = byte_channels((lead + text).encode(), (len(lead.encode()),))
    assert found.tolist() == expected
    visible = "".join(c for c, channel in zip(text, characters(text, ""), strict=True) if channel != 3)
    assert "\n".join(line.strip() for line in visible.split("\n") if line.strip()) == remove_thoughts(text)


def qwen_like(directory, shared):
    """A Hugging Face byte-level BPE of LLaMA 3's ranks that normalises, as Qwen 2's does."""
    save_tokenizer(tokenizer.load_tokenizer(shared / "tokenizers" / "llama3"), directory)
    (directory / "tokenizer.model").unlink()
    file = directory / "tokenizer.json"
    hf = json.loads(file.read_text())
    file.write_text(json.dumps(hf | {"normalizer": {"type": "NFC"}}))
    return tokenizer.load_tokenizer(file)


@pytest.fixture(scope="module")
def tokenizers(shared, tmp_path_factory):
    loaded = {name: tokenizer.load_tokenizer(shared / "tokenizers" / name) for name in ("llama3", "llama2")}
    loaded["hf"] = qwen_like(tmp_path_factory.mktemp("hf"), shared)
    loaded["stage"] = tokenizer.load_tokenizer(tokenizer.STAGE_TOKENIZER)
    return loaded


def by_decoding(tok, ids, mask, text, lead):
    """Channels of a turn's tokens by decoding ever longer beginnings: a token is of the highest channel it
    touches."""
    kinds, made, at = characters(text, lead), [], 0
    own = [i for i, learnt in zip(ids, mask, strict=True) if learnt]
    for end in range(1, len(own) + 1):
        if own[end - 1] in tok.names:
            made.append(1)
            continue
        so_far = tok.decode(own[:end])
        whole = len(so_far.rstrip("\ufffd"))
        reached = min(whole + (whole < len(so_far)), len(text))  # half a character counts
        made.append(max(kinds[at:reached], default=kinds[at] if at < len(kinds) else 1))
        at = whole
    return made


TURNS = st.text("[]()ab. \né😀ж▁'1", max_size=30)


@pytest.mark.parametrize("name", ["llama3", "llama2", "hf", "stage"])
def test_channels_of_tokens_equal_those_found_by_decoding(tokenizers, name):
    """For every kind of tokenizer, also where a token straddles a bracket and where a character takes several
    tokens."""
    tok = tokenizers[name]

    @settings(max_examples=150, deadline=None)
    @given(TURNS, st.sampled_from(["A", "Guard (first)", "é[x"]))
    def check(text, character):
        if name == "llama2":  # it writes its own sign for a space as a space
            text = text.replace("▁", "")
        lead = f"{character}: "
        messages = [
            {"role": "user", "content": "[who] (goes)"},
            {"role": "assistant", "content": lead + text},
        ]
        ids, mask = tok.render(messages)
        made, channels = label(tok, messages, character)
        assert made.tolist() == ids and [bool(c) for c in channels] == mask
        assert channels[channels != 0].tolist() == by_decoding(tok, ids, mask, lead + text, lead)

    check()


def test_a_token_that_straddles_takes_the_highest(tokenizers):
    """LLaMA 3's ` [` is a space and a bracket: thought. `)\\n\\n` is action. The name and the end of the turn
    are speech."""
    tok = tokenizers["llama3"]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "A [b: hi [no] ok (nods)\n\n"},
    ]
    ids, channels = label(tok, messages, "A [b")
    words = [
        (tok.decode([i]), channel)
        for i, channel in zip(ids.tolist(), channels.tolist(), strict=True)
        if channel
    ]
    assert words == [
        *(("A", 1), (" [", 1), ("b", 1), (":", 1), (" hi", 1), (" [", 3), ("no", 3), ("]", 3), (" ok", 1)),
        *((" (", 2), ("n", 2), ("ods", 2), (")\n\n", 2), ("<|eot_id|>", 1)),
    ]


@pytest.mark.parametrize("name", ["llama3", "llama2", "hf", "stage"])
def test_an_unclosed_bracket_ends_with_its_message(tokenizers, name):
    """Also where the next message is one's own and stands in the same turn: what the others perceive is no
    thought, and what they do not is one, however the tokenizer normalises or prefixes text."""
    tok = tokenizers[name]
    messages = [
        ("B", "x"),
        ("A", "[caf\u0065\u0301"),
        ("A", "a (nods"),
        ("A", "b [c"),
        ("A", "d"),
        ("B", "y"),
        ("A", "e"),
    ]
    scene = Scene("b", 0, 0, "train", "", "", "", [{"character": n, "message": m} for n, m in messages])
    chats = scene_to_chats(scene, next_speaker_share=0, variants="all")
    (chat, *_) = [c for c in chats if c.character == "A" and c.options["thoughts"]]
    ids, channels = label(tok, chat.messages, "A", chat.parts)
    words = [
        (tok.token_bytes(i).decode(errors="replace").strip(), int(c))
        for i, c in zip(ids.tolist(), channels, strict=True)
    ]
    found = {letter: channel for word, channel in words for letter in word if channel}
    assert {c: found[c] for c in "[fabcde"} == {"[": 3, "f": 3, "a": 1, "b": 1, "c": 3, "d": 1, "e": 1}
    assert found["("] == 2
    closed = "\n".join(text for n, m in messages if n == "A" and (text := remove_thoughts(m)))
    spoken = "".join(word for word, channel in words if channel in (1, 2)).replace("<|end|>", "")
    assert re.sub(r"\W|A", "", spoken) == re.sub(r"\W", "", closed)


def test_next_speaker_and_general_data_have_their_channels(tokenizers, stage):
    """All that a next-speaker model says is speech; general data is `general`, brackets and all."""
    scene = stage["ward-c/1"]
    chat = scene_to_chats(scene, next_speaker_share=1)[-1]
    assert set(label(tokenizers["stage"], chat.messages, chat.character)[1].tolist()) == {0, 1}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "f(a)[0]"}]
    assert set(label(tokenizers["stage"], messages)[1].tolist()) == {0, 4}


# ---- general data ------------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GOOD = {"messages": [USER, ANSWER]}
ROLE = "row with a role that is not system, user (human) or assistant (gpt)"
HUGE = "a" * (LONGEST + 1)
DROPPED = [
    (b'{"messages": "caf\xe9"}\n', "line that is not UTF-8"),
    (b"{messages}\n", "line that is not JSON"),
    (b"[" * 200_000 + b"\n", "line that is not JSON"),
    (b"1" * 9999 + b"\n", "line that is not JSON"),
    (b"x" * (LONGEST_LINE + 5) + b"\n", f"line of more than {LONGEST_LINE:,} bytes"),
    ([USER, ANSWER], "row that is not an object"),
    (5, "row that is not an object"),
    ({"text": "x"}, "row without `messages` or `conversations`"),
    ({"messages": []}, "row without `messages` or `conversations`"),
    ({"messages": {"role": "user"}}, "row without `messages` or `conversations`"),
    ({"messages": [USER, "a"]}, "row with a message that is not an object"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, ROLE),
    ({"messages": [USER, {"role": ["x"], "content": "x"}]}, ROLE),
    ({"messages": [USER, {"role": "assistant"}]}, "row with a message that is not text"),
    ({"messages": [USER, {"role": "assistant", "content": [{"text": "x"}]}]},
        "row with a message that is not text"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "row with an empty message"),
    ({"messages": [USER, {"role": "assistant", "content": HUGE}]},
        "row with a message of more than 1,000,000 characters"),
    ({"messages": [USER, {"role": "system", "content": "x"}, ANSWER]},
        "row with a system text that is not the first message"),
    ({"messages": [USER]}, "row without an answer"),
    ({"id": 7, **GOOD}, "row whose `id` was read before"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "kind"), DROPPED)
def test_a_bad_row_is_dropped_counted_and_located(row, kind, tmp_path):
    """One bad line among good ones: they are read, it is in the report with its line; --strict stops
    there."""
    file = tmp_path / "general.jsonl"
    line = row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n"
    good = json.dumps({"id": 7, **GOOD}).encode() + b"\n"
    file.write_bytes(good + b"\n" + line + json.dumps(GOOD).encode())
    report = Report()
    assert [messages for messages, *_ in read_general(file, report)] == [GOOD["messages"]] * 2
    assert report == {f"dropped: {kind}": 1} and report.examples == {f"dropped: {kind}": f"{file}: line 3"}
    with pytest.raises(UsageError, match=re.escape(f"{file}: line 3: dropped: {kind}")):
        list(read_general(file, Report(strict=True)))


def test_a_torn_last_line_is_counted(tmp_path):
    """A file cut in the middle of a row, or of a character, loses that row alone."""
    file = tmp_path / "general.jsonl"
    whole = json.dumps(
        {"messages": [USER, {"role": "assistant", "content": "né"}]}, ensure_ascii=False
    ).encode()
    for cut, kind in (
        (-1, "last line, incomplete"),
        (whole.index("é".encode()) + 1, "line that is not UTF-8"),
    ):
        file.write_bytes(whole + b"\n" + whole[:cut])
        report = Report()
        assert len(list(read_general(file, report))) == 1
        assert report.examples == {f"dropped: {kind}": f"{file}: line 2"}


def test_shapes_of_general_data(tmp_path):
    """ShareGPT and `messages`, a system text in front or beside, JSON lists and JSONL: the same
    conversations. What follows the last answer is left out; half a surrogate pair is mended; both are
    counted."""
    system = {"role": "system", "content": "s"}
    theirs = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
    ]
    rows = [
        {"messages": [system, USER, ANSWER]},
        {"conversations": theirs},
        {"conversations": theirs[1:], "system": "s"},
    ]
    rows += [{"messages": [system, USER, ANSWER, USER]}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "list.jsonl").write_text((tmp_path / "x.json").read_text())
    (tmp_path / "lines.json").write_text((tmp_path / "x.jsonl").read_text())
    places = {"x.json": "row 3", "x.jsonl": "line 4", "list.jsonl": "row 3", "lines.json": "line 4"}
    for name, place in places.items():
        report = Report()
        assert [found for found, *_ in read_general(tmp_path / name, report)] == [[system, USER, ANSWER]] * 4
        assert report.examples == {
            "repaired: messages after the last answer left out": f"{tmp_path / name}: {place}"
        }
    (tmp_path / "y.jsonl").write_text(
        json.dumps({"messages": [USER, {"role": "assistant", "content": "\ud83d!"}]})
    )
    report = Report()
    assert next(read_general(tmp_path / "y.jsonl", report))[0][1]["content"] == "?!" and len(report) == 1


def test_general_data_is_read_line_by_line(tmp_path):
    """Reading a file of 30 MB takes less than 2 MB."""
    file = tmp_path / "big.jsonl"
    line = json.dumps({"messages": [USER, {"role": "assistant", "content": "word " * 6000}]}) + "\n"
    with open(file, "w") as out:
        out.writelines(line for _ in range(1000))
    assert file.stat().st_size > 3e7
    tracemalloc.start()
    assert sum(1 for _ in read_general(file, Report())) == 1000
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


# ---- cutting and packing -----------------------------------------------------------------------------------


@st.composite
def labelled(draw, longest, number=30):
    """Documents (ids, channels) whose tokens are all different from each other, supervised in runs."""
    runs = st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 6)), min_size=1, max_size=max(1, longest // 6)
    )
    made, at = [], 1
    for document in draw(st.lists(runs, min_size=1, max_size=number)):
        channels = [channel for channel, length in document for _ in range(length)][:longest]
        made.append((list(range(at, at + len(channels))), channels))
        at += len(channels)
    return made


@settings(deadline=None)
@given(labelled(12), st.integers(12, 40), st.integers(0, 3))
def test_every_document_is_packed_once_and_by_itself(documents, seq_len, seed):
    """Each document stands whole in one row; its positions run from 0; its targets are its own next tokens,
    as labelled."""
    rows = pack_rows(documents, seq_len, seed)
    for row in rows:
        for name in ("tokens", "targets", "positions", "channels"):
            assert row[name].shape == (seq_len,) and row[name].dtype == (
                torch.int8 if name == "channels" else torch.int64
            )
        assert row["positions"][0] == 0 and row["tokens"].any()
    assert Counter(d for row in rows for d in documents_of(row)) == Counter(
        learnt(*document) for document in documents
    )


@settings(max_examples=300, deadline=None)
@given(labelled(120, 1), st.integers(2, 40))
def test_long_documents_are_cut_by_the_rule(documents, seq_len):
    """No piece is longer than a row; every supervised token but the first of all is the target of one piece;
    a piece begins behind a supervised turn, after the document's beginning up to and with its first one,
    wherever that fits."""
    ((ids, channels),) = documents
    channels = np.array(channels, np.int8)
    pieces, without = split_long(channels, seq_len)
    found, covered = Counter(), []
    ends = [
        i + 1 for i in range(len(channels)) if channels[i] and (i + 1 == len(channels) or not channels[i + 1])
    ]
    for context_start, context_end, start, end in pieces:
        assert 0 < context_end - context_start + end - start <= seq_len and end > start
        assert channels[start:end].any()
        assert (start == 0) == (context_end == context_start)
        if start:
            fits = bool(ends) and ends[0] <= seq_len // 2 and start in ends
            assert (context_start, context_end) == (
                (0, ends[0]) if fits else (max(0, start - seq_len // 2), start)
            )
        found.update(i for i in range(start, end) if channels[i])
        covered += range(start, end)
    assert found == Counter(np.flatnonzero(channels).tolist())
    left_out = sorted(set(range(len(channels))) - set(covered))
    assert not channels[left_out].any() and (without > 0) == bool(left_out)


def test_a_long_chat_is_cut_between_turns():
    """By hand: prompt 3, turns of user 2 and own 3; rows of 14 tokens. The second piece opens with prompt and
    first turn... of eight tokens, more than half a row, so with the seven before it; in rows of 16 with those
    eight."""
    channels = np.array([0] * 3 + ([0] * 2 + [1] * 3) * 4, np.int8)
    assert split_long(channels, 14) == ([(0, 0, 0, 13), (6, 13, 13, 18), (11, 18, 18, 23)], 0)
    assert split_long(channels, 16) == ([(0, 0, 0, 13), (0, 8, 13, 18), (0, 8, 18, 23)], 0)


def test_a_document_longer_than_a_row_is_refused():
    """Packing splits nothing: it says so."""
    with pytest.raises(ValueError, match="9 tokens in rows of 8"):
        pack_rows([([1] * 9, [True] * 9)], 8)


def test_packing_follows_its_seed():
    """The same seed gives the same rows; another one the same documents in another order, between rows and
    within."""
    rng = random.Random(5)
    lengths = [rng.randrange(1, 30) for _ in range(60)]
    one, same, other = (best_fit(lengths, 64, seed) for seed in ("1|0", "1|0", "1|1"))
    assert one == same != other
    assert sorted(map(sorted, one)) == sorted(map(sorted, other))
    assert sorted(one) != sorted(other)  # another order within rows
    assert list(map(sorted, one)) != list(map(sorted, other))  # and between them


# ---- the stream --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    """Rows of general data, each with a number of its own."""
    file, rng = tmp_path_factory.mktemp("general") / "general.jsonl", random.Random(0)
    with open(file, "w") as out:
        for i in range(60):
            answer = {
                "role": "assistant",
                "content": " ".join([f"row {i}"] + ["word"] * rng.randrange(1, 300)),
            }
            out.write(json.dumps({"messages": [USER, answer]}) + "\n")
    return file


@pytest.fixture
def stream(stage_tokenizer, tmp_path):
    """stream(paths, seq_len, ...): a Stream with a cache of its own."""

    def make(paths=(STAGE,), seq_len=2048, **options):
        return Stream(paths, stage_tokenizer, seq_len, **{"cache": tmp_path / "cache", **options})

    return make


def same(rows, others):
    return all(
        torch.equal(row[name], other[name]) for row, other in zip(rows, others, strict=True) for name in row
    )


def test_an_epoch_is_its_chats(stream, stage, stage_tokenizer):
    """Over three epochs with what is carried from one to the next, each chat that scene_to_chats draws stands
    in one row, once, with its ids and channels; counts say how many; held-out scenes are in none, and
    `held_out` has all of them."""
    made, found, expected = stream(seq_len=4096), Counter(), Counter()
    for epoch in range(3):
        assert not made.cut
        chats = [
            chat for scene in stage.values() if scene.tag == "train" for chat in scene_to_chats(scene, epoch)
        ]
        documents = [label(stage_tokenizer, chat.messages, chat.character) for chat in chats]
        assert made.documents == len(documents) and made.tokens == sum(len(ids) for ids, _ in documents)
        counts = Counter(c for _, channels in documents for c in channels.tolist())
        assert [made.supervised[name] for name in ("speech", "action", "thought")] == [
            counts[1],
            counts[2],
            counts[3],
        ]
        expected.update(learnt(ids.tolist(), channels.tolist()) for ids, channels in documents)
        for row in made.take(len(made.rows))[:]:
            found.update(documents_of(row))
        carried = made.next["carried"]
        made.begin(made.next)
    missing = expected - found
    assert not found - expected and sum(missing.values()) == len(carried)
    held = [chat for scene in stage.values() if scene.tag != "train" for chat in scene_to_chats(scene)]
    held = Counter(learnt(*map(list, label(stage_tokenizer, chat.messages, chat.character))) for chat in held)
    assert Counter(d for row in made.held_out() for d in documents_of(row)) == held


@pytest.mark.parametrize("options", [{}, {"variants": "all"}, {"mix": True}, {"seq_len": 700}])
def test_the_order_is_the_same_after_a_stop_and_on_any_number_of_ranks(options, stream, general):
    """A stream that goes on from a state (JSON, in the middle of any epoch, general data and carried rows
    included) gives the rows of one that never stopped; the shares of ranks are these rows, each once."""
    options = {**options, "mix": [(general, 0.3)] if options.get("mix") else (), "seed": -1}
    one, states, rows = stream(**options), [], []
    size = len(one.rows) // 3 + 1
    for _ in range(8):
        states.append(json.dumps(one.state()))
        batch = one.take(size)
        assert len(batch) == size
        rows.append(list(batch))
    assert json.loads(states[-1])["epoch"] >= 2
    for number in (0, 3, 5, 7):
        other = stream(**options)
        other.load(json.loads(states[number]))
        assert json.dumps(other.state()) == states[number]
        for expected in rows[number:]:
            batch = other.take(size)
            for world in (1, 2, 3):
                shares = [batch[rank::world] for rank in range(world)]
                assert sum(map(len, shares)) == size
                assert all(same(share, expected[rank::world]) for rank, share in enumerate(shares))


def test_rows_are_made_only_when_they_are_taken_out(stream, monkeypatch):
    """A rank pays for its own rows alone."""
    made = []
    one = stream()
    monkeypatch.setattr(data.stream, "make_row", lambda documents, seq_len: made.append(len(documents)))
    batch = one.take(9)
    assert not made
    assert len(batch[1::4]) == len(made) == 2


def test_rows_of_the_plays_are_full(shared, tmp_path):
    """LLaMA-3 tokens of King Lear and Othello, rows of 8,192 and of the paper's 16,384: at least 98% useful
    in every epoch, and every chat is there, or among those carried on."""
    llama = tokenizer.load_tokenizer(shared / "tokenizers" / "llama3")
    for seq_len in (8192, 16_384):
        made = Stream([shared / "coser" / "books"], llama, seq_len, cache=tmp_path)
        before = 0
        for epoch in range(8):
            assert made.cut == 0
            used = sum(int(row_lengths(row).sum()) for row in made.rows)
            carried = int(row_lengths(np.array(made.next["carried"]).reshape(-1, 6)).sum())
            assert used >= 0.98 * seq_len * len(made.rows), (epoch, used)
            assert used + carried == made.tokens + before
            before = carried
            made.begin(made.next)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_general_data_is_mixed_by_tokens(share, stream, general):
    """The share of all tokens, within a document of each file; every row of the file is read once before any
    is read again."""
    made, read, total = stream(mix=[(general, share / 2), (general, share / 2)]), [], Counter()
    longest = int(made.store(-1).lengths.max())
    for _ in range(3):
        for source, documents in made.chosen.items():
            total["general" if source < 0 else "scenes"] += int(made.store(source).lengths[documents].sum())
        assert made.supervised["general"] > 0
        read += made.chosen[-1].tolist()
        assert abs(total["general"] - share * total.total()) <= 2 * longest
        made.begin(made.next)
    number = len(made.store(-1).lengths)
    for start in range(0, len(read) - number + 1, number):
        assert sorted(read[start : start + number]) == list(range(number))
    if len(read) >= 2 * number:
        assert read[:number] != read[number : 2 * number]


def test_shares_that_leave_nothing_are_refused(stream, general):
    """0, 1 and more, nan; and what is no FILE:SHARE."""
    for share in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(UsageError, match="--mix"):
            stream(mix=[(general, share)])
    with pytest.raises(UsageError, match="FILE:SHARE"):
        data.stream.parse_mix("general.jsonl")
    assert data.stream.parse_mix("a:b.jsonl:0.25") == ("a:b.jsonl", 0.25)


# ---- the cache ---------------------------------------------------------------------------------------------


def test_the_cache_is_used_and_never_stale(stream, tmp_path, stage_tokenizer, monkeypatch, general):
    """The same again tokenises nothing and has the same report. A changed byte, a setting, another tokenizer
    or file of general data is tokenised anew."""
    book = tmp_path / "book.json"
    book.write_text((STAGE / "ward_c.json").read_text())
    stream([book], mix=[(general, 0.5)])
    built = []
    build = data.store.build_store
    monkeypatch.setattr(data.store, "build_store", lambda *args: built.append(args[1].name) or build(*args))

    def builds(*args, **options):
        built.clear()
        stream(*args, **options)
        return len(built)

    assert builds([book], mix=[(general, 0.5)]) == 0
    assert builds([book], seq_len=512) == 0  # rows are cut from the same tokens
    for options in ({"seed": 1}, {"thoughts": False}, {"variants": "all"}, {"held_out_books": 1e-9}):
        assert builds([book], **options) == 1
        assert builds([book], **options) == 0
    text = book.read_text()
    book.write_text(text.replace("the", "tha", 1))
    os.utime(book, (0, 0))
    assert builds([book]) == 1
    book.write_text(text)
    assert builds([book]) == 0
    copy = tmp_path / "copy.jsonl"
    copy.write_text(general.read_text().replace("word", "ward"))
    assert builds([book], mix=[(copy, 0.5)]) == 1
    stage_tokenizer = tokenizer.load_tokenizer(tokenizer.STAGE_TOKENIZER)
    stage_tokenizer.chat_format = "vicuna"
    built.clear()
    Stream([book], stage_tokenizer, 2048, cache=tmp_path / "cache")
    assert len(built) == 1


def test_all_variants_are_the_same_in_every_epoch(stream, tmp_path):
    """They are tokenised once, whatever the epoch."""
    made = stream([STAGE / "ward_c.json"], variants="all")
    made.begin(made.next)
    (store,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert made.start["epoch"] == 1 and len(made.chosen[1]) == made.documents > 0


def many_processes(monkeypatch, number=3):
    """Has even small data tokenised by that many processes."""
    monkeypatch.setattr(data.store, "BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(data.store, "PROCESSES", number)
    monkeypatch.setattr(os, "cpu_count", lambda: number)


def test_workers_make_what_one_process_makes(stream, tmp_path, monkeypatch):
    """Tokens in the same order, byte by byte, with and without workers; a cache that was cut short is a usage
    error."""
    stream(cache=tmp_path / "alone")
    many_processes(monkeypatch)
    stream()
    made, alone = (sorted(path for path in (tmp_path / name).glob("*/*")) for name in ("cache", "alone"))
    assert len(made) == 3 and [path.read_bytes() for path in made] == [path.read_bytes() for path in alone]
    for path, size in ((made[-1], 4000), (made[0], 4000), (made[0], 39)):
        whole = path.read_bytes()
        os.truncate(path, size)
        with pytest.raises(UsageError, match=f"{path.parent}: damaged"):
            stream()
        path.write_bytes(whole)
    stream()


def test_the_report_outlives_the_cache(stream, tmp_path):
    """What reading found is told again when nothing is read, and strict stops at it all the same."""
    book = json.loads((STAGE / "ward_c.json").read_text())
    book["plots"][0]["conversation"][0]["dialogues"][3]["thought"] = book["plots"][0]["conversation"][0][
        "dialogues"
    ][3].pop("message")
    (tmp_path / "book.json").write_text(json.dumps(book))
    place = f"{tmp_path / 'book.json'}: plot 0, conversation 0, message 3"
    for _ in range(2):
        assert stream([tmp_path / "book.json"]).report.lines() == [
            f"1 repaired: `thought` read as `message`, the first at {place}"
        ]
        with pytest.raises(UsageError, match=re.escape(place)):
            stream([tmp_path / "book.json"], strict=True)


@given(st.text("[]() ab\n", max_size=60), st.integers(1, 5))
def test_what_is_shown_is_what_is_learnt(text, size):
    """Thoughts and actions on the screen, however they come in, are those that the loss knows."""
    brackets, shown = BracketParser(), []
    for start in range(0, len(text), size):
        for part, channel in brackets.feed(text[start : start + size]):
            shown += [channel] * len(part)
    assert shown == byte_channels(text.encode()).tolist()


CHILD = """
import signal, sys, time, pathlib, data.store, data.stream, tokenizer
build = data.store.build_store
def slow(*args):
    print("built")
    time.sleep(1)
    build(*args)
data.store.build_store = slow
data.store.BYTES_PER_PROCESS, data.store.PROCESSES = 20_000, 2
data.store.os.cpu_count = lambda: 2
# a shell that starts tests in the background has SIGINT ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
tok = tokenizer.load_tokenizer(tokenizer.STAGE_TOKENIZER)
signal.signal(signal.SIGTERM, lambda *_: None)  # as train.py, which stops when the step is done
print("ready", flush=True)
sys.stdin.readline()
stream = data.stream.Stream([sys.argv[1]], tok, 2048, cache=sys.argv[2])
print(stream.documents, stream.tokens, len(stream.rows))
"""


def child(books, cache, code=CHILD):
    command = [sys.executable, "-c", code, str(books), str(cache)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def go(process):
    """Lets a child begin that has come up."""
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def test_of_several_processes_one_builds(tmp_path):
    """Of three that start at once one builds, all get the same, and there is one directory and nothing
    else."""
    together = [child(STAGE, tmp_path / "cache") for _ in range(3)]
    for process in together:
        go(process)
    said = [process.communicate(timeout=120)[0].splitlines() for process in together]
    assert sorted(map(len, said)) == [1, 1, 2] and len({lines[-1] for lines in said}) == 1
    (made,) = (tmp_path / "cache").iterdir()
    assert made.is_dir() and not made.suffix


def test_a_signal_to_the_whole_group_stops_no_worker(tmp_path):
    """As torchrun passes SIGTERM on: who handles it, as train.py does, gets all its chats all the same."""
    process = child(STAGE, tmp_path)
    go(process)
    while not list(tmp_path.glob("*.tmp/tokens")):
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)
    assert (
        process.communicate(timeout=60)[0].splitlines()[-1].split()[0].isdigit() and process.returncode == 0
    )


def test_every_process_is_started_with_signals_blocked():
    """SIGINT (bit 2) and SIGTERM (bit 15) in the first one too, which comes with a resource tracker."""
    code = (
        "import subprocess, data.store as store\n"
        "with store._signals_blocked():\n"
        "    for _ in range(2):\n"
        "        args = (['grep', '-h', 'SigBlk', '/proc/self/status'],)\n"
        "        process = store.SPAWN.Process(target=subprocess.run, args=args)\n"
        "        process.start(), process.join()\n"
        "subprocess.run(['grep', 'SigBlk', '/proc/self/status'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second, own = (int(line.split()[1], 16) for line in done.stdout.splitlines())
    assert (first, second, own) == (0x4002, 0x4002, 0)


def descendants(pid):
    """Processes that this one started, and those that they started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, parent = int(file.parent.name), int(file.read_text().rpartition(")")[2].split()[1])
            found += [number, *descendants(number)] if parent == pid else []
    return found


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_is_stopped_leaves_nothing_that_counts(sign, tmp_path, stage_tokenizer):
    """Killed in the middle: within seconds no process holds the lock any more or is alive, and the next one
    builds what an undisturbed one has. After Ctrl-C there is nothing left even of what was half built."""
    books, cache = tmp_path / "books", tmp_path / "cache"
    books.mkdir()
    for i in range(40):
        book = json.loads((STAGE / "ward_c.json").read_text())
        (books / f"{i}.json").write_text(json.dumps({**book, "title": f"book {i}"}))
    process = child(books, cache)
    try:
        go(process)
        while len(started := descendants(process.pid)) < 3:  # the resource tracker and two workers
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(sign)
        assert process.wait(timeout=30)
        deadline = time.monotonic() + 30
        while alive := [pid for pid in started if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.05)
        for file in cache.glob("*.tmp/tokens"):
            with open(file) as lock:
                for _ in range(100):
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    time.sleep(0.1)
                else:
                    pytest.fail("ten seconds later, a worker still holds the lock")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    left = {path.suffix for path in cache.iterdir() if path.is_dir()}
    assert left == ({".tmp"} if sign == signal.SIGKILL else set())
    one = Stream([books], stage_tokenizer, 2048, cache=cache)
    other = Stream([books], stage_tokenizer, 2048, cache=tmp_path / "other")
    assert same(one.take(5), other.take(5)) and one.tokens == other.tokens
    assert {path.name for path in cache.iterdir()} == {path.name for path in (tmp_path / "other").iterdir()}


def test_a_process_that_is_killed_is_a_usage_error(stream, monkeypatch):
    """As the system kills when memory is full: one line, and no store."""
    many_processes(monkeypatch, 2)

    def kill_the_first():
        while not (started := multiprocessing.active_children()):
            time.sleep(0.005)
        started[0].kill()

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    with pytest.raises(UsageError, match="ended early"):
        stream()
    killer.join()


def test_workers_report_what_they_find(tmp_path, stream, monkeypatch):
    """Repairs and drops, and the first of them with --strict, are those of one process."""
    book = json.loads((STAGE / "ward_c.json").read_text())
    book["plots"].insert(1, "odd")
    (tmp_path / "book.json").write_text(json.dumps(book))
    alone = stream([tmp_path / "book.json"], cache=tmp_path / "alone").report
    many_processes(monkeypatch)
    report = stream([tmp_path / "book.json"]).report
    assert report == alone and report.examples == alone.examples and len(report) == 1
    with pytest.raises(UsageError, match="plot 1: dropped: plot that is not an object"):
        stream([tmp_path / "book.json"], strict=True, seed=3)


# ---- what data.show shows ----------------------------------------------------------------------------------


@pytest.fixture
def inspect(script, tmp_path):
    def run(*args):
        return script("data.show", *args, "--cache", tmp_path / "cache")

    return run


def test_statistics_are_those_of_the_chats(inspect, stage, stage_tokenizer):
    """Conversations, chats, turns, tokens and the shares of channels, counted here a second time; a picture
    of lengths."""
    chats = [chat for scene in stage.values() if scene.tag == "train" for chat in scene_to_chats(scene)]
    code, out, _ = inspect()
    lengths = [len(stage_tokenizer.render(chat.messages)[0]) for chat in chats]
    supervised = sum(sum(stage_tokenizer.render(chat.messages)[1]) for chat in chats)
    assert code == 0
    assert (
        f"{sum(lengths):,}; mean" in out
        and f"longest {max(lengths):,}" in out
        and f"{supervised:,} tokens" in out
    )
    assert f"{Counter(chat.kind for chat in chats)['character']} character" in out
    assert f"{sum(scene.tag == 'train' for scene in stage.values())} train" in out
    picture = re.findall(r"to +[\d,]+ ?[█▏▎▍▌▋▊▉]* ?([\d,]*)\n", out)
    assert sum(int(count.replace(",", "") or 0) for count in picture) == len(chats)
    assert "nothing repaired or dropped" in out


def test_a_chat_is_shown_with_its_channels(inspect, stage, stage_tokenizer):
    """Without colours: the text of the document, what is under loss between marks that name its channel."""
    scene = next(scene for scene in stage.values() if scene.tag == "train")
    for options, thoughts in ((("--epoch", 1), True), (("--without-thoughts",), False)):
        chat = scene_to_chats(scene, epoch=int(thoughts), thoughts=thoughts)[0]
        code, out, _ = inspect(STAGE / "a_cook_for_the_general.json", "--chat", 0, *options)
        assert code == 0
        assert (
            re.sub("«[a-z]+\\||»", "", out)
            == stage_tokenizer.decode(stage_tokenizer.render(chat.messages)[0]) + "\n"
        )
        marked = re.findall("«([a-z]+)\\|([^»]*)»", out)
        answers = "<|end|>".join(
            message["content"] for message in chat.messages if message["role"] == "assistant"
        )
        assert "".join(text for _, text in marked) == answers + "<|end|>"
        assert all(text.strip()[0] in "[" for channel, text in marked if channel == "thought")


def test_a_chat_is_shown_to_the_last_space(inspect, shared):
    """SentencePiece writes a space in front of every part of a text: what is shown has those between channels
    too."""
    code, out, _ = inspect("--chat", 0, "--epoch", 1, "--tokenizer", shared / "tokenizers" / "llama2")
    assert (
        code == 0
        and re.search(r"speech\|[^»]+»«thought\| \[", out)
        and " USER: ===Conversation Start===" in out
    )


def test_progress_is_shown_as_a_share(stream, monkeypatch):
    """On a terminal, tokenising counts up to 100%."""
    screen = io.StringIO()
    monkeypatch.setattr(
        data.store.terminal, "stderr", rich.console.Console(file=screen, force_terminal=True, width=100)
    )
    stream()
    assert "tokenising the scenes of epoch 0" in screen.getvalue() and "100%" in screen.getvalue()


def test_a_files_name_is_shown_as_it_is(stream, general, monkeypatch, tmp_path):
    """Brackets in it are no markup of the progress bar."""
    screen, file = io.StringIO(), tmp_path / "chats[bold].jsonl"
    file.write_bytes(general.read_bytes())
    console = rich.console.Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(data.store.terminal, "stderr", console)
    stream(mix=[(file, 0.5)])
    assert "tokenising chats[bold].jsonl" in screen.getvalue()


def test_held_out_scenes_are_written_as_a_test_file(inspect, stage, tmp_path):
    """Those of the last plots; with books held out, all of theirs; read back equal. None to write is a usage
    error."""
    held = [scene for scene in stage.values() if scene.tag != "train"]
    (tmp_path / "[red]").mkdir()
    odd = tmp_path / "[red]" / "book.json"
    odd.write_text(json.dumps({**json.loads((STAGE / "ward_c.json").read_text()), "character_datasets": 5}))
    assert f"epoch 0 of {odd}\n" in inspect(odd)[1]  # no markup
    code, out, err = inspect(odd, "--test-scenes", tmp_path / "written.json")
    assert (code, out) == (0, "")
    assert f"1 dropped: `character_datasets` that is not an object, the first at {odd}" in err
    assert inspect("--test-scenes", tmp_path / "held.json")[0] == 0
    assert load_scenes(tmp_path / "held.json") == held
    assert inspect("--test-scenes", tmp_path / "all.json", "--held-out-books", 1)[0] == 0
    assert [scene.key for scene in load_scenes(tmp_path / "all.json")] == [
        scene.key for scene in stage.values()
    ]
    assert {scene.tag for scene in load_scenes(tmp_path / "all.json")} == {"ood"}


def test_inspect_says_what_is_wrong(inspect, tmp_path, general):
    """One line, exit code 2."""
    assert "no such file" in usage_error(inspect(tmp_path / "none.json"))
    assert "--chat 100000" in usage_error(inspect("--chat", 100_000))
    for seq_len in (-1, 1, 10**20):
        assert "--seq-len" in usage_error(inspect("--seq-len", seq_len))
    assert "--epoch" in usage_error(inspect("--epoch", -1))
    assert "a larger file or a smaller share" in usage_error(inspect("--mix", f"{general}:0.999999"))
    assert "FILE:SHARE" in usage_error(inspect("--mix", general))
    (tmp_path / "empty.jsonl").write_text("\n{}\n")
    assert "no usable row" in usage_error(inspect("--mix", f"{tmp_path / 'empty.jsonl'}:0.5"))
    book = json.loads((STAGE / "ward_c.json").read_text())
    (tmp_path / "book.json").write_text(json.dumps({**book, "plots": ["odd", *book["plots"]]}))
    assert "plot 0: dropped: plot that is not an object" in usage_error(
        inspect(tmp_path / "book.json", "--strict")
    )
