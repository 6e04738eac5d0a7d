"""Text from a model: a KV-cached engine, and completion and chat on the command line.

    python generate.py --prompt "The ferry"                     the stage actor goes on from a text
    python generate.py --chat --character "Hanne Brod"          meet a character of a bundled scene
    python generate.py --model DIR --chat

The engine is in engine.py.
"""

import dataclasses
import time

import torch

import cli
from checkpoint import DTYPES, find_model, load_config, load_model
from cli import UsageError
from data import prompts
from data.chats import perspective, system_prompt
from data.scenes import load_stage
from engine import Engine, SamplingParams
from fast_linear import fast_bf16
from tokenizer import CHAT_FORMATS, load_tokenizer


def load_engine(spec, dtype=None, chat_format=None):
    """An Engine for a checkpoint directory or Hub id: on the GPU in bf16 where there is one, else on the CPU in fp32."""
    directory, cuda = find_model(spec), torch.cuda.is_available()
    dtype = DTYPES[dtype] if dtype else torch.bfloat16 if cuda else torch.float32
    load_config(directory)  # a directory that is no checkpoint should be told so first
    tokenizer = load_tokenizer(directory, chat_format)
    model = load_model(directory, "cuda" if cuda else "cpu", dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(f"{directory}: {tokenizer.vocab_size} tokens in the tokenizer, {model.config.vocab_size} in the model")
    return Engine(model, tokenizer, consume=True)


# ---- command line -------------------------------------------------------------------------------------------------------


HELP = """/help          this
/system TEXT   a new system text from here on; without TEXT none
/retry         another answer to the last line
Ctrl-C         ends an answer, the chat goes on with what was said; an empty line ends the chat"""


def find_character(name, spec=None):
    """(scene, name) of a character of a bundled scene or a scene of a file, by full name or the beginning of any of its words,
    whatever the case."""
    from simulate import find_scenes

    scenes = find_scenes(spec) if spec else list(load_stage().values())
    cast = {character: scene for scene in reversed(scenes) for character in scene.major_characters}
    for character in sorted(cast):
        words = [character, *character.split()]
        if any(word.lower().startswith(name.lower()) for word in words):
            return cast[character], character
    raise UsageError(f"--character {name}: not in the cast; there are {', '.join(sorted(cast))}")


def show(pieces, stats=""):
    """Prints pieces of text as they come, then a line end; returns the text, or what there is of it at Ctrl-C, and the
    Completion, then None.

    stats: what to say of the speed besides how many tokens; empty for nothing at all.
    """
    painter, text, begun, first, done = cli.Painter(), "", time.perf_counter(), None, None
    try:
        while True:
            piece = next(pieces)
            first = first or time.perf_counter()
            for part, style in painter.spans(piece):
                cli.put(part, style)
            text += piece
    except StopIteration as end:
        cli.put("\n")
        done = end.value
        if stats:
            now = time.perf_counter()
            speed = f"{len(done.ids) / (now - begun):.1f} tokens/s{stats}, the first piece after {(first or now) - begun:.2f} s"
            cli.note(f"({len(done.ids)} tokens, {speed}; {done.cached_tokens} of {done.prompt_tokens} prompt tokens cached)")
    except KeyboardInterrupt:
        pieces.close()
        cli.put("\n")
    return text, done


def converse(engine, params, messages_of, system=None, name="", stats=""):
    """Lines from stdin, replies to stdout; an empty line or end of input ends it. messages_of: [(line, reply), ...] -> turns;
    name: who answers, if that is part of each answer."""
    from llm import as_sampled

    tokenizer, said, retries = engine.tokenizer, [], 0  # said: (line, reply, its Completion if it came to its end)
    opening = f"{name}:" if name else ""
    params = dataclasses.replace(params, stop_ids=tuple(tokenizer.specials.values()))  # none has a place within a turn
    for line in cli.lines("you> "):
        command, _, rest = line.partition(" ")
        if command == "/retry" and said:
            line, retries = said.pop()[0], retries + 1
        elif command == "/system":
            system = rest.strip() or None
            cli.note(f"system: {system or 'none'}")
            continue
        elif line.startswith("/"):
            known = {"/help": HELP, "/retry": "nothing has been said yet"}
            cli.note(known.get(command, f"{command}: no such command; /help lists them"))
            continue
        turns = messages_of([*((line, reply) for line, reply, _ in said), (line, "")])
        for message, (*_, done) in zip(turns[1::2], said, strict=True):
            if done:  # the very tokens that are cached
                message["ids"] = as_sampled(tokenizer.decode, tokenizer.encode, message["content"], opening, done.ids)[0]
        messages = [*([{"role": "system", "content": system}] if system else []), *turns]
        ids = tokenizer.render(messages, add_generation_prompt=True)[0] + tokenizer.encode(opening)
        seed = params.seed if params.seed is None else params.seed + retries
        cli.put(opening, "bold")
        try:
            said.append((line, *show(engine.stream(ids, dataclasses.replace(params, seed=seed)), stats)))
        except UsageError as error:
            cli.note(f"\n{error}: this chat has grown too long, or this line is")


def chat(engine, params, stats):
    """With the model as it is."""

    def turns(said):
        roles = ("user", "assistant")
        return [{"role": role, "content": text} for pair in said for role, text in zip(roles, pair, strict=True)][:-1]

    converse(engine, params, turns, stats=stats)


def meet(engine, params, stats, scene, character, visitor="Visitor"):
    """With one character of a scene, who hears the visitor as anyone else on stage."""

    def turns(said):
        dialogue = [(who, text) for line, reply in said for who, text in ((visitor, line), (character, reply.strip()))][:-1]
        return perspective([{"character": who, "message": text} for who, text in dialogue], character)

    cli.note(f"{character}, from {scene.book}. {scene.scenario}\n")
    system = system_prompt(scene, character, prompts.AT_PLAY, concise=True)
    converse(engine, params, turns, system, character, stats)


def main():
    from llm import default_actor

    parser = cli.Parser(__doc__, 'python generate.py --prompt "The ferry" --max-tokens 60 --seed 1')
    add = parser.add_argument
    add("--model", help="checkpoint directory or Hub id (default: the last trained stage actor, else the bundled one)")
    add("--prompt", help="a text to go on from; - reads it from stdin")
    add("--chat", action="store_true", help="talk with the model, a line at a time")
    add("--character", help="with --chat: whom to meet, of the bundled scenes or of --scene")
    add("--scene", help="with --character: a bundled scene, or FILE, FILE:INDEX of a book or test file")
    add("--stats", action="store_true", help="tokens a second, the dtype and cached tokens, after each answer, on stderr")
    add("--max-tokens", type=int, default=200)
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--stop", nargs="*", action="extend", default=[], help="strings that end the text")
    add("--chat-format", choices=CHAT_FORMATS, help="default: what the checkpoint says")
    add("--dtype", choices=DTYPES, help="default, by what is faster: bfloat16 on a GPU or a CPU with AMX, else float32")
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
    dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() or fast_bf16() else "float32")
    stats = f" in {dtype}" if args.stats else ""
    engine = load_engine(args.model or default_actor(), dtype, args.chat_format)
    if found:
        meet(engine, params, stats, *found)
    elif args.chat:
        chat(engine, params, stats)
    else:
        text = "\n".join(cli.lines("", keep=True)) if args.prompt == "-" else args.prompt
        bos = [] if engine.tokenizer.bos_id is None else [engine.tokenizer.bos_id]
        pieces = engine.stream(bos + engine.tokenizer.encode(text), params, goes_on=True)
        cli.put(text)
        if show(pieces, stats)[1] is None:
            raise KeyboardInterrupt


if __name__ == "__main__":
    cli.run(main)
