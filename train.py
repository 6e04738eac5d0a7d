"""Trains an actor: the loss is on a character's own messages, packed rows, FSDP over any number of ranks.

    torchrun train.py                                            the stage actor, on the bundled scenes
    torchrun --nproc_per_node 8 train.py --model DIR --data BOOK.json ... --out DIR

The loss of a step is the sum over supervised tokens of all ranks and micro-batches, divided by their number, so it does not
depend on how the batch is split. `--out DIR` holds `log.jsonl` (a line a step), `loss.png`, checkpoints `step-N/` and at the
end `final/`, a Hugging Face directory. Ctrl-C saves and leaves; `--resume` goes on.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import checkpoint
import cli
from cli import UsageError
from data.packing import IGNORE, make_row
from data.scenes import STAGE
from data.stream import Stream, parse_mix
from model import PRESETS, ModelConfig, Transformer
from tokenizer import CHAT_FORMATS, STAGE_TOKENIZER, load_tokenizer

# What a flag is when it is not given: for the stage actor (one row a rank), and as published for CoSER (paper, section 5).
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
STAGE_RECIPE = dict(seq_len=2048, batch_size=WORLD_SIZE, epochs=7.0, lr=2e-3, weight_decay=0.1)
PAPER_RECIPE = dict(seq_len=16_384, batch_size=48, epochs=8.0, lr=1e-5, weight_decay=0.0)


def parse_args():
    parser = cli.Parser(__doc__, "torchrun --nproc_per_node 2 train.py --max-steps 20 --out out/try")
    add = parser.add_argument
    add("--model", default="stage", help=f"checkpoint directory, Hub id, or a preset: {', '.join(PRESETS)} (default: stage)")
    add("--tokenizer", help="directory or file (default: the checkpoint's, else the stage's)")
    add("--chat-format", choices=CHAT_FORMATS, help="default: what the tokenizer says")
    add("--data", nargs="+", default=[STAGE], help="books in the CoSER format (default: the bundled stories)")
    add("--out", default=cli.OUT / "stage", help="directory of the run (default: out/stage)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, if there is one")
    add("--dry-run", action="store_true", help="print sizes, memory, tokens and steps; allocate nothing")
    add("--epochs", type=float)
    add("--max-steps", type=int, help="stop after this many steps, whatever --epochs says")
    add("--seq-len", type=int, help="tokens in a packed row")
    add("--batch-size", type=int, help="rows in a step, over all ranks")
    add("--micro-batch", type=int, default=1, help="rows in one forward pass of one rank (default: 1)")
    add("--lr", type=float, help="peak learning rate; linear warm-up, then a cosine down to a tenth")
    add("--warmup", type=float, default=0.03, help="share of the steps (default: 0.03)")
    add("--weight-decay", type=float, help="on matrices only")
    add("--clip", type=float, default=1.0, help="largest gradient norm (default: 1.0)")
    add("--dtype", choices=checkpoint.DTYPES, help="of the forward and backward pass (default: bfloat16 where it is native)")
    add("--without-thoughts", action="store_true", help="the ablation: no inner thoughts in what is learnt")
    add("--variants", choices=["draw", "all"], default="draw", help="chats of a character in a scene: one, drawn anew in each "
        "epoch (the paper's), or the release's four (default: draw)")  # fmt: skip
    add("--mix", action="append", type=parse_mix, default=[], metavar="FILE:SHARE", help="general SFT data (ShareGPT or "
        "`messages`) and its share of all tokens; half in the paper")  # fmt: skip
    add("--held-out-books", type=float, default=0.0, metavar="SHARE", help="share of the books to hold out whole (default: 0)")
    add("--strict", action="store_true", help="stop at the first thing that reading the data would repair or drop")
    add("--cache", default=cli.OUT / "cache", help="directory of tokenised data; may be deleted at any time")
    add("--save-every", type=int, default=200, help="steps between checkpoints; the last two are kept (default: 200)")
    add("--eval-every", type=int, default=100, help="steps between evaluations on held-out scenes (default: 100)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, value in (STAGE_RECIPE if args.model == "stage" else PAPER_RECIPE).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.seq_len is not None and args.seq_len < 2:
        raise UsageError(f"--seq-len must be above 1, not {args.seq_len}")
    for name in ("epochs", "seq_len", "batch_size", "micro_batch", "lr", "clip", "save_every", "eval_every"):
        if getattr(args, name) <= 0:
            raise UsageError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    args.dtype = args.dtype or ("bfloat16" if native_bfloat16() else "float32")
    if args.max_steps is not None and args.max_steps <= 0:
        raise UsageError(f"--max-steps must be above 0, not {args.max_steps}")
    return args


# ---- data ---------------------------------------------------------------------------------------------------------------


def open_stream(args, tokenizer):
    return Stream(
        args.data,
        tokenizer,
        args.seq_len,
        seed=args.seed,
        thoughts=not args.without_thoughts,
        variants=args.variants,
        mix=args.mix,
        held_out_books=args.held_out_books,
        cache=args.cache,
        strict=args.strict,
    )


def stack(rows, device):
    """Rows as one batch {tokens, targets, positions}, int64 [B, T]."""
    return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}


# ---- one step -----------------------------------------------------------------------------------------------------------


def loss_sum(model, batch):
    """Summed cross-entropy (nats) over the supervised tokens of a batch; the projection to the vocabulary only there."""
    targets = batch["targets"].flatten()
    rows = (targets != IGNORE).nonzero().flatten()  # [N]
    logits = model(batch["tokens"], batch["positions"], rows=rows)  # [N, V]
    return F.cross_entropy(logits.float(), targets[rows], reduction="sum")


def total(value, device):
    """The sum of a number over all ranks."""
    value = torch.as_tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(value)
    return value.item()


def train_step(model, optimizer, rows, args, device):
    """One optimiser step on this rank's rows. Returns what the log keeps of it."""
    supervised = total(sum((row["targets"] != IGNORE).sum().item() for row in rows), device)
    micro_batches = [rows[i : i + args.micro_batch] for i in range(0, len(rows), args.micro_batch)]
    loss = torch.zeros((), device=device)
    for i, micro_batch in enumerate(micro_batches):
        model.set_requires_gradient_sync(i == len(micro_batches) - 1)
        part = loss_sum(model, stack(micro_batch, device))
        # FSDP takes the mean of the ranks' gradients; what is wanted is the sum over ranks, over all supervised tokens
        (part * dist.get_world_size() / max(supervised, 1)).backward()
        loss += part.detach()
    loss = total(loss, device) / max(supervised, 1)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UsageError(f"loss {loss}, gradient norm {norm}: not finite, stopped before the optimiser; try a lower --lr")
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss, "grad_norm": norm, "supervised": int(supervised)}


