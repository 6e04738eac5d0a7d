"""A checkpoint on this machine as a chat model."""

import functools
import hashlib
import os
import re
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint import find_model, load_config, load_model, open_weights
from checkpoint.adapters import base_directory, is_adapter, tokenizer_directory
from common import files, terminal
from common.files import MANIFEST, ROOT, UsageError
from common.gguf import parts_of
from engine.cpu import DTYPES, PackedTransformer, native_bf16
from engine.engine import Engine
from engine.params import RequestRefused, SamplingParams
from llm.reply import REASONING_TOKENS, Model, Reply, needs_room, open_tag, split_reasoning, spoken_so_far
from tokenizer import load_tokenizer

LONG = 2**13  # characters of a text whose ids are not kept
BUNDLED_ACTOR = ROOT / "data" / "stage" / "actor"  # 4M parameters, from nothing
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
SHIPPED_ACTOR = ROOT / "data" / "stage" / "smollm2"  # a LoRA adapter


def load_engine(spec, dtype=None, chat_format=None):
    """An Engine for a checkpoint directory, GGUF file or Hub id.

    dtype: one of DTYPES; None is bfloat16 on a GPU, and on a CPU what `fitting_dtype` says.
    """
    directory, cuda = find_model(spec), torch.cuda.is_available()
    config = load_config(directory)  # first, so that a directory that is no checkpoint is reported as that
    tokenizer = load_tokenizer(tokenizer_directory(directory), chat_format)
    if tokenizer.vocab_size > config.vocab_size:
        what = f"tokenizer of {tokenizer.vocab_size} tokens, model of {config.vocab_size}"
        raise UsageError(f"{directory}: {what}")
    dtype = dtype or ("bfloat16" if cuda else fitting_dtype(config))
    choices = [name for name in DTYPES if not (cuda and name == "int8")]
    if dtype not in choices:
        raise UsageError(f"--dtype {dtype}: on {'a GPU' if cuda else 'a CPU'} one of {', '.join(choices)}")
    if cuda:
        return Engine(load_model(directory, "cuda", DTYPES[dtype]), tokenizer)
    return Engine(load_packed(directory, config, DTYPES[dtype]), tokenizer)


def load_packed(directory, config, dtype):
    """The PackedTransformer of a checkpoint, with a progress bar. Besides the packed weights only the layer
    that is being packed is in memory."""
    weights, done = open_weights(directory, config), 0
    with terminal.reporting(config.num_parameters(), "weights") as update:

        def read(name):
            nonlocal done
            tensor = weights[name][:]
            update(done := done + tensor.numel(), f"loading {Path(directory).name}")
            return tensor

        return PackedTransformer(config, read, dtype).eval()


def fitting_dtype(config):
    """The dtype of a model on this CPU: float32 if it takes at most half of the free memory, else bfloat16 if
    that does and the processor has it, else int8. A note says so if it is not float32."""
    count, free = config.num_parameters(), free_memory()
    if 4 * count <= free / 2:
        return "float32"
    dtype = "bfloat16" if 2 * count <= free / 2 and native_bf16() else "int8"
    sizes = f"{4 * count / 1e9:.1f} GB of weights in float32, {free / 1e9:.1f} GB of memory are free"
    terminal.note(f"{sizes}: loading in {dtype} (--dtype chooses)")
    return dtype


