"""LoRA (Hu et al. 2021, arXiv 2106.09685): the model is frozen, and small matrices beside it are trained.

    y = x W' + s (x A') B'      A [rank, in], B [out, rank] (zero at first), s = alpha / rank

`train.py --lora RANK` trains adapters and writes them as PEFT does; checkpoint/adapters.py reads them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint.adapters import CONFIG, PREFIX, TENSORS
from checkpoint.export import gathered, save_tensors
from checkpoint.weights import generator_of
from common.files import whole_directory, write_json
from text.export import save_tokenizer


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter: x [..., in] -> [..., out].

    The adapter is fp32 and computes in the dtype of x. The frozen weight gets no gradient, and of the
    adapter's products autograd keeps only x A', [..., rank].
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
    """Freezes a Transformer and adds an adapter to each linear layer of its blocks but the experts' gate."""
    model.requires_grad_(False)
    for parent in list(model.model["layers"].modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "gate":
                setattr(parent, name, LoraLinear(child, rank, alpha))
    return model


class FreshAdapters:
    """For `checkpoint.fill`: the base's weights and initial adapters, which change nothing yet.

    A is uniform within 1 / sqrt(in), as in PEFT, drawn from the seed and its own name; B is zero.
    """

    def __init__(self, weights, model, seed):
        self.weights, self.seed = weights, seed
        self.shapes = {name: p.shape for name, p in model.named_parameters() if ".lora_" in name}

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
    """Writes a model's adapters in bf16 as PEFT does. A collective if the model is sharded: rank 0 writes.

    base: directory or Hub id, as the user gave it. tokenizer: only if it is not the base's own.
    """
    adapters = [pair for pair in model.named_parameters() if ".lora_" in pair[0]]
    tensors = {PREFIX + name: tensor.to("cpu", torch.bfloat16).contiguous()
               for name, tensor in gathered(adapters)}  # fmt: skip
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base))
    config |= dict(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", use_rslora=False, use_dora=False)
    config |= dict(fan_in_fan_out=False, init_lora_weights=True, inference_mode=True, modules_to_save=None)
    config |= dict(rank_pattern={}, alpha_pattern={})
    config["target_modules"] = sorted({name.split(".")[-3] for name, _ in adapters})
    with whole_directory(directory) as temporary:
        save_tensors(tensors, temporary / TENSORS)
        write_json(temporary / CONFIG, config)
        if tokenizer:
            save_tokenizer(tokenizer, temporary)
