"""Trains an actor: the loss is on a character's own messages, packed rows, FSDP over any number of ranks.

    torchrun train.py                                            the stage actor, on the bundled scenes
    torchrun --nproc_per_node 8 train.py --model DIR --data BOOK.json ... --out DIR
    python train.py --model DIR --evaluate                       held-out loss by channel

`--out DIR` holds `log.jsonl` (a line for each step), `loss.png`, checkpoints `step-N/` and at the end
`final/`, a Hugging Face directory (with --lora, one of PEFT). Ctrl-C and SIGTERM save and exit; `--resume`
continues, bit for bit on as many ranks, up to rounding on any other number. Under `torchrun --max-restarts N`
a run of which a rank died continues by itself; no rank outlives its torchrun.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
from checkpoint.adapters import is_adapter, tokenizer_directory
from common import files, terminal
from common.files import UsageError, make_dir, write_json
from data.scenes import STAGE
from data.stream import add_data_flags, open_stream
from engine.cpu import fast_bf16
from llm.local import fingerprint
from model import PRESETS, ModelConfig
from text.chat import CHAT_FORMATS
from tokenizer import STAGE_TOKENIZER, load_tokenizer
from training import costs
from training.log import Log
from training.parallel import (
    RANK,
    WORLD_SIZE,
    agreed,
    shard_model,
    start_ranks,
    stop_requests,
    sum_over_ranks,
)
from training.resume import (
    fill_first,
    find_checkpoints,
    restarted,
    restore,
    save_final,
    save_state,
    settings_of,
)
from training.step import choose_held_out, evaluate, learning_rate, make_optimizer, sample, train_step

# Defaults: for the stage actor, for other models as published for CoSER (paper, section 5), and with --lora.
# A batch size is rounded up to what the ranks and --micro-batch divide.
STAGE_RECIPE = dict(seq_len=2048, batch_size=1, epochs=7.0, lr=2e-3, weight_decay=0.1)
PAPER_RECIPE = dict(seq_len=16_384, batch_size=48, epochs=8.0, lr=1e-5, weight_decay=0.0)
LORA_RECIPE = PAPER_RECIPE | dict(lr=1e-4, epochs=2.0)
SHOWN = (*PAPER_RECIPE, "micro_batch", "warmup", "clip", "dtype", "recompute", "seed")  # with the plan
MAY_BE_0 = ("warmup", "weight_decay", "held_out_books")


def default(name):
    """The defaults of a flag for its help text."""
    stage, paper, adapters = (recipe[name] for recipe in (STAGE_RECIPE, PAPER_RECIPE, LORA_RECIPE))
    text = f"{stage:,g} for the stage actor, {paper:,g} for other models"
    return f"(default: {text}{f', {adapters:,g} with --lora' if adapters != paper else ''})"


def parse_args():
    parser = terminal.Parser(__doc__, "torchrun --nproc_per_node 2 train.py --max-steps 20 --out out/try")
    add = parser.add_argument
    text = f"checkpoint directory, Hub id, or a preset: {', '.join(PRESETS)} (default: stage)"
    add("--model", default="stage", help=text)
    add("--lora", type=int, metavar="RANK", help="train adapters of this rank; final/ is as PEFT's")
    add("--lora-alpha", type=int, help="adapters are scaled by this divided by RANK (default: 2 RANK)")
    add("--tokenizer", help="directory or file (default: the checkpoint's, else the stage actor's)")
    add("--chat-format", choices=CHAT_FORMATS, help="default: the tokenizer's own")
    add("--data", nargs="+", default=[STAGE], help="books in the CoSER format (default: the bundled stories)")
    add("--out", default=files.OUT / "stage", help="directory of the run (default: out/stage)")
    add("--resume", action="store_true", help="continue from the last good checkpoint in --out, if any")
    add("--dry-run", nargs="?", type=int, const=WORLD_SIZE, metavar="RANKS", help="only print the plan")
    text = "train nothing: print the held-out loss of --model, by channel, as JSON"
    add("--evaluate", action="store_true", help=text)
    add("--epochs", type=float, help=f"passes over the data {default('epochs')}")
    add("--max-steps", type=int, help="stop after this many steps, whatever --epochs says")
    add("--seq-len", type=int, help=f"tokens in a packed row {default('seq_len')}")
    text = "rows in a step, over all ranks and accumulated micro-batches; the default is rounded up to divide"
    add("--batch-size", type=int, help=f"{text} {default('batch_size')}")
    add("--micro-batch", type=int, default=1, help="rows in one forward pass of a rank (default: 1)")
    text = "peak learning rate: linear warm-up to it, then a cosine down to a tenth"
    add("--lr", type=float, help=f"{text} {default('lr')}")
    add("--warmup", type=float, default=0.03, help="share of the steps that warm up (default: 0.03)")
    add("--weight-decay", type=float, help=f"of AdamW, on matrices only {default('weight_decay')}")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default: 1.0)")
    text = "of the forward and backward pass (default: bfloat16 where the hardware multiplies it faster)"
    add("--dtype", choices=["bfloat16", "float32"], help=text)
    add("--shard-ranks", type=int, help="ranks that share one copy of the model (default: all)")
    text = "what the backward pass computes again: nothing, all but matrix products, or whole blocks"
    text += " (default: full; none for the stage actor, and with --lora up to 8 GiB of activations)"
    add("--recompute", choices=["none", "selective", "full"], help=text)
    add("--compile", action="store_true", help="torch.compile each block; of use on a GPU")
    add("--skip-nonfinite", action="store_true", help="skip and count steps that are not finite")
    add("--save-every", type=int, default=200, help="steps between checkpoints (default: 200)")
    add("--keep", type=int, default=2, help="number of checkpoints to keep, the newest (default: 2)")
    add("--eval-every", type=int, default=100, help="steps between held-out evaluations (default: 100)")
    add("--eval-rows", type=int, default=64, help="held-out rows in an evaluation, at most (default: 64)")
    add("--tensorboard", action="store_true", help="write event files to --out as well")
    add("--peak-tflops", type=float, help="of one device, for MFU (default: that of A100, H100, H200)")
    add_data_flags(parser)
    return resolve(parser.parse_args())


def resolve(args):
    """Checks the flags and fills in those that were not given, but for --recompute, which needs the model."""
    if args.lora_alpha is not None and args.lora is None:
        raise UsageError("--lora-alpha needs --lora RANK")
    if args.lora and args.lora_alpha is None:
        args.lora_alpha = 2 * args.lora
    given = args.batch_size
    recipe = LORA_RECIPE if args.lora else STAGE_RECIPE if args.model == "stage" else PAPER_RECIPE
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, value in vars(args).items():
        if type(value) not in (int, float) or name == "seed":
            continue
        if not (0 < value < math.inf or (value == 0 and name in MAY_BE_0)):
            least = "at least" if name in MAY_BE_0 else "above"
            raise UsageError(f"--{name.replace('_', '-')} must be {least} 0 and finite, not {value}")
    if args.seq_len < 2 or args.warmup > 1 or abs(args.seed) >= 2**63:
        raise UsageError("--seq-len must be above 1, --warmup a share from 0 to 1, --seed below 2^63")
    if given is None:
        rows = (args.dry_run or WORLD_SIZE) * args.micro_batch
        args.batch_size = -(-args.batch_size // rows) * rows
    if args.dtype is None:
        cuda = torch.cuda.is_available()
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else fast_bf16()
        args.dtype = "bfloat16" if fast else "float32"
    return args


def main():
    args = parse_args()
    config, tokenizer, directory = open_model(args)
    args.recompute = args.recompute or costs.choose_recompute(config, args)
    stream = open_stream(args, args.data, tokenizer, training=not args.evaluate)
    if args.evaluate:
        return evaluate_only(args, tokenizer, directory, stream)
    world = args.dry_run or WORLD_SIZE
    check_rows(args, world, len(stream.rows))
    begun = find_checkpoints(args.out) or (Path(args.out) / "log.jsonl").exists()
    if begun and not (args.resume or args.dry_run or restarted(args.out)):
        raise UsageError(f"{args.out} already holds a run; continue it with --resume, or choose another")
    steps = args.max_steps or math.ceil(args.epochs * len(stream.rows) / args.batch_size)
    if RANK == 0:
        terminal.note("\n".join([*stream.report.lines(), *describe(config, args, stream, steps, world)]))
    if args.dry_run:
        return
    device = start_ranks()
    try:
        train(args, config, tokenizer, directory, stream, steps, device)
    except (UsageError, KeyboardInterrupt):  # raised on all ranks
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def train(args, config, tokenizer, directory, stream, steps, device):
    """The run, on every rank: model and optimiser, new or restored; the steps; the final model."""
    out = Path(args.out)
    with agreed():
        make_dir(out)
    model = shard_model(config, device, args)
    optimizer = make_optimizer(model, args)
    settings = settings_of(args, config, stream, args.lora and fingerprint(directory))
    if args.lora:  # its checkpoints hold the adapters alone
        fill_first(model, config, args, directory)
    progress = restore(out, model, optimizer, stream, settings)
    if progress is None:
        progress = {"step": 0, "skipped": 0, "settings": settings}
        if not args.lora:
            fill_first(model, config, args, directory)
    rows, opening = choose_held_out(stream.held_out(), args.eval_rows, args.seq_len)
    log, stopping = None, False
    with agreed():
        if RANK == 0:
            about = {"torch": torch.__version__, "ranks": WORLD_SIZE, "device": str(device)}
            about |= {"launcher": os.getppid(), "model_config": dataclasses.asdict(config)}
            write_json(out / "run.json", {**settings, **about})
            log = Log(out, steps, progress["step"], args.tensorboard)
    with stop_requests() as requests, log or contextlib.nullcontext():
        while progress["step"] < steps and not stopping:
            line = next_step(model, optimizer, stream, progress, steps, args, device)
            step = progress["step"]
            if rows and (step % args.eval_every == 0 or step in (1, steps)):
                line |= evaluate(model, rows, args, device, tokenizer)
                if opening:
                    line["sample"] = sample(model, opening, tokenizer, args.seed, device)
            failure = log.write(line) if log else None
            stop, failed = sum_over_ranks([bool(requests), bool(failure)], device)
            if failed:
                raise UsageError(failure or "rank 0 could not write the log")
            stopping = stop > 0
            if step % args.save_every == 0 or step == steps or stopping:
                progress["stream"] = stream.state()
                save_state(out / f"step-{step}", model, optimizer, progress, args.keep)
    if (step := progress["step"]) < steps:
        where = f"step {step} of {steps} is saved in {out}"
        raise KeyboardInterrupt(f"{where}; the same command with --resume continues")
    save_final(model, out, args, tokenizer)
    if log:
        log.draw()
        terminal.note(f"the trained actor is in {out / 'final'}, its loss curve in {out / 'loss.png'}")


def evaluate_only(args, tokenizer, directory, stream):
    """Prints the held-out loss of a trained model, an adapter included, as one JSON object."""
    if args.lora or args.dry_run or args.resume or directory is None:
        wrong = "--lora, --dry-run or --resume"
        raise UsageError(f"--evaluate measures a trained model: give --model DIR, without {wrong}")
    held_out = stream.held_out()
    rows, _ = choose_held_out(held_out, args.eval_rows, args.seq_len)
    if not rows:
        raise UsageError(f"{args.data[0]}: no held-out scene in it")
    device = start_ranks()
    model = checkpoint.load_model(directory, device, checkpoint.DTYPES[args.dtype])
    line = evaluate(model, rows, args, device, tokenizer)
    if RANK == 0:
        print(json.dumps({"model": str(args.model), "rows": min(len(held_out), args.eval_rows), **line}))
    dist.destroy_process_group()


def next_step(model, optimizer, stream, progress, steps, args, device):
    """Trains on the next rows of the stream and updates `progress`; returns the step's values for the log."""
    begun, step = time.perf_counter(), progress["step"] + 1
    lr = learning_rate(step - 1, steps, args)
    for group in optimizer.param_groups:
        group["lr"] = lr
    where = f"epoch {stream.start['epoch']}, from row {stream.at}"
    rows = stream.take(args.batch_size)[RANK::WORLD_SIZE]
    line = {"step": step, "lr": lr, **train_step(model, optimizer, rows, args, device)}
    if "nonfinite" in line:
        if not args.skip_nonfinite:
            why = f"step {step}, stopped before the optimiser: {line['nonfinite']} ({where})"
            raise UsageError(f"{why}; try a lower --lr, or skip such steps with --resume --skip-nonfinite")
        progress["skipped"] += 1
    if progress["skipped"]:
        line["skipped"] = progress["skipped"]
    progress["step"] = step
    return line | costs.speeds(line.pop("flops"), line, time.perf_counter() - begun, args, device)


