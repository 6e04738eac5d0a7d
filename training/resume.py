"""Checkpoints of a run: saved by all ranks, whole or not at all; verified, restored; the final model.

A checkpoint `OUT/step-N` holds the trained parameters and the optimiser (torch.distributed.checkpoint, each
rank its own shards), `progress.json` and a manifest of checksums. It is written under a temporary name,
synced and renamed, so a kill or a full disk leaves the earlier ones as they were. It loads on any number of
ranks. There is no random state to save: data, first weights and samples depend only on the seed and their own
position.
"""

import os
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule

import checkpoint
from checkpoint.weights import open_weights
from common import terminal
from common.files import MANIFEST, UsageError, checksum, read_json, sync_directory, verify, write_json
from training import lora, parallel
from training.parallel import RANK, WORLD_SIZE, agreed, gather

# flags that may change when a run is resumed, since they change nothing that is learnt
FREE = {"resume", "out", "dry_run", "save_every", "keep", "eval_every", "eval_rows", "tensorboard", "cache"}
FREE |= {"peak_tflops", "skip_nonfinite", "micro_batch", "shard_ranks", "recompute", "compile", "strict"}


def settings_of(args, config, stream, base):
    """{name: value as text} of what determines a run; base: the fingerprint of LoRA's frozen model."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    settings["model_shape"] = str(config)
    settings["data"] = f"{len(stream.files)} files, hash {stream.identity[:12]}"
    return settings | ({"base": base} if base else {})


def find_checkpoints(out):
    """The checkpoints of a run, oldest first."""
    steps = [path for path in Path(out).glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))


def restarted(out):
    """Whether torchrun --max-restarts restarted us in a run that it began itself. Rank 0 decides."""
    if RANK or not parallel.RESTARTS:
        return parallel.RESTARTS > 0
    file = Path(out) / "run.json"
    return file.exists() and read_json(file).get("launcher") == os.getppid()


# ---- saving -----------------------------------------------------------------------------------


def save_state(directory, model, optimizer, progress, keep=2):
    """Saves model, optimiser and `progress` (JSON) as `directory`; of the checkpoints beside it `keep` stay.

    A collective. If it fails it raises UsageError on every rank and leaves everything as it was before.
    """
    directory = Path(directory)
    temporary = directory.with_name(f".{directory.name}.tmp")
    try:
        with agreed():
            if RANK == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        with agreed():
            dcp.save(_state(model, optimizer), checkpoint_id=temporary)
            own = sorted(temporary.glob(f"__{RANK}_*"))  # each rank reads back what it wrote
            checksums = {file.name: checksum(file) for file in own}
        checksums = gather(checksums)
        with agreed():
            if RANK == 0:
                _complete(temporary, directory, progress, checksums, keep)
    except UsageError as error:
        if RANK == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = ", ".join(path.name for path in find_checkpoints(directory.parent))
        kept = f"earlier checkpoints are unchanged: {kept}" if kept else "there is no earlier one"
        raise UsageError(f"{directory}: the checkpoint could not be saved ({error}); {kept}") from None


def _complete(temporary, directory, progress, checksums, keep):
    """Writes progress and manifest, gives the checkpoint its name, and removes old ones."""
    write_json(temporary / "progress.json", progress)
    manifest = {name: checksum(temporary / name) for name in (".metadata", "progress.json")}
    for part in checksums:
        manifest |= part
    write_json(temporary / MANIFEST, manifest)
    sync_directory(temporary)
    _remove(directory)  # exists only if it was found damaged
    os.rename(temporary, directory)
    sync_directory(directory.parent)
    found = find_checkpoints(directory.parent)
    older = found[: found.index(directory) + 1]  # newer ones were found damaged
    for path in {*found} - {*older[-keep:]}:
        _remove(path)


def _remove(directory):
    """Removes a directory if it exists. A kill on the way leaves no half of it under its name."""
    if directory.exists():
        old = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(directory, old)
        shutil.rmtree(old)


def save_final(model, out, args, tokenizer):
    """Writes `OUT/final` in bf16, for Hugging Face or PEFT. A collective; errors are raised on all ranks."""
    with agreed():
        if args.lora:
            own = tokenizer if args.tokenizer or args.chat_format else None
            lora.save_adapter(model, out / "final", args.model, args.lora, args.lora_alpha, own)
        else:
            checkpoint.save_model(model, out / "final", tokenizer, dtype=torch.bfloat16)


# ---- starting and restoring -------------------------------------------------------------------


def fill_first(model, config, args, directory):
    """Gives a model the weights that a run begins with: a checkpoint's or random ones, fresh adapters.

    A collective. args: seed, lora.
    """
    with agreed():
        weights = checkpoint.RandomWeights(model, args.seed)
        if directory:
            weights = open_weights(directory, config, RANK, WORLD_SIZE)
        if args.lora:
            weights = lora.FreshAdapters(weights, model, args.seed)
    checkpoint.fill(model, weights)


def restore(out, model, optimizer, stream, settings):
    """Loads the newest good checkpoint into model, optimiser, stream; returns its progress, None without one.

    A collective. UsageError if the run had other settings ({name of a flag: value as text}).
    """
    directory = last_good(out)
    if directory is None:
        return None
    progress = read_json(directory / "progress.json")
    saved = progress["settings"]
    changed = [name for name, value in settings.items() if saved.get(name, "None") != value]
    if changed:
        flags = [f"--{name.replace('_', '-')} was {saved.get(name)}, is {settings[name]}" for name in changed]
        what = f"was trained with other settings ({'; '.join(flags)})"
        raise UsageError(f"{directory}: {what}; use the same, or another --out")
    with agreed():
        state = _state(model, optimizer)
        dcp.load(state, checkpoint_id=directory)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    stream.load(progress["stream"])
    if RANK == 0:
        terminal.note(f"resuming from {directory}")
    return progress


def _state(model, optimizer):
    """What a checkpoint holds, and is loaded into in place: trained parameters and their optimiser state."""
    if isinstance(model, FSDPModule):  # an evaluation leaves the root's parameters gathered
        model.reshard()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"model": parameters, "optimizer": get_optimizer_state_dict(model, optimizer)}


def last_good(out):
    """The newest checkpoint that matches its manifest; None if there is no checkpoint. A collective.

    It names the newer ones that are damaged. UsageError if all are.
    """
    found = find_checkpoints(out)
    if RANK == 0:  # left behind by a kill
        for path in [*Path(out).glob(".step-*.tmp"), *Path(out).glob(".step-*.old")]:
            shutil.rmtree(path, ignore_errors=True)
    for directory in reversed(found):
        try:
            with agreed():
                if not (directory / MANIFEST).is_file():
                    raise UsageError(f"{directory / MANIFEST}: missing")
                verify(directory, RANK, WORLD_SIZE)
            return directory
        except UsageError as error:
            if RANK == 0:
                terminal.note(f"{error}. Trying an older one")
    if found:
        raise UsageError(f"{out}: all {len(found)} checkpoints are damaged; start again in another --out")
    return None
