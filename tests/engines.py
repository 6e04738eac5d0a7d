"""What tests of the engine share: requests, random prompts, and checks of its state."""

import random

import numpy as np
import torch
from conftest import random_config

import checkpoint
from generate import Engine, SamplingParams


def greedy(max_tokens, **kwargs):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **kwargs)


def alone(model, prompt, params, **kwargs):
    """The completion of one prompt by an engine that has seen nothing else."""
    return Engine(model, **kwargs).generate([prompt], params)[0]


def random_prompts(model, seed, lengths):
    rng = random.Random(seed)
    return [[rng.randrange(model.config.vocab_size) for _ in range(n)] for n in lengths]


def parrot(ids, vocab_size, size=64):
    """A model that says ids (each only once among them) one after the other, greedily, once it is given the
    first."""
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


def scattered(blocks, n, rng):
    """Blank pages anywhere."""
    pages = rng.sample(np.flatnonzero(blocks.blank).tolist(), n)
    blocks.hold(pages)
    return pages


def bounded(engine, steps):
    """The engine, which fails where it takes more steps than that: what is lost or waits for ever should not
    hang a test."""
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


def forced_onto_tables(engine):
    """The engine as it attends on a GPU, by block tables."""
    engine.use_tables = True
    return engine


def collect(stream):
    """(pieces, completion) of a stream."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def logprobs_of(model, prompt, ids):
    """By one uncached pass: the log-probability of each of ids."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
