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
import fcntl
import hashlib
import html
import itertools
import json
import os
import queue
import re
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.cells import cell_len
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

import cli
from cli import UsageError
from data.chats import NEXT_SPEAKER
from data.scenes import ENVIRONMENT, Report, Scene, load_scenes, load_stage, straighten
from generate import SamplingParams
from llm import CONCURRENCY, Reply, default_actor, open_model
from protocol import PROTOCOLS, Call, Protocol, SceneFailed, clean_reply, next_speakers_chat, play

TRANSCRIPTS, SETTINGS, REPLIES, FAILURES = "transcripts.jsonl", "settings.json", "replies.jsonl", "failures.jsonl"
SCRIPT = "script.md"
SIDE_BY_SIDE = 32  # scenes
EVERY = 10  # seconds between two lines of progress where stderr is no terminal
TRANSCRIPT_KEYS = ("book", "i_p", "i_c", "scene", "settings", "messages", "stats")


# ---- many scenes --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Live:
    """A scene on stage: its coroutine, the call it waits for, what has been said, when it began."""

    scene: Scene
    coroutine: object
    said: list
    begun: float
    call: Call | None = None


class Journal:
    """The replies of a run as they came, so that none is asked for again. path None: nothing is kept.

    run: the number of this run, from 1; each time a run is resumed it is one more.
    """

    def __init__(self, path=None):
        self.path = path
        lines = cli.read_lines(path, ()) if path else []
        self.replies = {key: kept for line in lines for key, kept in line.items()}
        self.run = 1 + max((run for run, _ in self.replies.values()), default=0)
        if lines:
            cli.write_lines(path, lines)  # without the torn line a kill may have left

    def take(self, scene, call):
        """(the Reply to a call of a scene, the run in which it came), None where there was none."""
        run, reply = self.replies.pop(f"{scene.key}|{call.occasion}", (0, None))
        return (Reply(**reply), run) if reply else None

    def keep(self, answered, errors=False):
        """Puts the replies to [(Live, Reply)] on the disk, those of a step all or none. errors: these too, if plays go on."""
        kept = [(live, reply) for live, reply in answered if errors or reply.error is None]
        if self.path and kept:
            cli.append_line(self.path, {f"{it.scene.key}|{it.call.occasion}": (self.run, asdict(reply)) for it, reply in kept})


def _nothing(*_):
    pass


