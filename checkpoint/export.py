"""Writes a model as a Hugging Face directory."""

import contextlib
import os

import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from checkpoint.config import _config_to
from checkpoint.weights import INDEX
from common.files import whole_directory, write_json
from text.export import save_tokenizer


def save_model(model, directory, tokenizer=None, dtype=None, max_shard_bytes=5 * 10**9):
    """Writes `config.json`, `generation_config.json`, safetensors shards, the tokenizer and a manifest, or
    nothing at all.

    Of a sharded model it is a collective: every rank calls it, tensors are gathered one at a time, and rank 0
    writes.
    """
    writer = not dist.is_initialized() or dist.get_rank() == 0
    dtype = dtype or next(model.parameters()).dtype
    with whole_directory(directory) if writer else contextlib.nullcontext() as temporary:
        shards = []  # the tensor names of each file
        for shard in _shards(model, dtype, max_shard_bytes, writer):
            save_tensors(shard, temporary / f"{len(shards)}.safetensors")
            shards.append(list(shard))
        if not writer:
            return
        _name_shards(temporary, shards, sum(p.numel() for p in model.parameters()) * dtype.itemsize)
        write_json(temporary / "config.json", _config_to(model.config, dtype, tokenizer))
        if tokenizer:
            stops = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.stop_ids}
            write_json(temporary / "generation_config.json", stops)
            save_tokenizer(tokenizer, temporary)


def _shards(model, dtype, max_bytes, writer):
    """Yields {name: tensor} of at most max_bytes, or of one tensor; on ranks that do not write it only takes
    part."""
    shard, size = {}, 0
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not writer:
            continue
        number = tensor.numel() * dtype.itemsize
        if shard and size + number > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.to("cpu", dtype).contiguous()
        size += number
    if writer:
        yield shard


def _name_shards(directory, shards, total):
    """Gives 0.safetensors, 1.safetensors, ... their final names, and writes the index if there are
    several."""
    if len(shards) == 1:
        os.rename(directory / "0.safetensors", directory / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(directory / f"{i}.safetensors", directory / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_tensors(tensors, file):
    """Writes {name: tensor} as a safetensors file with the permissions of every new file, where safetensors
    would make it readable by its owner alone."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)
