"""Continues a text, or chats with a model or with a character of a scene, on the command line.

python generate.py --prompt "The ferry"                     the stage actor continues a text
python generate.py --chat --character "Hanne Brod"          meet a character of a bundled scene
python generate.py --chat --character CARD.png              meet a character card's
python generate.py --model DIR --chat
"""

import time
from dataclasses import dataclass, replace

from common import terminal
from common.files import UsageError
from data.brackets import BracketParser
from data.cards import VISITOR, read_card
from data.chats import perspective
from data.scenes import cast_member, find_scenes, load_stage
from engine.cpu import DTYPES, fast_bf16
from engine.engine import Engine  # noqa: F401 (generate.Engine is a contract)
from engine.params import Completion, SamplingParams
from llm.local import as_sampled, default_actor, load_engine, turn_markers
from llm.reply import open_tag, split_reasoning, spoken_so_far
from play.roles import CardRole, SceneRole, insert
from play.stage import STYLES
from text.chat import CHAT_FORMATS

CARDS = (".png", ".json", ".charx")
HELP = """/help          this text
/system TEXT   a new system text from here on; without TEXT none
/retry         another answer to the last line; before the first one, another greeting of a card's
Ctrl-C         ends an answer and keeps what there is of it; an empty line ends the chat"""


@dataclass
class Exchange:
    """A line and the reply to it; completion: None where Ctrl-C cut the reply short. line: None where the
    reply is a greeting."""

    line: str | None
    reply: str = ""
    completion: Completion | None = None


def find_character(name, spec=None):
    """(scene, full name) of a character of the bundled scenes or of a file's (see find_scenes)."""
    return cast_member(name, find_scenes(spec) if spec else list(load_stage().values()))


def show(pieces, stats="", tag=None):
    """Prints a stream of text, styled; Ctrl-C ends it. Returns the text, and the Completion or None.

    stats: what to print of the speed besides its numbers, "" for nothing at all. tag: None shows all of the
    text; else no reasoning is shown, and tag is what opens it at the end of the prompt ("" if nothing does).
    """
    brackets, text, shown, completion = BracketParser(), "", "", None
    start, first = time.perf_counter(), None
    try:
        while completion is None:
            try:
                text += next(pieces)
                first = first or time.perf_counter()
                visible = text if tag is None else spoken_so_far(tag + text)
            except StopIteration as stop:
                completion = stop.value
                text = visible = text if tag is None else split_reasoning(tag + text)[1]
            if visible.startswith(shown):
                for part, channel in brackets.feed(visible[len(shown) :]):
                    terminal.put(part, STYLES[channel])
                shown = visible
    except KeyboardInterrupt:
        pieces.close()
        text = shown
    terminal.put("\n")
    if stats and completion:
        count, end = len(completion.ids), time.perf_counter()
        begun, speed = (first or end) - start, f"{count / (end - start):.1f} tokens/s{stats}"
        cached = f"{completion.cached_tokens} of {completion.prompt_tokens} prompt tokens cached"
        terminal.note(f"({count} tokens, {speed}, the first piece after {begun:.2f} s; {cached})")
    return text, completion


def messages_of(exchanges, character=None):
    """The user and assistant messages of exchanges, without the last reply; as a character perceives them."""
    pairs = [((VISITOR, exchange.line), (character, exchange.reply)) for exchange in exchanges]
    turns = [turn for pair in pairs for turn in pair if turn[1] is not None][:-1]
    if character:
        return perspective([{"character": who, "message": text.strip()} for who, text in turns], character)
    return [{"role": "user" if who else "assistant", "content": text} for who, text in turns]


def prompt_of(tokenizer, exchanges, role=None, system=None, examples=True):
    """The token ids that the last line is answered after. system: in place of the role's own."""
    character = role and role.character
    messages, notes = messages_of(exchanges, character), []
    for message, exchange in zip(messages[1::2], exchanges[:-1], strict=True):
        if exchange.completion:  # the tokens as sampled are the ones in the cache
            sampled = (message["content"], f"{character}:" if character else "", exchange.completion.ids)
            message["ids"], _ = as_sampled(tokenizer.decode, tokenizer.encode, *sampled)
    if role:
        heard = [text for exchange in exchanges for text in (exchange.line, exchange.reply) if text]
        role_system, notes = role.system_and_notes(heard, examples)
        system = role_system if system is None else system
    for depth, text in notes:
        insert(messages, depth, text)
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer.render(messages, add_generation_prompt=True)[0]


def greet(role, number):
    """The exchange of a role's greeting, shown; an empty list where it has none."""
    if not role or not role.greetings:
        return []
    text = role.greetings[number % len(role.greetings)]
    terminal.put(f"{role.character}:", "bold")
    for part, channel in BracketParser().feed(f" {text}\n"):
        terminal.put(part, STYLES[channel])
    return [Exchange(None, text)]


