"""A checkpoint on this machine as a chat model."""

import functools
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint import DTYPES, find_model, load_config, load_model
from checkpoint.adapters import base_directory, is_adapter, tokenizer_directory
from common import files, terminal
from common.files import MANIFEST, ROOT, UsageError
from common.gguf import parts_of
from engine.engine import Engine
from engine.params import RequestRefused, SamplingParams
from llm.reply import REASONING_TOKENS, TAG, Reply, needs_room, open_tag, split_reasoning, spoken_so_far
from tokenizer import load_tokenizer

BUNDLED_ACTOR = ROOT / "data" / "stage" / "actor"


def load_engine(spec, dtype=None, chat_format=None):
    """An Engine for a checkpoint directory or Hub id: on the GPU in bf16 where there is one, else on the CPU
    in fp32.
    """
    directory, cuda = find_model(spec), torch.cuda.is_available()
    dtype = DTYPES[dtype] if dtype else torch.bfloat16 if cuda else torch.float32
    load_config(directory)  # first, so that a directory that is no checkpoint is reported as that
    tokenizer = load_tokenizer(tokenizer_directory(directory), chat_format)
    model = load_model(directory, "cuda" if cuda else "cpu", dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"{directory}: tokenizer of {tokenizer.vocab_size} tokens, model of {model.config.vocab_size}"
        )
    return Engine(model, tokenizer, consume=True)


def turn_markers(tokenizer):
    """Ids of the special tokens that end a turn: all but the tags around reasoning."""
    is_tag = {name: TAG.fullmatch(name.replace("/", "", 1)) for name in tokenizer.specials}
    return tuple(i for name, i in tokenizer.specials.items() if not is_tag[name])


@dataclass(eq=False)
class Request:
    """A conversation that the engine answers."""

    ids: list
    params: SamplingParams
    own_tokens: int  # those of ids that this model sampled
    tag: str  # opens reasoning at the end of the prompt; "" if nothing does
    room: int = 0  # tokens added to params.max_tokens for reasoning
    sequences: list | None = None  # the engine's

    @property
    def constrained(self):
        return self.params.choices is not None or self.params.json_schema is not None


class Local:
    """A checkpoint on this machine. `identity`: hash of its files, device and dtype, which determine answers.

    A reply that is cut off by max_tokens while the model is still reasoning is asked for once more with
    REASONING_TOKENS more, and so is every later one from the start (`reasoning_tokens`).
    """

    local, adaptations = True, ()

    def __init__(self, spec, dtype=None, chat_format=None):
        self.name, self.engine = str(spec), load_engine(spec, dtype, chat_format)
        self.tokenizer = self.engine.tokenizer
        self.identity = f"{fingerprint(find_model(spec))} {self.engine.device.type} {self.engine.kv.dtype}"
        self.markers = turn_markers(self.tokenizer)
        self.reasoning_tokens = 0
        self.running, self.refused = {}, []  # key -> Request; (key, Reply)
        # a chat's turns are rendered again at each of its calls
        self.encode = functools.lru_cache(2**15)(self.tokenizer.encode)
        self.as_sampled = functools.lru_cache(2**15)(
            functools.partial(as_sampled, self.tokenizer.decode, self.encode)
        )

    def chat(self, conversations, params, openings=None, on_reply=lambda: None):
        """A list of Reply to conversations, lists of messages; params: one SamplingParams for all, or a list.

        openings: the text that each reply is made to begin with, which is not part of the Reply (an endpoint
        cannot be made to). A message may carry `sampled`, the ids of the Reply it was, with the `opening` it
        had: see `as_sampled`. on_reply() is called after each reply. No other request may be running.
        """
        openings = openings or [""] * len(conversations)
        params = params if isinstance(params, list) else [params] * len(conversations)
        replies = {}
        try:
            for i, request in enumerate(zip(conversations, params, openings, strict=True)):
                self.ask(i, *request)
            while len(replies) < len(conversations):
                for key, reply in self.step():
                    replies[key] = reply
                    on_reply()
        finally:
            self.drop()
        return [replies[i] for i in range(len(conversations))]

    def score(self, conversations, openings, continuations):
        """[(log-probability in nats, number of tokens)] of each continuation of a reply that begins with its
        opening. RequestRefused if one of them is too long."""
        prompts = [self.prompt(*pair)[0] for pair in zip(conversations, openings, strict=True)]
        ids = [self.encode(text) for text in continuations]
        scores = self.engine.score(prompts, ids)
        return [(score, len(own)) for score, own in zip(scores, ids, strict=True)]

    def ask(self, key, messages, params, opening=""):
        """Enqueues a conversation, as in `chat`; `step` returns its Reply under this key."""
        ids, own_tokens = self.prompt(messages, opening)
        end = len(ids) - len(self.encode(opening))
        tag = open_tag(self.tokenizer.decode(ids[max(0, end - 16) : end]))
        request = Request(ids, params, own_tokens, tag)
        if not request.constrained:
            request.params = replace(params, stop_ids=(*params.stop_ids, *self.markers))
        self.enqueue(key, request)

    def enqueue(self, key, request):
        """Gives a request to the engine; what the engine refuses is a Reply with an error."""
        request.room = 0 if request.constrained else self.reasoning_tokens
        try:
            params = replace(request.params, max_tokens=request.params.max_tokens + request.room)
            request.sequences = self.engine.add(request.ids, params)
            self.running[key] = request
        except RequestRefused as error:
            self.refused.append((key, Reply("", "error", len(request.ids), error=f"{self.name}: {error}")))

    def step(self):
        """Runs a step of the engine for all requests -> [(key, Reply)] of those that have ended."""
        done, self.refused = self.refused, []
        if not done and self.running:
            self.engine.step()
            for key, request in list(self.running.items()):
                if completion := self.engine.completion(request.sequences):
                    del self.running[key]
                    reply = reply_of(completion, request)
                    if needs_room(reply) and not request.room:
                        self.reasoning_tokens = REASONING_TOKENS
                        self.enqueue(key, request)
                    else:
                        done.append((key, reply))
        return done

    def spoken(self, key):
        """What a running reply says so far, in whole characters, without reasoning."""
        request = self.running[key]
        return spoken_so_far(request.tag + request.sequences[0].text)

    def drop(self):
        """Cancels all requests."""
        for request in self.running.values():
            self.engine.cancel(request.sequences)
        self.running, self.refused = {}, []

    def prompt(self, messages, opening=""):
        """(ids of a conversation up to a reply that begins with `opening`, how many of them it sampled)."""
        rendered, own_tokens = [], 0
        for message in messages:
            if message.get("sampled"):
                ids, own = self.as_sampled(message["content"], message["opening"], tuple(message["sampled"]))
                own_tokens += own
            else:
                ids = self.encode(message["content"])
            rendered.append({**message, "ids": ids})
        ids, _ = self.tokenizer.render(rendered, add_generation_prompt=True)
        return ids + self.encode(opening), own_tokens


