"""Draws follow their distribution; log-probabilities are those of the model."""

import re

import pytest
import torch
from conftest import random_config, random_model
from engines import alone, everything_given_back, greedy, logprobs_of, random_prompts
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

import checkpoint
from common.files import UsageError
from generate import Engine, SamplingParams

logging.disable_progress_bar()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 7},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 3.0, "top_k": 20, "top_p": 0.6},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(settings):
    """Frequencies over many seeds fit, by chi-square, the distribution transformers' own processors leave;
    nothing outside."""
    draws = 3000
    model = random_model(random_config(1, vocab_size=40, num_hidden_layers=1), seed=5)
    params = [SamplingParams(max_tokens=1, seed=seed, **settings) for seed in range(draws)]
    done = Engine(model, max_batch=draws).generate([[3, 14, 15]] * draws, params)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in done]), minlength=40).double()
    warpers = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    processors = LogitsProcessorList(warpers[name](value) for name, value in settings.items())
    with torch.no_grad():
        scores = processors(None, model(torch.tensor([[3, 14, 15]]))[:, -1])[0]
    expected = draws * scores.double().softmax(-1)
    assert (counts[expected == 0] == 0).all() and (counts[expected > 30] > 0).all()
    rare = expected < 5  # counted as one
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    chi_square = ((counts - expected).square() / expected.clamp(min=1)).sum().item()
    freedom = len(expected) - 1
    assert freedom >= 3 and chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_a_seed_repeats_in_any_company():
    """A seed fixes a text whatever runs beside it; other seeds, or none, give other texts."""
    model = random_model(random_config(4))
    batch = random_prompts(model, 0, [3, 30, 11, 1, 11])
    params = [
        SamplingParams(temperature=1.2, top_k=50, top_p=0.95, max_tokens=30, seed=seed) for seed in range(5)
    ]
    together = [c.ids for c in Engine(model).generate(batch, params)]
    assert together == [alone(model, prompt, p).ids for prompt, p in zip(batch, params, strict=True)]
    assert together[::-1] == [c.ids for c in Engine(model, max_batch=2).generate(batch[::-1], params[::-1])]
    twice = Engine(model).generate([batch[1]] * 3, [params[1], params[2], params[1]])
    assert twice[0].ids == twice[2].ids == together[1] and twice[1].ids != together[1]
    unseeded = [SamplingParams(temperature=1.2, max_tokens=30, seed=seed) for seed in (1, 2, None, None)]
    assert len({tuple(c.ids) for c in Engine(model).generate([batch[0]] * 4, unseeded)}) == 4


def test_min_p_and_penalty_are_those_of_transformers(tmp_path):
    """min_p leaves the tokens that transformers' leaves; greedy text under a repetition penalty is its
    `generate`'s."""
    model = random_model(random_config(1, vocab_size=40))
    prompt = random_prompts(model, 0, [9])[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[:, -1]
    for min_p in (0.02, 0.2, 0.9):
        left = MinPLogitsWarper(min_p)(None, logits / 3)[0] > -torch.inf
        params = [SamplingParams(3, min_p=min_p, max_tokens=1, seed=seed) for seed in range(600)]
        seen = {c.ids[0] for c in Engine(model, max_batch=600).generate([prompt] * 600, params)}
        assert seen <= set(left.nonzero().flatten().tolist()) and len(seen) > 0.6 * left.sum()
    checkpoint.save_model(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs.generation_config.eos_token_id = None
    for penalty in (0.7, 1.5):
        ids = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, repetition_penalty=penalty
        )[0]
        assert alone(model, prompt, greedy(40, repetition_penalty=penalty)).ids == ids[len(prompt) :].tolist()


def test_logprobs_are_the_models():
    """Whatever temperature, filters and penalty chose the tokens; `score` gives the same for given ones, also
    in parts."""
    model = random_model(random_config(3))
    batch = random_prompts(model, 0, [1, 30, 12])
    params = SamplingParams(2, top_k=9, repetition_penalty=1.4, max_tokens=20, seed=1, logprobs=True)
    for prompt, done in zip(batch, Engine(model).generate(batch, params), strict=True):
        assert done.logprobs == pytest.approx(logprobs_of(model, prompt, done.ids), abs=1e-4)
    continuations = random_prompts(model, 1, [40, 1, 5])
    expected = [sum(logprobs_of(model, *pair)) for pair in zip(batch, continuations, strict=True)]
    assert Engine(model).score([[1, 2]], [[]]) == [0]
    for limits in ({}, {"max_step_tokens": 7}, {"max_batch": 1}):
        engine = Engine(model, **limits)
        for _ in range(2):  # from the cache as well
            assert engine.score(batch, continuations) == pytest.approx(expected, abs=1e-3)
        everything_given_back(engine)


def test_several_stop_ids(chatter):
    """Each request's own stop ids end it, besides the tokenizer's."""
    model, tokenizer, prompt, ids = chatter
    for at in (3, 9):
        done = alone(model, prompt, greedy(60, stop_ids=(ids[20], ids[at])), tokenizer=tokenizer)
        assert (done.ids, done.finish_reason) == (ids[: min(ids.index(ids[at]), ids.index(ids[20]))], "stop")


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1e-30}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 5, "top_k": 1}],
    ids=str,
)
def test_extremes_of_sampling_are_greedy(settings):
    """A vanishing temperature, one token to choose from, or a vanishing nucleus leave the likeliest token."""
    model = random_model(random_config(4))
    prompt = random_prompts(model, 1, [9])[0]
    assert (
        alone(model, prompt, SamplingParams(max_tokens=30, **settings)).ids
        == alone(model, prompt, greedy(30)).ids
    )


def test_only_tokens_of_the_tokenizer_are_chosen(stage_tokenizer):
    """A model with more rows than the tokenizer has tokens (a padded vocabulary) never says one that cannot
    be read."""
    model = random_model(random_config(0, vocab_size=4 * stage_tokenizer.vocab_size, hidden_size=24))
    done = Engine(model, stage_tokenizer).generate(
        [[5, 6], [7]], [greedy(20), SamplingParams(max_tokens=20, seed=0)]
    )
    assert all(max(c.ids) < stage_tokenizer.vocab_size for c in done)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_tokens": 0},
        {"temperature": float("inf")},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"stop": "abc"},
        {"stop": ("a", "")},
        {"choices": []},
        {"choices": ["a", 5]},
        {"choices": ["a", "a"]},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings):
    """Settings that mean nothing are refused by name and value."""
    (name, value), *_ = settings.items()
    with pytest.raises(UsageError, match=f"^{name} .*{re.escape(repr(value))}$"):
        SamplingParams(**settings)
