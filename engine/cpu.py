"""The model that the engine runs on a CPU: weights packed for few rows, q/k/v and gate/up as one product
each.

    PackedTransformer(config, read, torch.int8)           # read(name) -> that tensor of the checkpoint
    packed(model)                                         # of a Transformer, whose norms it shares

Each weight is packed as soon as it is read, so a model never exists in another form. In float32 and bfloat16
it is in oneDNN's blocked layout, in which a row's product has the same bits however many rows are multiplied,
so a text does not depend on what else is in the batch; MKL's row-major and column-major products do not have
that property on AVX2. A single row is the exception (oneDNN adds up more than 1,024 inputs in another order),
so it is run twice. Without oneDNN, or where it lacks a dtype, `F.linear` serves and the property does not
hold (`PackedLinear.blocked`). In int8 (int8.py) it holds by arithmetic. oneDNN's private operators are called
in this file only.
"""

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
from engine.int8 import Int8Embedding, Int8Linear
from model import MLP, Attention, Block, MixtureOfExperts, RMSNorm, Transformer, rotate

DTYPES = checkpoint.DTYPES | {"int8": torch.int8}
ROWS = 16  # the number of rows the blocked layout is chosen for: chosen for 1 it would be slow for more


def fast_bf16():
    """Whether this processor multiplies tiles of bfloat16 (AMX), which makes bfloat16 the faster choice.

    With AVX512-BF16 alone float32 is better: on one core the linear layers of a 135M model took 0.75 of its
    time in bfloat16 for 1 row, the same for 16, and 1.7 of it for the 512 and 2,048 rows of a prompt. Without
    either bfloat16 is emulated.
    """
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def native_bf16():
    """Whether oneDNN takes bfloat16 on this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_blocks(dtype):
    """Whether oneDNN's blocked layout takes weights of a dtype here."""
    if dtype == torch.float32:
        return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return dtype == torch.bfloat16 and native_bf16()


class PackedLinear(nn.Module):
    """x [..., C] -> [..., O]: linear layers that share their input, as one. weights: [outputs, C] each."""

    def __init__(self, weights, bias=None):
        super().__init__()
        first, *others = weights
        weight = torch.cat((first, *others)) if others else first
        self.bias, self.nbytes, self.blocked = bias, weight.nbytes, has_blocks(weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if self.blocked else weight

    def forward(self, x):
        if not self.blocked:
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)
        padded = rows.expand(2, -1) if len(rows) == 1 else rows
        out = torch.ops.mkldnn._linear_pointwise(padded, self.weight, self.bias, "none", [], "")
        return out[: len(rows)].view(*x.shape[:-1], out.shape[-1])


class PackedAttention(Attention):
    """Attention with a cache; rotates queries and keys together."""

    def __init__(self, config, layer, weights):
        nn.Module.__init__(self)
        self.head_dim, self.layer, self.window = config.head_dim, layer, config.sliding_window
        self.key_heads = config.num_key_value_heads
        self.qkv = weights.linear("q_proj", "k_proj", "v_proj", bias=config.qkv_bias)
        self.o_proj = weights.linear("o_proj")

    def forward(self, x, cos, sin, positions, cache, rows=None):
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [1, N, H + 2 K, D]
        qk, v = heads.split((heads.shape[-2] - self.key_heads, self.key_heads), dim=-2)
        q, k = rotate(qk, cos, sin).split((qk.shape[-2] - self.key_heads, self.key_heads), dim=-2)
        return self.o_proj(cache.attend(self.layer, q, k, v, self.window).flatten(-2))


class PackedMLP(MLP):
    """SwiGLU of the layers of an MLP or an Expert, by their names."""

    def __init__(self, weights, gate, up, down):
        nn.Module.__init__(self)
        self.gate_up, self.down = weights.linear(gate, up), weights.linear(down)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class PackedMixtureOfExperts(MixtureOfExperts):
    def __init__(self, config, weights):
        nn.Module.__init__(self)
        self.top_k = config.num_experts_per_tok
        self.gate = PackedLinear([weights.tensor("gate.weight")])  # small, and it chooses
        experts = (weights.below(f"experts.{number}") for number in range(config.num_local_experts))
        self.experts = nn.ModuleList(PackedMLP(expert, "w1", "w3", "w2") for expert in experts)


class PackedBlock(Block):
    def __init__(self, config, layer, weights):
        nn.Module.__init__(self)
        self.input_layernorm = weights.norm(config, "input_layernorm")
        self.post_attention_layernorm = weights.norm(config, "post_attention_layernorm")
        self.self_attn = PackedAttention(config, layer, weights.below("self_attn"))
        if config.num_local_experts:
            self.block_sparse_moe = PackedMixtureOfExperts(config, weights.below("block_sparse_moe"))
        else:
            self.mlp = PackedMLP(weights.below("mlp"), "gate_proj", "up_proj", "down_proj")


class Reader:
    """Makes packed layers of the tensors whose names begin with `prefix`; read(name) -> tensor."""

    def __init__(self, read, dtype, prefix=""):
        self.read, self.dtype, self.prefix = read, dtype, prefix
        self.kind = Int8Linear if dtype == torch.int8 else PackedLinear

    def below(self, name):
        return Reader(self.read, self.dtype, f"{self.prefix}{name}.")

    def tensor(self, name):
        """A tensor in the model's dtype, in float32 if that is int8."""
        dtype = torch.float32 if self.dtype == torch.int8 else self.dtype
        return self.read(self.prefix + name).detach().to(dtype)

    def linear(self, *names, bias=False):
        """The linear layers of these names as one, which are read one after the other."""
        biases = torch.cat([self.tensor(f"{name}.bias") for name in names]) if bias else None
        return self.kind((self.tensor(f"{name}.weight") for name in names), biases)

    def norm(self, config, name):
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        norm.weight = nn.Parameter(self.tensor(f"{name}.weight"), requires_grad=False)
        return norm


class PackedTransformer(Transformer):
    """A Transformer that runs with a cache only, its weights packed in `dtype`. It sees no later change of
    them."""

    @torch.no_grad()
    def __init__(self, config, read, dtype):
        nn.Module.__init__(self)
        self.config, self.dtype, weights = config, dtype, Reader(read, dtype)
        table = weights.tensor("model.embed_tokens.weight")
        if config.tie_word_embeddings:
            self.packed_head = weights.kind([table])
        embedding = Int8Embedding(table) if dtype == torch.int8 else nn.Embedding.from_pretrained(table)
        del table
        layers = weights.below("model.layers")
        blocks = (PackedBlock(config, n, layers.below(n)) for n in range(config.num_hidden_layers))
        parts = {"embed_tokens": embedding, "layers": nn.ModuleList(blocks)}
        self.model = nn.ModuleDict(parts | {"norm": weights.norm(config, "model.norm")})
        if not config.tie_word_embeddings:
            self.packed_head = weights.linear("lm_head")

    def bytes_read(self):
        """Bytes of weights that a step reads."""
        return sum(layer.nbytes for layer in self.modules() if isinstance(layer, (PackedLinear, Int8Linear)))

    def head(self, x, targets):
        return self.packed_head(x)


def packed(model):
    """The packed twin of a Transformer, which stays as it was; a PackedTransformer as it is."""
    if isinstance(model, PackedTransformer):
        return model
    return PackedTransformer(model.config, model.get_parameter, next(model.parameters()).dtype)