def perform(scenes, models, protocol, on_message=_nothing, on_end=_nothing, on_failure=_nothing, on_reply=_nothing,
            on_text=None, journal=None, side_by_side=SIDE_BY_SIDE):  # fmt: skip
    """Plays scenes, so many side by side: as one leaves, the next enters, and each goes on as soon as its own reply is there.

    What scenes ask of a local model runs in one batch, step by step; endpoints are asked by a thread each. models: {role:
    model}. on_message(scene, message) at each thing said; on_end(scene, messages, stats, seconds) or on_failure(scene,
    messages so far, error) once for each; on_reply(reply) at each reply of a model; on_text(call, text) with what has been
    spoken of a turn by a local model, as it grows.
    """
    journal = journal or Journal()
    scenes, live, arrived = iter(scenes), [], queue.Queue()
    ready, waiting = [], []  # (Live, what to send it); Live with a call to ask
    inside, out = set(), 0  # Live with a call at a local model; calls at endpoints
    local = {id(model): model for model in models.values() if model.local}.values()

    def advance(it, sent):
        """Lets a scene go on until it waits for a reply that is not in the journal, or has ended."""
        try:
            while True:
                asked = it.coroutine.send(sent)
                sent = None
                if isinstance(asked, Call):
                    it.call = asked
                    sent = journal.take(it.scene, asked)
                    if sent is None:
                        return waiting.append(it)
                else:
                    it.said.append(asked)
                    on_message(it.scene, asked)
        except StopIteration as end:
            on_end(it.scene, *end.value, time.perf_counter() - it.begun)
        except SceneFailed as error:
            on_failure(it.scene, it.said, str(error))
        live.remove(it)

    def answered(pairs):
        journal.keep(pairs, errors=not protocol.silence_passes)
        inside.difference_update(it for it, _ in pairs)
        for it, reply in pairs:
            on_reply(reply)
            ready.append((it, (reply, journal.run)))

    def fetch(it, model):
        try:
            arrived.put((it, model.chat([it.call.messages], [it.call.params], [it.call.opening])[0]))
        except BaseException as error:
            arrived.put((it, error))

    try:
        while True:
            while ready or len(live) < side_by_side:
                if not ready:
                    if (scene := next(scenes, None)) is None:
                        break
                    live.append(Live(scene, play(scene, protocol), [], time.perf_counter()))
                    ready.append((live[-1], None))
                advance(*ready.pop(0))
            if not live:
                return
            asked, waiting = waiting, []
            for it in asked:
                model = models[it.call.role]
                if model.local:
                    model.ask(it, it.call.messages, it.call.params, it.call.opening)
                    inside.add(it)
                else:  # a daemon, so that Ctrl-C need not wait for it
                    threading.Thread(target=fetch, args=(it, model), daemon=True).start()
                    out += 1
            while not ready:
                for model in local:
                    answered(model.step())
                for it in inside if on_text else ():
                    if it.call.role != "next_speaker":
                        on_text(it.call, models[it.call.role].spoken(it))
                while out and not (arrived.empty() and (ready or inside)):
                    it, reply = arrived.get()
                    out -= 1
                    if isinstance(reply, BaseException):
                        raise reply
                    answered([(it, reply)])
    finally:  # Ctrl-C leaves nothing behind
        for model in local:
            model.drop()


# ---- who speaks next, against the books ---------------------------------------------------------------------------------


def evaluate_next_speaker(scenes, model, protocol, on_batch=lambda *_: None):
    """How often a model names the real next speaker, teacher-forced: for every message but the first it reads the real ones
    before it. Returns {correct, answered, failed, total, last_other, uniform}: counts, and for `uniform` an expected one.

    Baselines: the last other speaker (the last to speak before the current one who is not the current one; at the second
    message there is none, which counts as wrong), and uniform over the cast without the current speaker. A message by the
    one who has just spoken is left out, since by the protocol nobody follows himself.
    """
    counts, errors = dict.fromkeys(("correct", "answered", "failed", "total", "last_other", "uniform"), 0), []
    for i in range(1, max(len(scene.dialogues) for scene in scenes)):
        batch = []
        for scene in scenes:
            names = [turn["character"] for turn in scene.dialogues[: i + 1]]
            if len(names) > i and names[i] != names[i - 1]:
                cast = list(dict.fromkeys([*scene.speaking_characters, ENVIRONMENT]))
                batch.append((scene, cast, names))
                others = [name for name in names[:i] if name != names[i - 1]]
                counts["last_other"] += bool(others) and others[-1] == names[i]
                counts["uniform"] += 1 / (len(cast) - 1)
        params = []
        for _, cast, names in batch:
            choices = [name for name in cast if name != names[i - 1]] if protocol.next_speaker_mode == "choices" else None
            shared = dict(max_tokens=protocol.next_speaker_tokens, seed=protocol.seed)
            params.append(SamplingParams(protocol.temperature, choices=choices, **shared))
        replies = model.chat([next_speakers_chat(scene, scene.dialogues[:i]) for scene, _, _ in batch], params) if batch else []
        for (_, cast, names), reply in zip(batch, replies, strict=True):
            named = protocol.named(reply.text, cast)
            counts["total"] += 1
            errors += [reply.error] if reply.error is not None else []
            counts["answered"] += named in cast and named != names[i - 1]
            counts["correct"] += named == names[i]
        on_batch(i, counts)
    counts["failed"] = len(errors)
    if errors and len(errors) == counts["total"]:
        raise UsageError(f"none of {len(errors)} questions was answered; the first: {errors[0]}")
    if errors:
        cli.note(f"{len(errors)} of {counts['total']} questions were not answered; the first: {errors[0]}")
    return counts


