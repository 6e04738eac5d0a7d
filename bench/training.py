"""A training step of ours on packed rows, against transformers on the same rows or on padded batches; with
--lora of adapters alone, against PEFT."""

import functools
import multiprocessing
import re
import signal
import tempfile
import types
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.figures import seconds
from bench.models import SHAPES, config_of, in_transformers, randomise
from checkpoint import DTYPES, build_model
from common.files import UsageError
from data.packing import IGNORE
from data.scenes import STAGE
from data.stream import Stream
from tokenizer import STAGE_TOKENIZER, load_tokenizer
from training import costs
from training.lora import add_adapters
from training.parallel import shard_model, start_ranks
from training.step import make_optimizer, train_step


def measure(args):
    """Tokens a second, peak memory and loss of each side, in a process of its own, all from the same weights.

    The padded peer is left out at a vocabulary above 100,000, where its logits would take some 20 GB.
    """
    args.model = args.model or ("8b" if args.device == "cuda" else "stage")
    args.seq_len = min(args.seq_len, 1024) if args.toy else args.seq_len
    if args.model not in SHAPES or args.peer == "llama.cpp":
        raise UsageError(f"train takes --model {', '.join(SHAPES)} (random weights), --peer transformers")
    tokenizer = load_tokenizer(Path(args.tokenizer or STAGE_TOKENIZER))
    sides = ["ours", "transformers, packed"][: 1 + bool(args.peer)]
    sides += ["transformers, padded"] * (bool(args.peer) and tokenizer.vocab_size < 100_000 and not args.lora)
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        workers = {side: stack.enter_context(ProcessPoolExecutor(1, spawn)) for side in sides}
        for side, worker in workers.items():
            worker.submit(open_side, args, side).result()
        for number in range(args.rounds + 1):
            losses = {}
            for side, worker in workers.items():
                figures = worker.submit(measured_step).result()
                losses[side] = figures["loss"]
                yield number, {"side": side, "rows": f"{args.rows} x {args.seq_len}"}, figures
            if max(losses.values()) - min(losses.values()) > 1e-4 * losses["ours"]:
                raise UsageError(f"the losses differ, so that nothing can be compared: {losses}")


opened = None  # in the process of a side: its step, tokens, device


def open_side(args, side):
    """Makes this process a side, for `measured_step`."""
    global opened
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach all processes; the parent ends this one
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1 if args.toy else torch.get_num_threads())
    cuda, device = args.device == "cuda", start_ranks()
    tokenizer = load_tokenizer(Path(args.tokenizer or STAGE_TOKENIZER))
    own = 0 if args.toy or args.model == "stage" else SHAPES[args.model]["vocab_size"]
    config = config_of(args, vocab_size=max(own, tokenizer.vocab_size))
    options = types.SimpleNamespace(
        micro_batch=1, clip=1.0, shard_ranks=None, lora=None, lr=1e-6, weight_decay=0.0, compile=args.compile
    )
    options.recompute = "full" if cuda else "none"
    options.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    rows = Stream([args.data or STAGE], tokenizer, args.seq_len).take(args.rows)[:]
    if args.lora:  # the frozen base is kept in the dtype of compute
        model = randomise(build_model(config, device, DTYPES[options.dtype]))
    else:
        model = randomise(shard_model(config, device, options))
    if side == "ours":
        if args.lora:
            options.lora = args.lora
            add_adapters(model, args.lora, 2 * args.lora)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.zero_()
        optimizer = make_optimizer(model, options)
        run = functools.partial(train_step, model, optimizer, rows, options, device)
    else:
        batches = [packed(row) for row in rows]
        if side.endswith("padded"):
            documents = [document for row in batches for document in split(row)]
            batches = [padded(documents[i : i + 8]) for i in range(0, len(documents), 8)]
        with tempfile.TemporaryDirectory() as directory:
            peer = in_transformers(model, f"{directory}/model")
        if args.lora:
            peer = with_peft(peer, args.lora)
        run = peer_step(peer, batches, options)
        del model
    opened = run, sum(row["used"].item() for row in rows), device


def measured_step():
    """The figures of one step; the step returns a dict with `loss`, and ours with `flops`."""
    run, tokens, device = opened
    line = {}
    took = seconds(lambda: line.update(run()), device.type)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_peak()
    figures = {"tok/s": tokens / took, "seconds": took, "peak GiB": peak / 2**30, "loss": line["loss"]}
    if "flops" in line:
        figures["TFLOP/s"] = line["flops"] / took / 1e12
        limit = costs.peak_flops(device, torch.bfloat16)
        figures |= {"MFU": line["flops"] / took / limit} if limit else {}
    return figures


def resident_peak():
    """Bytes; getrusage would count what the parent process held as well."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("utf-8"))[1]) * 2**10


def packed(row):
    """A row as arguments of transformers [1, T], which makes its attention mask from the positions.

    transformers has a label at its own token, not at the token before.
    """
    labels = F.pad(row["targets"][:-1], (1, 0), value=IGNORE)
    parts = {"input_ids": row["tokens"], "labels": labels, "position_ids": row["positions"]}
    return {name: part[None, : row["used"]] for name, part in parts.items()}


def split(row):
    """(ids, labels) of each document of a packed row."""
    starts = (row["position_ids"][0] == 0).nonzero().flatten().tolist()
    parts = (row[name][0].tensor_split(starts[1:]) for name in ("input_ids", "labels"))
    return zip(*parts, strict=True)


def padded(documents):
    """Documents as arguments of transformers, padded to the longest."""
    ids, labels = zip(*documents, strict=True)
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = pad([torch.ones_like(part) for part in ids])
    return {"input_ids": pad(ids), "labels": pad(labels, padding_value=IGNORE), "attention_mask": mask}


def with_peft(model, rank):
    """The model under PEFT's adapters, of the same rank, scale and layers as ours."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def peer_step(model, batches, options):
    """One optimiser step of transformers, its gradient accumulated over batches."""
    model.train()
    betas, decay = (0.9, 0.95), options.weight_decay
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, options.lr, betas, weight_decay=decay, fused=True)
    batches = [{name: part.to(model.device) for name, part in batch.items()} for batch in batches]
    supervised = sum((batch["labels"] != IGNORE).sum() for batch in batches)

    def run():
        total = 0.0
        for batch in batches:
            loss = model(**batch, use_cache=False, num_items_in_batch=supervised).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": total}

    return run
