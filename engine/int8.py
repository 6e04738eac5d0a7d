"""Linear layers with weights of 7 bits and inputs of 8, whose products are sums of integers.

A weight is q s: integers q from -63 to 63 and a scale s for each output. Each row of the input is scaled so
that its largest value is 127, and rounded. Sums of integers are exact, so a row has the same bits in any
batch and on any processor; only a row with an inf or a NaN has no finite result. The eighth bit of the
weights is left out because processors without VNNI add pairs of products in 16 bits, which 2 * 255 * 127
overflows and 2 * 255 * 63 does not. A GGUF's Q8_0 blocks cannot be kept: they have a scale for every 32
inputs, here an output has one scale for all its inputs.

fbgemm multiplies, by operators that torch has deprecated and that are called in this file only. Where they
are missing (on ARM, for example), `torch._int_mm` multiplies, with the same bits.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from common import terminal

WEIGHT_LEVELS, INPUT_LEVELS = 63, 127
CHUNK = 2**20  # weights quantised at once
TINY = 1e-30  # the least maximum of a row, so that a row of zeros can be divided by it
OPERATOR = "linear_with_input_q_dq_qweight_dq_output_fp32"


@functools.cache
def has_fbgemm():
    """Whether this torch and processor have fbgemm's operators; if not, a note says so once."""
    found = "fbgemm" in torch.backends.quantized.supported_engines and hasattr(torch.ops.quantized, OPERATOR)
    if not found:
        terminal.note("int8 without fbgemm, which this torch or processor lacks: slower, the same results")
    return found


def row_maxima(x):
    """The largest magnitude in each row of x, [..., C] -> [..., 1]. (vector_norm takes ten times as long.)"""
    return x.abs().amax(-1, keepdim=True)


def quantise(weight, levels=WEIGHT_LEVELS):
    """weight [O, C] -> (int8 [O, C], scale fp32 [O]); the largest magnitude of a row becomes `levels`."""
    q, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight), 1)
    rows = max(1, CHUNK // weight.shape[1])
    for q_part, scale_part, part in zip(*(x.split(rows) for x in (q, scale, weight)), strict=True):
        scale_part.copy_(row_maxima(part.float()).clamp_min_(TINY) / levels)
        q_part.copy_((part / scale_part).round_())
    return q, scale.squeeze(1)


class Int8Linear(nn.Module):
    """x fp32 [..., C] -> [..., O]: linear layers that share their input, as one.

    weights: [outputs, C] each. `packed` is fbgemm's weight; None where torch._int_mm multiplies with `q`.
    """

    def __init__(self, weights, bias=None):
        super().__init__()
        q, self.scale = (torch.cat(parts) for parts in zip(*map(quantise, weights), strict=True))
        self.bias, self.nbytes = bias, q.nbytes + self.scale.nbytes
        self.packed, self.q = (pack(q, self.scale), None) if has_fbgemm() else (None, q)

    def forward(self, x):
        rows = x.flatten(0, -2)
        step = row_maxima(rows).mul_(1 / INPUT_LEVELS).clamp_min_(TINY)
        out = self.multiply((rows / step).round_()).mul_(step)  # fbgemm's own rounding differs at ties
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], out.shape[-1])

    def multiply(self, levels):
        """levels [N, C], integers in fp32 -> [N, O]."""
        if self.packed is not None:
            return getattr(torch.ops.quantized, OPERATOR)(levels, 1.0, INPUT_LEVELS + 1, self.packed)
        return torch._int_mm(levels.to(torch.int8), self.q.T) * self.scale


def pack(q, scale):
    """q int8 [O, C] and scale [O] in fbgemm's layout."""
    engine, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
    try:
        with warnings.catch_warnings(action="ignore"):
            zeros = torch.zeros(len(q), dtype=torch.int64)
            weight = torch._make_per_channel_quantized_tensor(q, scale, zeros, 0)
            return torch.ops.quantized.linear_prepack(weight, None)
    finally:
        torch.backends.quantized.engine = engine


class Int8Embedding(nn.Module):
    """A table whose rows are kept in 8 bits: ids [...] -> fp32 [..., C]."""

    def __init__(self, weight):
        super().__init__()
        self.q, self.scale = quantise(weight, INPUT_LEVELS)

    def forward(self, ids):
        return F.embedding(ids, self.q).float() * self.scale[ids].unsqueeze(-1)
