"""What a training step costs: operations and bytes, counted from the shapes.

Model FLOPs are those a step cannot do without, at two a multiply-add: every block at every token, but in the last one and in
the head only supervised rows beyond keys and values; attention at the (query, key) pairs within documents; three times the
forward pass for forward and backward. Recomputation and padding do not count. Utilisation (MFU) is their rate over the peak.
"""

import resource

import torch

from kernels.cross_entropy import CHUNK

PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
}  # dense bf16, without sparsity, as NVIDIA states them


def peak_flops(device, dtype):
    """bf16 operations a second of a device that is known, else None; no CPU states its own."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def model_flops(config, tokens, supervised, pairs, supervised_pairs):
    """Model FLOPs of forward and backward over tokens of which some are supervised.

    pairs: (query, key) pairs that attention needs, summed over queries; supervised_pairs: those of supervised queries.
    """
    C, D, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    kv, experts = 2 * C * K * D, config.num_local_experts
    rest = (
        2 * C * H * D
        + 3 * C * config.intermediate_size * (config.num_experts_per_tok if experts else 1)
        + C * experts
    )
    before = config.num_hidden_layers - 1
    products = (
        before * (kv + rest) * tokens + kv * tokens + rest * supervised + C * config.vocab_size * supervised
    )
    attention = 2 * H * D * (before * pairs + supervised_pairs)
    return 3 * 2 * (products + attention)


def peak_memory(device):
    """Bytes: the most this process has held so far, on its GPU or, on a CPU, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_plan(config, tokens, itemsize, recompute, shards):
    """Bytes on one rank by what takes them, for `tokens` in a forward pass, compute of `itemsize` bytes, over `shards` ranks.

    Weights, gradients and AdamW's two moments are fp32. "gathered" is what FSDP puts together: embeddings and head, two blocks,
    the gradient of one. Activations are what autograd keeps of each block: all that a product or norm reads ("none" is
    recomputed), inputs and products ("selective"), or inputs alone ("full"); of one block all exists at a time.
    """
    C, D, M = config.hidden_size, config.head_dim, config.intermediate_size
    q, kv, L = config.num_attention_heads * D, 2 * config.num_key_value_heads * D, config.num_hidden_layers
    M *= config.num_experts_per_tok if config.num_local_experts else 1
    total = config.num_parameters()
    root = config.vocab_size * C * (1 if config.tie_word_embeddings else 2)
    block = (total - root) / L
    everything = 4 * C + 2 * q + kv + 4 * M
    kept = {"none": everything, "selective": 3 * C + q + kv + 2 * M, "full": C}[recompute]
    kept = kept * (L - 1) + 2 * C + kv + (everything if recompute != "none" else 0)
    return {
        "weights": 4 * total / shards,
        "gradients": 4 * total / shards,
        "optimiser": 8 * total / shards,
        "gathered": itemsize * (2 * root + 3 * block) if shards > 1 or itemsize < 4 else 0,
        "activations": itemsize * kept * tokens + 4 * min(CHUNK, config.vocab_size * tokens),
    }
