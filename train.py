"""Trains an actor: the loss is on a character's own messages, packed rows, FSDP over any number of ranks.

    torchrun train.py                                            the stage actor, on the bundled scenes
    torchrun --nproc_per_node 8 train.py --model DIR --data BOOK.json ... --out DIR

The loss of a step is the sum over supervised tokens of all ranks and micro-batches, divided by their number, so it does not
depend on how the batch is split. `--out DIR` holds `log.jsonl` (a line a step), `loss.png`, checkpoints `step-N/` and at the
end `final/`, a Hugging Face directory. Ctrl-C and SIGTERM save and leave; `--resume` goes on, bit for bit, on any number of
ranks up to rounding. Under `torchrun --max-restarts N` a run whose rank died goes on by itself; no rank outlives its torchrun.
"""

import ctypes
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint
import kernels
from checkpoint.adapters import is_adapter, tokenizer_directory
from common import files, terminal
from common.files import UsageError, make_dir, read_json, write_whole
from data.brackets import CHANNELS
from data.packing import IGNORE, make_row
from data.scenes import STAGE
from data.stream import add_data_flags, open_stream
from engine.cpu import fast_bf16
from llm.local import fingerprint
from model import PRESETS, ModelConfig, Transformer
from text.chat import CHAT_FORMATS
from tokenizer import STAGE_TOKENIZER, load_tokenizer
from training import costs, lora
from training.log import Log
from training.resume import agreed, find_checkpoints, last_good, load_state, save_state

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # of torchrun --max-restarts

# What a flag is when it is not given: for the stage actor (one row a rank), and as published for CoSER (paper, section 5).
STAGE_RECIPE = dict(seq_len=2048, epochs=7.0, lr=2e-3, weight_decay=0.1)
PAPER_RECIPE = dict(seq_len=16_384, batch_size=48, epochs=8.0, lr=1e-5, weight_decay=0.0)
LORA_RECIPE = PAPER_RECIPE | dict(lr=1e-4, epochs=2.0)
WHOLE = 8 * 2**30  # bytes of activations up to which a LoRA run recomputes none
MAY_BE_0 = ("warmup", "weight_decay", "held_out_books")
# what may change from one resume to the next, since it changes nothing of what is learnt
FREE = (
    "resume",
    "out",
    "dry_run",
    "save_every",
    "keep",
    "eval_every",
    "tensorboard",
    "peak_tflops",
    "skip_nonfinite",
)
FREE += ("micro_batch", "shard_ranks", "recompute", "compile", "eval_rows", "cache", "strict")


