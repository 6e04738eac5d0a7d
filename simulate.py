"""Puts a scene on stage: one model plays every character, one the world around them, one says who is next.

    python simulate.py --list                                            the bundled scenes
    python simulate.py --scene the-last-ferry/1                          watch one, played by the stage actor
    python simulate.py --scene test.json:all --actor DIR --out DIR       a whole test file, all scenes side by side
    python simulate.py --next-speaker-eval test.json --next-speaker DIR  how often it names who really speaks next

The rules are in protocol.py. `--out DIR` gets `settings.json`, all that decides the result; `transcripts.jsonl`, a scene as
soon as it is finished, in the order of the file at the end; `failures.jsonl` with scenes that could not be finished, if any;
and until then `replies.jsonl`, every reply as it comes, so that `--resume` asks for none of them again and ends with what an
uninterrupted run would have written. The same settings and seed give the same bytes on a CPU, but for the last value of a line,
`stats.seconds`: to compare two files of transcripts, drop it (`sed 's/"seconds": [0-9.]*}}$//'`).
"""

import contextlib
import hashlib
import json
import os
import time
from dataclasses import asdict

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from common import files, terminal
from common.files import UsageError, append_line, write_lines, write_whole
from data.scenes import find_scenes, load_stage
from engine.params import SamplingParams
from evals.next_speaker import evaluate_next_speaker
from llm import open_model
from llm.endpoint import CONCURRENCY
from llm.local import default_actor
from play.perform import SIDE_BY_SIDE, Journal, perform
from play.protocol import PROTOCOLS, Protocol
from play.stage import Stage
from play.transcripts import FAILURES, REPLIES, SCRIPT, TRANSCRIPTS, begin, held, markdown, output_directory


def main_next_speaker_eval(args):
    scenes = find_scenes(args.next_speaker_eval, args.limit, "all")
    model = open_roles(args, ["next_speaker"])["next_speaker"]
    protocol = Protocol(
        next_speaker_mode=args.next_speaker_mode,
        temperature=args.temperature,
        seed=args.seed,
        **PROTOCOLS[args.protocol],
    )
    longest = max(len(scene.dialogues) for scene in scenes) - 1
    with terminal.progress() as bar:
        task = bar.add_task("message by message", total=longest)
        counts = evaluate_next_speaker(scenes, model, protocol, lambda i, _: bar.update(task, completed=i))
    total = counts["total"]
    if not total:
        raise UsageError(f"{args.next_speaker_eval}: no second message in it, so nobody to name")
    shares = {
        name: round(100 * counts[name] / total, 2)
        for name in ("correct", "last_other", "uniform", "answered")
    }
    terminal.note(
        f"{model.name}: {shares['correct']}% of {total:,} next speakers of {len(scenes)} scenes; the last other speaker: "
        f"{shares['last_other']}%; uniform over the cast: {shares['uniform']}%"
    )
    about = {"model": model.identity, "mode": args.next_speaker_mode, "scenes": len(scenes)}
    print(json.dumps(about | counts | {"percent": shares}))


def open_roles(args, roles=("actor", "environment", "next_speaker")):
    """{role: model} of the command line, one model for roles with the same endpoint or directory."""
    options = dict(
        answers=files.OUT / "answers", concurrency=args.concurrency, per_minute=args.requests_per_minute
    )
    opened, models = {}, {}
    for role in roles:
        spec = str(getattr(args, role) or args.actor or args.default)
        same = os.path.realpath(spec) if os.path.isdir(spec) else spec
        models[role] = opened.setdefault(same, opened.get(same) or open_model(spec, **options))
    if args.next_speaker_mode == "choices" and not models["next_speaker"].local:
        raise UsageError(
            "--next-speaker-mode choices needs the probabilities of a local model; name one with --next-speaker"
        )
    return models


