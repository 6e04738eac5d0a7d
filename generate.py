"""Text from a model: a KV-cached engine, and completion and chat on the command line.

    python generate.py --prompt "The ferry"                     the stage actor goes on from a text
    python generate.py --chat --character "Hanne Brod"          meet a character of a bundled scene
    python generate.py --model DIR --chat

The engine is in engine.py.
"""

import dataclasses
import time

import torch

from checkpoint import DTYPES
from common import terminal
from common.files import UsageError
from data import prompts
from data.brackets import BracketParser
from data.chats import perspective, system_prompt
from data.scenes import find_scenes, load_stage
from engine.cpu import fast_bf16
from engine.engine import Engine  # noqa: F401 (generate.Engine is a contract)
from engine.params import SamplingParams
from llm.local import as_sampled, default_actor, load_engine
from play.stage import STYLES
from tokenizer import CHAT_FORMATS

HELP = """/help          this
/system TEXT   a new system text from here on; without TEXT none
/retry         another answer to the last line
Ctrl-C         ends an answer, the chat goes on with what was said; an empty line ends the chat"""


def find_character(name, spec=None):
    """(scene, name) of a character of a bundled scene or a scene of a file, by full name or the beginning of any of its words,
    whatever the case."""

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
    brackets, text, begun, first, done = BracketParser(), "", time.perf_counter(), None, None
    try:
        while True:
            piece = next(pieces)
            first = first or time.perf_counter()
            for part, channel in brackets.feed(piece):
                terminal.put(part, STYLES[channel])
            text += piece
    except StopIteration as end:
        terminal.put("\n")
        done = end.value
        if stats:
            now = time.perf_counter()
            speed = f"{len(done.ids) / (now - begun):.1f} tokens/s{stats}, the first piece after {(first or now) - begun:.2f} s"
            terminal.note(
                f"({len(done.ids)} tokens, {speed}; {done.cached_tokens} of {done.prompt_tokens} prompt tokens cached)"
            )
    except KeyboardInterrupt:
        pieces.close()
        terminal.put("\n")
    return text, done


def converse(engine, params, messages_of, system=None, name="", stats=""):
    """Lines from stdin, replies to stdout; an empty line or end of input ends it. messages_of: [(line, reply), ...] -> turns;
    name: who answers, if that is part of each answer."""

    tokenizer, said, retries = (
        engine.tokenizer,
        [],
        0,
    )  # said: (line, reply, its Completion if it came to its end)
    opening = f"{name}:" if name else ""
    params = dataclasses.replace(
        params, stop_ids=tuple(tokenizer.specials.values())
    )  # none has a place within a turn
    for line in terminal.lines("you> "):
        command, _, rest = line.partition(" ")
        if command == "/retry" and said:
            line, retries = said.pop()[0], retries + 1
        elif command == "/system":
            system = rest.strip() or None
            terminal.note(f"system: {system or 'none'}")
            continue
        elif line.startswith("/"):
            known = {"/help": HELP, "/retry": "nothing has been said yet"}
            terminal.note(known.get(command, f"{command}: no such command; /help lists them"))
            continue
        turns = messages_of([*((line, reply) for line, reply, _ in said), (line, "")])
        for message, (*_, done) in zip(turns[1::2], said, strict=True):
            if done:  # the very tokens that are cached
                message["ids"] = as_sampled(
                    tokenizer.decode, tokenizer.encode, message["content"], opening, done.ids
                )[0]
        messages = [*([{"role": "system", "content": system}] if system else []), *turns]
        ids = tokenizer.render(messages, add_generation_prompt=True)[0] + tokenizer.encode(opening)
        seed = params.seed if params.seed is None else params.seed + retries
        terminal.put(opening, "bold")
        try:
            said.append((line, *show(engine.stream(ids, dataclasses.replace(params, seed=seed)), stats)))
        except UsageError as error:
            terminal.note(f"\n{error}: this chat has grown too long, or this line is")


def chat(engine, params, stats):
    """With the model as it is."""

    def turns(said):
        roles = ("user", "assistant")
        return [
            {"role": role, "content": text} for pair in said for role, text in zip(roles, pair, strict=True)
        ][:-1]

    converse(engine, params, turns, stats=stats)


def meet(engine, params, stats, scene, character, visitor="Visitor"):
    """With one character of a scene, who hears the visitor as anyone else on stage."""

    def turns(said):
        dialogue = [
            (who, text) for line, reply in said for who, text in ((visitor, line), (character, reply.strip()))
        ][:-1]
        return perspective([{"character": who, "message": text} for who, text in dialogue], character)

    terminal.note(f"{character}, from {scene.book}. {scene.scenario}\n")
    system = system_prompt(scene, character, prompts.AT_PLAY, concise=True)
    converse(engine, params, turns, system, character, stats)


def main():

    parser = terminal.Parser(__doc__, 'python generate.py --prompt "The ferry" --max-tokens 60 --seed 1')
    add = parser.add_argument
    add(
        "--model",
        help="checkpoint directory or Hub id (default: the last trained stage actor, else the bundled one)",
    )
    add("--prompt", help="a text to go on from; - reads it from stdin")
    add("--chat", action="store_true", help="talk with the model, a line at a time")
    add("--character", help="with --chat: whom to meet, of the bundled scenes or of --scene")
    add("--scene", help="with --character: a bundled scene, or FILE, FILE:INDEX of a book or test file")
    add(
        "--stats",
        action="store_true",
        help="tokens a second, the dtype and cached tokens, after each answer, on stderr",
    )
    add("--max-tokens", type=int, default=200)
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--stop", nargs="*", action="extend", default=[], help="strings that end the text")
    add("--chat-format", choices=CHAT_FORMATS, help="default: what the checkpoint says")
    add(
        "--dtype",
        choices=DTYPES,
        help="default, by what is faster: bfloat16 on a GPU or a CPU with AMX, else float32",
    )
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
        text = "\n".join(terminal.lines("", keep=True)) if args.prompt == "-" else args.prompt
        bos = [] if engine.tokenizer.bos_id is None else [engine.tokenizer.bos_id]
        pieces = engine.stream(bos + engine.tokenizer.encode(text), params, goes_on=True)
        terminal.put(text)
        if show(pieces, stats)[1] is None:
            raise KeyboardInterrupt


if __name__ == "__main__":
    terminal.run(main)
