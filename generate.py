"""Text from a model: a KV-cached engine, and completion and chat on the command line.

    python generate.py --prompt "The ferry"                     the stage actor goes on from a text
    python generate.py --chat --character "Hanne Brod"          meet a character of a bundled scene
    python generate.py --model DIR --chat

`Engine.generate` takes token ids and gives completions. All sequences in flight share one forward pass a step: their new tokens
lie one after the other in a single row, whole prompts beside single tokens, and `StepCache` knows which belong to whom. A
sequence that ends leaves its keys and values behind, and a later prompt that begins the same way takes them over.
"""

import torch

import cli
from checkpoint import DTYPES, find_model, load_config, load_model
from cli import UsageError
from data import prompts
from data.chats import perspective, system_prompt
from data.scenes import load_stage
from engine import Engine, SamplingParams
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
