"""Cross-entropy from hidden states: the projection to the vocabulary in chunks, without holding all logits.

    logits = x W'        loss_i = logsumexp(logits_i) - logits_i,target
    d loss_i / d logits_i = softmax(logits_i) - onehot(target)

The gradient of a chunk's logits is known as soon as the logits are. The forward pass multiplies it into the
gradients of x and W and drops the logits: three products of N V C multiply-adds in all, and one chunk of
logits (256 MiB in fp32) at a time. 8k tokens with a vocabulary of 128k would otherwise hold 4.2 GB of logits,
and as much again of their gradients.
"""

import torch

CHUNK = 2**26  # logits held at a time


def linear_cross_entropy(x, weight, targets):
    """(sum of losses [], losses [N]), fp32 nats, of targets int64 [N] given hidden states x [N, C] and a head
    weight [V, C]. Only the sum has a gradient."""
    return _LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, training):
        losses = torch.empty(len(x), device=x.device, dtype=torch.float32)
        grad_x = torch.empty_like(x) if training else None
        grad_weight = None  # of a frozen head
        if training and ctx.needs_input_grad[1]:  # fp32, since rounding at every chunk would add up
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        size = max(1, CHUNK // len(weight))
        for at in range(0, len(x), size):
            part, target = x[at : at + size], targets[at : at + size, None]  # [n, C], [n, 1]
            logits = (part @ weight.T).float()  # [n, V]
            total = logits.logsumexp(-1, keepdim=True)  # [n, 1]
            losses[at : at + size] = (total - logits.gather(1, target)).squeeze(1)
            if training:
                grad = logits.sub_(total).exp_()  # softmax
                grad = grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0)).to(x.dtype)
                grad_x[at : at + size] = grad @ weight
                if grad_weight is not None:
                    _add_product(grad_weight, grad.T, part)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(losses)
        ctx.dtype = weight.dtype
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad, _):
        grad_x, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad).to(ctx.dtype)  # in place: it is large, and used once
        return grad_x * grad, grad_weight, None, None


def _add_product(total, a, b):
    """total += a @ b, in place, for a fp32 total: products of bf16 factors are not rounded to bf16."""
    if a.is_cuda and a.dtype != torch.float32:
        total += torch.mm(a, b, out_dtype=torch.float32)  # of tensor cores; there is none for a CPU
    else:
        total.addmm_(a.float(), b.float())
