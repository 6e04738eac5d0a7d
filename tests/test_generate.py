"""The engine: greedy as in transformers, the same alone or in any company, draws that follow their distribution; the script."""

import copy
import gc
import io
import json
import os
import random
import re
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from conftest import ROOT, random_config, random_model, usage_error
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
import tokenizer as tokenizer_module
from common.files import UsageError
from common.terminal import plain
from data import prompts
from data.chats import perspective, system_prompt
from engine import constrain
from engine.cpu import PackedLinear
from engine.pages import contiguous
from generate import Engine, SamplingParams, find_character
from llm import open_model
from llm.local import load_engine
from model import RopeScaling

logging.disable_progress_bar()


def greedy(max_tokens, **kwargs):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **kwargs)


def alone(model, prompt, params, **kwargs):
    """The completion of one prompt by an engine that has seen nothing else."""
    return Engine(model, **kwargs).generate([prompt], params)[0]


def random_prompts(model, seed, lengths):
    rng = random.Random(seed)
    return [[rng.randrange(model.config.vocab_size) for _ in range(n)] for n in lengths]


def parrot(ids, vocab_size, size=64):
    """A model that says ids (each only once among them) one after the other, greedily, once it is given the first."""
    assert len(set(ids)) == len(ids)
    config = random_config(
        0, vocab_size=vocab_size, num_hidden_layers=1, hidden_size=size, tie_word_embeddings=False
    )
    model = checkpoint.build_model(config, "cpu", torch.float32).eval()
    vectors = torch.randn(len(ids), size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(
                parameter.ndim == 1
            )  # norms 1, all else 0: a token's embedding goes straight to the head
        model.model["embed_tokens"].weight[ids] = vectors
        model.lm_head.weight[ids[1:]] = vectors[:-1]
    return model


@pytest.fixture(scope="module")
def chatter(tiny_actor):
    """The tiny actor's model and tokenizer, a prompt, and 60 tokens it says greedily."""
    model, tokenizer = checkpoint.load_model(tiny_actor), tokenizer_module.load_tokenizer(tiny_actor)
    prompt = tokenizer.encode("The ferry leaves at")
    ids = alone(model, prompt, greedy(60)).ids
    assert len(set(ids)) > 20
    return model, tokenizer, prompt, ids


@pytest.fixture(params=["stage", "llama3"])
def any_tokenizer(request):
    """The stage's tokenizer, then LLaMA 3's where the real data is at hand."""
    if request.param == "stage":
        return request.getfixturevalue("stage_tokenizer")
    return tokenizer_module.load_tokenizer(request.getfixturevalue("shared") / "tokenizers" / "llama3")


# ---- greedy, batches, the cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_greedy_equals_transformers(seed, tmp_path):
    """64 greedy tokens are those of transformers' generate, with grouped heads and scaled rope among the configurations."""
    model = random_model(
        random_config(
            seed, rope_scaling=RopeScaling(original_max_position_embeddings=32) if seed & 1 else None
        )
    )
    checkpoint.save_model(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs.generation_config.eos_token_id = None
    for prompt in random_prompts(model, seed, [1, 17]):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        done = alone(model, prompt, greedy(64))
        assert len(expected) == 64 and done.ids == expected
        assert (done.finish_reason, done.prompt_tokens, done.cached_tokens, done.text) == (
            "length",
            len(prompt),
            0,
            None,
        )


@pytest.mark.parametrize(
    "limits", [{}, {"max_batch": 1}, {"max_batch": 3, "max_step_tokens": 16}, {"max_step_tokens": 1}]
)
@pytest.mark.parametrize("seed", range(3))
def test_a_ragged_batch_equals_each_alone(seed, limits):
    """However many run at once and whatever they wait for, each prompt gets its own tokens, in the order given."""
    model, rng = random_model(random_config(seed)), random.Random(seed)
    batch = random_prompts(model, seed, [1, 40, 2, 23, 7, 7, 1, 60, 12])
    params = [greedy(rng.randrange(1, 30)) for _ in batch]
    engine = Engine(model, **limits)
    done = engine.generate(batch, params)
    assert [c.ids for c in done] == [
        alone(model, prompt, p).ids for prompt, p in zip(batch, params, strict=True)
    ]
    assert [len(c.ids) for c in done] == [p.max_tokens for p in params]
    assert engine.stats["decoded"] == sum(p.max_tokens for p in params)
    assert engine.stats["prefilled"] + engine.stats["reused"] == sum(map(len, batch))


def test_limits_of_a_step_are_kept():
    """No more sequences run at once than max_batch, no more of prompts is taken in than fits, and no less."""
    model = random_model(random_config(2))
    batch = random_prompts(model, 0, [9, 9, 9, 40, 5, 9, 9, 9])
    engine = Engine(model, max_batch=3, max_step_tokens=20)
    sequences, taken, running = (
        [engine.add(prompt, greedy(n + 2))[0] for n, prompt in enumerate(batch)],
        [],
        [],
    )
    while any(s.finish_reason is None for s in sequences):
        before = engine.stats["prefilled"], engine.stats["decoded"]
        engine.step()
        taken.append(engine.stats["prefilled"] - before[0])
        running.append(engine.stats["decoded"] - before[1])
    assert max(running) == 3 and max(taken) == taken[0] == 20 and sum(taken) == sum(map(len, batch))


@pytest.mark.parametrize("seed", range(4))
def test_a_prefix_is_reused(seed):
    """Prompts that begin like something the engine has run take over its cache: the same tokens, and `cached_tokens` counts."""
    model = random_model(random_config(seed))
    engine, (first, other) = Engine(model), random_prompts(model, seed, [30, 12])
    said = engine.generate([first], greedy(20))[0].ids
    history = [  # a prompt, and how much of it the cache holds: not the last token said, nor the last of a prompt
        (first + said + other, 30 + 19),
        (first + said + other, 30 + 20 + 11),
        (first[:10] + other, 10),
        ([(first[0] + 1) % model.config.vocab_size, *first], 0),
        (first[:5], 4),
    ]
    for prompt, cached in history:
        done = engine.generate([prompt], greedy(25))[0]
        assert done.cached_tokens == cached and done.prompt_tokens == len(prompt)
        assert done.ids == alone(model, prompt, greedy(25)).ids
    assert engine.stats["reused"] == sum(cached for _, cached in history)
    assert engine.stats["prefilled"] == 30 + sum(len(prompt) - cached for prompt, cached in history)


def test_a_beginning_serves_many():
    """Two prompts with the same beginning both take it over, at the same time, and neither disturbs the other."""
    model = random_model(random_config(2))
    engine, (start, a, b) = Engine(model), random_prompts(model, 0, [20, 3, 4])
    engine.generate([start], greedy(1))
    done = engine.generate([start + a, start + b], greedy(20))
    assert [c.cached_tokens for c in done] == [20, 20]
    assert [c.ids for c in done] == [alone(model, start + x, greedy(20)).ids for x in (a, b)]


def test_the_same_prompt_is_read_once():
    """Of prompts with the same beginning that come together one is run, and the others wait for its full pages."""
    model = random_model(random_config(2))
    engine, (start, *ends) = Engine(model), random_prompts(model, 0, [70, 3, 4, 5])
    batch = [start + end for end in ends]
    done = engine.generate(batch, greedy(10))
    assert [c.cached_tokens for c in done] == [0, 64, 64] and engine.stats["prefilled"] == 73 + 10 + 11
    assert [c.ids for c in done] == [alone(model, prompt, greedy(10)).ids for prompt in batch]


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_chat_that_grows_is_never_read_twice(page_size):
    """Each turn runs only what is new and the one token whose keys were never computed, whatever the pages' borders."""
    model, rng = random_model(random_config(3)), random.Random(0)
    engine, history, known = Engine(model, page_size=page_size), [], 0
    for turn in range(12):
        history += random_prompts(model, turn, [rng.randrange(1, 12)])[0]
        before = engine.stats["prefilled"]
        done = engine.generate([history], greedy(rng.randrange(1, 9)))[0]
        assert done.cached_tokens == known and engine.stats["prefilled"] - before == len(history) - known
        assert done.ids == alone(model, history, greedy(len(done.ids))).ids
        history += done.ids
        known = len(history) - 1  # the last token said was never run


def test_chats_lie_in_a_row():
    """Chats that take turns keep their pages in a row as they grow, so that their keys need not be gathered."""
    model = random_model(random_config(2))
    chats, tables = random_prompts(model, 3, [46, 47, 5]), []
    engine = Engine(model, page_size=4)
    running = engine.run
    engine.run = lambda batch: tables.append(batch[0][0].block_table) or running(batch)
    for _ in range(4):
        for i, chat in enumerate(chats):
            done = engine.generate([chat], greedy(5))[0]
            assert done.ids == alone(model, chat, greedy(5)).ids
            chats[i] = chat + done.ids + [i + 1] * 5
    assert all(map(contiguous, filter(None, tables))) and len({table[0] for table in tables if table}) == 3


def test_chats_with_the_same_beginning_do_not_disturb_each_other():
    """They share its pages; what each says after it is its own, at all its returns."""
    model = random_model(random_config(2))
    shared, *own = random_prompts(model, 3, [42, 6, 7, 8])
    engine, chats = Engine(model, page_size=4), [shared + ids for ids in own]
    for turn in range(4):
        for i, chat in enumerate(chats):
            done = engine.generate([chat], greedy(5))[0]
            assert done.ids == alone(model, chat, greedy(5)).ids
            assert done.cached_tokens >= 42 or (turn, i) == (0, 0)
            chats[i] = chat + done.ids[:3] + [i + 1] * 5
    everything_given_back(engine)


def test_the_cache_is_bounded():
    """Where room runs out the oldest of what nobody holds goes first."""
    model = random_model(random_config(2))
    batch = random_prompts(model, 0, [20, 20, 20])
    engine = Engine(model, cache_tokens=50, page_size=1)
    for prompt in batch:
        engine.generate([prompt], greedy(1))
    assert [engine.generate([prompt], greedy(1))[0].cached_tokens for prompt in (batch[2], batch[1])] == [
        19,
        19,
    ]
    assert engine.generate([batch[0]], greedy(1))[0].cached_tokens < 19
    assert engine.scheduler.blocks.available() == 50 and not engine.scheduler.blocks.ref_counts


def test_caches_take_no_memory_until_they_are_used():
    """Room for more tokens than the machine has memory for, and a process that has it can still fork."""
    model = random_model(random_config(1))
    engines, memory = [], os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    while sum(engine.kv.nbytes for engine in engines) <= memory:
        engines.append(Engine(model))
    if not (child := os.fork()):
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_an_engine_goes_with_its_last_name(tiny_actor):
    """No reference cycle keeps weights and cache until the collector runs."""
    gc.disable()
    try:
        model = open_model(tiny_actor)
        model.chat([[{"role": "user", "content": "hello"}]], greedy(3))
        gone = weakref.ref(model.engine)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_bf16_keeps_its_cache_in_bf16(tiny_actor):
    """A bf16 model goes on from its cache with the same tokens as without, give or take a near tie."""
    model = checkpoint.load_model(tiny_actor, dtype=torch.bfloat16)
    engine = Engine(model)
    ids = engine.generate([[5, 6, 7]], greedy(30))[0].ids
    assert engine.kv.dtype == torch.bfloat16
    tokens = torch.tensor([[5, 6, 7, *ids[:-1]]])
    with torch.no_grad():
        logits = model(tokens)[0, 2:].float()
    chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() < 0.05 * logits.std()


@pytest.mark.parametrize("seed", range(4))
def test_tables_of_blocks_and_views_agree(seed):
    """The kernels' decode attention, which a GPU uses, gives the tokens that views of pages give; scattered pages as well."""
    family = "mistral" if seed & 1 else "llama"
    model = random_model(random_config(seed, family, **({"sliding_window": 7} if seed & 1 else {})))
    batch = random_prompts(model, seed, [1, 40, 2, 23, 7])
    expected = [alone(model, prompt, greedy(30)).ids for prompt in batch]
    engine = Engine(model, page_size=4)
    engine.use_tables = True
    assert [c.ids for c in engine.generate(batch, greedy(30))] == expected
    engine = Engine(model, page_size=4, cache_tokens=1000)
    rng = random.Random(seed)
    engine.scheduler.blocks.allocate = lambda n, *_: scattered(engine.scheduler.blocks, n, rng)
    assert [c.ids for c in engine.generate(batch, greedy(30))] == expected


def scattered(blocks, n, rng):
    """Blank pages anywhere."""
    pages = rng.sample(np.flatnonzero(blocks.blank).tolist(), n)
    blocks.hold(pages)
    return pages


@pytest.mark.parametrize(
    "shape", [(512, 256), (256, 704), (960, 576), (1408, 256), (1536, 576), (576, 1536), (70, 3000)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_any_batch(shape, threads):
    """However many rows are multiplied at once, one alone included, and whatever the number of inputs."""
    layer = torch.nn.Linear(*reversed(shape), bias=False).requires_grad_(False)
    if not PackedLinear(layer).blocked:
        pytest.skip("without oneDNN a row's bits depend on the number of rows")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(64, shape[1])
        together = PackedLinear(layer)(x)
        torch.testing.assert_close(together, layer(x), rtol=1e-4, atol=1e-5)
        for n in (1, 2, 3, 4, 5, 16, 33):
            assert torch.equal(PackedLinear(layer)(x[:n]), together[:n])
    finally:
        torch.set_num_threads(before)


def bounded(engine, steps):
    """The engine, which fails where it takes more steps than that: what is lost or waits for ever should not hang a test."""
    step, left = engine.step, iter(range(steps))

    def counted():
        assert next(left, None) is not None, f"not done after {steps} steps"
        step()

    engine.step = counted
    return engine


def everything_given_back(engine):
    scheduler, blocks = engine.scheduler, engine.scheduler.blocks
    assert not (scheduler.waiting or scheduler.running or blocks.ref_counts)
    assert blocks.available() == blocks.num_pages
    assert blocks.free.keys() == blocks.known.keys() == {*np.flatnonzero(~blocks.blank).tolist()}
    children = [
        (before, tokens, page) for before, own in blocks.children.items() for tokens, page in own.items()
    ]
    assert sorted(page for *_, page in children) == sorted(blocks.known)
    assert all(blocks.known[page] == (before, tokens) for before, tokens, page in children)


@pytest.mark.parametrize("chunk", [5, 4096])
def test_pages_run_out(chunk):
    """With room for little more than one sequence the youngest are computed again later: none is lost, none differs."""
    model, rng = random_model(random_config(4)), random.Random(1)
    batch = random_prompts(model, 0, [rng.randrange(1, 40) for _ in range(12)])
    params = [greedy(rng.randrange(1, 60)) for _ in batch]
    engine = bounded(Engine(model, cache_tokens=112, page_size=4, max_step_tokens=chunk), 2000)
    put_back, release = [], engine.scheduler.release
    engine.scheduler.release = lambda s: (
        put_back.append(s) if s.finish_reason is None and s.block_table else None,
        release(s),
    )
    done = engine.generate(batch, params)
    assert [c.ids for c in done] == [
        alone(model, prompt, p).ids for prompt, p in zip(batch, params, strict=True)
    ]
    assert put_back
    everything_given_back(engine)


def soak(requests, seed):
    """Random requests come in bursts to a small engine with few pages; some are cancelled on the way."""
    rng, model = random.Random(seed), random_model(random_config(4, vocab_size=100))
    engine = bounded(
        Engine(model, cache_tokens=256, page_size=4, max_batch=6, max_step_tokens=32), 40 * requests
    )
    starts = random_prompts(model, seed, [30, 12, 50])
    asked, cancelled = [], 0
    while len(asked) < requests or engine.scheduler.waiting or engine.scheduler.running:
        for _ in range(rng.choice([0, 0, 0, 1, 2, 12]) if len(asked) < requests else 0):
            start = rng.choice(starts)[: rng.randrange(50)] if rng.random() < 0.6 else []
            prompt = start + [rng.randrange(100) for _ in range(rng.randrange(1, 60))]
            params = SamplingParams(
                temperature=rng.choice([0, 0, 0.7, 1.5]),
                top_p=rng.choice([1, 0.9]),
                top_k=rng.choice([0, 5]),
                min_p=rng.choice([0, 0.05]),
                repetition_penalty=rng.choice([1, 1, 1.3]),
                max_tokens=rng.randrange(1, 50),
                seed=rng.randrange(1000),
                stop_ids=tuple(rng.sample(range(100), rng.choice([0, 0, 3]))),
                logprobs=rng.random() < 0.2,
            )
            asked.append((prompt, params, *engine.add(prompt, params)))
        if asked and rng.random() < 0.1:
            victim = rng.choice(asked[-20:])[2]
            cancelled += victim.finish_reason is None and (
                victim in engine.scheduler.waiting or victim in engine.scheduler.running
            )
            engine.cancel([victim])
        engine.step()
    everything_given_back(engine)
    assert cancelled > requests / 50
    answered = 0
    for prompt, params, sequence in asked:
        if sequence.finish_reason:
            answered += 1
            done = alone(model, prompt, params)
            assert (sequence.generated, sequence.finish_reason) == (done.ids, done.finish_reason)
            if params.logprobs:
                assert sequence.logprobs == pytest.approx(done.logprobs, abs=1e-3)
    assert answered + cancelled == len(asked) >= requests


def test_soak_short():
    """150 random requests: all answered as they are alone, no page leaked."""
    soak(150, 0)


@pytest.mark.slow
def test_soak():
    """2,000 random requests: all answered as they are alone, no page leaked."""
    soak(2000, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_the_packed_twin(family, dtype):
    """It gives the model's logits, each row's the same bits among any number of rows, and leaves the model as it was."""
    model = random_model(
        random_config(5, family, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    )
    model = model.to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine, prompt = Engine(model), random_prompts(model, 0, [33])[0]
    assert engine.model is not model and model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    logits, run = [], engine.run
    engine.run = lambda batch: logits.append(run(batch)) or logits[-1]
    engine.generate([prompt], greedy(1))
    expected = model(torch.tensor([prompt]))[0, -1].float()
    assert (logits[0][0].float() - expected).abs().max() < (
        1e-4 if dtype == torch.float32 else 0.1
    ) * expected.std()
    layers = engine.model.model["layers"][0].self_attn.qkv, engine.model.packed_head
    if dtype == torch.float32 and not layers[0].blocked:
        pytest.skip("without oneDNN a row's bits depend on the number of rows")
    for n in (1, 2, 5, 16, 17):
        rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(n)).to(dtype)
        for layer in layers:
            assert torch.equal(layer(rows[:n]), layer(rows)[:n])


def test_a_model_that_is_consumed():
    """Its weights are let go as they are packed, and the text is the same."""
    for seed, family in enumerate(["llama", "llama", "mixtral", "qwen2"]):
        model, prompt = random_model(random_config(seed, family)), [3, 1, 4]
        expected = alone(copy.deepcopy(model), prompt, greedy(20)).ids
        assert alone(model, prompt, greedy(20), consume=True).ids == expected
        assert not list(model.parameters())


def forced_onto_tables(engine):
    """The engine as it attends on a GPU, by block tables."""
    engine.use_tables = True
    return engine


@pytest.mark.parametrize("seed", range(4))
def test_tables_of_blocks_through_all_that_happens(seed):
    """As on a GPU: chunks, prefixes found again, pages that run out, windows; with every index where the model is."""
    own = {"sliding_window": 9} if seed & 1 else {}
    model = random_model(random_config(seed, "mistral" if seed & 1 else "llama", **own))
    batch = random_prompts(model, seed, [1, 40, 2, 23, 7, 33])
    batch += [batch[1] + [1, 2], batch[1][:19] + [5] * 9]
    expected = [alone(model, prompt, greedy(25)).ids for prompt in batch]
    scores = Engine(model).score(batch, expected)
    engine = bounded(
        forced_onto_tables(Engine(model, page_size=4, cache_tokens=120, max_step_tokens=8)), 2000
    )
    for _ in range(2):
        assert [c.ids for c in engine.generate(batch, greedy(25))] == expected
        assert engine.score(batch, expected) == pytest.approx(scores, abs=1e-3)
    everything_given_back(engine)


@pytest.mark.parametrize("window", [2, 3, 16])
def test_windows_over_pages(window, tmp_path):
    """A window that ends within a page, at its border, or before the last key: as transformers, from the cache as well."""
    model = random_model(random_config(3, "mistral", sliding_window=window))
    checkpoint.save_model(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs.generation_config.eos_token_id = None
    engine, prompt = Engine(model, page_size=4, max_step_tokens=7), random_prompts(model, 0, [21])[0]
    for _ in range(3):
        ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=11, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        assert engine.generate([prompt], greedy(11))[0].ids == ids
        prompt = prompt + ids
    assert engine.stats["reused"] == 31 + 42


# ---- where a text ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 10, 500])
def test_the_context_is_a_limit_too(max_tokens):
    """A text ends at max_tokens or where the context ends, whichever comes first."""
    model = random_model(random_config(0, max_position_embeddings=50))
    for length in (1, 45, 49):
        done = alone(model, random_prompts(model, 0, [length])[0], greedy(max_tokens))
        assert (len(done.ids), done.finish_reason) == (min(max_tokens, 50 - length), "length")


def test_stop_ids_end_a_text(chatter):
    """The text ends before the first of the tokenizer's stop ids, wherever it comes, as transformers ends it."""
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
    """Of two that become whole with the same token, the one that begins first ends the text, however they are ordered."""
    ids = stage_tokenizer.encode("A ferry")
    model = parrot(ids, stage_tokenizer.vocab_size)
    for stop in (("rry", "fer"), ("fer", "rry")):
        assert alone(model, ids[:1], greedy(len(ids) - 1, stop=stop), tokenizer=stage_tokenizer).text == " "


def test_a_stop_string_at_the_very_end(chatter):
    """One that is whole with the last token allowed ends the text as `stop`; one that is not yet whole leaves it be."""
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


# ---- streaming ----------------------------------------------------------------------------------------------------------


def collect(stream):
    """(pieces, completion) of a stream."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


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
    """Work on the same engine between two pieces takes nothing from a stream, though it may end in the meantime."""
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


def test_pages_lost_to_an_interrupt_come_back(chatter):
    """Ctrl-C may come while pages change hands; once nothing is in flight, none is held."""
    model, tokenizer, prompt, _ = chatter
    engine = Engine(model, tokenizer, cache_tokens=64, page_size=4)
    engine.scheduler.blocks.hold([3, 5])
    for _ in range(2):
        assert engine.generate([prompt], greedy(20))[0].ids == alone(model, prompt, greedy(20)).ids
        assert not engine.scheduler.blocks.ref_counts


def test_rooms_for_nothing_are_refused():
    """An engine that could never run a sequence says so, and does not wait for ever."""
    model = random_model(random_config(0))
    for options in ({"max_batch": 0}, {"max_step_tokens": 0}, {"cache_tokens": 8}, {"page_size": 0}):
        with pytest.raises(UsageError, match="at least"):
            Engine(model, **options)


# ---- sampling -----------------------------------------------------------------------------------------------------------


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
    """Frequencies over many seeds fit, by chi-square, the distribution transformers' own processors leave; nothing outside."""
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
    """min_p leaves the tokens that transformers' leaves; greedy text under a repetition penalty is its `generate`'s."""
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


def logprobs_of(model, prompt, ids):
    """By one uncached pass: the log-probability of each of ids."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def test_logprobs_are_the_models():
    """Whatever temperature, filters and penalty chose the tokens; `score` gives the same for given ones, also in parts."""
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


# ---- choices and JSON ---------------------------------------------------------------------------------------------------

NAMES = ["Hanne", "Hanne Brod", "Jory", "<END CHAT>", "Environment"]


@pytest.mark.parametrize("length", [9, 16, 70])
def test_choices_read_the_prompt_once(chatter, length):
    """The first choice reads it, the others find it in the cache and run their own tokens only; so does `score`."""
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
    """Two that a tokenizer normalises to the same are as likely as each other, and nothing of them stays in line."""
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
    """Probabilities are those of an uncached pass over each choice's tokens, the end of the turn included where another goes
    on from it; greedy takes the likeliest, draws follow them."""
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
    """Whatever a random model would say, at any length and temperature, alone or among others that are free."""
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
    """Any tokens that are allowed, one after the other, within any budget, end on a document of the schema."""
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


def test_a_prompt_that_never_fits():
    """It is refused with its size and the limit, at once, and the engine goes on."""
    model = random_model(random_config(0))
    engine = Engine(model, cache_tokens=32, page_size=4)
    with pytest.raises(UsageError, match=r"40 tokens.* 31"):
        engine.generate([[1] * 40], greedy(1))
    done = engine.generate([[1] * 31], greedy(9))[0]
    assert (len(done.ids), done.finish_reason) == (1, "length")
    everything_given_back(engine)


def test_cancelling_gives_pages_back(chatter):
    """At once: a stream that is left, and a `generate` that Ctrl-C ends."""
    model, tokenizer, prompt, _ = chatter
    engine = Engine(model, tokenizer)
    stream = engine.stream(prompt, greedy(60))
    next(stream)
    assert engine.scheduler.blocks.ref_counts
    stream.close()
    everything_given_back(engine)
    run, calls = engine.run, iter(range(100))

    def interrupted(*args):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return run(*args)

    engine.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.generate([prompt, prompt[1:]], greedy(60))
    everything_given_back(engine)
    assert engine.generate([prompt], greedy(9))[0].ids == alone(model, prompt, greedy(9)).ids


def test_a_prompt_that_fills_the_cache():
    """Its one token is sampled, alone and with others in line, whatever its pages held before."""
    model = random_model(random_config(2))
    full, *others = random_prompts(model, 0, [31, 3, 9])
    engine = bounded(Engine(model, cache_tokens=32, page_size=4), 200)
    for _ in range(3):
        done = engine.generate([others[0], full, others[1]], greedy(6))
        assert [len(c.ids) for c in done] == [6, 1, 6] and done[1].finish_reason == "length"
        assert [c.ids for c in done] == [
            alone(model, p, greedy(6), cache_tokens=32).ids for p in (others[0], full, others[1])
        ]
    everything_given_back(engine)


def test_cancelling_a_prompt_half_read():
    """Its pages come back, what was read of it is found again, and its neighbours go on."""
    model = random_model(random_config(2))
    long, other = random_prompts(model, 0, [50, 5])
    engine = Engine(model, page_size=4, max_step_tokens=10)
    [beside], [victim] = engine.add(other, greedy(20)), engine.add(long, greedy(5))
    engine.step()
    engine.step()
    assert 0 < victim.cached < len(long)
    read = victim.cached
    engine.cancel([victim])
    while beside.finish_reason is None:
        engine.step()
    assert beside.generated == alone(model, other, greedy(20)).ids
    everything_given_back(engine)
    done = engine.generate([long], greedy(5))[0]
    assert done.cached_tokens == read and done.ids == alone(model, long, greedy(5)).ids


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
    """A model with more rows than the tokenizer has tokens (a padded vocabulary) never says one that cannot be read."""
    model = random_model(random_config(0, vocab_size=4 * stage_tokenizer.vocab_size, hidden_size=24))
    done = Engine(model, stage_tokenizer).generate(
        [[5, 6], [7]], [greedy(20), SamplingParams(max_tokens=20, seed=0)]
    )
    assert all(max(c.ids) < stage_tokenizer.vocab_size for c in done)


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "0 tokens"), ([1] * 256, "256 tokens"), ([1, -1], "-1"), ([1, 5000], "5000")],
    ids=["empty", "too long", "negative", "unknown"],
)
def test_bad_prompts_are_refused(prompt, words):
    """An empty, too long or impossible prompt is refused with its number, and leaves nothing behind in the engine."""
    model = random_model(random_config(0))
    engine = Engine(model)
    with pytest.raises(UsageError, match=words):
        engine.generate([[1, 2, 3], prompt], greedy(5))
    assert engine.generate([[4, 5]], greedy(5))[0].ids == alone(model, [4, 5], greedy(5)).ids
    assert engine.stats["prefilled"] == 2  # the good prompt beside the bad one was not run


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


# ---- the script ---------------------------------------------------------------------------------------------------------


def expected_reply(engine, messages, max_tokens, opening=""):
    ids, _ = engine.tokenizer.render(messages, add_generation_prompt=True)
    return engine.generate([ids + engine.tokenizer.encode(opening)], greedy(max_tokens))[0]


def test_prompt(script, tiny_actor, stage_tokenizer):
    """--prompt prints the prompt and what follows it, and repeats itself with a seed."""
    prompt = "The ferry [at last] left now\n\nand (then)"
    options = ["--model", tiny_actor, "--max-tokens", 30, "--dtype", "float32"]
    code, out, err = script("generate", "--prompt", prompt, "--temperature", 0, *options)
    ids = [stage_tokenizer.bos_id, *stage_tokenizer.encode(prompt)]
    text = alone(checkpoint.load_model(tiny_actor), ids, greedy(30), tokenizer=stage_tokenizer).text
    assert (code, err) == (0, "") and out == prompt + plain(text) + "\n"
    seeded = [script("generate", "--prompt", "x", "--seed", seed, *options) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]


@pytest.mark.parametrize(
    ("prompt", "printed"),
    [
        ("[bold]now[/] [link=x]", "[bold]now[/] [link=x]"),
        ("I :heart: it: (c) ->", "I :heart: it: (c) ->"),
        ("a\tb", "a\tb"),
        (" one " * 40, " one " * 40),
        ("red \x1b[31m, \x07\rback, \u202eturned", "red \ufffd[31m, \ufffd\ufffdback, \ufffdturned"),
        ("10\u00a0km \u300c\u3000\u65e5\u300d \u0645\u06cc\u200c \U0001f469\u200d\U0001f467",) * 2,
    ],
    ids=["markup", "emoji", "tab", "long", "controls", "spaces and joiners"],
)
def test_text_is_printed_as_it_is(prompt, printed, script, tiny_actor):
    """Nothing in a text is taken for markup, nothing is wrapped or spelt anew, and only control characters are replaced."""
    _, out, _ = script("generate", "--model", tiny_actor, "--prompt", prompt, "--max-tokens", 1)
    assert out.startswith(printed)


def test_prompt_from_stdin(script, tiny_actor, monkeypatch):
    """`--prompt -` reads the text from stdin."""
    options = ["--model", tiny_actor, "--max-tokens", 5, "--temperature", 0]
    given = script("generate", "--prompt", "Two\nlines", *options)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Two\nlines"))
    assert script("generate", "--prompt", "-", *options) == given


def test_stop_option(script, tiny_actor):
    """--stop ends the text; an empty string among them is not one."""
    options = ["--model", tiny_actor, "--max-tokens", 30, "--temperature", 0, "--prompt", "Go"]
    _, whole, _ = script("generate", *options)
    stop = whole[12:14]
    cut = whole[: whole.find(stop, 2)] + "\n"
    assert script("generate", *options, "--stop", "", stop)[1] == cut
    assert script("generate", *options, "--stop", stop, "--stop", "never said")[1] == cut


def test_chat_through_a_pipe(tiny_actor):
    """A line in, a reply out, each knowing what was said before; an empty line ends it. As a process of its own."""
    command = [
        sys.executable,
        "generate.py",
        "--model",
        tiny_actor,
        "--chat",
        "--temperature",
        "0",
        "--max-tokens",
        "12",
    ]
    command += ["--dtype", "float32"]
    done = subprocess.run(
        command, input="Good day\n Who are you? \n\nnot read\n", capture_output=True, text=True, cwd=ROOT
    )
    engine, messages, expected = load_engine(tiny_actor, "float32"), [], ""
    for line in ("Good day", "Who are you?"):
        messages.append({"role": "user", "content": line})
        ids = expected_reply(engine, messages, 12).ids
        messages.append({"role": "assistant", "content": "", "ids": ids})
        expected += plain(engine.tokenizer.decode(ids)) + "\n"
    assert (done.returncode, done.stderr, done.stdout) == (0, "", expected)


def test_commands_of_a_chat(script, tiny_actor, monkeypatch):
    """/system and /retry change what the next answer is made from, /help and mistakes answer on stderr, --stats counts."""
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("/retry\n/help\n/fly\n/system Be brief.\nGood day\n/retry\nAnd?\n")
    )
    options = ["--model", tiny_actor, "--max-tokens", 12, "--dtype", "float32", "--seed", 3, "--stats"]
    code, out, err = script("generate", "--chat", *options)
    engine, expected = load_engine(tiny_actor, "float32"), []
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Good day"}]

    def reply(seed):
        params = SamplingParams(0.8, max_tokens=12, seed=seed)
        return engine.generate([engine.tokenizer.render(messages, add_generation_prompt=True)[0]], params)[0]

    expected += [reply(3), reply(4)]
    messages += [
        {"role": "assistant", "content": "", "ids": expected[-1].ids},
        {"role": "user", "content": "And?"},
    ]
    expected.append(reply(4))
    assert code == 0 and out == "".join(plain(done.text) + "\n" for done in expected)
    known = expected[1].prompt_tokens + len(expected[1].ids) - (expected[1].finish_reason == "length")
    assert (
        f"; {known} of {expected[2].prompt_tokens} prompt tokens cached" in err
    )  # its own answer is not read again
    assert "/retry  " in err and "/fly" in err and "nothing has been said" in err and "Be brief." in err
    assert len(re.findall(r"tokens/s in float32.*cached", err)) == 3


def test_ctrl_c_ends_an_answer_and_not_the_chat(script, tiny_actor, monkeypatch):
    """What was said by then stays in the history, and the next line is answered."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Good day\nAnd?\n"))
    step, calls = Engine.step, iter(range(100))

    def interrupted(self):
        if next(calls) == 7:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    options = ["--model", tiny_actor, "--max-tokens", 12, "--temperature", 0, "--dtype", "float32"]
    code, out, _ = script("generate", "--chat", *options)
    monkeypatch.undo()
    engine = load_engine(tiny_actor, "float32")
    messages = [{"role": "user", "content": "Good day"}]
    first = expected_reply(engine, messages, 7).text
    messages += [
        {"role": "assistant", "content": first.rstrip("\ufffd")},
        {"role": "user", "content": "And?"},
    ]
    assert (
        code == 0
        and out == plain(messages[1]["content"] + "\n" + expected_reply(engine, messages, 12).text) + "\n"
    )


def test_ctrl_c_ends_a_completion_with_130(script, tiny_actor, monkeypatch):
    """Where there is no chat to go on with."""

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupted)
    assert script("generate", "--model", tiny_actor, "--prompt", "Good day")[0] == 130


def test_a_line_too_long_for_the_model_does_not_end_the_chat(script, tiny_actor, monkeypatch):
    """It is refused with its size, and what was said before stays."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Good day\n" + "word " * 9000 + "\nAnd?\n"))
    options = ["--model", tiny_actor, "--temperature", 0, "--max-tokens", 5, "--dtype", "float32"]
    code, out, err = script("generate", "--chat", *options)
    assert code == 0 and len(out.splitlines()) == 2 and "the model takes" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("Good day\nAnd?\n"))
    assert script("generate", "--chat", *options)[1] == out


def test_meeting_a_character(script, tiny_actor, monkeypatch):
    """--character plays one of the cast, told what actors are told, hearing the visitor as anyone, beginning with the name."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Good day\nA long way?\n"))
    options = ["--model", tiny_actor, "--temperature", 0, "--max-tokens", 12, "--dtype", "float32"]
    code, out, err = script(
        "generate", "--chat", "--character", "hanne", "--scene", "the-last-ferry/3", *options
    )
    scene, name = find_character("Hanne Brod", "the-last-ferry/3")
    assert code == 0 and name in err and scene.scenario[:40] in " ".join(err.split())
    engine, dialogue, expected = load_engine(tiny_actor, "float32"), [], ""
    system = {"role": "system", "content": system_prompt(scene, name, prompts.AT_PLAY, concise=True)}
    spoken = []
    for line in ("Good day", "A long way?"):
        dialogue.append({"character": "Visitor", "message": line})
        turns = perspective(dialogue, name)
        for turn, ids in zip(turns[1::2], spoken, strict=True):
            assert turn["content"].endswith("\n\n")
            turn["ids"] = engine.tokenizer.encode(f"{name}:") + ids + engine.tokenizer.encode("\n\n")
        done = expected_reply(engine, [system, *turns], 12, opening=f"{name}:")
        dialogue.append({"character": name, "message": done.text.strip()})
        spoken.append(done.ids)
        expected += f"{name}:{plain(done.text)}\n"
    assert out == expected


def test_characters_are_found_by_how_they_begin(stage):
    """Each of the cast by the full name in any case, and by the beginning of any word of it, in a scene they are in."""
    cast = {name for scene in stage.values() for name in scene.major_characters}
    assert len(cast) > 20
    for name in cast:
        for form in (name, name.upper(), name.lower()):
            scene, found = find_character(form)
            assert found == name and name in scene.major_characters
        for word in name.split():
            _, found = find_character(word[:3])
            assert any(part.lower().startswith(word[:3].lower()) for part in found.split())
    assert find_character("brod", "the-last-ferry/2")[1] == "Jory Brod"
    assert find_character("hanne b")[1] == "Hanne Brod"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "--prompt"),
        (["--prompt", "x", "--chat"], "--prompt"),
        (["--prompt", "x", "--character", "hanne"], "--character"),
        (["--chat", "--scene", "the-last-ferry/1"], "--scene"),
        (["--chat", "--character", "Godot"], "Hanne Brod"),
        (["--chat", "--character", "brod", "--scene", "the-last-ferry/99"], "the-last-ferry/1"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--top-p", "0"], "top_p"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens"),
        (["--prompt", "x", "--max-tokens", "many"], "many"),
        (["--prompt", "x", "--seed", "1" + "0" * 30], "seed"),
        (["--prompt", "x", "--dtype", "int4"], "int4"),
        (["--prompt", "word " * 9000], "8191"),
        (["--prompt", "torn \udcff"], "UTF-8"),
        (["--prompts", "x"], "--prompts"),
        (["--prompt", "x", "--model", "no/such/model"], "no/such/model"),
    ],
    ids=lambda value: (
        " ".join(value)[:40].encode("ascii", "replace").decode() if isinstance(value, list) else None
    ),
)
def test_bad_input_is_one_line(options, word, script, tiny_actor):
    """Each mistake is told in one line that names it, with exit code 2 and nothing on stdout but the prompt."""
    result = script("generate", "--model", tiny_actor, *options)
    assert word in usage_error(result)
    assert result[1] == "" or result[1].strip() == options[1].strip()


@pytest.mark.parametrize("option", [["--prompt", "-"], ["--chat"]])
def test_stdin_that_is_no_text(option, script, tiny_actor, monkeypatch):
    """Bytes that are not UTF-8 on stdin are a mistake like any other."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    assert "UTF-8" in usage_error(script("generate", "--model", tiny_actor, *option))


def test_a_model_without_its_tokenizer(script, tmp_path):
    """A checkpoint without a tokenizer.model says so."""
    checkpoint.save_model(random_model(random_config(0)), tmp_path / "model")
    assert "tokenizer.model" in usage_error(
        script("generate", "--model", tmp_path / "model", "--prompt", "x")
    )


@pytest.mark.parametrize("length", [1, 2, 9, 40])
def test_no_part_of_a_stop_string_is_streamed(chatter, length):
    """However long the stop string, pieces joined are the text of `generate`."""
    model, tokenizer, prompt, _ = chatter
    whole = Engine(model, tokenizer).generate([prompt], greedy(40))[0].text
    for begin in (0, 3):
        params = greedy(40, stop=(whole[begin : begin + length],))
        expected = Engine(model, tokenizer).generate([prompt], params)[0].text
        assert "".join(Engine(model, tokenizer).stream(prompt, params)) == expected