def parse_args():
    parser = terminal.Parser(__doc__, "torchrun --nproc_per_node 2 train.py --max-steps 20 --out out/try")
    add = parser.add_argument
    add(
        "--model",
        default="stage",
        help=f"checkpoint directory, Hub id, or a preset: {', '.join(PRESETS)} (default: stage)",
    )
    add(
        "--lora",
        type=int,
        metavar="RANK",
        help="train adapters of this rank, the model itself frozen; final/ is as PEFT's",
    )
    add(
        "--lora-alpha",
        type=int,
        help="an adapter's product is scaled by this over its rank (default: 2 RANK)",
    )
    add("--tokenizer", help="directory or file (default: the checkpoint's, else the stage's)")
    add("--chat-format", choices=CHAT_FORMATS, help="default: what the tokenizer says")
    add("--data", nargs="+", default=[STAGE], help="books in the CoSER format (default: the bundled stories)")
    add("--out", default=files.OUT / "stage", help="directory of the run (default: out/stage)")
    add("--resume", action="store_true", help="go on from the last good checkpoint in --out, if there is one")
    add(
        "--dry-run",
        nargs="?",
        type=int,
        const=WORLD_SIZE,
        metavar="RANKS",
        help="only print the plan, for so many ranks",
    )
    add("--epochs", type=float)
    add("--max-steps", type=int, help="stop after this many steps, whatever --epochs says")
    add("--seq-len", type=int, help="tokens in a packed row")
    add(
        "--batch-size",
        type=int,
        help="rows in a step, over all ranks; what a rank cannot take at once is accumulated",
    )
    add("--micro-batch", type=int, default=1, help="rows in one forward pass of one rank (default: 1)")
    add("--lr", type=float, help="peak learning rate; linear warm-up, then a cosine down to a tenth")
    add("--warmup", type=float, default=0.03, help="share of the steps (default: 0.03)")
    add("--weight-decay", type=float, help="on matrices only")
    add("--clip", type=float, default=1.0, help="largest gradient norm (default: 1.0)")
    add(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="of forward and backward pass (default: bfloat16 where it is native)",
    )
    add(
        "--shard-ranks",
        type=int,
        help="ranks a model is spread over; groups of them hold copies (default: all)",
    )
    add("--recompute", choices=["none", "selective", "full"], help="in the backward pass: all but products, or whole blocks "
        "(default: full; none for the stage actor, and with --lora up to 8 GiB of activations)")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile each block; what it brings is on a GPU")
    add(
        "--skip-nonfinite",
        action="store_true",
        help="leave out a step whose loss or gradient is not finite, and count it",
    )
    add("--save-every", type=int, default=200, help="steps between checkpoints (default: 200)")
    add("--keep", type=int, default=2, help="checkpoints kept, the newest (default: 2)")
    add(
        "--eval-every",
        type=int,
        default=100,
        help="steps between evaluations on held-out scenes (default: 100)",
    )
    add("--eval-rows", type=int, default=64, help="held-out rows evaluated on, at most (default: 64)")
    add("--tensorboard", action="store_true", help="write event files to --out as well")
    add(
        "--peak-tflops",
        type=float,
        help="of one device, for its utilisation (default: known for A100, H100 and H200)",
    )
    add_data_flags(parser)
    args = parser.parse_args()
    if args.lora_alpha is not None and args.lora is None:
        raise UsageError("--lora-alpha needs --lora RANK")
    if args.lora and args.lora_alpha is None:
        args.lora_alpha = 2 * args.lora
    if args.model == "stage" and args.batch_size is None:
        args.batch_size = args.dry_run or WORLD_SIZE
    recipe = LORA_RECIPE if args.lora else STAGE_RECIPE if args.model == "stage" else PAPER_RECIPE
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, value in vars(args).items():
        zero = name in MAY_BE_0
        if (
            type(value) in (int, float)
            and name != "seed"
            and not (0 < value < math.inf or (zero and value == 0))
        ):
            raise UsageError(
                f"--{name.replace('_', '-')} must be {'at least' if zero else 'above'} 0 and finite, not {value}"
            )
    if args.seq_len < 2 or args.warmup > 1 or abs(args.seed) >= 2**63:
        raise UsageError(
            "--seq-len must be above 1, --warmup a share from 0 to 1, --seed a number of 63 bits"
        )
    args.dtype = args.dtype or ("bfloat16" if native_bfloat16() else "float32")
    return args


def choose_recompute(config, args):
    """What is recomputed where --recompute does not say."""
    if not args.lora:
        return "none" if args.model == "stage" else "full"
    itemsize = checkpoint.DTYPES[args.dtype].itemsize
    plan = costs.memory_plan(config, args.micro_batch * args.seq_len, itemsize, "none", 1, args.lora)
    return "none" if plan["activations"] <= WHOLE else "full"


# ---- data ---------------------------------------------------------------------------------------------------------------


def find_opening(rows):
    """Token ids of a held-out chat up to its first answer, for `sample` to go on from: the shortest; with thoughts, if any."""
    openings = []  # (whether without thoughts, ids)
    for row in rows:
        starts = (row["positions"][: row["used"]] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], row["used"]], strict=True):
            learnt = (row["targets"][start:end] != IGNORE).nonzero().flatten()
            thinks = 1 + CHANNELS.index("thought") in row["channels"][start:end]
            if len(learnt):
                openings.append((not thinks, row["tokens"][start : start + learnt[0] + 1].tolist()))
    return min(openings, key=lambda each: (each[0], len(each[1])), default=(False, None))[1]


def stack(rows, device):
    """Rows as one batch {tokens, targets, positions, channels}, int [B, T], and `used` [B]."""
    return {name: torch.stack([row[name] for row in rows]).to(device, non_blocking=True) for name in rows[0]}


# ---- the model, in the order that composes: recompute, compile, shard ----------------------------------------------------


