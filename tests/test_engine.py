"""The engine: greedy as in transformers, the same alone or in any company; its pages, limits and
interrupts."""

import gc
import os
import random
import weakref

import pytest
import torch
from conftest import random_config, random_model
from engines import (
    alone,
    bounded,
    everything_given_back,
    forced_onto_tables,
    greedy,
    random_prompts,
    scattered,
)
from transformers import (
    AutoModelForCausalLM,
)
from transformers.utils import logging

import checkpoint
import kernels
from common.files import UsageError
from engine.pages import contiguous
from engine.params import RequestRefused
from engine.sequence import Sequence
from generate import Engine, SamplingParams
from llm import open_model
from model import RopeScaling

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}, "text": {"type": "string"}}}

logging.disable_progress_bar()


@pytest.mark.parametrize("seed", range(5))
def test_greedy_equals_transformers(seed, tmp_path):
    """64 greedy tokens are those of transformers' generate, with grouped heads and scaled rope among the
    configurations."""
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
    """However many run at once and whatever they wait for, each prompt gets its own tokens, in the order
    given."""
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
    """Prompts that begin like something the engine has run take over its cache: the same tokens, and
    `cached_tokens` counts."""
    model = random_model(random_config(seed))
    engine, (first, other) = Engine(model), random_prompts(model, seed, [30, 12])
    said = engine.generate([first], greedy(20))[0].ids
    # a prompt, and how much of it the cache holds: not the last token said, nor the last of a prompt
    history = [
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
    """Two prompts with the same beginning both take it over, at the same time, and neither disturbs the
    other."""
    model = random_model(random_config(2))
    engine, (start, a, b) = Engine(model), random_prompts(model, 0, [20, 3, 4])
    engine.generate([start], greedy(1))
    done = engine.generate([start + a, start + b], greedy(20))
    assert [c.cached_tokens for c in done] == [20, 20]
    assert [c.ids for c in done] == [alone(model, start + x, greedy(20)).ids for x in (a, b)]


def test_the_same_prompt_is_read_once():
    """Of prompts with the same beginning that come together one is run, and the others wait for its full
    pages."""
    model = random_model(random_config(2))
    engine, (start, *ends) = Engine(model), random_prompts(model, 0, [70, 3, 4, 5])
    batch = [start + end for end in ends]
    done = engine.generate(batch, greedy(10))
    assert [c.cached_tokens for c in done] == [0, 64, 64] and engine.stats["prefilled"] == 73 + 10 + 11
    assert [c.ids for c in done] == [alone(model, prompt, greedy(10)).ids for prompt in batch]


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_chat_that_grows_is_never_read_twice(page_size):
    """Each turn runs only what is new and the one token whose keys were never computed, whatever the pages'
    borders."""
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
    """Chats that take turns keep their pages in a row as they grow, so that their keys need not be
    gathered."""
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


@pytest.mark.parametrize("seed", range(5))
def test_tables_of_blocks_and_views_agree(seed):
    """The kernels' decode attention, which a GPU uses, gives the tokens that views of pages give; scattered
    pages as well, also with a single layer."""
    family = "mistral" if seed & 1 else "llama"
    changes = {"sliding_window": 7} if seed & 1 else {"num_hidden_layers": 1} if seed == 4 else {}
    model = random_model(random_config(seed, family, **changes))
    batch = random_prompts(model, seed, [1, 40, 2, 23, 7])
    expected = [alone(model, prompt, greedy(30)).ids for prompt in batch]
    engine = Engine(model, page_size=4)
    engine.use_tables = True
    assert [c.ids for c in engine.generate(batch, greedy(30))] == expected
    engine = Engine(model, page_size=4, cache_tokens=1000)
    rng = random.Random(seed)
    engine.scheduler.blocks.allocate = lambda n, *_: scattered(engine.scheduler.blocks, n, rng)
    assert [c.ids for c in engine.generate(batch, greedy(30))] == expected


@pytest.mark.parametrize("chunk", [5, 4096])
def test_pages_run_out(chunk):
    """With room for little more than one sequence the youngest are computed again later: none is lost, none
    differs."""
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


@pytest.mark.parametrize("seed", range(4))
def test_tables_of_blocks_through_all_that_happens(seed):
    """As on a GPU: chunks, prefixes found again, pages that run out, windows; with every index where the
    model is."""
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


@pytest.mark.parametrize("window", [None, 9])
def test_paged_prefill_in_triton(window):
    """Whole prompts, chunks and cached prefixes through the Triton kernel and block tables: the tokens that
    views give, and nothing of what other pages hold."""
    own = {
        "sliding_window": window,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model = random_model(random_config(3, "mistral", **own))
    batch = random_prompts(model, 3, [1, 23, 38])
    batch.append(batch[1][:17] + [5] * 4)
    expected = [alone(model, prompt, greedy(2)).ids for prompt in batch]
    engine = forced_onto_tables(Engine(model, page_size=4, cache_tokens=200, max_step_tokens=30))
    engine.kv.fill_(torch.nan)
    kernels.use("triton")
    try:
        assert [c.ids for c in engine.generate(batch, greedy(2))] == expected
        assert engine.generate(batch[3:], greedy(2))[0].ids == expected[3]
    finally:
        kernels.use(None)


@pytest.mark.parametrize("window", [2, 3, 16])
def test_windows_over_pages(window, tmp_path):
    """A window that ends within a page, at its border, or before the last key: as transformers, from the
    cache as well."""
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


def test_a_prompt_that_never_fits():
    """It is refused with its size and the limit, at once, and the engine goes on."""
    model = random_model(random_config(0))
    engine = Engine(model, cache_tokens=32, page_size=4)
    with pytest.raises(UsageError, match=r"40 tokens.* 31"):
        engine.generate([[1] * 40], greedy(1))
    done = engine.generate([[1] * 31], greedy(9))[0]
    assert (len(done.ids), done.finish_reason) == (1, "length")
    everything_given_back(engine)


def test_a_refused_request_leaves_the_others_alone(chatter):
    """A prompt or a schema that cannot fit is refused by `add`, for that request only."""
    model, tokenizer, prompt, ids = chatter
    engine = Engine(model, tokenizer, cache_tokens=256)
    request = engine.add(prompt, greedy(20))
    engine.step()
    for bad, params in (([1] * 500, greedy(5)), (prompt, greedy(3, json_schema=SCHEMA)), ([], greedy(5))):
        with pytest.raises(RequestRefused):
            engine.add(bad, params)
    while not (done := engine.completion(request)):
        engine.step()
    assert done.ids == ids[:20]
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
    ("prompt", "words"),
    [([], "0 tokens"), ([1] * 256, "256 tokens"), ([1, -1], "-1"), ([1, 5000], "5000")],
    ids=["empty", "too long", "negative", "unknown"],
)
def test_bad_prompts_are_refused(prompt, words):
    """An empty, too long or impossible prompt is refused with its number, and leaves nothing behind in the
    engine."""
    model = random_model(random_config(0))
    engine = Engine(model)
    with pytest.raises(UsageError, match=words):
        engine.generate([[1, 2, 3], prompt], greedy(5))
    assert engine.generate([[4, 5]], greedy(5))[0].ids == alone(model, [4, 5], greedy(5)).ids
    assert engine.stats["prefilled"] == 2  # the good prompt beside the bad one was not run


def test_a_draw_is_below_one(monkeypatch):
    """Also with the largest digest, whose 56 bits are more than a float has."""

    class Largest:
        def digest(self):
            return b"\xff" * 7

    monkeypatch.setattr("engine.sequence.hashlib.blake2b", lambda *_, **__: Largest())
    assert 0.999 < Sequence([1], SamplingParams(), 1, 2, 0).uniform(0) < 1
