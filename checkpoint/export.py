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
from tokenizer import save_tokenizer


def save_model(model, directory, tokenizer=None, dtype=None, max_shard_bytes=5 * 10**9):
    """Writes `config.json`, `generation_config.json`, safetensors shards, the tokenizer, a manifest: whole or not at all.

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
        shard, size, shards, total = {}, 0, [], 0

        def flush():
            shards.append(list(shard))
            save_tensors(shard, temporary / f"{len(shards) - 1}.safetensors")

        for name, tensor in tensors:
            bytes_ = tensor.numel() * dtype.itemsize
            if shard and size + bytes_ > max_shard_bytes:
                flush()
                shard, size = {}, 0
            shard[name] = tensor.to("cpu", dtype).contiguous()
            size, total = size + bytes_, total + bytes_
        flush()
        if len(shards) == 1:
            os.rename(temporary / "0.safetensors", temporary / "model.safetensors")
        else:
            weight_map = {}
            for i, part in enumerate(shards):
                file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
                os.rename(temporary / f"{i}.safetensors", temporary / file)
                weight_map |= dict.fromkeys(part, file)
            write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(temporary / "config.json", _config_to(config, dtype, tokenizer))
        if tokenizer:
            stops = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.stop_ids}
            write_json(temporary / "generation_config.json", stops)
            save_tokenizer(tokenizer, temporary)


def save_tensors(tensors, file):
    """Writes {name: tensor} as a safetensors file."""
    file.touch()
    mode = file.stat().st_mode  # that of every new file; safetensors would let nobody else read it
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # not an OSError, even if the disk is full
        raise UsageError(f"{file}: could not be written ({error})") from None
    file.chmod(mode)