def start_ranks():
    """Joins the ranks torchrun started, or is the only one; returns this rank's device."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        if (
            sys.platform == "linux"
        ):  # a rank must not go on writing to --out when its torchrun was killed (1: PR_SET_PDEATHSIG)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        # torchrun's store outlives a restart, and what the dead ranks left in it must not be read
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt-{RESTARTS}", store)
    else:
        store, rank, world = dist.HashStore(), 0, 1
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return device


def native_bfloat16():
    """Whether this machine multiplies bf16 matrices faster than fp32 ones, rather than emulating them."""
    return (
        torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else fast_bf16()
    )


KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
}  # by selective recomputation


def keep_products(_, operation, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def shard_model(config, device, args):
    """A Transformer without values yet, whose every block, then the rest, is sharded: fp32 master weights and reduction.

    One rank that computes in fp32 has nothing to shard or cast, and gets it plain. With --lora the frozen base is in the
    dtype of compute and the adapters cast themselves, so that one rank never needs more.
    """
    dtype, shards = checkpoint.DTYPES[args.dtype], args.shard_ranks or WORLD_SIZE
    with torch.device("meta"):
        model = Transformer(config)
        if args.lora:
            model = lora.add_adapters(model.to(dtype), args.lora, args.lora_alpha)
    blocks = model.model["layers"]
    if args.recompute != "none":
        contexts = functools.partial(create_selective_checkpoint_contexts, keep_products)
        options = {"context_fn": contexts} if args.recompute == "selective" else {}
        for block in blocks:
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False, **options)
    if args.compile:
        # a loop over documents, which a compiler would unroll anew for each row
        kernels.attention_torch = torch.compiler.disable(kernels.attention_torch)
        for block in blocks:
            block.forward = torch.compile(block.forward)
    if WORLD_SIZE > 1 or (dtype != torch.float32 and not args.lora):
        # ranks of a copy of the model, or copies and the ranks of each
        shape = (WORLD_SIZE,) if shards == WORLD_SIZE else (WORLD_SIZE // shards, shards)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        options = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        }
        for block in blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
    return model.to_empty(device=device)


def make_optimizer(model, args):
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay}]
    groups += [{"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}] * (not args.lora)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


# ---- one step -----------------------------------------------------------------------------------------------------------


def loss_sum(model, batch):
    """Summed cross-entropy (nats) of a batch over its supervised tokens, and those of each channel, [4]."""
    targets = batch["targets"].flatten()
    rows = (targets != IGNORE).nonzero().flatten()  # [N]
    loss, losses = model(batch["tokens"], batch["positions"], rows=rows, targets=targets[rows])  # [], [N]
    channels = batch["channels"].flatten()[rows].long() - 1  # [N]
    return loss, losses.new_zeros(len(CHANNELS)).index_add_(0, channels, losses)


def total(values, device):
    """The sums of numbers over all ranks, a list."""
    values = torch.as_tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


def tally(batches, window):
    """What batches hold, int64: tokens, (query, key) pairs, those of supervised queries, supervised tokens of each channel."""
    sums = 0
    for batch in batches:
        reach = (batch["positions"] + 1).clamp(
            max=window or batch["positions"].shape[1]
        )  # keys that each query sees
        used = torch.arange(reach.shape[1], device=reach.device) < batch["used"][:, None]
        learnt = batch["targets"] != IGNORE
        channels = torch.bincount(batch["channels"][learnt].long(), minlength=len(CHANNELS) + 1)[1:]
        sums = sums + torch.stack([used.sum(), reach[used].sum(), reach[learnt].sum(), *channels])
    return sums


def train_step(model, optimizer, rows, args, device):
    """One optimiser step on this rank's rows. Returns what the log keeps of it; `nonfinite` says why none was made."""
    batches = [stack(rows[i : i + args.micro_batch], device) for i in range(0, len(rows), args.micro_batch)]
    tokens, pairs, supervised_pairs, *counts = total(tally(batches, model.config.sliding_window), device)
    supervised = sum(counts)
    sums, finite = torch.zeros(len(CHANNELS), device=device), []
    for batch in batches:
        loss, by_channel = loss_sum(model, batch)
        # FSDP takes the mean of the ranks' gradients; what is wanted is the sum over ranks, over all supervised tokens
        (loss * (WORLD_SIZE / max(supervised, 1))).backward()
        sums += by_channel
        finite.append(loss.detach().isfinite())
    sums = total(sums, device)
    loss = sum(sums) / max(supervised, 1)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    line = {"loss": loss, "grad_norm": norm}
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    else:
        bad = [RANK + WORLD_SIZE * row for row in range(len(rows)) if not finite[row // args.micro_batch]]
        found = [None] * WORLD_SIZE
        dist.all_gather_object(found, bad)
        bad = ", ".join(map(str, sorted(sum(found, [])))) or "none alone"
        line = {
            "loss": None,
            "grad_norm": None,
            "nonfinite": f"loss {loss}, gradient norm {norm}, rows of the batch: {bad}",
        }
    optimizer.zero_grad()
    shares = zip(CHANNELS, sums, counts, strict=True)
    if line["loss"] is not None:
        line |= {f"loss_{name}": each / number for name, each, number in shares if number}
    flops = costs.model_flops(model.config, tokens, supervised, pairs, supervised_pairs, args.lora)
    return {**line, "tokens": int(tokens), "supervised": int(supervised), "flops": flops}


@torch.no_grad()
def evaluate(model, rows, device):
    """Mean loss (nats per supervised token) over all ranks' rows, each having as many; None where it is not finite."""
    loss = supervised = 0
    for row in rows:
        loss += loss_sum(model, stack([row], device))[0].item()
        supervised += (row["targets"] != IGNORE).sum().item()
    loss, supervised = total([loss, supervised], device)
    return loss / max(1, supervised) if math.isfinite(loss) else None


@torch.no_grad()
def sample(model, opening, tokenizer, seed, device, length=32, temperature=0.7):
    """How the actor goes on from token ids, as text. No cache, a pass a token, all ranks in step: for a line now and then."""
    ids, generator = list(opening), torch.Generator().manual_seed(seed)
    for _ in range(length):
        padded = ids + [0] * (-len(ids) % 128)  # no token sees those behind it; and few shapes are fast
        tokens, last = torch.tensor([padded], device=device), torch.tensor([len(ids) - 1], device=device)
        logits = model(tokens, rows=last)[0].float().cpu()  # [V]
        chances = (logits / temperature).softmax(-1)
        token = (chances / torch.empty_like(chances).exponential_(generator=generator)).argmax().to(device)
        dist.broadcast(token, 0)
        if token.item() in tokenizer.stop_ids:
            break
        ids.append(token.item())
    return " ".join(tokenizer.decode(ids[len(opening) :]).split())


def learning_rate(step, steps, args):
    """Linear warm-up, then a cosine down to a tenth of --lr."""
    warmup = max(1, round(steps * args.warmup))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- the run ------------------------------------------------------------------------------------------------------------


def describe(config, args, stream, steps, world):
    """The plan, in lines: parameters, memory of each rank, tokens and steps."""
    parameters, shards = config.num_parameters(), args.shard_ranks or world
    dtype = checkpoint.DTYPES[args.dtype]
    memory = costs.memory_plan(
        config, args.micro_batch * args.seq_len, dtype.itemsize, args.recompute, shards, args.lora
    )
    parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in memory.items())
    card = costs.smallest_card(sum(memory.values()))
    fits = f"fits a card of {card} GB" if card else "more than any one card has"
    adapters = f", {costs.adapter_parameters(config, args.lora):,} of adapters" if args.lora else ""
    cut = (
        f"; {stream.cut} chats longer than a row are cut, {stream.without} pieces teach nothing"
        if stream.cut
        else ""
    )
    learnt = sum(stream.supervised.values())
    return (
        f"{parameters:,} parameters{adapters}, sharded over {shards} of {world} rank(s); {args.dtype}, "
        f"recomputing {args.recompute}\n"
        f"memory of a rank: {sum(memory.values()) / 2**30:.2f} GiB ({parts}); {fits}\n"
        f"an epoch: {stream.documents:,} chats, {stream.tokens:,} tokens, {learnt / stream.tokens:.1%} under loss, "
        f"in {len(stream.rows):,} rows of {args.seq_len:,}{cut}\n"
        f"{steps:,} steps of {args.batch_size} rows, {args.batch_size * args.seq_len:,} places: "
        f"{args.batch_size // (world * args.micro_batch)} micro-batch(es) of {args.micro_batch} a rank"
    )


def open_model(args):
    """(config, tokenizer, directory of the checkpoint or None for a preset)."""
    directory = None if args.model in PRESETS else checkpoint.find_model(args.model, weights=not args.dry_run)
    if args.lora and directory is None and not args.dry_run:
        raise UsageError(
            f"--lora {args.lora}: {args.model} is a shape without weights; --model has to be a trained model"
        )
    if args.lora and directory and is_adapter(directory):
        raise UsageError(
            f"--lora {args.lora}: {args.model} is an adapter itself, and adapters cannot be stacked"
        )
    config = directory and checkpoint.load_config(directory)
    if config is None and args.model != "stage" and not args.tokenizer:
        raise UsageError(f"--model {args.model} needs --tokenizer: a directory with LLaMA 3's")
    path = args.tokenizer or (directory and tokenizer_directory(directory)) or STAGE_TOKENIZER
    tokenizer = load_tokenizer(path, args.chat_format)
    if config is None:
        config = ModelConfig(vocab_size=tokenizer.vocab_size, **PRESETS[args.model])
    elif tokenizer.vocab_size > config.vocab_size:
        raise UsageError(f"{path}: {tokenizer.vocab_size} tokens, but {args.model} has {config.vocab_size}")
    return config, tokenizer, directory


def main():
    args = parse_args()
    config, tokenizer, directory = open_model(args)
    args.recompute = args.recompute or choose_recompute(config, args)
    stream = open_stream(args, args.data, tokenizer)
    rows = len(stream.rows)
    if not rows:
        raise UsageError(
            f"{args.data[0]}: no chat with a token to learn from fits rows of {args.seq_len} tokens"
        )
    steps = args.max_steps or math.ceil(args.epochs * rows / args.batch_size)
    world = args.dry_run or WORLD_SIZE
    check_ranks(args, world, rows)
    begun = find_checkpoints(args.out) or (Path(args.out) / "log.jsonl").exists()
    if begun and not (args.resume or args.dry_run or started_again(args.out)):
        raise UsageError(
            f"{args.out}: holds a run already; add --resume to go on with it, or choose another --out"
        )
    if RANK == 0:
        if args.seq_len > config.max_position_embeddings:
            terminal.note(
                f"warning: rows of {args.seq_len} tokens, but the model takes {config.max_position_embeddings}"
            )
        terminal.note("\n".join([*stream.report.lines(), describe(config, args, stream, steps, world)]))
    if args.dry_run:
        return
    device = start_ranks()
    try:
        train(args, config, tokenizer, directory, stream, steps, device)
    except (UsageError, KeyboardInterrupt):  # all ranks leave together
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def started_again(out):
    """Whether torchrun --max-restarts has started us again in a run that it began itself; rank 0 finds out for all."""
    if RANK or not RESTARTS:
        return RESTARTS > 0
    file = Path(out) / "run.json"
    return file.exists() and read_json(file).get("launcher") == os.getppid()


def check_ranks(args, world, rows):
    """UsageError if the rows of a step, or the ranks of a copy of the model, do not divide among the ranks.

    Too few rows for the ranks are an error too, but in a dry run a warning: the plan may be for more data than there is here.
    """
    if rows < world:
        few = (
            f"{rows} rows of documents for {world} ranks; use fewer ranks, more --data or a shorter --seq-len"
        )
        if not args.dry_run:
            raise UsageError(few)
        terminal.note(f"warning: {few}")
    if args.batch_size % (world * args.micro_batch):
        raise UsageError(
            f"--batch-size {args.batch_size} does not divide into {world} ranks of --micro-batch {args.micro_batch}"
        )
    if args.shard_ranks and world % args.shard_ranks:
        raise UsageError(f"--shard-ranks {args.shard_ranks} does not divide {world} ranks")


def go_on(out, model, optimizer, stream, settings):
    """Puts the last good state of a run into model, optimiser and stream; its `progress`, or None where there is none."""
    found = last_good(out)
    if found is None:
        return None
    progress = read_json(found / "progress.json")
    saved = progress["settings"]
    changed = [name for name, value in settings.items() if saved.get(name, "None") != value]
    if changed:
        what = "; ".join(
            f"--{name.replace('_', '-')} was {saved.get(name)}, is {settings[name]}" for name in changed
        )
        raise UsageError(f"{found}: was trained with other settings ({what}); use the same, or another --out")
    load_state(found, model, optimizer)
    stream.load(progress["stream"])
    if RANK == 0:
        terminal.note(f"going on from {found}")
    return progress


def fill_first(model, config, args, directory):
    """Gives a model the weights that a run begins with. A collective."""
    with agreed():
        weights = checkpoint.RandomWeights(model, args.seed)
        if directory:
            weights = checkpoint.open_weights(directory, config, RANK, WORLD_SIZE)
        if args.lora:
            weights = lora.FreshAdapters(weights, model, args.seed)
    checkpoint.fill(model, weights)


def train(args, config, tokenizer, directory, stream, steps, device):
    """The run itself, on every rank."""
    out = Path(args.out)
    with agreed():
        make_dir(out)
    model = shard_model(config, device, args)
    optimizer = make_optimizer(model, args)
    settings = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    settings |= {
        "model_shape": str(config),
        "data": f"{len(stream.files)} files, hash {stream.identity[:12]}",
    }
    if args.lora:  # whose states hold no base
        settings |= {"base": fingerprint(directory)}
        fill_first(model, config, args, directory)
    progress = go_on(out, model, optimizer, stream, settings)
    if progress is None:
        progress = {"step": 0, "skipped": 0, "settings": settings}
        if not args.lora:
            fill_first(model, config, args, directory)

    # torchrun passes Ctrl-C on to every rank; all of them must agree on the step they stop after
    asked = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.append(True))

    held_out = stream.held_out()
    number = min(args.eval_rows, len(held_out))
    evaluation, opening = held_out[RANK:number:WORLD_SIZE], find_opening(held_out[:8])
    if len(evaluation) < -(-number // WORLD_SIZE):  # every rank must make the same number of passes
        evaluation.append(make_row([], args.seq_len))
    log = failure = None
    with agreed():
        if RANK == 0:
            versions = {
                "torch": torch.__version__,
                "ranks": WORLD_SIZE,
                "device": str(device),
                "launcher": os.getppid(),
            }
            with write_whole(out / "run.json") as file:
                json.dump(
                    {**settings, **versions, "model_config": dataclasses.asdict(config)}, file, indent=1
                )
            log = Log(out, steps, progress["step"], args.tensorboard)
    peak = (
        args.peak_tflops * 1e12
        if args.peak_tflops
        else costs.peak_flops(device, checkpoint.DTYPES[args.dtype])
    )
    stopping = False
    while progress["step"] < steps and not stopping:
        begun = time.perf_counter()
        step = progress["step"] + 1
        lr = learning_rate(step - 1, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        epoch, row = stream.start["epoch"], stream.at
        batch = stream.take(args.batch_size)
        line = {"step": step, "lr": lr, **train_step(model, optimizer, batch[RANK::WORLD_SIZE], args, device)}
        if "nonfinite" in line:
            progress["skipped"] += 1
            if not args.skip_nonfinite:
                raise UsageError(
                    f"step {step}, stopped before the optimiser: {line['nonfinite']} (epoch {epoch}, from row {row}); "
                    "try a lower --lr, or leave such steps out with --resume --skip-nonfinite"
                )
        progress["step"] = step
        line |= speeds(line.pop("flops"), line, time.perf_counter() - begun, peak, device)
        line |= {"skipped": progress["skipped"]} if progress["skipped"] else {}
        if evaluation and (step % args.eval_every == 0 or step in (1, steps)):
            line["eval_loss"] = evaluate(model, evaluation, device)
            line |= {"sample": sample(model, opening, tokenizer, args.seed, device)} if opening else {}
        if RANK == 0:
            failure = record(log, line)
        stop, failed = total([bool(asked), bool(failure)], device)
        if failed:
            raise UsageError(failure or "the log could not be written")
        stopping = stop > 0
        if step % args.save_every == 0 or step == steps or stopping:
            progress["stream"] = stream.state()
            save_state(out / f"step-{step}", model, optimizer, progress, args.keep)
    if log:
        log.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if progress["step"] < steps:
        raise KeyboardInterrupt(
            f"step {progress['step']} of {steps} is saved in {out}; the same command with --resume goes on"
        )
    if args.lora:
        own = tokenizer if args.tokenizer or args.chat_format else None
        lora.save_adapter(model, out / "final", args.model, args.lora, args.lora_alpha, own)
    else:
        checkpoint.save_model(model, out / "final", tokenizer, dtype=torch.bfloat16)
    dist.barrier()
    if log:
        log.draw()
        terminal.note(f"the trained actor is in {out / 'final'}, its loss curve in {out / 'loss.png'}")


def speeds(flops, line, took, peak, device):
    """What the log says of a step's speed: tokens a second of all ranks, model FLOP/s and utilisation of each."""
    rate = flops / took / WORLD_SIZE
    return {
        "seconds": took,
        "tokens_per_second": line["tokens"] / took,
        "supervised_per_second": line["supervised"] / took,
        "tflops": rate / 1e12,
        **({"mfu": rate / peak} if peak else {}),
        "peak_memory": costs.peak_memory(device),
    }


def record(log, line):
    """Writes a step down; returns why that failed, if it did."""
    try:
        log.write(line)
        if "eval_loss" in line:
            log.draw()
    except OSError as error:
        return f"{error.filename or log.path}: {error.strerror}; the checkpoints before are as they were"


if __name__ == "__main__":
    terminal.run(main)
