"""The model that the engine runs on a CPU: weights packed for few rows, q/k/v and gate/up as one product
each.

    twin = PackedTransformer(model)              # shares embeddings and norms; the model stays as it was

Every weight is in oneDNN's blocked layout. There a row's product has the same bits however many rows are
multiplied with it, so a text does not depend on what else is in the batch; MKL's products of row-major and
column-major weights do not have that property on AVX2. One row alone is the exception (oneDNN adds up more
than 1,024 inputs in another order), so it is run twice. Without oneDNN, or where it refuses a dtype, plain
`F.linear` serves and the property does not hold (`PackedLinear.blocked`). The two private operators of torch
are called in this file and nowhere else.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import MLP, Attention, Block, MixtureOfExperts, Transformer, rotate

ROWS = 16  # the number of rows the blocked layout is chosen for: chosen for 1 it would be slow for more


def fast_bf16():
    """Whether this processor multiplies tiles of bfloat16 (AMX), which makes bfloat16 the faster choice.

    With AVX512-BF16 alone float32 is better: on one core the linear layers of a 135M model took 0.75 of its
    time in bfloat16 for 1 row, the same for 16, and 1.7 of it for the 512 and 2,048 rows of a prompt. Without
    either bfloat16 is emulated.
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
    """weight [out, in] in oneDNN's blocked layout; None where this torch has no oneDNN or the processor lacks
    the dtype."""
    try:
        if weight.dtype == torch.float32 or (
            weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    except (AttributeError, RuntimeError):  # a build without oneDNN; bf16 on a processor without it
        pass
    return None


class PackedAttention(Attention):
    """Attention with a cache; rotates queries and keys together."""

    def __init__(self, attention):
        nn.Module.__init__(self)
        self.head_dim, self.layer, self.window = attention.head_dim, attention.layer, attention.window
        self.key_heads = attention.k_proj.out_features // self.head_dim
        self.qkv = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = PackedLinear(attention.o_proj)

    def forward(self, x, cos, sin, positions, cache, rows=None):
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [1, N, H + 2 K, D]
        qk, v = heads.split((heads.shape[-2] - self.key_heads, self.key_heads), dim=-2)
        q, k = rotate(qk, cos, sin).split((qk.shape[-2] - self.key_heads, self.key_heads), dim=-2)
        return self.o_proj(cache.attend(self.layer, q, k, v, self.window).flatten(-2))


class PackedMLP(MLP):
    """SwiGLU of an MLP's or an Expert's three layers."""

    def __init__(self, gate, up, down):
        nn.Module.__init__(self)
        self.gate_up, self.down = PackedLinear(gate, up), PackedLinear(down)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class PackedMixtureOfExperts(MixtureOfExperts):
    def __init__(self, experts):
        nn.Module.__init__(self)
        self.top_k, self.gate = experts.top_k, PackedLinear(experts.gate)
        self.experts = nn.ModuleList(PackedMLP(e.w1, e.w3, e.w2) for e in experts.experts)


class PackedBlock(Block):
    def __init__(self, block):
        nn.Module.__init__(self)
        self.input_layernorm, self.post_attention_layernorm = (
            block.input_layernorm,
            block.post_attention_layernorm,
        )
        self.self_attn = PackedAttention(block.self_attn)
        if hasattr(block, "block_sparse_moe"):
            self.block_sparse_moe = PackedMixtureOfExperts(block.block_sparse_moe)
        else:
            self.mlp = PackedMLP(block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj)


class PackedTransformer(Transformer):
    """A twin of a Transformer that runs with a cache only. It sees no later change of the weights.

    consume: takes the model apart while packing, so that no weight is held twice.
    """

    @torch.no_grad()
    def __init__(self, model, consume=False):
        nn.Module.__init__(self)
        self.config, parts, blocks = model.config, dict(model.model.items()), []
        for block in parts["layers"]:
            blocks.append(PackedBlock(block))
            if consume:
                block._modules.clear()
        self.model = nn.ModuleDict({**parts, "layers": nn.ModuleList(blocks)})
        tied = self.config.tie_word_embeddings
        self.packed_head = PackedLinear(parts["embed_tokens"] if tied else model.lm_head)
        if consume:
            model._modules.clear()

    def head(self, x, targets):
        return self.packed_head(x)
