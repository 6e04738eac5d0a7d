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
    """Writes `config.json`, `generation_config.json`, safetensors shards, the tokenizer, a manifest: whole or not at all.

    Works on one process or on every rank of a sharded model (a collective then; rank 0 writes, a tensor at a time is gathered).
    """
    writer = not dist.is_initialized() or dist.get_rank() == 0
    dtype = dtype or next(model.parameters()).dtype
    with whole_directory(directory) if writer else contextlib.nullcontext() as temporary:
        shard, size, shards = {}, 0, []

        def flush():
            shards.append(list(shard))
            save_tensors(shard, temporary / f"{len(shards) - 1}.safetensors")

        total = 0
        for name, parameter in model.named_parameters():
            tensor = parameter.detach()
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if not writer:
                continue
            bytes_ = tensor.numel() * dtype.itemsize
            if shard and size + bytes_ > max_shard_bytes:
                flush()
                shard, size = {}, 0
            shard[name] = tensor.to("cpu", dtype).contiguous()
            size, total = size + bytes_, total + bytes_
        if not writer:
            return
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
        write_json(temporary / "config.json", _config_to(model.config, dtype, tokenizer))
        if tokenizer:
            stops = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.stop_ids}
            write_json(temporary / "generation_config.json", stops)
            save_tokenizer(tokenizer, temporary)


def save_tensors(tensors, file):
    """Writes {name: tensor} as a safetensors file."""
    file.touch()
    mode = file.stat().st_mode  # that of every new file; safetensors would let nobody else read it
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)