def chat(engine, params, stats, role=None):
    """Reads lines from stdin and prints replies, until an empty line or the end of input: of the model as it
    is, or of a role, to whom the visitor is one more speaker on stage."""
    tokenizer, retries, system, opening = engine.tokenizer, 0, None, ""
    if role:
        terminal.note(f"{role.character}, {role.introduction}\n")
        opening = f"{role.character}:"
    exchanges = greet(role, 0)
    params = replace(params, stop_ids=(*params.stop_ids, *turn_markers(tokenizer)))
    for line in terminal.lines("you> "):
        command, _, argument = line.partition(" ")
        if command == "/retry" and exchanges:
            line, retries = exchanges.pop().line, retries + 1
            if line is None:
                exchanges = greet(role, retries)
                continue
        elif command == "/system":
            system = argument.strip()
            terminal.note(f"system: {system or 'none'}")
            continue
        elif line.startswith("/"):
            answers = {"/help": HELP, "/retry": "nothing has been said yet"}
            terminal.note(answers.get(command, f"{command}: no such command; /help lists them"))
            continue
        said = [*exchanges, Exchange(line)]
        ids = prompt_of(tokenizer, said, role, system)
        if role and len(ids) + params.max_tokens > engine.max_sequence_tokens:
            ids = prompt_of(tokenizer, said, role, system, examples=False)
        tag = open_tag(tokenizer.decode(ids[-16:]))
        seed = params.seed if params.seed is None else params.seed + retries
        stream = engine.stream(ids + tokenizer.encode(opening), replace(params, seed=seed), bool(opening))
        terminal.put(opening, "bold")
        try:
            exchanges.append(Exchange(line, *show(stream, stats, tag)))
        except UsageError as error:
            terminal.note(f"\n{error}: the line is too long, or the chat has become too long")


def parse_args():
    parser = terminal.Parser(__doc__, 'python generate.py --prompt "The ferry" --max-tokens 60 --seed 1')
    add = parser.add_argument
    add("--model", help="checkpoint directory or Hub id (default: the last stage actor, else the bundled)")
    add("--prompt", help="a text to continue; - reads it from stdin")
    add("--chat", action="store_true", help="chat with the model, line by line")
    add("--character", help="with --chat: whom to meet, of the bundled scenes or of --scene; or a card")
    add("--scene", help="with --character: a bundled scene, or FILE, FILE:INDEX of a book or test file")
    add(
        "--star-actions",
        action="store_true",
        help="read a card's *waves* as (waves), the form of actions here",
    )
    add("--stats", action="store_true", help="print speed, dtype and cached tokens after each answer")
    add("--max-tokens", type=int, default=200, help="default: 200")
    add("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    add("--top-p", type=float, default=1.0, help="default: 1, which keeps all tokens")
    add("--top-k", type=int, default=0, help="default: 0, which keeps all tokens")
    add("--stop", nargs="*", action="extend", default=[], help="strings that end the text")
    add("--chat-format", choices=CHAT_FORMATS, help="default: what the checkpoint says")
    add("--dtype", choices=DTYPES, help="default: as fits processor and memory; int8 is fast on a CPU")
    add("--seed", type=int)
    args = parser.parse_args()
    if args.chat == (args.prompt is not None):
        raise UsageError("give either --prompt TEXT or --chat")
    if (args.character and not args.chat) or (args.scene and not args.character):
        raise UsageError("--character goes with --chat, and --scene with --character")
    if (args.scene and is_card(args.character)) or (args.star_actions and not is_card(args.character)):
        raise UsageError("--scene goes with the name of a character, --star-actions with the file of a card")
    return args


def is_card(character):
    return bool(character) and character.lower().endswith(CARDS)


def main():
    args = parse_args()
    stop = tuple(filter(None, args.stop))
    params = SamplingParams(args.temperature, args.top_p, args.top_k, args.max_tokens, stop, args.seed)
    card = read_card(args.character) if is_card(args.character) else None
    role = SceneRole(*find_character(args.character, args.scene)) if args.character and not card else None
    dtype = args.dtype or ("bfloat16" if fast_bf16() else None)
    engine = load_engine(args.model or default_actor(), dtype, args.chat_format)
    stats = f" in {str(engine.dtype).removeprefix('torch.')}" if args.stats else ""
    if args.stats:
        terminal.note(f"chat format {engine.tokenizer.chat_format_reason}")
    if args.chat:
        if card:
            seed = time.time() if args.seed is None else args.seed
            role = CardRole(card, lambda text: len(engine.tokenizer.encode(text)), args.star_actions, seed)
        chat(engine, params, stats, role)
    else:
        text = "\n".join(terminal.lines("", keep=True)) if args.prompt == "-" else args.prompt
        bos = [] if engine.tokenizer.bos_id is None else [engine.tokenizer.bos_id]
        pieces = engine.stream(bos + engine.tokenizer.encode(text), params, goes_on=True)
        terminal.put(text)
        if show(pieces, stats)[1] is None:
            raise KeyboardInterrupt


if __name__ == "__main__":
    terminal.run(main)
