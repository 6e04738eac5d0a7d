"""Where a text ends, and its pieces on the way."""

import copy

import pytest
from conftest import random_config, random_model
from engines import (
    alone,
    collect,
    greedy,
    parrot,
    random_prompts,
)

from generate import Engine


@pytest.mark.parametrize("max_tokens", [1, 10, 500])
def test_the_context_is_a_limit_too(max_tokens):
    """A text ends at max_tokens or where the context ends, whichever comes first."""
    model = random_model(random_config(0, max_position_embeddings=50))
    for length in (1, 45, 49):
        done = alone(model, random_prompts(model, 0, [length])[0], greedy(max_tokens))
        assert (len(done.ids), done.finish_reason) == (min(max_tokens, 50 - length), "length")


def test_stop_ids_end_a_text(chatter):
    """The text ends before the first of the tokenizer's stop ids, wherever it comes, as transformers ends
    it."""
    model, tokenizer, prompt, ids = chatter
    for at in (0, 7, 30):
        tokenizer = copy.copy(tokenizer)
        tokenizer.stop_ids = [ids[at], tokenizer.vocab_size - 1]
        end = ids.index(ids[at])
        done = alone(model, prompt, greedy(60), tokenizer=tokenizer)
        assert (done.ids, done.text, done.finish_reason) == (ids[:end], tokenizer.decode(ids[:end]), "stop")


def test_stop_strings_end_a_text(chatter):
    """The text ends before a stop string, also one that begins in one token and ends in another."""
    model, tokenizer, prompt, ids = chatter
    whole, cuts = tokenizer.decode(ids), 0
    for n in range(1, len(ids)):
        border = len(tokenizer.decode(ids[:n]))
        stop = whole[border - 2 : border + 2]
        if len(stop) < 4 or "\ufffd" in stop:
            continue
        done = alone(model, prompt, greedy(60, stop=("not there", stop)), tokenizer=tokenizer)
        assert (done.text, done.finish_reason) == (whole[: whole.find(stop)], "stop")
        assert len(done.ids) <= n + 2
        cuts += 1
    assert cuts > 10


def test_the_earliest_of_stop_strings_counts(stage_tokenizer):
    """Of two that become whole with the same token, the one that begins first ends the text, however they are
    ordered."""
    ids = stage_tokenizer.encode("A ferry")
    model = parrot(ids, stage_tokenizer.vocab_size)
    for stop in (("rry", "fer"), ("fer", "rry")):
        assert alone(model, ids[:1], greedy(len(ids) - 1, stop=stop), tokenizer=stage_tokenizer).text == " "


def test_a_stop_string_at_the_very_end(chatter):
    """One that is whole with the last token allowed ends the text as `stop`; one that is not yet whole leaves
    it be."""
    model, tokenizer, prompt, ids = chatter
    for n in (1, 9, 20):
        text = tokenizer.decode(ids[:n])
        if text.endswith("\ufffd"):
            continue
        done = alone(model, prompt, greedy(n, stop=(text[-1:],)), tokenizer=tokenizer)
        assert (done.text, done.finish_reason) == (text[: text.find(text[-1:])], "stop")
        pieces, done = collect(
            Engine(model, tokenizer).stream(prompt, greedy(n, stop=(text[-1:] + "never",)))
        )
        assert "".join(pieces) == done.text == text and (done.ids, done.finish_reason) == (ids[:n], "length")


def test_a_stop_string_is_part_of_neither_ids_nor_text(stage_tokenizer):
    """Where the stop string is whole tokens, ids end before it like the text."""
    ids = stage_tokenizer.encode("A ferry.\nHalt! Go")
    model = parrot(ids, stage_tokenizer.vocab_size)
    end = next(n for n in range(len(ids)) if stage_tokenizer.decode(ids[:n]).endswith("\n"))
    done = alone(model, ids[:1], greedy(len(ids) - 1, stop=("Halt!",)), tokenizer=stage_tokenizer)
    assert (done.text, done.finish_reason) == (stage_tokenizer.decode(ids[1:end]), "stop")
    assert done.ids == ids[1:end]


def test_what_a_stopped_prompt_leaves_can_be_taken_over(chatter):
    """After a stop string the conversation goes on from the cache with the tokens a fresh engine gives."""
    model, tokenizer, prompt, ids = chatter
    whole = tokenizer.decode(ids)
    engine = Engine(model, tokenizer)
    done = engine.generate([prompt], greedy(60, stop=(whole[20:24],)))[0]
    longer = prompt + tokenizer.encode(done.text + " and then")
    again = engine.generate([longer], greedy(20))[0]
    assert again.cached_tokens >= len(prompt) and again.ids == alone(model, longer, greedy(20)).ids


