"""A checkpoint on this machine as a chat model."""

import functools
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import DTYPES, find_model, load_config, load_model
from common import files, terminal
from common.files import MANIFEST, ROOT, UsageError
from engine.engine import Engine
from llm.reply import Reply
from tokenizer import load_tokenizer


def load_engine(spec, dtype=None, chat_format=None):
    """An Engine for a checkpoint directory or Hub id: on the GPU in bf16 where there is one, else on the CPU in fp32."""
    directory, cuda = find_model(spec), torch.cuda.is_available()
    dtype = DTYPES[dtype] if dtype else torch.bfloat16 if cuda else torch.float32
    load_config(directory)  # a directory that is no checkpoint should be told so first
    tokenizer = load_tokenizer(directory, chat_format)
    model = load_model(directory, "cuda" if cuda else "cpu", dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"{directory}: {tokenizer.vocab_size} tokens in the tokenizer, {model.config.vocab_size} in the model"
        )
    return Engine(model, tokenizer, consume=True)


BUNDLED_ACTOR = ROOT / "data" / "stage" / "actor"


class Local:
    """A checkpoint on this machine. `identity` says which model computes what: files, device and dtype."""

    local = True

    def __init__(self, directory):
        self.name, self.engine = str(directory), load_engine(directory)
        self.tokenizer = self.engine.tokenizer
        self.identity = (
            f"{fingerprint(find_model(directory))} {self.engine.device.type} {self.engine.kv.dtype}"
        )
        self.markers = tuple(
            self.tokenizer.specials.values()
        )  # none has a place within a turn, so each ends it
        self.encode = functools.lru_cache(2**15)(
            self.tokenizer.encode
        )  # a chat's turns are rendered at each of its calls
        self.asked, self.refused = (
            {},
            [],
        )  # key -> (what the engine has in line, tokens it sampled itself); (key, Reply)
        self.as_sampled = functools.lru_cache(2**15)(
            functools.partial(as_sampled, self.tokenizer.decode, self.encode)
        )

    def chat(self, conversations, params, openings=None, on_reply=lambda: None):
        """conversations: lists of messages; params: one SamplingParams for all, or one each. Returns a list of Reply.

        openings: the text each reply is to begin with; it is not part of the Reply. An endpoint cannot be made to, and is not.
        A message may carry `sampled`, the ids that a Reply had, with the `opening` it was asked for: see `as_sampled`. Nothing
        else may be in line. on_reply() is called at each reply.
        """
        openings = openings or [""] * len(conversations)
        params = params if isinstance(params, list) else [params] * len(conversations)
        replies = {}
        try:
            for i, asked in enumerate(zip(conversations, params, openings, strict=True)):
                self.ask(i, *asked)
            while len(replies) < len(conversations):
                done = self.step()
                replies.update(done)
                for _ in done:
                    on_reply()
        finally:
            self.drop()
        return [replies[i] for i in range(len(conversations))]

    def ask(self, key, messages, params, opening=""):
        """Puts a conversation in line, as `chat`; `step` will give its reply under this key."""
        ids, own = self.prompt(messages, opening)
        takes = self.engine.max_sequence_tokens - 1
        needed = len(ids) + max(len(self.encode(choice)) for choice in params.choices or [""])
        needed += 64 if params.json_schema is not None else 0  # a schema's shortest text has to fit as well
        if needed > takes:
            error = f"a prompt of {needed:,} tokens, and {self.name} takes {takes:,}"
            self.refused.append((key, Reply("", "error", len(ids), error=error)))
            return
        if params.choices is None and params.json_schema is None:
            params = replace(params, stop_ids=self.markers)
        self.asked[key] = self.engine.add(ids, params), own

    def step(self):
        """Lets all conversations in line go on by a step of the engine -> [(key, Reply)] of those that are at their end."""
        done, self.refused = self.refused, []
        if not done and self.asked:
            self.engine.step()
            for key, (line, own) in list(self.asked.items()):
                if c := self.engine.completion(line):
                    counts = (c.prompt_tokens, len(c.ids), c.cached_tokens)
                    done.append(
                        (key, Reply(c.text, c.finish_reason, *counts, c.ids, c.probabilities, own_tokens=own))
                    )
                    del self.asked[key]
        return done

    def spoken(self, key):
        """The text of a reply so far, in whole characters."""
        return self.asked[key][0][0].text

    def drop(self):
        """Takes all conversations out of line."""
        for line, _ in self.asked.values():
            self.engine.cancel(line)
        self.asked, self.refused = {}, []

    def prompt(self, messages, opening=""):
        """(ids of the conversation up to a reply that begins with opening, how many of them this model has sampled)."""
        rendered, own = [], 0
        for message in messages:
            if message.get("sampled"):
                ids, kept = self.as_sampled(message["content"], message["opening"], tuple(message["sampled"]))
                own += kept
            else:
                ids = self.encode(message["content"])
            rendered.append({**message, "ids": ids})
        return self.tokenizer.render(rendered, add_generation_prompt=True)[0] + self.encode(opening), own


def as_sampled(decode, encode, content, opening, sampled):
    """(ids of an own turn, how many of them were sampled): the opening, then as many of the sampled tokens as say what the
    content says, then the rest of the content, encoded. White space after the opening stays as it was sampled."""
    spoken = content.removeprefix(opening).lstrip()
    for n in range(len(sampled), 0, -1):
        text = decode(sampled[:n]).lstrip()
        if text and spoken.startswith(text):
            return [*encode(opening), *sampled[:n], *encode(spoken[len(text) :])], n
    return encode(content), 0


def fingerprint(directory):
    """sha256 of a checkpoint: of its manifest, which has the hash of each file, or else of the files themselves; of a file of
    more than 64 MiB its size, its first MiB and 64 KiB at 255 places, since hashing 140 GB takes minutes."""
    directory, digest = Path(directory), hashlib.sha256()
    files = [directory / MANIFEST]
    if not files[0].is_file():
        files = sorted(f for f in directory.iterdir() if f.suffix in (".json", ".safetensors", ".model"))
    for file in files:
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
    """The last trained stage actor if there is one, else the bundled one."""
    trained = files.OUT / "stage" / "final"
    for directory, what in (
        (trained, "the last trained stage actor"),
        (BUNDLED_ACTOR, "the bundled stage actor"),
    ):
        if (directory / "config.json").is_file():
            terminal.note(f"using {what}, {os.path.relpath(directory)}")
            return directory
    raise UsageError("no stage actor has been trained yet; run `torchrun train.py` first, or name a model")
