"""A simulation: scenes side by side in our engine, against one after the other, as in the paper's code."""

import gc
import time
from concurrent.futures import Future
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch

from bench.models import SHAPES, LlamaCpp, in_transformers, open_model, ours_in
from data.scenes import load_scenes, load_stage
from engine.engine import Engine
from llm.local import BUNDLED_ACTOR, Local
from llm.reply import Reply
from play.perform import perform
from play.protocol import Protocol


class Peer:
    """A model object for `perform`: another program, one chat at a time, on the token ids `ours` would use.

    generate(prompt ids, maximum of new tokens) -> (new ids, number of cached prompt tokens).
    """

    local, name, identity = True, "peer", "peer"

    def __init__(self, ours, generate):
        self.ours, self.generate, self.calls = ours, generate, []
        self.stops = [*ours.tokenizer.stop_ids, *ours.markers]

    def submit(self, messages, params, opening=""):
        self.calls.append((Future(), messages, params, opening))
        return self.calls[-1][0]

    def step(self):
        if not self.calls:
            return
        future, messages, params, opening = self.calls.pop(0)
        prompt, own = self.ours.prompt(messages, opening)
        ids, cached = self.generate(prompt, params.max_tokens)
        end = "length" if len(ids) == params.max_tokens and ids[-1] not in self.stops else "stop"
        ids = ids[:-1] if ids and ids[-1] in self.stops else ids
        text = self.ours.tokenizer.decode(ids)
        future.set_result(Reply(text, end, len(prompt), len(ids), cached, ids, own_tokens=own))


def with_transformers(ours, model):
    """transformers' own `generate`, which prefills the whole history at each call."""
    with TemporaryDirectory() as directory:
        peer = in_transformers(model, f"{directory}/model", ours.tokenizer)

    @torch.inference_mode()
    def generate(ids, new):
        tokens, stops = torch.tensor([ids], device=peer.device), [*ours.tokenizer.stop_ids, *ours.markers]
        ends = dict(eos_token_id=stops, pad_token_id=stops[0], attention_mask=torch.ones_like(tokens))
        return peer.generate(tokens, max_new_tokens=new, do_sample=False, **ends)[0, len(ids) :].tolist(), 0

    return Peer(ours, generate)


def with_llama_cpp(ours, args, context):
    """llama.cpp's server with its prompt cache: eight slots, for the agents of a scene."""
    server = LlamaCpp(args, 8, context)

    def generate(ids, new):
        [answer] = server.complete([ids], new)
        return answer["tokens"], answer["timings"]["cache_n"]

    return Peer(ours, generate)


def choose_scenes(args):
    """--scenes of --data or of the bundled ones; beyond their number copies, in books of other titles."""
    scenes = list(load_scenes(args.data) if args.data else load_stage().values())
    while len(scenes) < args.scenes:  # the title stands early in a prompt, so that copies share no cache
        scenes += [replace(scene, book=f"{scene.book} {len(scenes)}") for scene in scenes]
    return scenes[: args.scenes]


def measure(args):
    """Tokens decoded a second by each side, greedily; the warm-up is two rounds of one scene.

    `same text`: the share of a side's finished scenes with the same text as ours, 1 with the same weights in
    the same dtype. A round that Ctrl-C stopped is reported as far as it got.
    """
    args.model = args.model or ("8b" if args.device == "cuda" else str(BUNDLED_ACTOR))
    random = args.model in SHAPES
    local = Local(BUNDLED_ACTOR if random else args.model)
    dtype, context = local.engine.kv.dtype, min(local.engine.max_sequence_tokens, 8192)

    def ours(model=None):
        """`local` with an empty cache. The old engine is freed first: its cache takes most of a GPU."""
        local.engine = None
        gc.collect()
        torch.cuda.empty_cache()
        local.engine = model and Engine(model, local.tokenizer)
        return local

    ours()
    model = open_model(args, dtype)  # of the peer, in float32 beside ours in int8
    head = model.lm_head if hasattr(model, "lm_head") else model.model["embed_tokens"]
    head.weight.data[local.tokenizer.vocab_size :] = 0  # ids beyond the tokenizer's are never sampled
    own, scenes = ours_in(model, args.dtype), choose_scenes(args)
    few = scenes[: args.peer_scenes]
    protocol = Protocol(max_rounds=args.max_rounds, retry_temperature=0.0)
    protocol = replace(protocol, max_tokens=args.turn or (60 if random else 512))
    sides = {"ours": (lambda: ours(own), scenes, len(scenes))}
    if args.peer == "transformers":
        peer = with_transformers(local, model)
        sides["transformers, one by one"] = lambda: peer, few, 1
    elif args.peer:  # a new server each time, with an empty cache
        sides["llama.cpp, one by one"] = lambda: with_llama_cpp(local, args, context), few, 1
    else:
        sides["ours, one by one"] = lambda: ours(own), few, 1
    for number in range(args.rounds + 1):
        rules, texts = protocol if number else replace(protocol, max_rounds=2), {}
        for side, (open_side, chosen, together) in sides.items():
            chosen = chosen if number else chosen[:1]
            figures, texts[side], stopped = play_all(open_side(), chosen, rules, together)
            same = sum(text == texts["ours"].get(key) for key, text in texts[side].items())
            yield number, {"side": side}, figures | {"same text": same / max(1, len(texts[side]))}
            if stopped:
                raise stopped


def play_all(model, scenes, protocol, side_by_side):
    """(figures, {scene key: messages} of the scenes that ended, KeyboardInterrupt if one stopped it)."""
    ended, replies, stopped = {}, [], None
    models = dict.fromkeys(("actor", "environment", "next_speaker"), model)
    handlers = dict(on_end=lambda scene, *end: ended.update({scene.key: end}), on_reply=replies.append)
    start = time.perf_counter()
    try:
        perform(scenes, models, protocol, side_by_side=side_by_side, **handlers)
    except KeyboardInterrupt as error:
        stopped = error
    took, spoken = time.perf_counter() - start, sum(reply.completion_tokens for reply in replies)
    figures = {"tok/s": spoken / took, "seconds": took, "spoken": spoken, "scenes": len(ended)}
    for name, key in (("read", "prefilled"), ("least to read", "least")):
        figures[name] = sum(stats[key] for _, stats, _ in ended.values())
    return figures, {key: messages for key, (messages, *_) in ended.items()}, stopped