def parse_args():
    parser = terminal.Parser(__doc__, "python simulate.py --scene the-last-ferry/1 --max-rounds 6")
    add = parser.add_argument
    add(
        "--scene",
        help="a bundled scene (see --list), or FILE, FILE:INDEX, FILE:FIRST-LAST, FILE:all of a book or test file",
    )
    add("--list", action="store_true", help="the bundled scenes")
    add(
        "--next-speaker-eval",
        metavar="FILE",
        help="how often the next-speaker model is right on these scenes (as --scene)",
    )
    add("--limit", type=int, metavar="N", help="only the first N scenes of them")
    add(
        "--actor",
        metavar="M",
        help="checkpoint directory, openai:MODEL or openai:MODEL@URL (default: a stage actor)",
    )
    add("--environment", metavar="M", help="who narrates the world (default: the actor)")
    add("--next-speaker", metavar="M", help="who names the next speaker (default: the actor)")
    add(
        "--next-speaker-mode",
        choices=["text", "choices"],
        default="text",
        help="choices: one of the cast by its probability",
    )
    add(
        "--protocol",
        choices=PROTOCOLS,
        default="paper",
        help="release: as the code released with the paper plays",
    )
    add(
        "--out",
        metavar="DIR",
        help="directory for the transcripts (default: one under out/plays, named after the settings)",
    )
    add(
        "--resume", action="store_true", help="with --out: go on with an interrupted run of the same settings"
    )
    add("--script", action="store_true", help=f"write {SCRIPT} as well, the scenes to be read")
    add("--max-rounds", type=int, default=20)
    add(
        "--continue-from", type=int, default=0, metavar="K", help="the first K messages are the original ones"
    )
    add("--without-thoughts", action="store_true", help="actors are asked for none, and do not see their own")
    add(
        "--thoughts",
        choices=["show", "hide"],
        default="show",
        help="on the screen; the transcript has them in any case",
    )
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    add("--seed", type=int, default=0)
    add(
        "--side-by-side",
        type=int,
        default=SIDE_BY_SIDE,
        metavar="N",
        help="scenes on stage at once (default: %(default)s)",
    )
    add(
        "--concurrency",
        type=int,
        default=CONCURRENCY,
        metavar="N",
        help=f"requests to an endpoint at once ({CONCURRENCY})",
    )
    add("--requests-per-minute", type=float, metavar="N", help="to an endpoint, at most")
    args = parser.parse_args()
    if bool(args.scene) + args.list + bool(args.next_speaker_eval) != 1:
        raise UsageError("give --scene NAME or FILE, or --list to see the bundled ones")
    if args.max_rounds < 1 or args.continue_from < 0 or not args.temperature >= 0:
        raise UsageError("--max-rounds is at least 1, --continue-from and --temperature at least 0")
    if args.resume and not args.out:
        raise UsageError("--resume goes with --out: which run should go on?")
    for name in ("limit", "side_by_side", "concurrency", "requests_per_minute"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} is more than 0, not {value}")
    return args


def main():
    args = parse_args()
    if args.list:
        for name, scene in load_stage().items():
            held_out = "" if scene.tag == "train" else "  (held out)"
            terminal.stdout.print(f"{name:28} {scene.book}: {scene.topic}{held_out}", markup=False)
        return
    args.default = None
    if not args.actor and not (args.next_speaker_eval and args.next_speaker):
        args.default = default_actor()
    if args.next_speaker_eval:
        return main_next_speaker_eval(args)
    scenes = find_scenes(args.scene, args.limit)
    models = open_roles(args)
    protocol = Protocol(
        **PROTOCOLS[args.protocol],
        max_rounds=args.max_rounds,
        next_speaker_mode=args.next_speaker_mode,
        temperature=args.temperature,
        thoughts=not args.without_thoughts,
        continue_from=args.continue_from,
        seed=args.seed,
    )
    SamplingParams(args.temperature, seed=args.seed)  # one that cannot be is told before anything is written
    settings = {role: model.name for role, model in models.items()}
    settings |= {f"{role}_identity": model.identity for role, model in models.items()}
    contents = json.dumps([scene.to_dict() for scene in scenes], sort_keys=True)
    settings |= {
        "scenes": hashlib.sha256(contents.encode()).hexdigest()[:16],
        "protocol": args.protocol,
        **asdict(protocol),
    }
    with held(out := output_directory(args, settings)):
        done = begin(out, settings, args.resume)
        run(scenes, models, protocol, settings, out, done, args)


