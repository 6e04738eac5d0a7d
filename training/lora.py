"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen model learns through small added matrices, y = x W' + s (x A') B'.

A is [rank, in], B is [out, rank] and zero at first, s = alpha / rank. `train.py --lora RANK` trains adapters and writes them as
PEFT lays them out; checkpoint/adapters.py reads them.
"""

import json

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from checkpoint.adapters import CONFIG, PREFIX, TENSORS
from checkpoint.export import save_tensors
from checkpoint.weights import generator_of
from common.files import whole_directory
from text.export import save_tokenizer


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter: x [..., in] -> [..., out].

    The adapter is kept in fp32 and computed in the dtype of x. No gradient of the frozen weight is computed, and autograd
    keeps of the adapter's own products only x A', [..., rank].
    """

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        options = dict(bias=False, device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(base.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, base.out_features, **options)

    def forward(self, x):
        hidden = F.linear(x, self.lora_A.weight.to(x.dtype)) * self.scale
        return F.linear(x, self.weight, self.bias) + F.linear(hidden, self.lora_B.weight.to(x.dtype))


def add_adapters(model, rank, alpha):
    """Freezes a Transformer and puts an adapter on every linear layer of its blocks but the router of experts."""
    model.requires_grad_(False)
    for parent in list(model.model["layers"].modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "gate":
                setattr(parent, name, LoraLinear(child, rank, alpha))
    return model


class FreshAdapters:
    """For `checkpoint.fill`: a base's weights, and first values of the adapters, which change nothing yet.

    A is uniform within 1 / sqrt(in), as PEFT draws it; it depends on the seed and its name alone. B is zero.
    """

    def __init__(self, weights, model, seed):
        self.weights, self.seed = weights, seed
        self.shapes = {
            name: parameter.shape for name, parameter in model.named_parameters() if ".lora_" in name
        }

    def __getitem__(self, name):
        if name not in self.shapes:
            return self.weights[name]
        if name.endswith("lora_B.weight"):
            return torch.zeros(self.shapes[name])
        bound = self.shapes[name][1] ** -0.5
        return torch.empty(self.shapes[name]).uniform_(-bound, bound, generator=generator_of(self.seed, name))

    def order(self, names):
        return [*self.weights.order([name for name in names if name not in self.shapes]), *self.shapes]


def save_adapter(model, directory, base, rank, alpha, tokenizer=None):
    """Writes a model's adapters in bf16 as PEFT does; `base` is the base's directory or Hub id as the user gave it.

    A collective when the model is sharded: rank 0 writes. The tokenizer is the base's unless one is given.
    """
    tensors, modules = {}, set()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            tensor = parameter.detach()
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            tensors[PREFIX + name] = tensor.to("cpu", torch.bfloat16).contiguous()
            modules.add(name.split(".")[-3])
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    config = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=rank, lora_alpha=alpha
    )
    config |= dict(target_modules=sorted(modules), lora_dropout=0.0, bias="none", inference_mode=True)
    config |= dict(
        use_rslora=False, use_dora=False, fan_in_fan_out=False, init_lora_weights=True, modules_to_save=None
    )
    config |= dict(rank_pattern={}, alpha_pattern={})
    with whole_directory(directory) as temporary:
        save_tensors(tensors, temporary / TENSORS)
        (temporary / CONFIG).write_text(json.dumps(config, indent=1))
        if tokenizer:
            save_tokenizer(tokenizer, temporary)


# ---- reading ------------------------------------------------------------------------------------------------------------