def main_next_speaker_eval(args):
    scenes = find_scenes(args.next_speaker_eval, args.limit, "all")
    model = open_roles(args, ["next_speaker"])["next_speaker"]
    protocol = Protocol(
        next_speaker_mode=args.next_speaker_mode, temperature=args.temperature, seed=args.seed, **PROTOCOLS[args.protocol]
    )
    longest = max(len(scene.dialogues) for scene in scenes) - 1
    with cli.progress() as bar:
        task = bar.add_task("message by message", total=longest)
        counts = evaluate_next_speaker(scenes, model, protocol, lambda i, _: bar.update(task, completed=i))
    total = counts["total"]
    if not total:
        raise UsageError(f"{args.next_speaker_eval}: no second message in it, so nobody to name")
    shares = {name: round(100 * counts[name] / total, 2) for name in ("correct", "last_other", "uniform", "answered")}
    cli.note(
        f"{model.name}: {shares['correct']}% of {total:,} next speakers of {len(scenes)} scenes; the last other speaker: "
        f"{shares['last_other']}%; uniform over the cast: {shares['uniform']}%"
    )
    about = {"model": model.identity, "mode": args.next_speaker_mode, "scenes": len(scenes)}
    print(json.dumps(about | counts | {"percent": shares}))


# ---- what to play, and where it goes ------------------------------------------------------------------------------------


def find_scenes(spec, limit=None, which="0"):
    """Scenes by the name of a bundled one, or FILE, FILE:INDEX, FILE:FIRST-LAST (both included), FILE:all; the first `limit`
    of them. which: what of a FILE is meant where nothing is said and no limit given."""
    stage = load_stage()
    if spec in stage:
        return [stage[spec]]
    file, which = spec, "all" if limit else which
    if re.search(r":(all|-?\d{1,18}|\d{1,18}-\d{1,18})$", spec):
        file, _, which = spec.rpartition(":")
    if not Path(file).exists():
        raise UsageError(f"--scene {spec}: neither a file nor a bundled scene; bundled are {', '.join(stage)}")
    scenes = load_scenes(file, report := Report())
    for line in report.lines():
        cli.note(f"{file}: {line}")
    if any(what.startswith(("dropped: scene", "dropped: conversation")) for what in report):
        cli.note(f"{file}: its scenes are counted without those that are dropped")
    if which != "all":
        first, last = which.split("-") if re.fullmatch(r"\d+-\d+", which) else (which, which)
        if not 0 <= int(first) <= int(last) < len(scenes):
            raise UsageError(f"--scene {spec}: {file} has scenes 0 to {len(scenes) - 1}")
        scenes = scenes[int(first) : int(last) + 1]
    if len({scene.key for scene in scenes}) < len(scenes):
        raise UsageError(f"--scene {spec}: two scenes with the same book, plot and conversation number; play them one by one")
    return scenes[:limit]


def open_roles(args, roles=("actor", "environment", "next_speaker")):
    """{role: model} of the command line, one model for roles with the same endpoint or directory."""
    options = dict(answers=cli.OUT / "answers", concurrency=args.concurrency, per_minute=args.requests_per_minute)
    opened, models = {}, {}
    for role in roles:
        spec = str(getattr(args, role) or args.actor or args.default)
        same = os.path.realpath(spec) if os.path.isdir(spec) else spec
        models[role] = opened.setdefault(same, opened.get(same) or open_model(spec, **options))
    if args.next_speaker_mode == "choices" and not models["next_speaker"].local:
        raise UsageError("--next-speaker-mode choices needs the probabilities of a local model; name one with --next-speaker")
    return models


