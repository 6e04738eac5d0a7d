"""Run by test_train.py under torchrun: one training step split in several ways; each rank 0 leaves its loss
and gradients.

    torchrun --nproc_per_node N tests/one_step.py OUT SPLITS

SPLITS: JSON [{name, micro_batch, train.py's options}, ...]
OUT holds `start/`, a checkpoint, and `rows.safetensors`; OUT/N-NAME.safetensors is made.
"""

import functools
import json
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
from training.parallel import shard_model, start_ranks
from training.step import train_step

torch.set_num_threads(1)
torch.compile = functools.partial(
    torch.compile, backend="aot_eager"
)  # captured, but no code generated: that takes minutes
out, splits = Path(sys.argv[1]), json.loads(sys.argv[2])
stored = load_file(out / "rows.safetensors")
rows = [{name: tensor[i] for name, tensor in stored.items()} for i in range(len(stored["tokens"]))]
device = start_ranks()
rank, world = dist.get_rank(), dist.get_world_size()
for split in splits:
    options = dict(
        dtype="float32", recompute="none", compile=False, shard_ranks=None, lora=None, clip=1e9, micro_batch=1
    )
    args = types.SimpleNamespace(**options | split)
    model = shard_model(checkpoint.load_config(out / "start"), device, args)
    checkpoint.fill(model, checkpoint.Weights(out / "start"))
    found = {}

    def keep_gradients(model=model, found=found):
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()

    optimizer = types.SimpleNamespace(step=keep_gradients, zero_grad=model.zero_grad)
    line = train_step(model, optimizer, rows[rank::world], args, device)
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
    found |= {f"line.{name}": torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    if rank == 0:
        save_file(found, out / f"{world}-{split['name']}.safetensors")
dist.destroy_process_group()
