"""Choices and JSON: exact probabilities, and documents that always parse."""

import json
import random
import re

import pytest
import torch
from engines import alone, collect, everything_given_back, greedy, logprobs_of

from common.files import UsageError
from engine import constrain
from generate import Engine, SamplingParams

NAMES = ["Hanne", "Hanne Brod", "Jory", "<END CHAT>", "Environment"]


@pytest.mark.parametrize("length", [9, 16, 70])
def test_choices_read_the_prompt_once(chatter, length):
    """The first choice reads it, the others find it in the cache and run their own tokens only; so does
    `score`."""
    model, tokenizer, *_ = chatter
    prompt = [i % 50 + 5 for i in range(length)]
    paths = [tokenizer.encode(name) for name in NAMES]
    own = [len(path) + any(other != path and other[: len(path)] == path for other in paths) for path in paths]
    engine = Engine(model, tokenizer)
    engine.generate([prompt], greedy(1, choices=NAMES))
    assert engine.stats["prefilled"] == length - 1 + sum(own)
    engine = Engine(model)
    engine.score([prompt] * len(paths), paths)
    assert engine.stats["prefilled"] == length - 1 + sum(map(len, paths))


def test_choices_of_the_same_tokens(chatter, monkeypatch):
    """Two that a tokenizer normalises to the same are as likely as each other, and nothing of them stays in
    line."""
    model, tokenizer, prompt, _ = chatter
    engine, encode = Engine(model, tokenizer, max_batch=2), tokenizer.encode
    expected = engine.generate([prompt], greedy(1, choices=["Hanne", "Wick Tarn"]))[0].probabilities
    monkeypatch.setattr(tokenizer, "encode", lambda text: encode(text.replace("~", "")))
    for _ in range(3):
        line = engine.add(prompt, greedy(1, choices=["Hanne", "Wick Tarn", "Hanne~"]))
        for _ in range(20):
            engine.step()
        everything_given_back(engine)
        found = engine.completion(line).probabilities
        assert found["Hanne"] == found["Hanne~"]
        assert found["Hanne"] / found["Wick Tarn"] == pytest.approx(
            expected["Hanne"] / expected["Wick Tarn"], rel=1e-3
        )
        assert engine.generate([prompt], greedy(3))[0].ids


def test_choices(chatter):
    """Probabilities are those of an uncached pass over each choice's tokens, the end of the turn included
    where another goes on from it; greedy takes the likeliest, draws follow them."""
    model, tokenizer, prompt, _ = chatter
    tokens = {name: tokenizer.encode(name) + [tokenizer.stop_ids[0]] * (name == "Hanne") for name in NAMES}
    joint = torch.tensor([sum(logprobs_of(model, prompt, tokens[name])) for name in NAMES]).softmax(-1)
    engine = Engine(model, tokenizer)
    params = [SamplingParams(1, choices=NAMES, seed=seed) for seed in range(200)]
    done = engine.generate([prompt] * 201, [greedy(1, choices=NAMES, logprobs=True), *params])
    assert done[0].text == NAMES[joint.argmax()] and done[0].ids == tokenizer.encode(done[0].text)
    assert done[0].logprobs == pytest.approx(logprobs_of(model, prompt, done[0].ids), abs=1e-3)
    for each in done:
        assert list(each.probabilities) == NAMES and each.finish_reason == "stop"
        assert list(each.probabilities.values()) == pytest.approx(joint.tolist(), abs=1e-4)
    counts = torch.tensor([sum(each.text == name for each in done[1:]) for name in NAMES]) / 200
    assert (counts - joint).abs().max() < 4 * 0.5 / 200**0.5
    flat = engine.generate(
        [prompt] * 50, [SamplingParams(1e9, choices=NAMES, seed=seed) for seed in range(50)]
    )
    assert {each.text for each in flat} == set(NAMES)
    assert collect(engine.stream(prompt, params[3]))[0] == [done[4].text]
    everything_given_back(engine)


FLAWS = {
    "type": "object",
    "properties": {
        "flaws": {
            "type": "array",
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {
                    "instance": {"type": "string"},
                    "type": {"enum": ["a", "a b", 'quote " and \u00e9']},
                    "severity": {"type": "integer", "minimum": 1, "maximum": 5},
                },
            },
        },
        "n": {"type": "integer", "minimum": -30, "maximum": 120},
        "ok": {"type": "boolean"},
        "none": {"type": "null"},
        "two": {"type": "array", "items": {"type": "integer", "minimum": 7}, "minItems": 2, "maxItems": 2},
    },
}


