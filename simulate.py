"""Puts a scene on stage: one model plays every character, one the world around them, one says who is next.

    python simulate.py --list                                            the bundled scenes
    python simulate.py --scene the-last-ferry/1                          watch one, played by the stage actor
    python simulate.py --scene test.json:all --actor DIR --out DIR       a whole test file, all scenes side by side

Given-circumstance acting (coser paper, section 4.3): each agent has a chat of its own, in which it reads the others without
their thoughts. A round is one turn of the current speaker, then the next-speaker model names who follows. `transcripts.jsonl`
gets a scene as soon as it is finished; `--resume` plays only what is missing.
"""

import functools
import hashlib
import itertools
import json
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.text import Text

import cli
from cli import UsageError
from data import prompts
from data.chats import END_CHAT, NEXT_SPEAKER, next_speaker_perspective, perspective, system_prompt
from data.scenes import ENVIRONMENT, load_scenes, load_stage
from generate import SamplingParams
from llm import default_actor, open_model

TRANSCRIPTS, SETTINGS = "transcripts.jsonl", "settings.json"
SIDE_BY_SIDE = 32  # scenes
TRANSCRIPT_KEYS = ("book", "i_p", "i_c", "scene", "settings", "messages", "stats")


@dataclass
class Protocol:
    """The rules of a performance (paper, section 4.3 and the release's settings)."""

    max_rounds: int = 20
    end_from_round: int = 5  # an <END CHAT> before this round index does not count
    max_tokens: int = 512  # of an actor's turn
    next_speaker_tokens: int = 32
    temperature: float = 0.0
    retry_temperature: float = 1.0  # when the first try came out empty
    thoughts: bool = True
    continue_from: int = 0  # so many messages are the original ones
    seed: int = 0


@dataclass
class Call:
    """What a scene waits for: one reply of the model in a role (`actor`, `environment` or `next_speaker`)."""

    role: str
    messages: list
    params: SamplingParams
    opening: str = ""  # what the reply begins with: in training, a turn begins with its speaker's name


# ---- one scene ----------------------------------------------------------------------------------------------------------