@torch.no_grad()
def evaluate(model, rows, device):
    """Mean loss (nats per supervised token) over rows, shared out over the ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    empty = make_row([], len(rows[0]["tokens"]))
    rows = rows + [empty] * (-len(rows) % world)  # every rank must make the same number of passes
    mine = rows[rank::world]
    model.eval()
    loss = total(sum(loss_sum(model, stack([row], device)).item() for row in mine), device)
    model.train()
    return loss / max(1, sum((row["targets"] != IGNORE).sum().item() for row in rows))


def learning_rate(step, steps, args):
    """Linear warm-up, then a cosine down to a tenth of --lr."""
    warmup = max(1, round(steps * args.warmup))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- the run ------------------------------------------------------------------------------------------------------------


def start_ranks():
    """Joins the ranks torchrun started, or is the only one; returns this rank's device."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    else:
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return device


def native_bfloat16():
    """Whether this machine multiplies bf16 matrices faster than fp32 ones, rather than emulating them."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def shard_model(config, device, dtype):
    """A Transformer whose every block, then the rest, is sharded over all ranks: fp32 master weights, compute in `dtype`."""
    with torch.device("meta"):
        model = Transformer(config)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
    for block in model.model["layers"]:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model.to_empty(device=device)


def make_optimizer(model, args):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def find_checkpoints(out):
    """Checkpoints of a run, oldest first."""
    steps = [path for path in Path(out).glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))


class Log:
    """log.jsonl, loss.png and the terminal; only rank 0 has one."""

    def __init__(self, out, steps, kept):
        self.path, self.picture, self.steps = Path(out) / "log.jsonl", Path(out) / "loss.png", steps
        lines = cli.read_lines(self.path, ("step",)) if kept else []
        self.lines = [line for line in lines if line["step"] <= kept]
        cli.write_lines(self.path, self.lines)
        self.bar = cli.progress()
        self.task = self.bar.add_task("training", total=steps, completed=kept)
        self.bar.start()

    def write(self, line):
        self.lines.append(line)
        cli.append_line(self.path, line)
        speed = line["tokens"] / line["seconds"]
        text = f"loss {line['loss']:.3f}  {speed:,.0f} tok/s"
        self.bar.update(self.task, completed=line["step"], description=text)
        evaluated = f"  held out {line['eval_loss']:.3f}" if "eval_loss" in line else ""
        if evaluated or (self.bar.disable and line["step"] % 10 == 0):
            recent = [line["seconds"] for line in self.lines[-20:]]
            left = sum(recent) / len(recent) * (self.steps - line["step"])
            cli.note(f"step {line['step']}/{self.steps}  {text}{evaluated}  {left:,.0f} s left")

    def draw(self):
        """The loss curve as a picture, renewed as the run goes."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        axes.plot([line["step"] for line in self.lines], [line["loss"] for line in self.lines], lw=0.8, label="training")
        held_out = [line for line in self.lines if "eval_loss" in line]
        axes.plot([line["step"] for line in held_out], [line["eval_loss"] for line in held_out], "o-", label="held out")
        axes.set(xlabel="step", ylabel="loss, nats per supervised token")
        axes.grid(alpha=0.3)
        axes.legend()
        with cli.write_whole(self.picture, "wb") as file:
            figure.savefig(file, format="png", dpi=130)
        plt.close(figure)


