"""Drawing tokens from logits."""

import torch


def draw(logits, params, uniform):
    """One token each: logits fp32 [N, V], parameters and numbers in [0, 1) of each row -> ids int64 [N], on the device.

    Temperature, then top-k, top-p of what is left, min-p; then the token at which the running sum of probabilities passes the
    number. No row depends on another.
    """
    device, V = logits.device, logits.shape[1]
    columns = [[p.temperature, p.top_p, p.min_p, u] for p, u in zip(params, uniform, strict=True)]
    temperature, top_p, min_p, uniform = (
        torch.tensor(columns, dtype=torch.float64, device=device).unsqueeze(-1).unbind(1)
    )
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(1e-30, 1e30).float()
    if some := [i for i, p in enumerate(params) if 0 < p.top_k < V]:
        k = torch.tensor([[params[i].top_k - 1] for i in some], device=device)
        least = logits[some].topk(max(params[i].top_k for i in some)).values.gather(1, k)
        logits[some] = logits[some].masked_fill(logits[some] < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if some := [i for i, p in enumerate(params) if p.top_p < 1]:
        ordered = probabilities[some].topk(min(V, 1024) if device.type == "cpu" else V).values
        if device.type == "cpu" and (ordered.double().sum(-1, keepdim=True) <= top_p[some]).any():
            ordered = (
                probabilities[some].sort(descending=True).values
            )  # all are rarely needed, and take ten times as long
        enough = (ordered.double().cumsum(-1) - ordered < top_p[some]).sum(
            -1, keepdim=True
        )  # the fewest that reach top_p
        probabilities[some] *= probabilities[some] >= ordered.gather(1, enough - 1)
    probabilities *= probabilities >= min_p * probabilities.amax(-1, keepdim=True)
    sums = probabilities.double().cumsum(-1)
    return (sums <= uniform * sums[:, -1:]).sum(-1)
