"""The state of a training run, `DIR/step-N`: saved by all ranks, whole or not at all; verified, found again, put back.

A state is parameters, optimiser (both through torch.distributed.checkpoint, each rank its own shards), `progress.json` and a
manifest of checksums. It is written under a temporary name, synced and renamed, so a kill or a full disk leaves the ones before
it as they were. It can be loaded on any number of ranks. Nothing in training draws from the global random generators: data,
first weights and samples each depend on the seed and their own place, so there is no random state to keep.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from common import terminal
from common.files import MANIFEST, UsageError, checksum, sync_directory, verify, write_whole


@contextlib.contextmanager
def agreed():
    """What fails on any rank within is raised on all of them, as one UsageError; else one would wait for another forever."""
    error = None
    try:
        yield
    except (OSError, UsageError, CheckpointException) as failure:
        error = failure
        if isinstance(failure, CheckpointException) and failure.failures:
            error = next(iter(failure.failures.values()))[0]
        error = (
            f"{getattr(error, 'filename', None) or ''}: {error.strerror}"
            if isinstance(error, OSError)
            else str(error)
        )
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    errors = [error for error in errors if error is not None]
    if errors:
        raise UsageError(errors[0].removeprefix(": ") or "an error without a message")


def find_checkpoints(out):
    """States of a run, oldest first."""
    steps = [path for path in Path(out).glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))


def save_state(directory, model, optimizer, progress, keep=2):
    """Writes model, optimiser and `progress` (a JSON dict) as `directory`; of its neighbours the last `keep` stay.

    A collective. UsageError on every rank if it cannot be done; then all is as it was before.
    """
    directory, first = Path(directory), dist.get_rank() == 0
    temporary = directory.with_name(f".{directory.name}.tmp")
    try:
        with agreed():
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        with agreed():
            dcp.save(_state(model, optimizer), checkpoint_id=temporary)
            mine = sorted(temporary.glob(f"__{dist.get_rank()}_*"))  # each rank reads back what it wrote
            checksums = {file.name: checksum(file) for file in mine}
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, checksums)
        with agreed():
            if first:
                (temporary / "progress.json").write_text(json.dumps(progress, indent=1))
                own = {name: checksum(temporary / name) for name in (".metadata", "progress.json")}
                manifest = {name: value for each in [own, *everyone] for name, value in each.items()}
                with write_whole(temporary / MANIFEST) as file:
                    json.dump(manifest, file, indent=1)
                sync_directory(temporary)
                remove(directory)  # there only if it was found damaged
                os.rename(temporary, directory)
                sync_directory(directory.parent)
                found = find_checkpoints(directory.parent)
                older = found[: found.index(directory) + 1]  # what is newer was found damaged
                for path in {*found} - {*older[-keep:]}:
                    remove(path)
    except UsageError as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = [path.name for path in find_checkpoints(directory.parent)]
        kept = (
            f"{', '.join(kept)} {'is' if len(kept) == 1 else 'are'} as before"
            if kept
            else "there is none before it"
        )
        raise UsageError(f"{directory}: the checkpoint could not be saved ({error}); {kept}") from None


def _state(model, optimizer):
    """What is saved and loaded in place: the parameters that are trained, and their optimiser state."""
    parameters = {
        name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return {"model": parameters, "optimizer": get_optimizer_state_dict(model, optimizer)}


def remove(directory):
    """Removes a directory, if it is there, so that a kill leaves no half of it under its name."""
    if directory.exists():
        gone = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(directory, gone)
        shutil.rmtree(gone)


def last_good(out):
    """The newest state of a run that matches its manifest, or None where there is none at all. A collective.

    Says which newer ones are damaged. UsageError if all are.
    """
    found = find_checkpoints(out)
    if dist.get_rank() == 0:
        for rest in [
            *Path(out).glob(".step-*.tmp"),
            *Path(out).glob(".step-*.old"),
        ]:  # of a run that was killed
            shutil.rmtree(rest, ignore_errors=True)
    for directory in reversed(found):
        try:
            with agreed():
                if not (directory / MANIFEST).is_file():
                    raise UsageError(f"{directory / MANIFEST}: missing")
                verify(directory, dist.get_rank(), dist.get_world_size())
            return directory
        except UsageError as error:
            if dist.get_rank() == 0:
                terminal.note(f"{error}. Looking for an older one")
    if found:
        raise UsageError(
            f"{out}: each of its {len(found)} checkpoints is damaged; start again in another --out"
        )
    return None


def load_state(directory, model, optimizer):
    """Puts a verified state into a model and optimiser of the same shapes, on any number of ranks. A collective."""
    with agreed():
        state = _state(model, optimizer)
        dcp.load(state, checkpoint_id=directory)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
