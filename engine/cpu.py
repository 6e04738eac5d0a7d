"""A model for decoding on a CPU: weights in the layout that few rows are multiplied by fastest, q/k/v and gate/up as one.

    model = packed(model)                        # shares embeddings and norms; the model given stays as it was

Large weights are in oneDNN's own layout, small ones in fp32 column by column. All linear layers of one step of a 135M model on
two cores with AVX512, row-major against packed against column-major, in ms: 21, 22, 19 for 1 row, 36, 26, 27 for 4, 46, 37, 44
for 16; the 512 rows of a prompt take as long either way. A call to oneDNN takes 15 us more, which is most of the time of a
weight that a core's cache holds. With both, a row's results do not depend on how many rows there are, so that a text comes out
the same in any batch; that is why 1 row is no exception. The two private operators are called here and nowhere else; where they
are missing or refuse, plain ones serve.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from model import MLP, Attention, RMSNorm, Transformer, rotate, select

ROWS = 16  # what the layout is chosen for; chosen for 1 it would be slow at more
SMALL, NARROW = (
    2**21,
    1024,
)  # bytes and inputs of a weight; with more inputs some numbers of rows are added up in two parts


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
        self.layout = "rows"
        if (
            self.weight.dtype == torch.float32
            and self.weight.nbytes <= SMALL
            and self.weight.shape[1] <= NARROW
        ):
            self.weight, self.layout = self.weight.T.contiguous(), "columns"
            return
        try:
            types = (
                {torch.float32, torch.bfloat16}
                if torch.ops.mkldnn._is_mkldnn_bf16_supported()
                else {torch.float32}
            )
            if self.weight.dtype in types:
                self.weight, self.layout = (
                    torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS),
                    "blocks",
                )
        except (AttributeError, RuntimeError):
            pass  # no oneDNN in this torch

    def forward(self, x):
        if self.layout == "rows":
            return F.linear(x, self.weight, self.bias)
        if self.layout == "blocks":
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        rows = x.flatten(0, -2)
        several = (
            rows.expand(2, -1) if len(rows) == 1 else rows
        )  # one row alone would be added up in another order
        out = (
            torch.mm(several, self.weight)
            if self.bias is None
            else torch.addmm(self.bias, several, self.weight)
        )
        return out[: len(rows)].view(*x.shape[:-1], out.shape[-1])


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