def describe(config, args, stream, steps, world):
    """The plan, in lines: sizes, memory for weights and optimiser, tokens and steps."""
    cut = f"; {stream.cut} chats longer than a row are cut, {stream.without} pieces teach nothing" if stream.cut else ""
    parameters = config.num_parameters()
    memory = 16 * parameters / world / 2**30  # fp32 weights, gradients and two moments
    sizes = ", ".join(f"{dtype.itemsize * parameters / 2**30:.2f} GiB in {name}" for name, dtype in checkpoint.DTYPES.items())
    return (
        f"{parameters:,} parameters ({sizes}); training takes {memory:.2f} GiB for weights, gradients and optimiser "
        f"on each of {world} rank(s), and room for activations\n"
        f"{stream.documents:,} chats, {stream.tokens:,} tokens, {sum(stream.supervised.values()) / stream.tokens:.1%} under "
        f"loss; {len(stream.rows)} rows of {args.seq_len} tokens an epoch{cut}; "
        f"{steps} steps of {args.batch_size} rows"
    )


def main():
    args = parse_args()
    directory = None if args.model in PRESETS else checkpoint.find_model(args.model)
    config = directory and checkpoint.load_config(directory)
    if config is None and args.model != "stage" and not args.tokenizer:
        raise UsageError(f"--model {args.model} needs --tokenizer: a directory with LLaMA 3's")
    tokenizer_path = args.tokenizer or directory or STAGE_TOKENIZER
    tokenizer = load_tokenizer(tokenizer_path, args.chat_format)
    if config is None:
        config = ModelConfig(vocab_size=tokenizer.vocab_size, **PRESETS[args.model])
    elif tokenizer.vocab_size > config.vocab_size:
        raise UsageError(f"{tokenizer_path}: {tokenizer.vocab_size} tokens, but {args.model} has {config.vocab_size}")
    stream = open_stream(args, tokenizer)
    if not stream.rows:
        raise UsageError(f"{args.data[0]}: no chat with a token to learn from fits rows of {args.seq_len} tokens")
    steps = args.max_steps or math.ceil(args.epochs * len(stream.rows) / args.batch_size)
    world, first = WORLD_SIZE, int(os.environ.get("RANK", 0)) == 0
    if args.batch_size % (world * args.micro_batch):
        raise UsageError(
            f"--batch-size {args.batch_size} does not divide into {world} ranks of --micro-batch {args.micro_batch}"
        )
    checkpoints = find_checkpoints(args.out)
    if (checkpoints or (Path(args.out) / "log.jsonl").exists()) and not (args.resume or args.dry_run):
        raise UsageError(f"{args.out}: holds a run already; add --resume to go on with it, or choose another --out")
    if first:
        cli.note("\n".join([*stream.report.lines(), describe(config, args, stream, steps, world)]))
    if args.dry_run:
        return
    out = cli.make_dir(args.out)

    device = start_ranks()
    model = shard_model(config, device, checkpoint.DTYPES[args.dtype])
    optimizer = make_optimizer(model, args)
    # what may change from one resume to the next
    free = ("resume", "out", "dry_run", "save_every", "eval_every", "cache", "strict")
    settings = {name: str(value) for name, value in vars(args).items() if name not in free}
    step = 0
    if checkpoints:
        progress = checkpoint.load_state(checkpoints[-1], model, optimizer)
        changed = [name for name, value in settings.items() if progress["settings"].get(name) != value]
        if changed:
            raise UsageError(
                f"{checkpoints[-1]}: was trained with other --{', --'.join(changed).replace('_', '-')}; use the same"
            )
        step = progress["step"]
        stream.load(progress["stream"])
        if first:
            cli.note(f"going on from {checkpoints[-1]}")
    elif args.model in PRESETS:
        checkpoint.fill(model, checkpoint.RandomWeights(model, args.seed))
    else:
        weights = checkpoint.Weights(directory)
        weights.check(model)
        checkpoint.fill(model, weights)

    # torchrun passes Ctrl-C on to every rank; all of them must agree on the step they stop after
    asked = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.append(True))

    def save():
        progress = {"step": step, "stream": stream.state(), "settings": settings}
        checkpoint.save_state(out / f"step-{step}", model, optimizer, progress)
        if first:
            for old in find_checkpoints(out)[:-2]:
                shutil.rmtree(old)

    evaluation = list(stream.held_out())
    log = None
    if first:
        versions = {"torch": torch.__version__, "ranks": world, "device": str(device)}
        with cli.write_whole(out / "run.json") as file:
            json.dump({**settings, **versions, "model_config": dataclasses.asdict(config)}, file, indent=1)
        log = Log(out, steps, step)
    stopping = False
    while step < steps and not stopping:
        begun = time.perf_counter()
        lr = learning_rate(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = stream.take(args.batch_size)
        line = train_step(model, optimizer, batch[dist.get_rank() :: world], args, device)
        step += 1
        line = {"step": step, "lr": lr, "tokens": batch.used, **line, "seconds": time.perf_counter() - begun}
        evaluating = evaluation and (step % args.eval_every == 0 or step in (1, steps))
        if evaluating:
            line["eval_loss"] = evaluate(model, evaluation, device)
        if first:
            log.write(line)
            if evaluating:
                log.draw()
        stopping = bool(total(bool(asked), device))
        if step % args.save_every == 0 or step == steps or stopping:
            save()
    if first:
        log.bar.stop()
    if step < steps:
        dist.destroy_process_group()
        raise KeyboardInterrupt(f"step {step} of {steps} is saved in {out}; the same command with --resume goes on")
    checkpoint.save_model(model, out / "final", tokenizer, dtype=torch.bfloat16)
    dist.barrier()
    if first:
        log.draw()
        cli.note(f"the trained actor is in {out / 'final'}, its loss curve in {out / 'loss.png'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