def play(scene, protocol):
    """The performance of a scene as a coroutine: yields a Call, is sent the Reply, returns `(messages, stats)`.

    messages: `{role, content}` in order, next-speaker decisions included as role NSP. Anything said is added through
    `yield` of a message dict, so that whoever drives the scene can show it at once.
    """
    cast = scene.speaking_characters + [ENVIRONMENT] * (ENVIRONMENT not in scene.speaking_characters)
    dialogue, messages = [], []
    stats = {"prefilled": 0, "decoded": 0, "cached": 0, "empty": 0, "fallbacks": 0, "original": 0}

    def add(role, content):
        messages.append({"role": role, "content": content})
        if role != NEXT_SPEAKER:
            dialogue.append({"character": role, "message": content})
        return messages[-1]

    def ask(role, chat, max_tokens, temperature, occasion):
        digest = hashlib.sha256(f"{protocol.seed}|{scene.key}|{occasion}|{role}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        opening = "" if role == "next_speaker" else f"{speaker}:"
        reply = yield Call(role, chat, SamplingParams(temperature, max_tokens=max_tokens, seed=seed), opening)
        stats["prefilled"] += reply.prompt_tokens - reply.cached_tokens
        stats["cached"] += reply.cached_tokens
        stats["decoded"] += reply.completion_tokens
        return reply.text

    speaker = scene.speaking_characters[0]
    for index in range(protocol.max_rounds):
        if index < protocol.continue_from and index < len(scene.dialogues):
            turn = scene.dialogues[index]
            speaker = turn["character"]
            stats["original"] += 1
            yield add(speaker, turn["message"])
            if index + 1 < min(protocol.continue_from, len(scene.dialogues)):  # the next line is given as well
                add(NEXT_SPEAKER, scene.dialogues[index + 1]["character"])
                continue
        else:
            role = "environment" if speaker == ENVIRONMENT else "actor"
            options = {**prompts.AT_PLAY, "thoughts": protocol.thoughts}
            system = {"role": "system", "content": system_prompt(scene, speaker, options, concise=True)}
            chat = [system, *perspective(dialogue, speaker, protocol.thoughts)]
            content = ""
            for attempt, temperature in enumerate((protocol.temperature, protocol.retry_temperature)):
                text = yield from ask(role, chat, protocol.max_tokens, temperature, f"{index}.{attempt}")
                content = clean_reply(text, speaker, cast)
                if content:
                    break
            if content:
                yield add(speaker, content)
            else:
                stats["empty"] += 1
        if index == protocol.max_rounds - 1:
            break
        named = None
        if dialogue and dialogue[-1]["character"] == speaker:  # one who said nothing is passed over without a question
            system = {"role": "system", "content": prompts.next_speaker(scene)}
            chat = [system, *next_speaker_perspective(dialogue)]
            text = yield from ask("next_speaker", chat, protocol.next_speaker_tokens, protocol.temperature, f"{index}")
            named = parse_next_speaker(text, cast)
        if named == END_CHAT and index >= protocol.end_from_round:
            add(NEXT_SPEAKER, END_CHAT)
            break
        if named not in cast or named == speaker:
            stats["fallbacks"] += 1
            last = dialogue[-1]["character"] if dialogue else speaker  # another one, if the speaker had nothing to say
            named = fall_back(scene, cast, {speaker, last}, f"{protocol.seed}|{scene.key}|{index}")
            if named is None:
                break
        add(NEXT_SPEAKER, named)
        speaker = named
    return messages, stats


def fall_back(scene, cast, without, seed):
    """Who speaks when the next-speaker model named nobody: a seeded choice of the major characters and the Environment, else
    of the cast; nobody (None) where all of them are in `without`."""
    candidates = [name for name in [*scene.major_characters, ENVIRONMENT] if name not in without]
    candidates = candidates or [name for name in cast if name not in without]
    return random.Random(seed).choice(candidates) if candidates else None


def parse_next_speaker(text, cast):
    """A name of the cast, END_CHAT, or None, out of whatever the model wrapped around it."""
    if "END CHAT" in text.upper():
        return END_CHAT
    names = "|".join(re.escape(name) for name in sorted(cast, key=len, reverse=True))  # the longest of two that fit
    found = re.search(rf"(?<!\w)({names})(?!\w)", text, re.IGNORECASE)
    return next((name for name in cast if found and name.casefold() == found[1].casefold()), None)


def clean_reply(text, character, cast):
    """What an actor's reply adds to the play: its own part without its name, and without what it repeats."""
    names = "|".join(re.escape(name) for name in sorted({*cast, character}, key=len, reverse=True))
    parts = re.split(rf"^[ \t]*[*#]*({names})[*]*[ \t]*:[*]*[ \t]*", text, flags=re.MULTILINE)
    own = parts[:1] + [part for name, part in zip(parts[1::2], parts[2::2], strict=True) if name == character]
    return cut_repetition("\n".join(part.strip() for part in own if part.strip()))


def cut_repetition(text):
    """Cuts what a model stuck in a loop says: long runs of letters, phrases said five times over, passages said again.

    A run of 100 letters or more keeps 20; of a sequence of 5 to 30 words five times in a row the first is kept; at the second
    occurrence of 15 words the rest goes.
    """
    text = re.sub(r"[A-Za-z]{100,}", lambda run: run[0][:20], text)
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    words = [text[first:last] for first, last in spans]
    for start in range(len(words)):
        for size in range(5, 31):
            phrase = words[start : start + size]
            if len(phrase) == size and words[start : start + 5 * size] == phrase * 5:
                end = start + 5 * size
                while words[end : end + size] == phrase:
                    end += size
                return cut_repetition(text[: spans[start + size - 1][1]] + text[spans[end - 1][1] :])
    seen = set()
    for start in range(len(words) - 14):
        passage = tuple(words[start : start + 15])
        if passage in seen:
            return text[: spans[start][0]].rstrip()
        seen.add(passage)
    return text


# ---- many scenes --------------------------------------------------------------------------------------------------------


def perform(scenes, models, protocol, on_message=lambda *_: None, on_end=lambda *_: None):
    """Plays scenes side by side, SIDE_BY_SIDE at a time: all calls that wait for the same model go to it in one batch.

    models: {role: model}. on_message(scene, message) at each thing said; on_end(scene, messages, stats, seconds) once for each.
    """
    scenes, live = iter(scenes), []
    waiting = []  # the Reply each live scene is to be sent next
    calls = {}
    while True:
        for scene in itertools.islice(scenes, SIDE_BY_SIDE - len(live)):  # as one leaves, the next enters
            live.append((scene, play(scene, protocol), time.perf_counter()))
            waiting.append(None)
        if not live:
            break
        for i, (scene, coroutine, begun) in enumerate(live):
            try:
                asked = coroutine.send(waiting[i])
                while not isinstance(asked, Call):
                    on_message(scene, asked)
                    asked = coroutine.send(None)
                calls[i] = asked
            except StopIteration as end:
                on_end(scene, *end.value, time.perf_counter() - begun)
                live[i] = None
        waiting = [None] * len(live)
        for model in {id(model): model for model in models.values()}.values():
            mine = [i for i in calls if models[calls[i].role] is model]
            if mine:
                asked = [calls[i] for i in mine]
                replies = model.chat([c.messages for c in asked], [c.params for c in asked], [c.opening for c in asked])
                for i, reply in zip(mine, replies, strict=True):
                    waiting[i] = reply
        waiting = [reply for reply, scene in zip(waiting, live, strict=True) if scene]
        live, calls = [scene for scene in live if scene], {}


def find_scenes(spec):
    """Scenes by the name of a bundled one, or FILE, FILE:INDEX, FILE:all."""
    stage = load_stage()
    if spec in stage:
        return [stage[spec]]
    file, _, which = spec.rpartition(":") if re.search(r":(all|-?\d+)$", spec) else (spec, "", "0")
    if not Path(file).exists():
        raise UsageError(f"--scene {spec}: neither a file nor a bundled scene; bundled are {', '.join(stage)}")
    scenes = load_scenes(file)
    if which == "all":
        return scenes
    if not 0 <= int(which) < len(scenes):
        raise UsageError(f"--scene {spec}: {file} has scenes 0 to {len(scenes) - 1}")
    return [scenes[int(which)]]


def free_directory(spec):
    """Makes a directory under out/plays that no run has used yet, named after the scene."""
    name = spec if spec in load_stage() else Path(spec).name
    base = cli.OUT / "plays" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    for number in range(1, 10_000):
        directory = base.with_name(f"{base.name}.{number}")
        try:
            directory.mkdir(parents=True)
            return directory
        except FileExistsError:
            continue
    raise UsageError(f"{base.parent}: full; choose --out")


class Stage:
    """The terminal as a stage: a colour for each character, thoughts dim, actions in italics."""

    COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")

    def __init__(self, scene):
        actors = [name for name in scene.speaking_characters if name != ENVIRONMENT]
        self.styles = {name: f"bold {self.COLOURS[i % len(self.COLOURS)]}" for i, name in enumerate(actors)}
        cli.stdout.rule(Text(cli.plain(scene.book)), style="dim") if cli.stdout.is_terminal else self._line(scene.book)
        self._line(scene.scenario + "\n", "italic")

    def show(self, message):
        name = message["role"]
        if name == ENVIRONMENT:
            self._line(message["content"] + "\n", "dim italic")
        elif name != NEXT_SPEAKER:
            spans = cli.Painter().spans(message["content"])
            cli.stdout.print(Text.assemble((cli.plain(name), self.styles.get(name, "bold")), "  ", *spans, "\n"))

    def _line(self, text, style=None):
        cli.stdout.print(cli.plain(text), style=style, markup=False)


def parse_args():
    parser = cli.Parser(__doc__, "python simulate.py --scene the-last-ferry/1 --max-rounds 6")
    add = parser.add_argument
    add("--scene", help="a bundled scene (see --list), or FILE, FILE:INDEX, FILE:all of a book or test file")
    add("--list", action="store_true", help="the bundled scenes")
    add("--actor", help="checkpoint directory or openai:MODEL (default: the last trained stage actor, else the bundled one)")
    add("--environment", help="who narrates the world (default: the actor)")
    add("--next-speaker", help="who names the next speaker (default: the actor)")
    add("--out", help="directory for transcripts.jsonl (default: a new one under out/plays)")
    add("--resume", action="store_true", help="with --out: play only the scenes that are not there yet")
    add("--max-rounds", type=int, default=20)
    add("--continue-from", type=int, default=0, metavar="K", help="the first K messages are the original ones")
    add("--without-thoughts", action="store_true", help="actors are asked for none, and do not see their own")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if bool(args.scene) == args.list:
        raise UsageError("give --scene NAME or FILE, or --list to see the bundled ones")
    if args.max_rounds < 1 or args.continue_from < 0 or args.temperature < 0:
        raise UsageError("--max-rounds is at least 1, --continue-from and --temperature at least 0")
    if args.resume and not args.out:
        raise UsageError("--resume goes with --out: which run should go on?")
    return args


def main():
    args = parse_args()
    if args.list:
        for name, scene in load_stage().items():
            held_out = "" if scene.tag == "train" else "  (held out)"
            cli.stdout.print(f"{name:28} {scene.book}: {scene.topic}{held_out}", markup=False)
        return
    scenes = find_scenes(args.scene)
    actor = args.actor or default_actor()
    specs = {"actor": actor, "environment": args.environment or actor, "next_speaker": args.next_speaker or actor}
    protocol = Protocol(
        max_rounds=args.max_rounds,
        temperature=args.temperature,
        thoughts=not args.without_thoughts,
        continue_from=args.continue_from,
        seed=args.seed,
    )
    settings = {**{role: str(spec) for role, spec in specs.items()}, **asdict(protocol)}
    out = Path(args.out) if args.out else free_directory(args.scene)
    done = cli.read_lines(out / TRANSCRIPTS, TRANSCRIPT_KEYS)
    if done and not args.resume:
        raise UsageError(f"{out}: holds transcripts already; add --resume to go on with them, or choose another --out")
    if done and done[0]["settings"] != settings:
        changed = [name for name in settings if done[0]["settings"].get(name) != settings[name]]
        raise UsageError(f"{out}: was played with other settings ({', '.join(changed)}); choose another --out")
    played = {(line["book"], line["i_p"], line["i_c"]) for line in done}
    left = [scene for scene in scenes if (scene.book, scene.i_p, scene.i_c) not in played]
    open_once = functools.cache(open_model)
    models = {role: open_once(spec) for role, spec in specs.items()}
    cli.make_dir(out)
    with cli.write_whole(out / SETTINGS) as file:
        json.dump(settings, file, indent=1)
    cli.write_lines(out / TRANSCRIPTS, done)  # without the torn line a kill may have left

    alone = Stage(left[0]) if len(scenes) == 1 and left else None
    turns = 0
    with cli.progress() as bar:
        task = bar.add_task(f"playing {len(scenes)} scenes", total=len(scenes), completed=len(done), visible=not alone)

        def on_message(scene, message):
            nonlocal turns
            turns += 1
            if alone:
                alone.show(message)
            else:
                bar.update(task, description=f"playing, {turns} turns")

        def on_end(scene, messages, stats, seconds):
            line = {"book": scene.book, "i_p": scene.i_p, "i_c": scene.i_c, "scene": scene.to_dict(), "settings": settings}
            line |= {"messages": messages, "stats": {**stats, "seconds": round(seconds, 3)}}
            cli.append_line(out / TRANSCRIPTS, line)
            done.append(line)
            bar.update(task, completed=len(done))

        try:
            perform(left, models, protocol, on_message, on_end)
        except (KeyboardInterrupt, UsageError) as error:
            why = str(error) + ". " if str(error) else ""
            kept = (
                f"{len(done)} of {len(scenes)} scenes are in {out}; the same command with --out {out} --resume plays the rest"
            )
            raise type(error)(f"{why}{kept}") from None
    totals = {name: sum(line["stats"][name] for line in done) for name in ("prefilled", "cached", "decoded", "seconds")}
    cli.note(
        f"{len(done)} scene(s) in {out / TRANSCRIPTS}: {totals['decoded']:,} tokens spoken, {totals['prefilled']:,} read, "
        f"{totals['cached']:,} remembered. Next: python judge.py {out}"
    )


if __name__ == "__main__":
    cli.run(main)
