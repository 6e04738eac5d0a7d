"""The forward pass of the Llama family and nothing else: Llama 2 to 3.2, Mistral, Qwen 2, Mixtral.

    logits = Transformer(config)(tokens)          # [B, T] -> [B, T, vocab]

One pass serves training (packed rows, `positions`), prefill and cached decode (`cache`). Modules are named as
in Hugging Face checkpoints, so loading needs no renaming. In shapes, B is batch, T time, C hidden size, H
query heads, K key/value heads, D head size, E experts, N selected rows, V vocabulary. `rows`, int64 [N],
sorted, are indices into the flattened [B * T].
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from kernels.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class RopeScaling:
    """LLaMA 3.1's scaling of the rotary wavelengths, from a context of 8k tokens in training to 128k."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape, with the names of Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 131_072
    tie_word_embeddings: bool = False
    model_type: str = "llama"  # of config.json; the fields below are what differs between families
    qkv_bias: bool = False  # Qwen 2
    sliding_window: int | None = None  # Mistral v0.1: keys that a query sees, its own included
    num_local_experts: int = 0  # Mixtral; 0 is a plain MLP
    num_experts_per_tok: int = 2

    def num_parameters(self):
        """Parameters of the whole model, counted from the shapes."""
        C, D, E = self.hidden_size, self.head_dim, self.num_local_experts
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        attention = C * D * (heads + self.num_attention_heads) + D * heads * self.qkv_bias
        layer = attention + 3 * C * self.intermediate_size * max(E, 1) + C * E + 2 * C
        embeddings = self.vocab_size * C * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + C


PRESETS = {  # the vocabulary follows the tokenizer
    "stage": dict(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        rope_theta=10_000.0,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": dict(
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_scaling=RopeScaling(),
    ),
    "llama-3.1-70b": dict(
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        rope_scaling=RopeScaling(),
    ),
}


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def rope_frequencies(config, device):
    """Angle per position of each pair of dimensions, fp32 [D/2]; no buffer of the model, so it stays fp32.

    With scaling (Llama 3.1, section on long context): wavelengths shorter than 8192/4 stay, the frequencies
    of those longer than 8192/1 are divided by the factor, and between the two the frequency is interpolated.
    """
    D = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    return frequencies


def rotary(positions, config):
    """(cos, cos) and (-sin, sin) of the angles, [B, T, 1, D] fp32, for positions int [B, T]."""
    angles = (positions[:, :, None].float() * rope_frequencies(config, positions.device))[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """Rotates each pair (x[i], x[i + D/2]) by its angle: x [..., heads, D], cos and sin from `rotary`."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class _Rotate(torch.autograd.Function):
    """`rotate` with a backward that needs no copy of x: the gradient is rotated by the opposite angle."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


def select(x, rows):
    """x [B, T, ...] as it is, or only its rows, [N, ...]."""
    return x if rows is None else x.flatten(0, 1)[rows]


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, residual=None):
        return kernels.rms_norm(x, self.weight, self.eps, residual)


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K key/value heads."""

    def __init__(self, config, layer):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.layer, self.window = D, layer, config.sliding_window
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.attention = kernels.attention  # training may keep torch.compile out of it

    def forward(self, x, cos, sin, positions, cache, rows=None):
        """x [B, T, C] -> [B, T, C]; with rows only their queries are computed, out [N, C]."""
        heads = (-1, self.head_dim)
        k = _Rotate.apply(self.k_proj(x).unflatten(-1, heads), cos, sin)  # [B, T, K, D]
        v = self.v_proj(x).unflatten(-1, heads)  # [B, T, K, D]
        x, cos, sin = (select(part, rows) for part in (x, cos, sin))
        q = _Rotate.apply(self.q_proj(x).unflatten(-1, heads), cos, sin)  # [B, T, H, D] or [N, H, D]
        if cache is None:
            out = self.attention(q, k, v, positions, self.window, rows)
        else:
            out = cache.attend(self.layer, q, k, v, self.window)
        return self.o_proj(out.flatten(-2))  # [..., H, D] -> [..., C]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        C, M = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, M, bias=False)
        self.up_proj = nn.Linear(C, M, bias=False)
        self.down_proj = nn.Linear(M, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Expert(nn.Module):
    """SwiGLU under Mixtral's names: w2(silu(w1(x)) * w3(x))."""

    def __init__(self, config):
        super().__init__()
        C, M = config.hidden_size, config.intermediate_size
        self.w1, self.w2, self.w3 = (nn.Linear(*sizes, bias=False) for sizes in ((C, M), (M, C), (C, M)))

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MixtureOfExperts(nn.Module):
    """Each token goes through its gate's top-k experts, weighted by the gate (Jiang et al. 2024, 2.1)."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_local_experts))

    def forward(self, x):
        tokens = x.flatten(0, -2)  # [N, C]
        shares, chosen = self.gate(tokens).softmax(-1, dtype=torch.float32).topk(self.top_k)  # [N, top_k]
        shares = (shares / shares.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, rank = (chosen == number).nonzero(as_tuple=True)  # this expert's tokens
            out = out.index_add(0, rows, expert(tokens[rows]) * shares[rows, rank, None])
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.num_local_experts:
            self.block_sparse_moe = MixtureOfExperts(config)
        else:
            self.mlp = MLP(config)

    def forward(self, x, cos, sin, positions=None, cache=None, rows=None):
        """x [B, T, C] -> [B, T, C]; with rows (last layer) all but keys and values is theirs only: [N, C]."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin, positions, cache, rows)
        normed, x = self.post_attention_layernorm(attended, residual=select(x, rows))
        feed_forward = self.block_sparse_moe if hasattr(self, "block_sparse_moe") else self.mlp
        return x + feed_forward(normed)


class Transformer(nn.Module):
    """tokens int64 [B, T] -> logits [B, T, V], in the model's dtype."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        blocks = (Block(config, layer) for layer in range(config.num_hidden_layers))
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(blocks),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens, positions=None, cache=None, rows=None, targets=None):
        """Logits [B, T, V], or [N, V] at `rows`; with targets, int64 [N], `linear_cross_entropy` instead.

        positions: int [B, T], from 0 in each document of a packed row; None means 0, 1, 2, ... in every row.
        cache: an object whose `attend(layer, q, k, v, window)` stores keys and values and attends to all
        stored ones (engine/cache.py); it needs `positions`. Without one the last layer computes only `rows`.
        """
        x = self.model["embed_tokens"](tokens)  # [B, T, C]
        packed = positions  # None: attention takes whole rows as documents
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        cos, sin = (angle.to(x.dtype) for angle in rotary(positions, self.config))
        *blocks, last = self.model["layers"]
        for block in blocks:
            x = block(x, cos, sin, packed, cache)
        if cache is None:
            x = last(x, cos, sin, packed, rows=rows)  # [B, T, C] or [N, C]
        else:
            x = select(last(x, cos, sin, packed, cache), rows)
        return self.head(self.model["norm"](x), targets)

    def head(self, x, targets):
        head = self.model["embed_tokens"] if self.config.tie_word_embeddings else self.lm_head
        if targets is not None:  # here, where FSDP has gathered the head's weight
            return linear_cross_entropy(x, head.weight, targets)
        return F.linear(x, head.weight)