def output_directory(args, settings):
    """The directory of this run: `--out`, or a new one under out/plays, named after what is played and the settings."""
    if args.out:
        return cli.make_dir(args.out)
    name = args.scene if args.scene in load_stage() else Path(args.scene).name
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    for number in itertools.count(1):
        directory = cli.OUT / "plays" / f"{name}.{digest}.{number}"
        if not directory.exists():
            return cli.make_dir(directory)


@contextlib.contextmanager
def held(directory):
    """Keeps a second run out of a directory for as long as this one is in it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(f"{directory}: another run is writing there; wait for it or choose another --out") from None
    finally:
        os.close(descriptor)


# ---- to watch, to read --------------------------------------------------------------------------------------------------


class Stage:
    """The terminal as a stage: a colour for each character, thoughts dim (or not shown), actions in italics."""

    COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")

    def __init__(self, scene, thoughts=True):
        self.cast, self.thoughts = [*scene.speaking_characters, ENVIRONMENT], thoughts
        actors = [name for name in scene.speaking_characters if name != ENVIRONMENT]
        self.styles = {name: f"bold {self.COLOURS[i % len(self.COLOURS)]}" for i, name in enumerate(actors)}
        self.shown = ""
        cli.stdout.rule(Text(cli.plain(scene.book)), style="dim") if cli.stdout.is_terminal else cli.put(scene.book + "\n")
        cli.stdout.print(cli.plain(scene.scenario) + "\n", style="italic", markup=False)

    def hear(self, call, said):
        """What has been spoken of a turn: what will surely stay of it is shown, so no line that may be another's."""
        *lines, line = said.split("\n")
        start = straighten(line).strip("-*#> \t").casefold()
        names = [straighten(name).casefold() for name in self.cast]
        after = r"[*\s]*(\([^)]*\)?\s*)?"
        beginning = any(name.startswith(start) or re.fullmatch(re.escape(name) + after, start) for name in names)
        sure = clean_reply("\n".join(lines) if beginning else said, call.agent, self.cast)
        self.put(call.agent, re.sub(r"\S+$", "", sure))  # whole words, so that they can be wrapped

    def show(self, message):
        """A turn as it is played."""
        if message["role"] != NEXT_SPEAKER:
            if not message["content"].startswith(self.shown):  # something in the middle has been cut since
                cli.put("\n")
                self.shown = ""
            self.put(message["role"], message["content"])
            cli.put("\n\n")
            self.shown = ""

    def put(self, name, text):
        """Shows how a turn goes on; nothing where the end of it has been cut since."""
        if not text.startswith(self.shown) or len(text) == len(self.shown):
            return
        if not self.shown:
            self.painter, self.column = cli.Painter(), cell_len(name) + 2
            cli.put(f"{name}: ", self.styles.get(name, "dim"))
        for word in re.findall(r"\s+|\S+", text[len(self.shown) :]):
            spans = [span for span in self.painter.spans(word) if self.thoughts or span[1] != cli.THOUGHT]
            width = cell_len("".join(part for part, _ in spans))
            if cli.stdout.is_terminal and self.column + width > cli.stdout.width:
                cli.put("\n")
                self.column = 0
                if word.isspace():
                    continue
            for part, style in spans:
                cli.put(part, "dim italic" if name == ENVIRONMENT else style)
            self.column = width if "\n" in word else self.column + width
        self.shown = text


def markdown(line):
    """A played scene as Markdown, in which nothing that was said is markup or HTML."""

    def plain(text):
        text = re.sub(r"([\\`*_\[\]#|~])", r"\\\1", html.escape(cli.plain(" ".join(text.split())), quote=False))
        return re.sub(r"^(\d*)([-+.)])", r"\1\\\2", text)  # no list, no line

    scene = line["scene"]
    parts = [f"## {plain(scene['book'])}", f"*{plain(scene['scenario'])}*" if scene["scenario"].strip() else ""]
    for message in line["messages"]:
        if message["role"] == ENVIRONMENT:
            parts.append(f"> {plain(message['content'])}")
        elif message["role"] != NEXT_SPEAKER:
            spans = itertools.groupby(cli.Painter().spans(message["content"]), lambda span: span[1])
            text = [("".join(part for part, _ in group), style) for style, group in spans]
            text = [f"*{plain(part)}*" if style and part.strip() else plain(part) for part, style in text]
            parts.append(f"**{plain(message['role'])}:** {' '.join(filter(None, text))}")
    return "\n\n".join(filter(None, parts)) + "\n"


