"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension, the mean in fp32.

The torch reference of rms_norm_triton.py. With a residual, the sum x + residual is normalised and returned
too, so that a block reads and writes its residual stream once. Memory-bound: 2 bytes moved per byte of x (4
with a residual) and a few operations.
"""

import torch


def rms_norm_torch(x, weight, eps=1e-5, residual=None):
    """x [..., C], weight [C] -> normed [..., C] in x's dtype; with a residual, `(normed, x + residual)`."""
    if residual is not None:
        x = x + residual
    x32 = x.float()
    normed = (weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)).to(x.dtype)
    return normed if residual is None else (normed, x)
