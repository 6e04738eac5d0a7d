"""Cross-entropy straight from hidden states: the projection to the vocabulary in chunks, the logits never held whole.

    logits = x W'      loss_i = logsumexp(logits_i) - logits_i,target      d loss_i / d logits_i = softmax(logits_i) - onehot

The gradient of a chunk is known as soon as its logits are, so it is multiplied into those of x and W at once, and the chunk's
logits are overwritten by it: three products of N V C multiply-adds, and one chunk of logits (256 MiB in fp32) whatever N and V.
8k tokens at a vocabulary of 128k would hold 4.2 GB of them, and as much again of their gradient.
"""

import torch

CHUNK = 2**26  # logits held at a time


def linear_cross_entropy(x, weight, targets):
    """(sum of losses [], losses [N]), fp32 nats, of targets int64 [N] given hidden states x [N, C] and a head weight [V, C].

    The sum is differentiable; the losses are for reading.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, training):
        losses = torch.empty(len(x), device=x.device, dtype=torch.float32)
        grad_x = torch.empty_like(x) if training else None
        grad_weight = (
            torch.zeros_like(weight) if training and ctx.needs_input_grad[1] else None
        )  # None where frozen
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
                    grad_weight.addmm_(grad.T, part)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad, _):
        grad_x, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight.mul_(grad)  # the larger one in place: it is used once
        return grad_x * grad, grad_weight, None, None