# ---- before the run ---------------------------------------------------------------------------


def open_model(args):
    """(config, tokenizer, directory of the checkpoint or None for a preset)."""
    directory = None if args.model in PRESETS else checkpoint.find_model(args.model, weights=not args.dry_run)
    if args.lora and directory is None and not args.dry_run:
        what = f"{args.model} is a shape without weights; --model has to be a trained model"
        raise UsageError(f"--lora {args.lora}: {what}")
    if args.lora and directory and is_adapter(directory):
        raise UsageError(f"--lora {args.lora}: {args.model} is itself an adapter; adapters cannot be stacked")
    if directory is None and args.model != "stage" and not args.tokenizer:
        raise UsageError(f"--model {args.model} needs --tokenizer: a directory with LLaMA 3's")
    config = directory and checkpoint.load_config(directory)
    path = args.tokenizer or (directory and tokenizer_directory(directory)) or STAGE_TOKENIZER
    tokenizer = load_tokenizer(path, args.chat_format)
    if config is None:
        config = ModelConfig(vocab_size=tokenizer.vocab_size, **PRESETS[args.model])
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(f"{path}: {tokenizer.vocab_size} tokens, but {args.model} has {config.vocab_size}")
    return config, tokenizer, directory


def check_rows(args, world, rows):
    """UsageError unless the rows of a step and the ranks of a copy of the model divide among `world` ranks.

    Fewer rows of data than ranks are an error too; in a dry run, which may plan for other data, a warning.
    """
    if not rows:
        raise UsageError(f"{args.data[0]}: no chat with a supervised token fits {args.seq_len} tokens")
    if rows < world:
        few = f"{rows} rows of documents for {world} ranks; use fewer ranks, more --data, shorter --seq-len"
        if not args.dry_run:
            raise UsageError(few)
        terminal.note(f"warning: {few}")
    if args.batch_size % (world * args.micro_batch):
        ranks = f"{world} ranks of --micro-batch {args.micro_batch}"
        raise UsageError(f"--batch-size {args.batch_size} does not divide into {ranks}")
    if args.shard_ranks and world % args.shard_ranks:
        raise UsageError(f"--shard-ranks {args.shard_ranks} does not divide {world} ranks")