def free_memory():
    """Bytes that can be allocated without swapping, at most a container's limit; all memory where the system
    does not say (macOS)."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file, pattern, unit in (MEMINFO, r"MemAvailable: *(\d+) kB", 1024), (CGROUP, r"(\d+)", 1):
        if file.exists() and (found := re.match(rf"(?s).*?{pattern}", file.read_text("utf-8"))):
            free = min(free, int(found[1]) * unit)
    return free


def turn_markers(tokenizer):
    """Ids of the special tokens that end a turn: all but the tags around reasoning."""
    return tuple(i for name, i in tokenizer.specials.items() if not open_tag(name.replace("/", "", 1)))


@dataclass(eq=False)
class Request:
    """A conversation that the engine answers."""

    ids: list
    params: SamplingParams
    own_tokens: int  # those of ids that this model sampled
    tag: str  # opens reasoning at the end of the prompt; "" if nothing does
    room: int = 0  # tokens added to params.max_tokens for reasoning
    goes_on: bool = False  # the reply continues an opening (see Engine.stream)
    raw: bool = False  # token ids that the engine continues as they are
    continuation: list | None = None  # of a raw request: ids that are only scored
    sequences: list | None = None  # the engine's

    @property
    def constrained(self):
        return self.params.choices is not None or self.params.json_schema is not None


class Local(Model):
    """A checkpoint on this machine. `identity`: hash of its files, device and dtype, which determine answers.

    A reply that is cut off by max_tokens while the model is still reasoning is asked for once more with
    REASONING_TOKENS more, and so is every later one from the start (`reasoning_tokens`).
    """

    local, adaptations = True, ()

    def __init__(self, spec, dtype=None, chat_format=None):
        self.name, self.engine = str(spec), load_engine(spec, dtype, chat_format)
        self.tokenizer = self.engine.tokenizer
        self.chat_format_reason = self.tokenizer.chat_format_reason
        self.identity = f"{fingerprint(find_model(spec))} {self.engine.device.type} {self.engine.dtype}"
        self.markers = turn_markers(self.tokenizer)
        self.reasoning_tokens = 0
        self.running = {}  # {Future: Request}
        # a chat's turns are rendered again at each of its calls
        encode, cached = self.tokenizer.encode, functools.lru_cache(2**13)(self.tokenizer.encode)
        self.encode = lambda text: (cached if len(text) < LONG else encode)(text)  # without self: no cycle
        sampled = functools.partial(as_sampled, self.tokenizer.decode, self.encode)
        self.as_sampled = functools.lru_cache(2**13)(sampled)

    def score(self, conversations, openings, continuations):
        """[(log-probability in nats, number of tokens)] of each continuation of a reply that begins with its
        opening. RequestRefused if one of them is too long."""
        prompts = [self.prompt(*pair)[0] for pair in zip(conversations, openings, strict=True)]
        ids = [self.encode(text) for text in continuations]
        scores = self.engine.score(prompts, ids)
        return [(score, len(own)) for score, own in zip(scores, ids, strict=True)]

    def submit(self, messages, params, opening=""):
        """Enqueues a conversation, as in `chat`, and returns the Future of its Reply."""
        ids, own_tokens = self.prompt(messages, opening)
        end = len(ids) - len(self.encode(opening))
        tag = open_tag(self.tokenizer.decode(ids[max(0, end - 16) : end]))
        request, future = Request(ids, params, own_tokens, tag, goes_on=bool(opening)), Future()
        if not request.constrained:
            request.params = replace(params, stop_ids=(*params.stop_ids, *self.markers))
        future.add_done_callback(self.remove)
        self.enqueue(future, request)
        return future

    def complete(self, ids, params, continuation=None):
        """Enqueues token ids to be continued as they are, or only to be scored with these ids after them;
        returns the Future of the engine's Completion, RequestRefused if it does not fit."""
        request = Request(ids, params, 0, "", goes_on=True, raw=True, continuation=continuation)
        future = Future()
        future.add_done_callback(self.remove)
        self.enqueue(future, request)
        return future

    def enqueue(self, future, request):
        """Gives a request to the engine; if the engine refuses it, the Reply has the error."""
        request.room = 0 if request.constrained or request.raw else self.reasoning_tokens
        try:
            params = replace(request.params, max_tokens=request.params.max_tokens + request.room)
            request.sequences = self.engine.add(request.ids, params, request.goes_on, request.continuation)
            self.running[future] = request
        except RequestRefused as error:
            if request.raw:
                raise
            future.set_result(Reply("", "error", len(request.ids), error=f"{self.name}: {error}"))

    def step(self):
        """Runs a step of the engine for all requests, and gives those that have ended their Reply."""
        if self.running:
            self.engine.step()
        for future, request in list(self.running.items()):
            if completion := self.engine.completion(request.sequences):
                del self.running[future]
                reply = completion if request.raw else reply_of(completion, request)
                if not request.raw and needs_room(reply) and not request.room:
                    self.reasoning_tokens = REASONING_TOKENS
                    self.enqueue(future, request)
                else:
                    future.set_result(reply)

    def spoken(self, future):
        """What a running reply says so far, in whole characters, without reasoning."""
        request = self.running[future]
        text = request.sequences[0].settled
        return text if request.raw or request.constrained else spoken_so_far(request.tag + text)

    def remove(self, future):
        """Takes a cancelled request out of the engine."""
        if request := self.running.pop(future, None):
            self.engine.cancel(request.sequences)

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
    """The directory of the actor that plays where none is named; a note on stderr says which.

    The stage actor trained last (out/stage/final), else the shipped adapter over SmolLM2, else, where the
    package with SmolLM2 is not installed, the small bundled stage actor.
    """
    trained = files.OUT / "stage" / "final"
    if (trained / "config.json").is_file():
        actor, what = trained, "the stage actor trained last"
    else:
        try:
            find_model("smollm2")
            actor, what = SHIPPED_ACTOR, "SmolLM2 trained on the bundled stories"
        except UsageError as error:
            actor, what = BUNDLED_ACTOR, f"the small bundled stage actor ({error} for one that makes sense)"
    terminal.note(f"using {what}, {os.path.relpath(actor)}")
    return actor