def run(scenes, models, protocol, settings, out, done, args):
    """Plays what is missing, and puts the transcripts in order."""
    played = {(line["book"], line["i_p"], line["i_c"]) for line in done}
    left = [scene for scene in scenes if (scene.book, scene.i_p, scene.i_c) not in played]
    alone = Stage(left[0], args.thoughts == "show") if len(scenes) == 1 and left else None
    failures, rounds, decoded, begun, told = [], 0, 0, time.monotonic(), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        contextlib.nullcontext() if alone else terminal.progress(*columns) as bar
    ):  # a bar would wipe what is being spoken
        task = (
            None
            if alone
            else bar.add_task(f"playing {len(scenes)} scenes", total=len(scenes), completed=len(done))
        )

        def update():
            nonlocal told
            if alone:
                return
            speed = decoded / max(1e-9, time.monotonic() - begun)
            what = f"playing, {rounds} rounds, {speed:,.0f} tokens/s"
            bar.update(task, description=what, completed=len(done) + len(failures))
            if not terminal.stderr.is_terminal and time.monotonic() - told > terminal.EVERY:
                told = time.monotonic()
                terminal.note(f"{what}, {len(done)} of {len(scenes)} scenes")

        def on_message(scene, message):
            nonlocal rounds
            rounds += 1
            if alone:
                alone.show(message)
            update()

        def on_reply(reply):
            nonlocal decoded
            decoded += reply.completion_tokens

        def line_of(scene, messages, stats):
            line = {
                "book": scene.book,
                "i_p": scene.i_p,
                "i_c": scene.i_c,
                "scene": scene.to_dict(),
                "settings": settings,
            }
            return line | {"messages": messages, "stats": stats}

        def on_end(scene, messages, stats, seconds):
            done.append(line_of(scene, messages, {**stats, "seconds": round(seconds, 3)}))
            append_line(out / TRANSCRIPTS, done[-1])
            update()

        def on_failure(scene, messages, error):
            failures.append(line_of(scene, messages, {}) | {"error": error})
            append_line(out / FAILURES, failures[-1])
            update()

        hooks = dict(on_message=on_message, on_end=on_end, on_failure=on_failure, on_reply=on_reply)
        try:
            journal = Journal(out / REPLIES)
            hear = alone.hear if alone else None
            perform(
                left, models, protocol, **hooks, on_text=hear, journal=journal, side_by_side=args.side_by_side
            )
            if failures:
                raise UsageError(
                    f"{len(failures)} scene(s) could not be finished; the first: {failures[0]['error']}"
                )
        except (KeyboardInterrupt, UsageError) as error:
            why = str(error) + ". " if str(error) else ""
            kept = f"{len(done)} of {len(scenes)} scenes are in {out}"
            raise type(error)(
                f"{why}{kept}; the same command with --out {out} --resume plays the rest"
            ) from None
    order = {(scene.book, scene.i_p, scene.i_c): i for i, scene in enumerate(scenes)}
    done.sort(key=lambda line: order.get((line["book"], line["i_p"], line["i_c"]), len(order)))
    write_lines(out / TRANSCRIPTS, done)
    (out / REPLIES).unlink(missing_ok=True)
    if args.script:
        with write_whole(out / SCRIPT) as file:
            file.write("\n".join(markdown(line) for line in done))
    counted = ("prefilled", "least", "decoded", "empty", "fallbacks")
    total = {name: sum(line["stats"][name] for line in done) for name in counted}
    if total["empty"] or total["fallbacks"]:
        terminal.note(
            f"turns without a word: {total['empty']}; next speakers drawn, as nobody was named: {total['fallbacks']}"
        )
    least = (
        f" ({total['prefilled'] / total['least']:.3f} of the least possible)"
        if total["least"] and all(m.local for m in models.values())
        else ""
    )
    terminal.note(
        f"{len(done)} scene(s) in {out / TRANSCRIPTS}: {total['decoded']:,} tokens spoken, {total['prefilled']:,} read{least}. "
        f"Next: python judge.py {out}"
    )


if __name__ == "__main__":
    terminal.run(main)