# ---- command line -------------------------------------------------------------------------------------------------------


def parse_args():
    parser = cli.Parser(__doc__, "python simulate.py --scene the-last-ferry/1 --max-rounds 6")
    add = parser.add_argument
    add("--scene", help="a bundled scene (see --list), or FILE, FILE:INDEX, FILE:FIRST-LAST, FILE:all of a book or test file")
    add("--list", action="store_true", help="the bundled scenes")
    add("--next-speaker-eval", metavar="FILE", help="how often the next-speaker model is right on these scenes (as --scene)")
    add("--limit", type=int, metavar="N", help="only the first N scenes of them")
    add("--actor", metavar="M", help="checkpoint directory, openai:MODEL or openai:MODEL@URL (default: a stage actor)")
    add("--environment", metavar="M", help="who narrates the world (default: the actor)")
    add("--next-speaker", metavar="M", help="who names the next speaker (default: the actor)")
    add("--next-speaker-mode", choices=["text", "choices"], default="text", help="choices: one of the cast by its probability")
    add("--protocol", choices=PROTOCOLS, default="paper", help="release: as the code released with the paper plays")
    add("--out", metavar="DIR", help="directory for the transcripts (default: one under out/plays, named after the settings)")
    add("--resume", action="store_true", help="with --out: go on with an interrupted run of the same settings")
    add("--script", action="store_true", help=f"write {SCRIPT} as well, the scenes to be read")
    add("--max-rounds", type=int, default=20)
    add("--continue-from", type=int, default=0, metavar="K", help="the first K messages are the original ones")
    add("--without-thoughts", action="store_true", help="actors are asked for none, and do not see their own")
    add("--thoughts", choices=["show", "hide"], default="show", help="on the screen; the transcript has them in any case")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    add("--seed", type=int, default=0)
    add("--side-by-side", type=int, default=SIDE_BY_SIDE, metavar="N", help="scenes on stage at once (default: %(default)s)")
    add("--concurrency", type=int, default=CONCURRENCY, metavar="N", help=f"requests to an endpoint at once ({CONCURRENCY})")
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
            cli.stdout.print(f"{name:28} {scene.book}: {scene.topic}{held_out}", markup=False)
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
    settings |= {"scenes": hashlib.sha256(contents.encode()).hexdigest()[:16], "protocol": args.protocol, **asdict(protocol)}
    with held(out := output_directory(args, settings)):
        done = begin(out, settings, args.resume)
        run(scenes, models, protocol, settings, out, done, args)


def begin(out, settings, resume):
    """The lines of the run that this directory holds; UsageError where it is none that can go on."""
    done = cli.read_lines(out / TRANSCRIPTS, TRANSCRIPT_KEYS)
    begun = (out / SETTINGS).exists()
    if (done or begun) and not resume:
        raise UsageError(f"{out}: holds a run already; add --resume to go on with it, or choose another --out")
    if done or begun:
        old = cli.read_json(out / SETTINGS)
        known = {name for name in settings if f"{name}_identity" in settings}  # what a model is, not where it lies
        if changed := sorted(name for name in {*settings, *old} - known if settings.get(name) != old.get(name)):
            raise UsageError(f"{out}: was played with other settings ({', '.join(changed)}); choose another --out")
    with cli.write_whole(out / SETTINGS) as file:
        json.dump(settings, file, indent=1)
    cli.write_lines(out / TRANSCRIPTS, done)  # without the torn line a kill may have left
    (out / FAILURES).unlink(missing_ok=True)
    return done