def test_pieces_make_up_the_text(chatter):
    """Pieces joined are the text generate gives, with the same completion at the end, stopped or not."""
    model, tokenizer, prompt, ids = chatter
    whole = tokenizer.decode(ids)
    borders = [len(tokenizer.decode(ids[:n])) for n in range(5, 25, 2)]
    torn = [
        (whole[at - 2 : at + 2],) for at in borders
    ]  # stop strings that are half said before they are whole
    for stop in ((), *torn, (whole[30:33], whole[50:58]), (whole[:1],), ("never said",)):
        params = greedy(60, stop=stop)
        pieces, done = collect(Engine(model, tokenizer).stream(prompt, params))
        assert done == alone(model, prompt, params, tokenizer=tokenizer)
        assert "".join(pieces) == done.text and "" not in pieces
        assert len(pieces) > 3 or len(done.text) < 20


def test_streams_never_tear_a_character(any_tokenizer):
    """Characters that take several tokens come whole, each as soon as it is complete."""
    text = "x\u65e5b\U0001f702c\u017ed"
    first = any_tokenizer.encode("Z")[-1]
    ids = [first, *any_tokenizer.encode(text), any_tokenizer.stop_ids[0]]
    assert len(ids) - 2 > len(text)
    model = parrot(ids, any_tokenizer.vocab_size)
    pieces, done = collect(Engine(model, any_tokenizer).stream(ids[:1], greedy(100)))
    assert (done.text, done.ids, done.finish_reason) == (text, ids[1:-1], "stop")
    assert "".join(pieces) == text and len(pieces) > 4
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("after", ["", "ok"])
def test_streams_of_broken_characters(any_tokenizer, after):
    """A character that stays torn, in the middle or at the end, shows as U+FFFD in pieces and text alike."""
    torn = any_tokenizer.encode("\U0001f702")[:-1]
    first, *rest = any_tokenizer.encode("Z")[-1:] + torn + any_tokenizer.encode(after)
    model = parrot([first, *rest], any_tokenizer.vocab_size)
    pieces, done = collect(Engine(model, any_tokenizer).stream([first], greedy(len(rest))))
    assert done.ids == rest and done.text == any_tokenizer.decode(rest)
    assert "\ufffd" in done.text and "".join(pieces) == done.text


def test_streams_side_by_side(chatter):
    """Work on the same engine between two pieces takes nothing from a stream, though it may end in the
    meantime."""
    model, tokenizer, prompt, _ = chatter
    engine = Engine(model, tokenizer)
    streams = [engine.stream(prompt, greedy(60)), engine.stream(prompt[1:], greedy(40))]
    started = [next(stream) for stream in streams]
    done = engine.generate([prompt[2:]], greedy(80))[0]
    assert done.ids == alone(model, prompt[2:], greedy(80)).ids
    for stream, piece, begin, n in zip(streams, started, (0, 1), (60, 40), strict=True):
        pieces, completion = collect(stream)
        assert completion.ids == alone(model, prompt[begin:], greedy(n)).ids
        assert piece + "".join(pieces) == completion.text


def test_a_stream_that_is_left_runs_no_further(chatter):
    """When the reader leaves, its sequence stops costing steps, whether it was running or still in line."""
    model, tokenizer, prompt, _ = chatter
    engine = Engine(model, tokenizer, max_batch=1)
    stream = engine.stream(prompt, greedy(60))
    next(stream)
    stream.close()
    before = engine.stats["decoded"]
    assert engine.generate([prompt], greedy(5))[0].ids == alone(model, prompt, greedy(5)).ids
    assert engine.stats["decoded"] == before + 5


def test_only_what_may_begin_a_stop_string_is_held_back(chatter):
    """A long stop string that nothing resembles delays no piece."""
    model, tokenizer, prompt, _ = chatter
    pieces, done = collect(Engine(model, tokenizer).stream(prompt, greedy(40)))
    assert not any(c in done.text for c in "<>")
    assert collect(Engine(model, tokenizer).stream(prompt, greedy(40, stop=("<" * 40 + ">",))))[0] == pieces


@pytest.mark.parametrize("length", [1, 2, 9, 40])
def test_no_part_of_a_stop_string_is_streamed(chatter, length):
    """However long the stop string, pieces joined are the text of `generate`."""
    model, tokenizer, prompt, _ = chatter
    whole = Engine(model, tokenizer).generate([prompt], greedy(40))[0].text
    for begin in (0, 3):
        params = greedy(40, stop=(whole[begin : begin + length],))
        expected = Engine(model, tokenizer).generate([prompt], params)[0].text
        assert "".join(Engine(model, tokenizer).stream(prompt, params)) == expected
