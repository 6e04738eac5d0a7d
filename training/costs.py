"""What a training step costs: operations and bytes, counted from shapes.

Model FLOPs are those that a step needs, two for each multiply-add. All tokens count, but in the head, and
beyond keys and values in the last block, only supervised ones; attention counts at (query, key) pairs within
documents. Forward and backward are three times the forward pass; recomputation and padding do not count.
Utilisation (MFU) is their rate divided by the device's peak.
"""

import resource

import torch

import checkpoint
from kernels.cross_entropy import CHUNK

PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312}  # NVIDIA's, dense bf16
CARDS = (8, 16, 24, 32, 40, 48, 80, 96, 141)  # GB of memory
RECOMPUTE_ABOVE = 8 * 2**30  # bytes of activations from which on a LoRA run recomputes them


def peak_flops(device, dtype):
    """bf16 operations a second of a known GPU, else None."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def peak_memory(device):
    """Bytes: the most that this process has held so far, on its GPU or, on a CPU, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def speeds(flops, line, seconds, args, device):
    """The log's figures of a step's speed: tokens a second of all ranks, FLOP/s and utilisation of each.

    flops: of all ranks; line: holds the step's `tokens` and `supervised`; args: dtype, peak_tflops.
    """
    rate = flops / seconds / torch.distributed.get_world_size()
    peak = peak_flops(device, checkpoint.DTYPES[args.dtype])
    peak = args.peak_tflops * 1e12 if args.peak_tflops else peak
    figures = {name: line[key] / seconds for name, key in
               (("tokens_per_second", "tokens"), ("supervised_per_second", "supervised"))}  # fmt: skip
    figures |= {"seconds": seconds, "tflops": rate / 1e12, "peak_memory": peak_memory(device)}
    return figures | ({"mfu": rate / peak} if peak else {})


def adapter_parameters(config, rank):
    """Parameters of LoRA adapters of a rank on all linear layers of the blocks."""
    C, D, M = config.hidden_size, config.head_dim, config.intermediate_size
    sizes = 2 * (C + config.num_attention_heads * D) + 2 * (C + config.num_key_value_heads * D)
    return config.num_hidden_layers * rank * (sizes + 3 * max(config.num_local_experts, 1) * (C + M))


def model_flops(config, tokens, supervised, pairs, supervised_pairs, lora=None):
    """Model FLOPs of forward and backward over `tokens`, of which `supervised` are under loss.

    pairs: (query, key) pairs that attention needs, summed over queries; supervised_pairs: those of supervised
    queries. lora: the rank of adapters on a frozen base, whose products then cost twice the forward pass
    instead of three times, since its weights need no gradient.
    """
    C, D, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    M, experts, before = config.intermediate_size, config.num_local_experts, config.num_hidden_layers - 1
    chosen = config.num_experts_per_tok if experts else 1

    def products(kv, others, head):
        return before * (kv + others) * tokens + kv * tokens + (others + head) * supervised

    base = products(2 * C * K * D, 2 * C * H * D + 3 * C * M * chosen + C * experts, C * config.vocab_size)
    attention = 2 * H * D * (before * pairs + supervised_pairs)
    if lora:
        adapters = lora * products(2 * (C + K * D), 2 * (C + H * D) + 3 * (C + M) * chosen, 0)
        return 2 * (2 * base + 3 * (attention + adapters))
    return 3 * 2 * (base + attention)


def memory_plan(config, tokens, itemsize, recompute, shards, lora=None):
    """{what: bytes} of one of `shards` ranks, for `tokens` in a forward pass in a dtype of `itemsize` bytes.

    Weights, gradients and AdamW's two moments are fp32. "gathered" is what FSDP gathers at a time: embeddings
    and head with their gradients (the head's in fp32), two blocks and the gradient of one. Activations are
    what autograd keeps of each block: all that a product or norm reads (nothing is recomputed), inputs and
    products ("selective"), or inputs alone ("full"); one block at a time exists as a whole. lora: the rank of
    adapters; the frozen base is kept in the dtype of compute, and the rest is the adapters'.
    """
    C, D, M = config.hidden_size, config.head_dim, config.intermediate_size
    q, kv, L = config.num_attention_heads * D, 2 * config.num_key_value_heads * D, config.num_hidden_layers
    chosen = config.num_experts_per_tok if config.num_local_experts else 1
    M *= chosen
    total, head = config.num_parameters(), config.vocab_size * C
    root = head * (1 if config.tie_word_embeddings else 2)
    block = (total - root) / L
    whole_block = 4 * C + 2 * q + kv + 4 * M
    kept = {"none": whole_block, "selective": 3 * C + q + kv + 2 * M, "full": C}
    if lora:  # the adapters' inner products; "selective" keeps the outputs of base and adapter apart
        inner = lora * (4 + 3 * chosen)
        whole_block += inner
        kept["none"] = whole_block
        kept["selective"] += 2 * C + q + kv + 2 * M + inner
        trained = adapter_parameters(config, lora)
        weights, gathered = itemsize * total + 4 * trained, itemsize * (root + 2 * block + 3 * trained / L)
    else:
        trained, weights = total, 4 * total
        gathered = itemsize * (2 * root + 3 * block) + (4 - itemsize) * head
    activations = kept[recompute] * (L - 1) + 2 * C + kv + (whole_block if recompute != "none" else 0)
    return {
        "weights": weights / shards,
        "gradients": 4 * trained / shards,
        "optimiser": 8 * trained / shards,
        "gathered": gathered if shards > 1 or (itemsize < 4 and not lora) else 0,
        "activations": itemsize * activations * tokens + 4 * min(CHUNK, config.vocab_size * tokens),
    }


def choose_recompute(config, args):
    """The default of --recompute; args: model, lora, dtype, micro_batch, seq_len."""
    if not args.lora:
        return "none" if args.model == "stage" else "full"
    itemsize = checkpoint.DTYPES[args.dtype].itemsize
    plan = memory_plan(config, args.micro_batch * args.seq_len, itemsize, "none", 1, args.lora)
    return "none" if plan["activations"] <= RECOMPUTE_ABOVE else "full"


def smallest_card(size):
    """GB of the smallest common GPU that holds 1.1 times as many bytes (no plan sees everything), or None."""
    return next((card for card in CARDS if 1.1 * size < card * 2**30), None)