def run(scenes, models, protocol, settings, out, done, args):
    """Plays what is missing, and puts the transcripts in order."""
    played = {(line["book"], line["i_p"], line["i_c"]) for line in done}
    left = [scene for scene in scenes if (scene.book, scene.i_p, scene.i_c) not in played]
    alone = Stage(left[0], args.thoughts == "show") if len(scenes) == 1 and left else None
    failures, rounds, decoded, begun, told = [], 0, 0, time.monotonic(), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with contextlib.nullcontext() if alone else cli.progress(*columns) as bar:  # a bar would wipe what is being spoken
        task = None if alone else bar.add_task(f"playing {len(scenes)} scenes", total=len(scenes), completed=len(done))

        def update():
            nonlocal told
            if alone:
                return
            speed = decoded / max(1e-9, time.monotonic() - begun)
            what = f"playing, {rounds} rounds, {speed:,.0f} tokens/s"
            bar.update(task, description=what, completed=len(done) + len(failures))
            if not cli.stderr.is_terminal and time.monotonic() - told > EVERY:
                told = time.monotonic()
                cli.note(f"{what}, {len(done)} of {len(scenes)} scenes")

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
            line = {"book": scene.book, "i_p": scene.i_p, "i_c": scene.i_c, "scene": scene.to_dict(), "settings": settings}
            return line | {"messages": messages, "stats": stats}

        def on_end(scene, messages, stats, seconds):
            done.append(line_of(scene, messages, {**stats, "seconds": round(seconds, 3)}))
            cli.append_line(out / TRANSCRIPTS, done[-1])
            update()

        def on_failure(scene, messages, error):
            failures.append(line_of(scene, messages, {}) | {"error": error})
            cli.append_line(out / FAILURES, failures[-1])
            update()

        hooks = dict(on_message=on_message, on_end=on_end, on_failure=on_failure, on_reply=on_reply)
        try:
            journal = Journal(out / REPLIES)
            hear = alone.hear if alone else None
            perform(left, models, protocol, **hooks, on_text=hear, journal=journal, side_by_side=args.side_by_side)
            if failures:
                raise UsageError(f"{len(failures)} scene(s) could not be finished; the first: {failures[0]['error']}")
        except (KeyboardInterrupt, UsageError) as error:
            why = str(error) + ". " if str(error) else ""
            kept = f"{len(done)} of {len(scenes)} scenes are in {out}"
            raise type(error)(f"{why}{kept}; the same command with --out {out} --resume plays the rest") from None
    order = {(scene.book, scene.i_p, scene.i_c): i for i, scene in enumerate(scenes)}
    done.sort(key=lambda line: order.get((line["book"], line["i_p"], line["i_c"]), len(order)))
    cli.write_lines(out / TRANSCRIPTS, done)
    (out / REPLIES).unlink(missing_ok=True)
    if args.script:
        with cli.write_whole(out / SCRIPT) as file:
            file.write("\n".join(markdown(line) for line in done))
    counted = ("prefilled", "least", "decoded", "empty", "fallbacks")
    total = {name: sum(line["stats"][name] for line in done) for name in counted}
    if total["empty"] or total["fallbacks"]:
        cli.note(f"turns without a word: {total['empty']}; next speakers drawn, as nobody was named: {total['fallbacks']}")
    least = (
        f" ({total['prefilled'] / total['least']:.3f} of the least possible)"
        if total["least"] and all(m.local for m in models.values())
        else ""
    )
    cli.note(
        f"{len(done)} scene(s) in {out / TRANSCRIPTS}: {total['decoded']:,} tokens spoken, {total['prefilled']:,} read{least}. "
        f"Next: python judge.py {out}"
    )


if __name__ == "__main__":
    cli.run(main)
