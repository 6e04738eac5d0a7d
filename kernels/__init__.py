"""Chooses the version of a kernel: Triton on CUDA tensors, the torch reference on all others.

Each kernel has a file with its mathematics and its readable torch reference, and one with the Triton version,
imported when it first runs. `use` overrides the choice, for tests and comparisons. Shapes that do not fit are
a ValueError.
"""

from kernels.attention import attention_torch
from kernels.decode import decode_attention_torch
from kernels.rms_norm import rms_norm_torch

_chosen = None


def use(name):
    """Always runs the "torch" or the "triton" kernels from now on; None: as the tensors' device says."""
    global _chosen
    if name not in ("torch", "triton", None):
        raise ValueError(f"no {name!r} kernels; there are: torch, triton, and None (as the device says)")
    _chosen = name


def attention(q, k, v, positions=None, window=None, rows=None):
    """Causal attention within each document of packed rows; see `attention.attention_torch`."""
    fits = (
        k.ndim == 4
        and k.shape == v.shape
        and q.ndim == (4 if rows is None else 3)
        and q.shape[-2] % k.shape[2] == 0
        and q.shape[-1] == k.shape[3]
        and q.shape[:-2] == (k.shape[:2] if rows is None else rows.shape)
        and (positions is None or positions.shape == k.shape[:2])
    )
    taken = "q [B, T, H, D] (with rows [N]: [N, H, D]), k and v [B, T, K, D], positions [B, T], K dividing H"
    _check("attention", fits, taken, window, q=q, k=k, v=v, positions=positions, rows=rows)
    if runs_triton(q.device):
        from kernels.attention_triton import attention_triton

        return attention_triton(q, k, v, positions, window, rows)
    return attention_torch(q, k, v, positions, window, rows)


def decode_attention(q, key_pages, value_pages, block_table, lengths, window=None):
    """The last tokens of each sequence attend to its paged keys; see `decode.decode_attention_torch`."""
    fits = (
        q.ndim == key_pages.ndim == 4
        and key_pages.shape == value_pages.shape
        and q.shape[2] % key_pages.shape[2] == 0
        and q.shape[3] == key_pages.shape[3]
        and block_table.ndim == 2
        and lengths.shape == q.shape[:1] == block_table.shape[:1]
    )
    taken = "q [S, Q, H, D], pages [P, page_size, K, D] (K dividing H), block_table [S, n], lengths [S]"
    given = dict(q=q, key_pages=key_pages, value_pages=value_pages, block_table=block_table, lengths=lengths)
    _check("decode_attention", fits, taken, window, **given)
    if runs_triton(q.device):
        from kernels.decode_triton import decode_attention_triton

        return decode_attention_triton(q, key_pages, value_pages, block_table, lengths, window)
    return decode_attention_torch(q, key_pages, value_pages, block_table, lengths, window)


def rms_norm(x, weight, eps=1e-5, residual=None):
    """RMSNorm over the last dimension; with a residual, `(normed, x + residual)`."""
    fits = weight.shape == x.shape[-1:] and (residual is None or residual.shape == x.shape)
    taken = "x [..., C], weight [C] and a residual like x or none"
    _check("rms_norm", fits, taken, x=x, weight=weight, residual=residual)
    if runs_triton(x.device):
        from kernels.rms_norm_triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps, residual)
    return rms_norm_torch(x, weight, eps, residual)


def runs_triton(device):
    """Whether tensors on a torch.device go to the Triton kernels."""
    return _chosen == "triton" or (_chosen is None and device.type == "cuda")


def _check(kernel, fits, taken, window=None, **tensors):
    if not fits:
        got = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items() if x is not None)
        raise ValueError(f"{kernel} takes {taken}; got {got}")
    if window is not None and window < 1:
        raise ValueError(f"{kernel} takes a window of at least 1 key, the query's own; got {window}")
