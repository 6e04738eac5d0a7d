"""One training step: loss, gradient accumulation, clipping, the optimiser; held-out loss and a sample.

The loss of a step is the sum over supervised tokens of all ranks and micro-batches, divided by their number,
so it does not depend on how a batch is split.
"""

import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import kernels
from data.brackets import CHANNELS
from data.packing import IGNORE, make_row
from training import costs
from training.parallel import RANK, WORLD_SIZE, gather, sum_over_ranks

MULTIPLE = 64  # batches are trimmed to a multiple of this many tokens


def stack(rows, device, trim=False):
    """Rows as one batch {tokens, targets, positions, channels}, int [B, T], and `used` [B].

    trim: without the places at the end that are padding in every row. Nothing that is learnt changes.
    """
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if trim:
        length = max(1, -(-batch["used"].max().item() // MULTIPLE)) * MULTIPLE
        batch = {name: part[:, :length] if part.ndim == 2 else part for name, part in batch.items()}
    return {name: part.to(device, non_blocking=True) for name, part in batch.items()}


def loss_sum(model, batch):
    """Cross-entropy (nats) of a batch, summed over its supervised tokens, and over those of each channel."""
    targets = batch["targets"].flatten()
    rows = (targets != IGNORE).nonzero().flatten()  # [N]
    loss, losses = model(batch["tokens"], batch["positions"], rows=rows, targets=targets[rows])  # [], [N]
    channels = batch["channels"].flatten()[rows].long() - 1  # [N]
    return loss, losses.new_zeros(len(CHANNELS)).index_add_(0, channels, losses)


def tally(batches, window):
    """Counts of batches, int64 [3 + 4]: tokens, (query, key) pairs, the pairs of supervised queries, and the
    supervised tokens of each channel."""
    sums = 0
    for batch in batches:
        T = batch["positions"].shape[1]
        reach = (batch["positions"] + 1).clamp(max=window or T)  # keys that each query sees
        used = torch.arange(T, device=reach.device) < batch["used"][:, None]
        learnt = batch["targets"] != IGNORE
        channels = torch.bincount(batch["channels"][learnt].long(), minlength=len(CHANNELS) + 1)[1:]
        sums = sums + torch.stack([used.sum(), reach[used].sum(), reach[learnt].sum(), *channels])
    return sums


def train_step(model, optimizer, rows, args, device):
    """One optimiser step on this rank's rows; args: micro_batch, clip, compile, lora.

    Returns the step's values for the log. If the loss or the gradient is not finite, the optimiser makes no
    step, `loss` is None and `nonfinite` says what was wrong and in which rows of the batch.
    """
    # compiled blocks take rows of full length: each new length would be compiled anew
    batches = [
        stack(rows[i : i + args.micro_batch], device, trim=not args.compile)
        for i in range(0, len(rows), args.micro_batch)
    ]
    counts = sum_over_ranks(tally(batches, model.config.sliding_window), device)
    tokens, pairs, supervised_pairs, *by_channel = counts
    supervised = sum(by_channel)
    sums, finite = torch.zeros(len(CHANNELS), device=device), []
    for batch in batches:
        loss, channel_sums = loss_sum(model, batch)
        # FSDP averages gradients over ranks; the sum over ranks by all supervised tokens is wanted
        (loss * (WORLD_SIZE / max(supervised, 1))).backward()
        sums += channel_sums
        finite.append(loss.detach().isfinite())
    sums = sum_over_ranks(sums, device)
    loss = sum(sums) / max(supervised, 1)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    flops = costs.model_flops(model.config, tokens, supervised, pairs, supervised_pairs, args.lora)
    line = {"loss": loss, "grad_norm": norm}
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
        parts = zip(CHANNELS, sums, by_channel, strict=True)
        line |= {f"loss_{name}": part / number for name, part, number in parts if number}
    else:
        bad = [RANK + WORLD_SIZE * row for row in range(len(rows)) if not finite[row // args.micro_batch]]
        bad = ", ".join(map(str, sorted(sum(gather(bad), [])))) or "none alone"
        why = f"loss {loss}, gradient norm {norm}, rows of the batch: {bad}"
        line = {"loss": None, "grad_norm": None, "nonfinite": why}
    optimizer.zero_grad()
    return {**line, "tokens": int(tokens), "supervised": int(supervised), "flops": flops}


def make_optimizer(model, args):
    """AdamW over the parameters that are trained; args: lr, weight_decay (on matrices only), lora."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay}]
    groups += [{"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}] * (not args.lora)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step, steps, args):
    """Of a step counted from 0: linear warm-up to args.lr, then a cosine down to a tenth of it."""
    warmup = max(1, round(steps * args.warmup))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- evaluation -------------------------------------------------------------------------------


def choose_held_out(held_out, number, seq_len):
    """(this rank's share of the first `number` held-out rows, the opening that samples continue).

    Every rank gets equally many rows, since each must make the same number of forward passes.
    """
    number = min(number, len(held_out))
    rows = held_out[RANK:number:WORLD_SIZE]
    if len(rows) < -(-number // WORLD_SIZE):
        rows.append(make_row([], seq_len))
    return rows, find_opening(held_out[:8])


def find_opening(rows):
    """Token ids of the shortest chat up to its first answer, of a chat with thoughts if any; else None."""
    openings = []  # (whether it lacks thoughts, ids)
    for row in rows:
        starts = (row["positions"][: row["used"]] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], row["used"]], strict=True):
            learnt = (row["targets"][start:end] != IGNORE).nonzero().flatten()
            thinks = 1 + CHANNELS.index("thought") in row["channels"][start:end]
            if len(learnt):
                openings.append((not thinks, row["tokens"][start : start + learnt[0] + 1].tolist()))
    return min(openings, key=lambda opening: (opening[0], len(opening[1])), default=(False, None))[1]


@torch.no_grad()
def evaluate(model, rows, args, device, tokenizer):
    """Held-out loss over the rows of all ranks, as values for the log.

    `eval_loss` is in nats per supervised token (None if it is not finite), `eval_bits_per_byte` in bits per
    byte of the supervised text, which compares models of different tokenizers (an end-of-turn token costs
    bits and has no bytes); both also by channel, as `eval_loss_thought`.
    """
    lengths = torch.tensor([len(tokenizer.token_bytes(i)) for i in range(model.config.vocab_size)])
    sums = torch.zeros(3, len(CHANNELS), dtype=torch.float64)  # nats, tokens, bytes
    for row in rows:
        nats = loss_sum(model, stack([row], device, trim=not args.compile))[1]
        learnt = row["targets"] != IGNORE
        channels = row["channels"][learnt].long() - 1
        weights = torch.ones(len(channels)), lengths[row["targets"][learnt].long()].float()
        counts = [torch.bincount(channels, part, len(CHANNELS)) for part in weights]
        sums += torch.stack([nats.double().cpu(), *counts])
    nats, tokens, sizes = torch.tensor(sum_over_ranks(sums.flatten(), device)).view(3, -1).tolist()
    if not math.isfinite(sum(nats)):
        return {"eval_loss": None}
    line = {"eval_loss": sum(nats) / max(1, sum(tokens))}
    line["eval_bits_per_byte"] = sum(nats) / math.log(2) / max(1, sum(sizes))
    for name, loss, count, size in zip(CHANNELS, nats, tokens, sizes, strict=True):
        if count:
            line[f"eval_loss_{name}"] = loss / count
            line[f"eval_bits_per_byte_{name}"] = loss / math.log(2) / max(1, size)
    return line


class SampleCache:
    """Keys and values of one sequence, for `sample`: the first pass is the opening, then a token a pass."""

    def __init__(self):
        self.kept = {}  # layer -> (keys, values), [1, tokens so far, K, D] each

    @torch.compiler.disable
    def attend(self, layer, q, k, v, window):
        if layer not in self.kept:
            self.kept[layer] = k, v
            return kernels.attention(q, k, v, window=window)
        k, v = (torch.cat(pair, dim=1) for pair in zip(self.kept[layer], (k, v), strict=True))
        self.kept[layer] = k, v
        last = torch.tensor([k.shape[1] - 1], device=q.device)
        return kernels.attention(q[0], k, v, window=window, rows=last)[None]


@torch.no_grad()
def sample(model, opening, tokenizer, seed, device, length=32, temperature=0.7):
    """Text with which the actor continues token ids. A collective: all ranks make the same passes."""
    ids, generator, cache = list(opening), torch.Generator().manual_seed(seed), SampleCache()
    new = ids[:]
    for _ in range(length):
        positions = torch.arange(len(ids) - len(new), len(ids), device=device)[None]
        last = torch.tensor([len(new) - 1], device=device)
        tokens = torch.tensor([new], device=device)
        logits = model(tokens, positions, cache=cache, rows=last)[0].float().cpu()  # [V]
        chances = (logits / temperature).softmax(-1)
        token = (chances / torch.empty_like(chances).exponential_(generator=generator)).argmax().to(device)
        dist.broadcast(token, 0)
        if token.item() in tokenizer.stop_ids:
            break
        new = [token.item()]
        ids += new
    return " ".join(tokenizer.decode(ids[len(opening) :]).split())
