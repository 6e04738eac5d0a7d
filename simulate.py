"""Plays a scene: one model plays every character, one the world around them, one names the next speaker.

    python simulate.py --list                                         the bundled scenes
    python simulate.py --scene the-last-ferry/1                       watch one, played by the stage actor
    python simulate.py --scene the-last-ferry/1 --play Hanne         play a part in it yourself
    python simulate.py --scene test.json:all --actor DIR --out DIR    a whole test file, many scenes at once
    python simulate.py --next-speaker-eval test.json --actor DIR      how often it names the real next speaker

The rules are in play/protocol.py. `--out DIR` gets `settings.json`, all that decides the result;
`transcripts.jsonl`, each scene as soon as it ends, in the order of the file at last; `failures.jsonl`, scenes
that could not be finished; `answers/` of endpoints; and, until the end, `replies.jsonl`, every reply as it
comes, so that `--resume` asks for none of them again and ends with what an uninterrupted run would have
written. The same settings and seed give the same bytes on a CPU, but for the last value of a line,
`stats.seconds` (drop it to compare two files: `sed 's/"seconds": [0-9.]*}}$//'`).
"""

import contextlib
import json
import os
import time
from collections import Counter
from pathlib import Path

from common import terminal
from common.files import UsageError, make_dir, write_whole
from data.chats import NEXT_SPEAKER
from data.scenes import find_scenes, load_stage
from engine.cpu import DTYPES
from engine.params import SamplingParams
from evals.next_speaker import evaluate_next_speaker
from llm import open_model
from llm.endpoint import CONCURRENCY
from llm.local import default_actor
from play.perform import SIDE_BY_SIDE, Journal, perform
from play.protocol import PROTOCOLS, Protocol
from play.retrieval import Retrieval
from play.session import Session
from play.session import play as play_session
from play.stage import Stage
from play.transcripts import (
    ANSWERS,
    REPLIES,
    SCRIPT,
    TRANSCRIPTS,
    Transcripts,
    default_directory,
    locked,
    settings_of,
)
from text.chat import CHAT_FORMATS

ROLES = ("actor", "environment", "next_speaker")

WATCHING = 0.7  # temperature of the default actor: greedy decoding makes a model of its size repeat itself


