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

CARDS = (8, 16, 24, 32, 40, 48, 80, 96, 141)  # GB of memory


def peak_flops(device, dtype):
    """bf16 operations a second of a device that is known, else None; no CPU states its own."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def adapter_parameters(config, rank):
    """Parameters of LoRA adapters of a rank on all linear layers of the blocks."""
    C, D, M = config.hidden_size, config.head_dim, config.intermediate_size
    sizes = 2 * (C + config.num_attention_heads * D) + 2 * (C + config.num_key_value_heads * D)
    return config.num_hidden_layers * rank * (sizes + 3 * max(config.num_local_experts, 1) * (C + M))


def model_flops(config, tokens, supervised, pairs, supervised_pairs, lora=None):
    """Model FLOPs of forward and backward over tokens of which some are supervised.

    pairs: (query, key) pairs that attention needs, summed over queries; supervised_pairs: those of supervised queries.
    lora: the rank of adapters on a frozen base, whose weights need no gradient: two times the forward pass for its products.
    """
    C, D, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    M, experts, before = config.intermediate_size, config.num_local_experts, config.num_hidden_layers - 1
    chosen = config.num_experts_per_tok if experts else 1

    def products(kv, rest, head):
        return before * (kv + rest) * tokens + kv * tokens + (rest + head) * supervised

    base = products(2 * C * K * D, 2 * C * H * D + 3 * C * M * chosen + C * experts, C * config.vocab_size)
    attention = 2 * H * D * (before * pairs + supervised_pairs)
    if lora:
        adapters = lora * products(2 * (C + K * D), 2 * (C + H * D) + 3 * (C + M) * chosen, 0)
        return 2 * (2 * base + 3 * (attention + adapters))
    return 3 * 2 * (base + attention)


def smallest_card(size):
    """GB of the smallest common GPU memory that takes so many bytes and a tenth more for what no plan sees, or None."""
    return next((card for card in CARDS if 1.1 * size < card * 2**30), None)


def peak_memory(device):
    """Bytes: the most this process has held so far, on its GPU or, on a CPU, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_plan(config, tokens, itemsize, recompute, shards, lora=None):
    """Bytes on one rank by what takes them, for `tokens` in a forward pass, compute of `itemsize` bytes, over `shards` ranks.

    Weights, gradients and AdamW's two moments are fp32. "gathered" is what FSDP puts together: embeddings and head, two blocks,
    the gradient of one. Activations are what autograd keeps of each block: all that a product or norm reads ("none" is
    recomputed), inputs and products ("selective"), or inputs alone ("full"); of one block all exists at a time.
    lora: the rank of adapters; the frozen base is kept in the dtype of compute, and the rest of the above is the adapters'.
    """
    C, D, M = config.hidden_size, config.head_dim, config.intermediate_size
    q, kv, L = config.num_attention_heads * D, 2 * config.num_key_value_heads * D, config.num_hidden_layers
    M *= config.num_experts_per_tok if config.num_local_experts else 1
    total = config.num_parameters()
    root = config.vocab_size * C * (1 if config.tie_word_embeddings else 2)
    block = (total - root) / L
    everything = 4 * C + 2 * q + kv + 4 * M
    kept = {"none": everything, "selective": 3 * C + q + kv + 2 * M, "full": C}
    weights, trained, gathered = 4 * total, total, 2 * root + 3 * block
    if lora:  # the adapters' inner products, and "selective" keeps the base's and the adapters' outputs apart
        chosen = config.num_experts_per_tok if config.num_local_experts else 1
        inner = lora * (4 + 3 * chosen)
        everything, kept["none"] = everything + inner, everything + inner
        kept["selective"] += 2 * C + q + kv + 2 * M + inner
        trained = adapter_parameters(config, lora)
        weights, gathered = itemsize * total + 4 * trained, root + 2 * block + 3 * trained / L
    kept = kept[recompute]
    kept = kept * (L - 1) + 2 * C + kv + (everything if recompute != "none" else 0)
    return {
        "weights": weights / shards,
        "gradients": 4 * trained / shards,
        "optimiser": 8 * trained / shards,
        "gathered": itemsize * gathered if shards > 1 or (itemsize < 4 and not lora) else 0,
        "activations": itemsize * kept * tokens + 4 * min(CHUNK, config.vocab_size * tokens),
    }
