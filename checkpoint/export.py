"""Writes a model as a Hugging Face directory."""

import os
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from checkpoint.config import _config_to
from checkpoint.weights import INDEX
from common.files import UsageError, whole_directory, write_json
from text.export import save_tokenizer


def save_model(model, directory, tokenizer=None, dtype=None, max_shard_bytes=5 * 10**9):
    """Writes `config.json`, `generation_config.json`, safetensors shards, the tokenizer and a manifest, or
    nothing at all.

    On every rank of a sharded model it is a collective: rank 0 writes, one tensor at a time is gathered. An
    error of rank 0 is raised there alone, after every rank has taken part in all of it.
    """
    tensors = gathered(model.named_parameters())
    try:
        if not dist.is_initialized() or dist.get_rank() == 0:
            dtype = dtype or next(model.parameters()).dtype
            _write(tensors, model.config, Path(directory), tokenizer, dtype, max_shard_bytes)
    finally:  # the other ranks, and rank 0 after an error: none may be missing where tensors are gathered
        for _ in tensors:
            pass


def gathered(parameters):
    """Yields (name, whole tensor) of named parameters; where they are sharded a collective for each."""
    for name, parameter in parameters:
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _write(tensors, config, directory, tokenizer, dtype, max_shard_bytes):
    """Writes the directory of `save_model` from pairs (name, tensor)."""
    with whole_directory(directory) as temporary:
        shards, total = [], 0  # the tensor names of each file; bytes
        for shard in _shards(tensors, dtype, max_shard_bytes):
            save_tensors(shard, temporary / f"{len(shards)}.safetensors")
            shards.append(list(shard))
            total += sum(tensor.nbytes for tensor in shard.values())
        _name_shards(temporary, shards, total)
        write_json(temporary / "config.json", _config_to(config, dtype, tokenizer))
        if tokenizer:
            stops = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.stop_ids}
            write_json(temporary / "generation_config.json", stops)
            save_tokenizer(tokenizer, temporary)


def _shards(tensors, dtype, max_bytes):
    """Yields {name: tensor} of at most max_bytes, or of one tensor."""
    shard, size = {}, 0
    for name, tensor in tensors:
        tensor = tensor.to("cpu", dtype).contiguous()
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
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
    mode = file.stat().st_mode  # that of every new file; safetensors would let nobody else read it
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # not an OSError, even if the disk is full
        raise UsageError(f"{file}: could not be written ({error})") from None
    file.chmod(mode)
