"""Shows training data: counts, lengths, repairs, and any chat with its tokens under loss.

    python -m data.show books/ --tokenizer DIR               statistics
    python -m data.show books/ --tokenizer DIR --chat 12     document 12 of the epoch, coloured by channel
    python -m data.show books/ --test-scenes held_out.json   the held-out scenes, for simulate.py

Books are files or directories of them; without any it shows the bundled stories.
"""

import json
from collections import Counter

import numpy as np
from rich.table import Table

from common import terminal
from common.files import UsageError, write_whole
from data.brackets import CHANNELS
from data.chats import scene_to_chats
from data.records import Report
from data.scenes import STAGE, read_scenes, to_test_scene
from data.stream import add_data_flags, open_stream, row_lengths
from text.chat import CHAT_FORMATS
from tokenizer import STAGE_TOKENIZER, load_tokenizer

STYLES = ("dim", "green", "yellow italic", "magenta", "green")  # not under loss, then CHANNELS
BINS = 16


def parse_args():
    parser = terminal.Parser(__doc__, "python -m data.show data/stage --chat 3")
    add = parser.add_argument
    add("paths", nargs="*", default=[STAGE], metavar="PATH", help="books (default: the bundled stories)")
    add("--tokenizer", default=STAGE_TOKENIZER, help="directory or file (default: the stage's)")
    add("--chat-format", choices=CHAT_FORMATS, help="default: what the tokenizer says")
    add("--chat", type=int, metavar="N", help="show document N, from 0; general data is after the scenes")
    add("--seq-len", type=int, default=16_384, help="tokens in a packed row (default: 16384, the paper's)")
    add("--epoch", type=int, default=0, help="epoch whose draw of prompts is shown (default: 0)")
    add("--test-scenes", metavar="FILE", help="write the held-out scenes as a test file")
    add_data_flags(parser)
    args = parser.parse_args()
    if args.epoch < 0:
        raise UsageError(f"--epoch is at least 0, not {args.epoch}")
    return args


def all_scenes(args, report):
    return (scene for scene, _ in read_scenes(args.paths, report, args.held_out_books))


def chats_of(scene, args):
    """The training chats of a scene in the epoch, in the order of the documents; none if it is held out."""
    if scene.tag != "train":
        return []
    epoch = args.epoch if args.variants == "draw" else 0
    return scene_to_chats(scene, epoch, args.seed, not args.without_thoughts, variants=args.variants)


def statistics(args, stream, lengths, counts):
    """Rows of the table. lengths: tokens of each document; counts: its supervised ones of each channel."""
    tags, kinds, turns = Counter(), Counter(), []
    for scene in all_scenes(args, Report()):
        tags[scene.tag] += 1
        for chat in chats_of(scene, args):
            kinds[chat.kind] += 1
            turns.append(len(chat.messages) - 1)
    tokens, supervised, rows = int(lengths.sum()), counts.sum(0), len(stream.rows)
    useful = sum(int(row_lengths(row).sum()) for row in stream.rows) / (rows * stream.seq_len)
    yield "conversations", ", ".join(f"{count:,} {tag}" for tag, count in sorted(tags.items()))
    yield "chats", ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in kinds.items())
    yield "turns in a chat", f"mean {np.mean(turns):.1f}, most {max(turns)}"
    if general := len(lengths) - len(turns):
        share = lengths[len(turns) :].sum() / tokens
        yield "general data", f"{general:,} chats, {share:.1%} of the tokens"
    middle = f"mean {lengths.mean():,.0f}, median {np.median(lengths):,.0f}"
    yield "tokens", f"{tokens:,}; {middle}, longest {lengths.max():,}"
    yield "under loss", f"{supervised.sum():,} tokens, {supervised.sum() / tokens:.1%}"
    for name, number in zip(CHANNELS, supervised.tolist(), strict=True):
        yield f"  {name}", f"{number:,}, {number / supervised.sum():.1%}"
    yield f"rows of {stream.seq_len:,}", f"{rows:,}, {useful:.1%} useful"
    if stream.cut:
        left_out = f"{stream.without:,} pieces without a token under loss left out"
        yield "longer than a row", f"{stream.cut:,} cut; {left_out}"


def histogram(lengths):
    """Lines of a bar chart: how many documents have how many tokens."""
    counts, edges = np.histogram(lengths, bins=BINS, range=(0, lengths.max()))
    for count, start, end in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        eighths = round(count / counts.max() * 40 * 8)
        bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
        yield f"{start:7,.0f} to {end:7,.0f}" + (f" {bar} {count:,}" if count else "")


def show(tokenizer, ids, channels):
    """A document as the model reads it, in the channels' colours or, without a terminal, «channel|text»."""
    edges = [0, *(np.flatnonzero(np.diff(channels)) + 1).tolist(), len(ids)]
    for start, end in zip(edges, edges[1:], strict=False):
        part = ids[start:end].tolist()
        text = b"".join(tokenizer.token_bytes(i) or tokenizer.names.get(i, "").encode() for i in part)
        channel, text = channels[start], text.decode(errors="replace")
        if channel and not terminal.stdout.is_terminal:
            text = f"«{CHANNELS[channel - 1]}|{text}»"
        terminal.put(text, STYLES[channel])
    terminal.put("\n")
    if terminal.stdout.is_terminal:
        for name, style in zip(("not under loss", *CHANNELS), STYLES, strict=True):
            terminal.put(f"{name}  ", style)
        terminal.put("\n")


def write_test_scenes(args):
    """Writes --test-scenes, and prints what reading repaired and dropped."""
    scenes = all_scenes(args, report := Report(args.strict))
    scenes = [to_test_scene(scene) for scene in scenes if scene.tag != "train"]
    if not scenes:
        hint = "--held-out-books 0.1 holds out a tenth of the books"
        raise UsageError(f"{args.paths[0]}: no held-out scene in it; {hint}")
    with write_whole(args.test_scenes) as file:
        json.dump(scenes, file, ensure_ascii=False, indent=1)
    note = f"{len(scenes)} held-out scenes; python simulate.py --scene {args.test_scenes}:0 plays one"
    terminal.note("\n".join([note, *report.lines()]))


def main():
    args = parse_args()
    if args.test_scenes:
        write_test_scenes(args)
        if args.chat is None:
            return
    tokenizer = load_tokenizer(args.tokenizer, args.chat_format)
    stream = open_stream(args, args.paths, tokenizer)
    while stream.start["epoch"] < args.epoch:
        stream.begin(stream.next)
    chosen = [(stream.store(source), numbers) for source, numbers in stream.chosen.items()]
    if args.chat is not None:
        documents = [(store, number) for store, numbers in chosen for number in numbers.tolist()]
        if not 0 <= args.chat < len(documents):
            raise UsageError(f"--chat {args.chat}: there are {len(documents)} documents, counted from 0")
        store, number = documents[args.chat]
        show(tokenizer, *store.read(number))
        return
    lengths = np.concatenate([store.lengths[numbers] for store, numbers in chosen])
    counts = np.concatenate([store.counts[numbers] for store, numbers in chosen])
    table = Table(show_header=False)
    for row in statistics(args, stream, lengths, counts):
        table.add_row(*row)
    terminal.put(f"epoch {args.epoch} of {', '.join(map(str, args.paths))}\n")
    terminal.stdout.print(table)
    found = stream.report.lines() or ["nothing repaired or dropped"]
    terminal.put("\n".join(["", "tokens in a chat", *histogram(lengths), "", *found, ""]))


if __name__ == "__main__":
    terminal.run(main)
