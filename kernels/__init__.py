"""The one place that decides which version of a kernel runs.

Each kernel has a file of its own with a readable torch twin. `IMPLEMENTATIONS` lists the versions there are; the torch twins
run everywhere, on any device. `use` overrides the choice, for tests and comparisons.
"""

from kernels.attention import attention_torch
from kernels.rms_norm import rms_norm_torch

IMPLEMENTATIONS = {"torch": {"attention": attention_torch, "rms_norm": rms_norm_torch}}
_chosen = IMPLEMENTATIONS["torch"]


def use(name):
    """Runs the kernels of that name from now on. ValueError, with those there are, for any other."""
    global _chosen
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"no {name!r} kernels; there are: {', '.join(IMPLEMENTATIONS)}")
    _chosen = IMPLEMENTATIONS[name]


def attention(q, k, v, positions=None, window=None):
    """Causal attention within each document of a packed row; shapes as in `kernels.attention.attention_torch`."""
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and k.shape == (*q.shape[:2], k.shape[2], q.shape[3])
    if not fits or q.shape[2] % k.shape[2] or (positions is not None and positions.shape != q.shape[:2]):
        shapes = {"q": q, "k": k, "v": v, "positions": positions}
        shapes = ", ".join(f"{n} {list(x.shape)}" for n, x in shapes.items() if x is not None)
        raise ValueError(f"attention takes q [B, T, H, D], k and v [B, T, K, D], positions [B, T], K dividing H; got {shapes}")
    return _chosen["attention"](q, k, v, positions, window)


def rms_norm(x, weight, eps=1e-5, residual=None):
    """RMSNorm over the last dimension; with a residual, `(normed, x + residual)`. See `kernels.rms_norm.rms_norm_torch`."""
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        shapes = f"x {list(x.shape)}, weight {list(weight.shape)}, residual {residual is not None and list(residual.shape)}"
        raise ValueError(f"rms_norm takes x [..., C], weight [C] and a residual like x or none; got {shapes}")
    return _chosen["rms_norm"](x, weight, eps, residual)