def parse_args():
    parser = terminal.Parser(__doc__, "python simulate.py --scene the-last-ferry/1 --max-rounds 6")
    add = parser.add_argument
    file_forms = "FILE, FILE:INDEX, FILE:FIRST-LAST or FILE:all of a book or test file"
    add("--scene", help=f"a bundled scene (see --list), or {file_forms}")
    add("--list", action="store_true", help="print the names of the bundled scenes")
    add("--next-speaker-eval", metavar="FILE", help="how often the next-speaker model is right (as --scene)")
    add("--play", metavar="NAME", help="play this character yourself; your lines are read from stdin")
    add("--limit", type=int, metavar="N", help="only the first N scenes")
    spec = "a checkpoint directory, openai:MODEL or openai:MODEL@URL"
    add("--actor", metavar="M", help=f"who plays the characters: {spec} (default: a stage actor)")
    add("--environment", metavar="M", help="who narrates the world (default: the actor)")
    add("--next-speaker", metavar="M", help="who names the next speaker (default: the actor)")
    add("--next-speaker-mode", choices=["text", "choices"], default="text", help="choices: by probability")
    add("--chat-format", choices=CHAT_FORMATS, help="of checkpoints (default: what each says)")
    add("--dtype", choices=DTYPES, help="of checkpoints (default: as fits; int8 is fast on a CPU)")
    add("--protocol", choices=PROTOCOLS, default="paper", help="release: as the paper's code plays")
    add("--out", metavar="DIR", help="directory of the results (default: a new one under out/plays)")
    add("--resume", action="store_true", help="with --out: go on with an interrupted run")
    add("--script", action="store_true", help=f"write {SCRIPT} as well, the scenes to be read")
    add("--max-rounds", type=int, default=20, metavar="N", help="(default: %(default)s)")
    add("--continue-from", type=int, default=0, metavar="K", help="begin with the first K original messages")
    add("--retrieve", metavar="S:N[+...]", help="remind actors of N pieces of raw, experience, conversation")
    add("--book", metavar="FILE", help="with --retrieve: the book of the scenes, or a directory of books")
    add("--retrieve-leaky", action="store_true", help="from the scene and later plots too, as the release")
    add("--without-thoughts", action="store_true", help="actors are asked for no thoughts, and see none")
    add("--thoughts", choices=["show", "hide"], help="on the screen (default: show; with --play hide)")
    watching = f"0 is greedy (default: 0, as published; {WATCHING} where no --actor is named)"
    add("--temperature", type=float, help=watching)
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="leave out tokens of a turn less likely than P times the likeliest",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="of a turn's tokens (default: 1, none)",
    )
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    default = "(default: %(default)s)"
    add("--side-by-side", type=int, default=SIDE_BY_SIDE, metavar="N", help=f"concurrent scenes {default}")
    add(
        "--concurrency", type=int, default=CONCURRENCY, metavar="N", help=f"requests to an endpoint {default}"
    )
    add("--requests-per-minute", type=float, metavar="N", help="to an endpoint, at most")
    args = parser.parse_args()
    if bool(args.scene) + args.list + bool(args.next_speaker_eval) != 1:
        raise UsageError("give --scene NAME or FILE, or --list to see the bundled scenes")
    if args.continue_from < 0:
        raise UsageError(f"--continue-from must be at least 0, not {args.continue_from}")
    if args.next_speaker_eval and (args.resume or args.script or args.retrieve):
        only = "--resume, --script and --retrieve"
        raise UsageError(f"{only} belong to --scene; --next-speaker-eval plays nothing")
    if bool(args.retrieve) != bool(args.book) or (args.retrieve_leaky and not args.retrieve):
        raise UsageError("give --retrieve and --book FILE together; --retrieve-leaky goes with them")
    if args.play and (args.resume or args.retrieve or args.next_speaker_eval or args.protocol != "paper"):
        raise UsageError("--play goes with --scene and the paper's protocol, not with --resume or --retrieve")
    if args.resume and not args.out:
        raise UsageError("--resume needs --out DIR, the run to go on with")
    for name in ("limit", "max_rounds", "side_by_side", "concurrency", "requests_per_minute"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be more than 0, not {value}")
    args.thoughts = args.thoughts or ("hide" if args.play else "show")
    if args.temperature is None:
        args.temperature = 0.0 if args.actor or args.next_speaker_eval else WATCHING
    return args


def main():
    args = parse_args()
    if args.list:
        return list_scenes()
    protocol = protocol_of(args)
    needs_default = not args.actor and not (args.next_speaker_eval and args.next_speaker)
    args.default = str(default_actor()) if needs_default else None
    if args.next_speaker_eval:
        return evaluate(args, protocol)
    scenes = find_scenes(args.scene, args.limit)
    session = person(scenes, protocol, args.play) if args.play is not None else None
    out = Path(args.out) if args.out else default_directory(args.scene, vars(args))
    from_book = (args.retrieve, scenes, args.book, args.retrieve_leaky)
    retrieval = Retrieval(*from_book) if args.retrieve else None
    models = open_roles(args, ROLES, out / ANSWERS)
    settings = settings_of(models, scenes, args.protocol, protocol)
    settings |= retrieval.settings if retrieval else {}
    settings |= {"human": session.human} if session else {}
    with locked(make_dir(out)):
        transcripts = Transcripts(out, settings, models, args.resume)
        if session:
            play_along(session, models, transcripts, args)
        else:
            with resumable(transcripts, len(scenes)):
                play_scenes(scenes, models, protocol, transcripts, args, retrieval)
        transcripts.complete(scenes, args.script)
    summarise(transcripts, models)


def list_scenes():
    for name, scene in load_stage().items():
        held_out = "" if scene.tag == "train" else "  (held out)"
        terminal.stdout.print(f"{name:28} {scene.book}: {scene.topic}{held_out}", markup=False)


def protocol_of(args):
    filters = dict(min_p=args.min_p, repetition_penalty=args.repetition_penalty)
    SamplingParams(args.temperature, seed=args.seed, **filters)  # refuses values out of range
    names = ("max_rounds", "next_speaker_mode", "temperature", "min_p", "repetition_penalty")
    names += ("continue_from", "seed")
    options = {name: getattr(args, name) for name in names}
    return Protocol(thoughts=not args.without_thoughts, **options, **PROTOCOLS[args.protocol])


def open_roles(args, roles, answers):
    """{role: model} of the command line; roles with the same endpoint or directory share a model."""
    options = dict(answers=answers, concurrency=args.concurrency, per_minute=args.requests_per_minute)
    options |= dict(chat_format=args.chat_format, dtype=args.dtype)
    opened, models = {}, {}
    for role in roles:
        spec = str(getattr(args, role) or args.actor or args.default)
        place = os.path.realpath(spec) if os.path.isdir(spec) else spec
        if place not in opened:
            opened[place] = open_model(spec, **options)
        models[role] = opened[place]
    if args.next_speaker_mode == "choices" and not models["next_speaker"].local:
        raise UsageError("--next-speaker-mode choices needs a local model; name one with --next-speaker")
    if (args.chat_format or args.dtype) and not any(model.local for model in models.values()):
        raise UsageError("--chat-format and --dtype are for checkpoints; an endpoint applies its own")
    return models


@contextlib.contextmanager
def resumable(transcripts, total):
    """Tells, when a run stops before its end, what is kept and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, UsageError, BrokenPipeError) as error:
        kept = f"{len(transcripts.finished)} of {total} scenes are in {transcripts.directory}"
        hint = f"{kept}; the same command with --out {transcripts.directory} --resume plays the rest"
        if isinstance(error, BrokenPipeError):
            terminal.note(f"stopped, since nobody reads the output any more. {hint}")
            raise
        reason = f"{error}. " if str(error) else ""
        raise type(error)(reason + hint) from None


def person(scenes, protocol, name):
    """The Session in which a person plays the character of this name."""
    if len(scenes) != 1:
        raise UsageError(f"--play needs one scene, and --scene names {len(scenes)}; add :INDEX")
    return Session(scenes[0], protocol, human=name)


def play_along(session, models, transcripts, args):
    """Plays a session on the terminal; its transcript is kept however it ends."""
    stage, started = Stage(session.scene, args.thoughts == "show"), time.monotonic()
    messages, stats, error = play_session(session, models, stage, terminal.lines("", keep=True))
    if not any(message["role"] != NEXT_SPEAKER for message in messages):
        raise UsageError(error or "nobody has said a word; there is no transcript")
    transcripts.add_finished(session.scene, messages, stats, time.monotonic() - started)
    if error:
        raise UsageError(f"{error}; what was played is in {transcripts.directory}")


def play_scenes(scenes, models, protocol, transcripts, args, retrieval=None):
    """Plays the scenes without a transcript: a single one on the terminal, several behind a progress bar."""
    missing = transcripts.missing(scenes)
    stage = Stage(missing[0], args.thoughts == "show") if len(scenes) == 1 and missing else None
    counts, started = Counter(), time.monotonic()
    no_progress = contextlib.nullcontext(lambda *_: None)  # a bar would wipe what is being spoken
    with no_progress if stage else terminal.reporting(len(scenes), "scenes") as update:

        def on_message(scene, message):
            counts["rounds"] += 1
            if stage:
                stage.on_message(message)

        def on_reply(reply):
            counts["tokens"] += reply.completion_tokens
            speed = counts["tokens"] / max(1e-9, time.monotonic() - started)
            ended = len(transcripts.finished) + len(transcripts.failed)
            update(ended, f"playing, {counts['rounds']} rounds, {speed:,.0f} tokens/s")

        handlers = on_message, transcripts.add_finished, transcripts.add_failed, on_reply
        on_text, journal = stage and stage.on_text, Journal(transcripts.directory / REPLIES)
        perform(missing, models, protocol, *handlers, on_text, journal, args.side_by_side, retrieval)
    if failed := transcripts.failed:
        raise UsageError(f"{len(failed)} scene(s) could not be finished; the first: {failed[0]['error']}")


def summarise(transcripts, models):
    total = Counter()
    for line in transcripts.finished:
        total.update({name: count for name, count in line["stats"].items() if name != "seconds"})
    if total["empty"] or total["fallbacks"]:
        drawn = f"next speakers drawn at random, as nobody was named: {total['fallbacks']}"
        terminal.note(f"turns without a word: {total['empty']}; {drawn}")
    where = transcripts.directory
    tokens = f"{total['decoded']:,} tokens generated, {total['prefilled']:,} prefilled"
    if not all(model.local for model in models.values()):
        terminal.note(f"the answers of the endpoints are kept in {where / ANSWERS}")
    elif total["least"]:
        tokens += f" ({total['prefilled'] / total['least']:.3f} of the least possible)"
    if "retrieved" in total:
        tokens += f"; about {total['retrieved']:,} tokens of prompts were retrieved"
    count = f"{len(transcripts.finished)} scene(s) in {where / TRANSCRIPTS}"
    terminal.note(f"{count}: {tokens}. Next: python judge.py {where}")


def evaluate(args, protocol):
    """Prints how often the next-speaker model is right, as JSON; with --out also writes it to a file."""
    scenes = find_scenes(args.next_speaker_eval, args.limit, "all")
    out = make_dir(args.out) if args.out else None
    model = open_roles(args, ["next_speaker"], out and out / ANSWERS)["next_speaker"]
    counts = evaluate_next_speaker(scenes, model, protocol)
    total = counts["total"]
    if not total:
        raise UsageError(f"{args.next_speaker_eval}: nobody to name, as no scene has a second message")
    names = ("correct", "last_other", "uniform", "answered")
    percent = {name: round(100 * counts[name] / total, 2) for name in names}
    baselines = f"the last other speaker: {percent['last_other']}%; uniform: {percent['uniform']}%"
    correct = f"{percent['correct']}% of {total:,} next speakers of {len(scenes)} scenes"
    terminal.note(f"{model.name}: {correct}; {baselines}")
    about = {"model": model.identity, "mode": args.next_speaker_mode, "scenes": len(scenes)}
    result = json.dumps({**about, **counts, "percent": percent})
    print(result)
    if out:
        with write_whole(out / "next_speaker.json") as file:
            file.write(result + "\n")


if __name__ == "__main__":
    terminal.run(main)
