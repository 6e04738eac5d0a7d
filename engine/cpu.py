"""The model that the engine runs on a CPU: weights packed for few rows, q/k/v and gate/up as one product each.

    model = packed(model)                        # shares embeddings and norms; the given model stays as it was

Every weight is in oneDNN's blocked layout. There a row's product has the same bits however many rows are multiplied with it, so
a text does not depend on what else is in the batch; MKL's products of row-major and column-major weights do not have that
property on AVX2. One row alone is the exception (oneDNN adds up more than 1,024 inputs in another order), so it is run twice.
Without oneDNN, or where it refuses a dtype, plain `F.linear` serves and the property does not hold (`PackedLinear.blocked`).
The two private operators of torch are called in this file and nowhere else.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from model import MLP, Attention, RMSNorm, Transformer, rotate, select

ROWS = 16  # the number of rows the blocked layout is chosen for: chosen for 1 it would be slow for more


def fast_bf16():
    """Whether this processor multiplies tiles of bfloat16 (AMX).

    With AVX512-BF16 alone float32 is the better choice: on one core the linear layers of a 135M model took 0.75 of its time in
    bfloat16 for 1 row, the same for 16, and 1.7 of it for the 512 and 2,048 rows of a prompt.
    """
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()


class PackedLinear(nn.Module):
    """x [..., C] -> [..., sum of the sizes]: linear layers that share their input, as one."""

    def __init__(self, *layers):
        super().__init__()
        weights = [layer.weight.detach() for layer in layers]
        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        biases = [layer.bias.detach() for layer in layers if getattr(layer, "bias", None) is not None]
        self.bias = torch.cat(biases) if biases else None
        blocked = block_layout(self.weight)
        self.blocked = blocked is not None
        self.weight = blocked if self.blocked else self.weight

    def forward(self, x):
        if not self.blocked:
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)
        padded = rows.expand(2, -1) if len(rows) == 1 else rows
        out = torch.ops.mkldnn._linear_pointwise(padded, self.weight, self.bias, "none", [], "")
        return out[: len(rows)].view(*x.shape[:-1], out.shape[-1])


def block_layout(weight):
    """weight [out, in] in oneDNN's blocked layout; None where this torch has no oneDNN or the processor lacks the dtype."""
    try:
        if weight.dtype == torch.float32 or (
            weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    except (AttributeError, RuntimeError):  # a build without oneDNN; bf16 on a processor without it
        pass
    return None


class PackedRMSNorm(RMSNorm):
    """x * weight sqrt(C) / sqrt(|x|^2 + C eps): kernels.rms_norm in half as many passes over the row."""

    def pack(self):
        size = self.weight.shape[0]
        self.scaled = self.weight.detach() * size**0.5  # [C]
        self.least = torch.tensor((size * self.eps) ** 0.5)

    def forward(self, x, residual=None):
        x = x if residual is None else x + residual
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [..., 1]
        normed = (x * self.scaled).div_(length.hypot_(self.least))
        return normed if residual is None else (normed, x)


class PackedAttention(Attention):
    def forward(self, x, cos, sin, positions, cache, rows=None):
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [1, N, H + 2 K, D]
        qk, v = heads.split((heads.shape[-2] - self.kv_heads, self.kv_heads), dim=-2)
        q, k = rotate(qk, cos, sin).split((qk.shape[-2] - self.kv_heads, self.kv_heads), dim=-2)
        out = cache.attend(self.layer, select(q, rows), k, v, self.window, rows)
        return self.o_proj(out.flatten(-2))


class PackedMLP(MLP):
    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class PackedTransformer(Transformer):
    def head(self, x, targets):
        return self.packed_head(x)


@torch.no_grad()
def packed(module, consume=False):
    """A twin of a Transformer (or a part of it) that runs with a cache only. It sees no later change of the weights.

    consume: takes the module apart on the way, so that each weight is held once and not twice.
    """
    if isinstance(module, nn.Linear):
        return PackedLinear(module)
    twin = copy.copy(module)
    if isinstance(module, Attention):
        twin.__class__, parts = PackedAttention, (module.q_proj, module.k_proj, module.v_proj)
        twin.kv_heads = module.k_proj.out_features // module.head_dim
        twin._modules = {"qkv": PackedLinear(*parts), "o_proj": PackedLinear(module.o_proj)}
    elif isinstance(module, MLP):
        twin.__class__, parts = PackedMLP, (module.gate_proj, module.up_proj)
        twin._modules = {"gate_up": PackedLinear(*parts), "down_proj": PackedLinear(module.down_proj)}
    elif isinstance(module, RMSNorm) and module.weight.dtype == torch.float32:
        twin.__class__ = PackedRMSNorm
        twin.pack()
    else:
        twin._modules = {
            name: packed(child, consume) for name, child in module._modules.items() if name != "lm_head"
        }
    if isinstance(module, Transformer):
        twin.__class__ = PackedTransformer
        tied = module.config.tie_word_embeddings
        twin._modules["packed_head"] = PackedLinear(twin.model["embed_tokens"] if tied else module.lm_head)
    if consume:
        module._modules.clear()
    return twin