def check_flaws(value):
    assert list(value) == list(FLAWS["properties"]) and len(value["flaws"]) <= 3
    for flaw in value["flaws"]:
        assert list(flaw) == ["instance", "type", "severity"] and isinstance(flaw["instance"], str)
        assert flaw["type"] in ("a", "a b", 'quote " and \u00e9') and flaw["severity"] in range(1, 6)
    assert value["n"] in range(-30, 121) and isinstance(value["ok"], bool) and value["none"] is None
    assert len(value["two"]) == 2 and min(value["two"]) >= 7


def test_json_always_parses(chatter):
    """Whatever a random model would say, at any length and temperature, alone or among others that are
    free."""
    model, tokenizer, prompt, _ = chatter
    least = constrain.cost(constrain.Grammar(FLAWS, constrain.Vocabulary(tokenizer)).start)
    engine = Engine(model, tokenizer)
    budgets = [least, least + 1, least + 20, 150, 300]
    params = [
        SamplingParams(t, max_tokens=n, seed=n, json_schema=FLAWS) for n in budgets for t in (0, 0.7, 2)
    ]
    done = engine.generate([prompt] * 30, [p for each in params for p in (each, greedy(20))])
    for each, p in zip(done[::2], params, strict=True):
        check_flaws(json.loads(each.text))
        assert each.finish_reason == "stop" and len(each.ids) <= p.max_tokens
    assert len({each.text for each in done[::2]}) > 8
    assert all(each.ids == done[1].ids for each in done[1::2])
    with pytest.raises(UsageError, match=f"{least} tokens.* {least - 1}"):
        engine.generate([prompt], greedy(least - 1, json_schema=FLAWS))


@pytest.mark.parametrize("budget", [None, 0, 1, 40])
def test_random_walks_through_a_grammar(any_tokenizer, budget):
    """Any tokens that are allowed, one after the other, within any budget, end on a document of the
    schema."""
    grammar, rng = constrain.Grammar(FLAWS, constrain.Vocabulary(any_tokenizer)), random.Random(budget)
    for _ in range(15):
        state, ids = grammar.start, []
        room = constrain.cost(state) + (rng.randrange(300) if budget is None else budget)
        while state:
            allowed, costs = grammar.allowed(state)
            i = int(rng.choice(allowed[costs < room - len(ids)]))
            ids.append(i)
            state = constrain.advance(state, any_tokenizer.token_bytes(i))
        assert len(ids) <= room
        check_flaws(json.loads(any_tokenizer.decode(ids)))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (-3, 12), (95, 1204), (-1204, -95), (7, None), (None, -7), (-1, 100)]
)
def test_integers_keep_to_their_bounds(low, high):
    """A text of digits is accepted exactly where it is a JSON integer within the bounds."""
    schema = (
        {"type": "integer"}
        | ({} if low is None else {"minimum": low})
        | ({} if high is None else {"maximum": high})
    )
    frames = constrain.compile_schema(schema)
    for text in [*map(str, range(-1300, 1300)), "", "-", "-0", "00", "07", "-07", "+1", "1.0", "--1", "1-"]:
        state = constrain.advance(frames, text.encode())
        accepted = state is not None and constrain.cost(state) == 0
        valid = (
            re.fullmatch(r"0|-?[1-9]\d*", text)
            and (low is None or low <= int(text))
            and (high is None or int(text) <= high)
        )
        assert accepted == bool(valid), text


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "number"}, "number"),
        ({"type": "string", "pattern": "x"}, "pattern"),
        ({"type": "array"}, "items"),
        (
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 2}}},
            "schema.a",
        ),
        ({"enum": []}, "enum"),
        ({"type": ["string", "null"]}, "type is"),
        ({"type": "object", "properties": []}, "properties"),
        ({"enum": [float("nan")]}, "cannot be written"),
        ({"const": float("inf")}, "cannot be written"),
        ({"enum": ["\ud800"]}, "cannot be written"),
        ({"enum": [{1, 2}]}, "cannot be written"),
        ({"type": "object", "properties": {"\ud800": {"type": "null"}}}, "cannot be written"),
    ],
    ids=ascii,
)
def test_schemas_outside_the_subset_are_refused(schema, word):
    """By name, not by ignoring what they ask for."""
    with pytest.raises(UsageError, match=word):
        constrain.compile_schema(schema)


@pytest.mark.parametrize("temperature", [1e-50, 1e-46, 1e39, 1e300])
def test_extreme_temperatures(chatter, temperature):
    """They are as good as greedy, or as uniform; JSON still parses."""
    model, tokenizer, prompt, _ = chatter
    engine = Engine(model, tokenizer)
    done = engine.generate([prompt], SamplingParams(temperature, max_tokens=30, seed=1))[0]
    if temperature < 1:
        assert done.ids == alone(model, prompt, greedy(30)).ids
    else:
        assert len({*done.ids}) > len(done.ids) / 2
    json.loads(
        engine.generate([prompt], SamplingParams(temperature, max_tokens=300, seed=1, json_schema=FLAWS))[
            0
        ].text
    )
