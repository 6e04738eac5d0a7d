"""Text from a model: a KV-cached engine, and completion and chat on the command line.

    python generate.py --prompt "The ferry"                     the stage actor goes on from a text
    python generate.py --chat --character "Hanne Brod"          meet a character of a bundled scene
    python generate.py --model DIR --chat

`Engine.generate` takes token ids and gives completions. All sequences in flight share one forward pass a step: their new tokens
lie one after the other in a single row, whole prompts beside single tokens, and `StepCache` knows which belong to whom. A
sequence that ends leaves its keys and values behind, and a later prompt that begins the same way takes them over.
"""

import itertools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import cli
from checkpoint import DTYPES, find_model, load_config, load_model
from cli import UsageError
from data import prompts
from data.chats import perspective, system_prompt
from data.scenes import load_stage
from tokenizer import CHAT_FORMATS, load_tokenizer


@dataclass
class SamplingParams:
    """How to choose tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep all; stop: strings that end the text.

    min_p: tokens less likely than this share of the likeliest are left out. repetition_penalty: divides the logits of tokens
    already in prompt or answer where positive, multiplies them where negative (Keskar et al. 2019). stop_ids: ids that end
    the text besides the tokenizer's. logprobs: whether to return them. choices: the text is one of these strings.
    json_schema: the text is JSON of this schema.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple = ()
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple = ()
    logprobs: bool = False
    choices: list | None = None
    json_schema: dict | None = None

    def __post_init__(self):
        seed = self.seed or 0
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0 < self.max_tokens and 0 <= seed < 2**63):
            raise UsageError(f"temperature, top_k and seed from 0, 0 < top_p <= 1 and max_tokens from 1 are needed; got {self}")


@dataclass
class Completion:
    """What was generated. `finish_reason`: `stop` (a stop id or string, neither part of ids or text) or `length`.

    logprobs: natural log-probability of each of ids under the model, before temperature and filters. probabilities: of
    each choice, where choices were given.
    """

    ids: list
    text: str | None
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    logprobs: list | None = None
    probabilities: dict | None = None


@dataclass(eq=False)
class Sequence:
    """A prompt and what has been generated after it, with the keys and values of its first `cached` tokens."""

    ids: list
    params: SamplingParams
    prompt_tokens: int
    limit: int  # tokens in all
    generator: torch.Generator
    kv: torch.Tensor | None = None  # [layers, 2, K, capacity, D]
    cached: int = 0
    reused: int = 0  # of the prompt, tokens that were already cached
    before: list = field(default_factory=list)  # the end of the prompt, where the text is decoded as going on from it
    text: str | None = None
    finish_reason: str | None = None

    @property
    def generated(self):
        return self.ids[self.prompt_tokens :]


@dataclass
class StepCache:
    """The cache of one forward pass: `spans` are (sequence, first, last + 1) of its tokens in the row."""

    spans: list

    def attend(self, layer, q, k, v, window=None):
        """Keeps the new keys and values, attends over all that are kept: q [1, N, H, D], k and v [1, N, K, D] -> as q.

        With a window w a query at i sees the keys i - w < j <= i.
        """
        out = torch.empty_like(q)
        for sequence, first, last in self.spans:
            old, new = sequence.cached, last - first
            store = sequence.kv[layer]
            store[0, :, old : old + new] = k[0, first:last].transpose(0, 1)
            store[1, :, old : old + new] = v[0, first:last].transpose(0, 1)
            begin = max(0, old + 1 - window) if window else 0  # no query here sees further back
            keys, values = store[:, None, :, begin : old + new]  # [1, K, seen, D]
            queries = q[:, first:last].transpose(1, 2)  # [1, H, new, D]
            if new == 1:  # fold the heads of a group into query rows: one product a key head
                folded = queries.view(1, keys.shape[1], -1, q.shape[-1])
                attended = F.scaled_dot_product_attention(folded, keys, values).view(queries.shape)
            else:
                mask, grouped = None, q.shape[2] != k.shape[2]
                if old or (window and new > window):
                    reach = old - begin  # query i of these sees keys up to i + reach
                    mask = torch.ones(new, keys.shape[2], dtype=torch.bool, device=q.device).tril(reach)
                    mask = mask.triu(reach + 1 - window) if window else mask
                attended = F.scaled_dot_product_attention(
                    queries, keys, values, mask, is_causal=mask is None, enable_gqa=grouped
                )
            out[:, first:last] = attended.transpose(1, 2)
        return out


class Engine:
    """Generates for many prompts at once, with cached keys and values.

    model: a Transformer in eval mode, any dtype and device. tokenizer: may be None where only ids go in and out (no stop ids
    then). max_batch: sequences in flight; max_step_tokens: prompt tokens taken in at one step (a longer prompt goes alone);
    idle_tokens: capacity of finished sequences kept for later prompts, the oldest dropped first.
    """

    def __init__(self, model, tokenizer=None, max_batch=64, max_step_tokens=8192, idle_tokens=65_536):
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.max_batch, self.max_step_tokens, self.idle_tokens = max_batch, max_step_tokens, idle_tokens
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.stop_ids = set(tokenizer.stop_ids) if tokenizer else set()
        self.waiting, self.running, self.idle = [], [], []
        self.stats = {"prefilled": 0, "reused": 0, "decoded": 0}

    def generate(self, prompts, params):
        """list of prompts (token ids), one SamplingParams for all or a list -> list[Completion], in the prompts' order."""
        params = params if isinstance(params, list) else [params] * len(prompts)
        sequences = [self.sequence(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        self.waiting += sequences
        while any(sequence.finish_reason is None for sequence in sequences):
            self.step()
        return [self.completion(sequence) for sequence in sequences]

    def stream(self, prompt, params, goes_on=False):
        """Yields the text of one completion piece by piece, in whole characters; its `return` value is the Completion.

        goes_on: the text goes on from the prompt's, so a space between them is part of it (SentencePiece drops the first).
        """
        sequence, shown = self.add(prompt, params), 0
        sequence.before = prompt[-1:] if goes_on else []
        try:
            while sequence.finish_reason is None:
                self.step()
                # a torn character shows as U+FFFD until its last byte; a stop string may have begun
                sure = sequence.text.rstrip("\ufffd")
                sure = sure[: max(0, len(sure) + 1 - max(map(len, params.stop), default=1))]
                if sequence.finish_reason is None and len(sure) > shown:
                    yield sure[shown:]
                    shown = len(sure)
            if len(sequence.text) > shown:
                yield sequence.text[shown:]
        finally:
            for line in (self.waiting, self.running):  # the reader has left
                if sequence in line:
                    line.remove(sequence)
        return self.completion(sequence)

    def completion(self, sequence):
        return Completion(sequence.generated, sequence.text, sequence.finish_reason, sequence.prompt_tokens, sequence.reused)

    def add(self, prompt, params):
        """Puts a prompt in line for the next steps; returns its Sequence."""
        self.waiting.append(self.sequence(prompt, params))
        return self.waiting[-1]

    def sequence(self, prompt, params):
        """A prompt as a Sequence. UsageError if it is empty, longer than the model's context, or not made of its tokens."""
        for name in ("min_p", "stop_ids", "logprobs", "choices", "json_schema"):
            if getattr(params, name):
                raise UsageError(f"{name} is not supported yet")
        if params.repetition_penalty != 1:
            raise UsageError("repetition_penalty is not supported yet")
        limit = self.config.max_position_embeddings
        if not prompt or len(prompt) >= limit:
            raise UsageError(f"a prompt of {len(prompt)} tokens; the model takes 1 to {limit - 1}")
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise UsageError(f"token ids {min(prompt)} to {max(prompt)}, but the vocabulary has {self.config.vocab_size}")
        generator = torch.Generator(self.device)
        generator.manual_seed(params.seed) if params.seed is not None else generator.seed()
        text = "" if self.tokenizer else None
        limit = min(limit, len(prompt) + params.max_tokens)
        return Sequence(list(prompt), params, len(prompt), limit, generator, text=text)

    @torch.inference_mode()
    def step(self):
        """One forward pass for every sequence in flight: schedule, run, sample, put away what has ended."""
        taken_in = 0
        while self.waiting and len(self.running) < self.max_batch:
            if taken_in and taken_in + len(self.waiting[0].ids) > self.max_step_tokens:
                break
            sequence = self.waiting.pop(0)
            self.take_over(sequence)
            taken_in += len(sequence.ids) - sequence.cached
            self.running.append(sequence)
        tokens, positions, spans = [], [], []
        for sequence in self.running:
            first = len(tokens)
            tokens += sequence.ids[sequence.cached :]
            positions += range(sequence.cached, len(sequence.ids))
            spans.append((sequence, first, len(tokens)))
            self.reserve(sequence)
        self.stats["prefilled"] += taken_in
        row = torch.tensor([tokens, positions], device=self.device)[:, None]  # [2, 1, N]
        last = torch.tensor([end - 1 for _, _, end in spans], device=self.device)
        logits = self.model(row[0], row[1], cache=StepCache(spans), rows=last)  # [sequences, V]
        for sequence, token in zip(self.running, self.sample(logits), strict=True):
            sequence.cached = len(sequence.ids)
            self.advance(sequence, token)
        for sequence in [s for s in self.running if s.finish_reason]:
            self.running.remove(sequence)
            self.idle.append(sequence)
        while sum(s.kv.shape[3] for s in self.idle) > self.idle_tokens:
            self.idle.pop(0)

    def take_over(self, sequence):
        """Gives a new sequence the cache of the idle one that begins most like its prompt: the cache itself where most of it
        serves, as in a chat that goes on, else a copy of the beginning."""
        best, common = None, 0
        for idle in self.idle:
            pairs = zip(idle.ids[: idle.cached], sequence.ids[:-1], strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if same > common:
                best, common = idle, same
        if best:
            sequence.kv, sequence.cached, sequence.reused = best.kv, common, common
            if 2 * common > best.cached:
                self.idle.remove(best)
            else:
                sequence.kv = best.kv[:, :, :, :common]  # no room left in it, so reserve will copy
            self.stats["reused"] += common

    def reserve(self, sequence):
        """Room for the keys and values of the sequence as it is, growing by doubling up to its limit."""
        needed, config = len(sequence.ids), self.config
        room = sequence.kv.shape[3] if sequence.kv is not None else 0
        if room < needed:
            capacity = max(needed, min(sequence.limit, max(2 * room, needed + 64)))
            shape = (config.num_hidden_layers, 2, config.num_key_value_heads, capacity, config.head_dim)
            kv = torch.empty(shape, dtype=self.dtype, device=self.device)
            if sequence.cached:
                kv[:, :, :, : sequence.cached] = sequence.kv[:, :, :, : sequence.cached]
            sequence.kv = kv

    def sample(self, logits):
        """The next token of each running sequence: logits [sequences, V] -> list of ids."""
        if self.tokenizer:  # a vocabulary may be padded; no token is behind the rest
            logits = logits[:, : self.tokenizer.vocab_size]
        tokens = logits.argmax(-1).tolist()
        for i, sequence in enumerate(self.running):
            if sequence.params.temperature > 0:
                tokens[i] = sample_one(logits[i].float(), sequence.params, sequence.generator)
        return tokens

    def advance(self, sequence, token):
        """Appends a sampled token, or ends the sequence."""
        self.stats["decoded"] += 1
        if token in self.stop_ids:
            sequence.finish_reason = "stop"
            return
        sequence.ids.append(token)
        if self.tokenizer:
            sequence.text = self.decode(sequence)
            found = [at for stop in sequence.params.stop if (at := sequence.text.find(stop)) >= 0]
            if found:
                text = sequence.text[: min(found)]
                while len(self.decode(sequence)) > len(text):
                    sequence.ids.pop()
                sequence.cached = min(sequence.cached, len(sequence.ids))
                sequence.text, sequence.finish_reason = text, "stop"
                return
        if len(sequence.ids) >= sequence.limit:
            sequence.finish_reason = "length"

    def decode(self, sequence):
        return self.tokenizer.decode(sequence.before + sequence.generated)[len(self.tokenizer.decode(sequence.before)) :]


def sample_one(logits, params, generator):
    """One token id from logits [V] by temperature, top-k and top-p (nucleus)."""
    logits, order = (logits / params.temperature).sort(descending=True, stable=True)
    probabilities = logits.softmax(-1)
    if params.top_k:
        probabilities[params.top_k :] = 0
        probabilities /= probabilities.sum()
    if params.top_p < 1:  # the smallest set of likeliest tokens that reaches top_p
        probabilities[probabilities.cumsum(-1) - probabilities >= params.top_p] = 0
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return order[(probabilities / noise).argmax()].item()  # argmax(p / exponential) is a draw from p


def load_engine(spec, dtype=None, chat_format=None):
    """An Engine for a checkpoint directory or Hub id: on the GPU in bf16 where there is one, else on the CPU in fp32."""
    directory, cuda = find_model(spec), torch.cuda.is_available()
    dtype = DTYPES[dtype] if dtype else torch.bfloat16 if cuda else torch.float32
    load_config(directory)  # a directory that is no checkpoint should be told so first
    tokenizer = load_tokenizer(directory, chat_format)
    model = load_model(directory, "cuda" if cuda else "cpu", dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(f"{directory}: {tokenizer.vocab_size} tokens in the tokenizer, {model.config.vocab_size} in the model")
    return Engine(model, tokenizer)


# ---- command line -------------------------------------------------------------------------------------------------------


def find_character(name, scene_name=None):
    """(scene, name) of a bundled character, by full name or the beginning of any of its words, whatever the case."""
    stage = load_stage()
    if scene_name and scene_name not in stage:
        raise UsageError(f"--scene {scene_name}: no such bundled scene; there are {', '.join(stage)}")
    scenes = [stage[scene_name]] if scene_name else list(stage.values())
    cast = {character: scene for scene in reversed(scenes) for character in scene.major_characters}
    for character in sorted(cast):
        words = [character, *character.split()]
        if any(word.lower().startswith(name.lower()) for word in words):
            return cast[character], character
    raise UsageError(f"--character {name}: not in the cast; there are {', '.join(sorted(cast))}")


def say(engine, messages, params, opening=""):
    """Streams one reply to the terminal and returns its text; opening is what it has begun with."""
    ids, _ = engine.tokenizer.render(messages, add_generation_prompt=True)
    return show(engine.stream(ids + engine.tokenizer.encode(opening), params))


def show(pieces):
    """Prints pieces of text as they come, then a line end; returns the whole."""
    painter, text = cli.Painter(), ""
    for piece in pieces:
        for part, style in painter.spans(piece):
            cli.put(part, style)
        text += piece
    cli.put("\n")
    return text


def chat(engine, params):
    """Lines from stdin, replies to stdout; an empty line or end of input ends it."""
    messages = []
    for line in cli.lines("you> "):
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": say(engine, messages, params)})


def meet(engine, params, scene, character, visitor="Visitor"):
    """A conversation with one character of a scene, who sees the visitor as anyone else on stage."""
    system = {"role": "system", "content": system_prompt(scene, character, prompts.AT_PLAY, concise=True)}
    cli.note(f"{character}, from {scene.book}. {scene.scenario}\n")
    dialogue = []
    for line in cli.lines("you> "):
        dialogue.append({"character": visitor, "message": line})
        cli.put(f"{character}:", "bold")
        text = say(engine, [system, *perspective(dialogue, character)], params, opening=f"{character}:")
        dialogue.append({"character": character, "message": text.strip()})


def main():
    from llm import default_actor

    parser = cli.Parser(__doc__, 'python generate.py --prompt "The ferry" --max-tokens 60 --seed 1')
    add = parser.add_argument
    add("--model", help="checkpoint directory or Hub id (default: the last trained stage actor, else the bundled one)")
    add("--prompt", help="a text to go on from; - reads it from stdin")
    add("--chat", action="store_true", help="talk with the model, a line at a time")
    add("--character", help="with --chat: who of the bundled scenes to meet")
    add("--scene", help="with --character: in which bundled scene")
    add("--max-tokens", type=int, default=200)
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--stop", nargs="*", default=[], help="strings that end the text")
    add("--chat-format", choices=CHAT_FORMATS, help="default: what the checkpoint says")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--seed", type=int)
    args = parser.parse_args()
    if args.chat == (args.prompt is not None):
        raise UsageError("give either --prompt TEXT or --chat")
    if (args.character and not args.chat) or (args.scene and not args.character):
        raise UsageError("--character goes with --chat, and --scene with --character")
    params = SamplingParams(
        args.temperature, args.top_p, args.top_k, args.max_tokens, tuple(filter(None, args.stop)), args.seed
    )
    found = find_character(args.character, args.scene) if args.character else None
    engine = load_engine(args.model or default_actor(), args.dtype, args.chat_format)
    if found:
        meet(engine, params, *found)
    elif args.chat:
        chat(engine, params)
    else:
        text = "\n".join(cli.lines("", keep=True)) if args.prompt == "-" else args.prompt
        bos = [] if engine.tokenizer.bos_id is None else [engine.tokenizer.bos_id]
        pieces = engine.stream(bos + engine.tokenizer.encode(text), params, goes_on=True)
        cli.put(text)
        show(pieces)


if __name__ == "__main__":
    cli.run(main)