def reply_of(completion, request):
    """The Reply that a Completion is; text that was constrained to choices or a schema holds no reasoning."""
    reasoning, text = "", completion.text
    if not request.constrained:
        reasoning, text = split_reasoning(request.tag + text)
    counts = completion.prompt_tokens, len(completion.ids), completion.cached_tokens
    return Reply(text, completion.finish_reason, *counts, completion.ids, completion.probabilities,
                 own_tokens=request.own_tokens, reasoning=reasoning)  # fmt: skip


def as_sampled(decode, encode, content, opening, sampled):
    """(ids of an own turn, how many of them were sampled), so that the cached prefix of a chat is used again.

    These are the opening, then as many sampled tokens as decode to the beginning of the content, then the
    rest of the content encoded. White space after the opening stays as it was sampled. Tokens of reasoning
    are not in the content, so a reply that began with reasoning is encoded anew.
    """
    spoken = content.removeprefix(opening).lstrip()
    if spoken[:1] == decode(sampled).lstrip()[:1]:
        for n in range(len(sampled), 0, -1):
            text = decode(sampled[:n]).lstrip()
            if text and spoken.startswith(text):
                return [*encode(opening), *sampled[:n], *encode(spoken[len(text) :])], n
    return encode(content), 0


def fingerprint(path):
    """sha256 of the files of a model, a directory or a single file; an adapter's covers its base as well.

    The manifest is hashed where there is one, since it has the hash of each file. Of a file of more than 64
    MiB its size, its first MiB and 64 KiB at 255 places are hashed, since hashing 140 GB takes minutes.
    """
    path, digest = Path(path), hashlib.sha256()
    if is_adapter(path):
        digest.update(fingerprint(base_directory(path)).encode())
    hashed = [path / MANIFEST]
    if not hashed[0].is_file():
        suffixes = (".json", ".safetensors", ".model", ".gguf")
        found = path.iterdir() if path.is_dir() else filter(Path.is_file, parts_of(path))
        hashed = sorted(file for file in found if file.suffix in suffixes)
    for file in hashed:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as stream:
            if size <= 2**26:
                digest.update(stream.read())
            else:
                for i in range(256):
                    stream.seek(i * (size // 256))
                    digest.update(stream.read(2**16 if i else 2**20))
    return "sha256:" + digest.hexdigest()[:16]


def default_actor():
    """The stage actor trained last if there is one, else the bundled one."""
    trained = files.OUT / "stage" / "final"
    for directory, what in (
        (trained, "the stage actor trained last"),
        (BUNDLED_ACTOR, "the bundled stage actor"),
    ):
        if (directory / "config.json").is_file():
            terminal.note(f"using {what}, {os.path.relpath(directory)}")
            return directory
    raise UsageError("no stage actor has been trained yet; run `torchrun train.py` first, or name a model")