def describe(config, args, stream, steps, world):
    """The plan, in lines: settings as resolved, parameters, memory of a rank, data and steps."""
    dtype, shards = checkpoint.DTYPES[args.dtype], args.shard_ranks or world
    tokens, places = args.micro_batch * args.seq_len, args.batch_size * args.seq_len
    memory = costs.memory_plan(config, tokens, dtype.itemsize, args.recompute, shards, args.lora)
    parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in memory.items())
    card = costs.smallest_card(sum(memory.values()))
    fits = f"fits a card of {card} GB" if card else "more than any one card has"
    adapters = f", {costs.adapter_parameters(config, args.lora):,} of adapters" if args.lora else ""
    share = sum(stream.supervised.values()) / stream.tokens
    cut = f"; {stream.cut} chats longer than a row are split, {stream.without} parts without loss left out"
    if args.seq_len > config.max_position_embeddings:
        yield f"warning: rows of {args.seq_len} tokens; the model takes {config.max_position_embeddings}"
    yield "settings: " + " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in SHOWN)
    yield f"{config.num_parameters():,} parameters{adapters}, sharded over {shards} of {world} rank(s)"
    yield f"memory of a rank: {sum(memory.values()) / 2**30:.2f} GiB ({parts}); {fits}"
    yield (
        f"an epoch: {stream.documents:,} chats, {stream.tokens:,} tokens, {share:.1%} under loss, "
        f"in {len(stream.rows):,} rows of {args.seq_len:,}{cut if stream.cut else ''}"
    )
    count = args.batch_size // (world * args.micro_batch)
    yield f"{steps:,} steps of {places:,} tokens: {count} micro-batch(es) of {args.micro_batch} rows a rank"


if __name__ == "__main__":
    terminal.run(main)
