"""From logits to tokens."""

import numpy as np
import torch

from engine.constrain import cost


def sample(logits, queries, stop_ids):
    """The token after each query, and its log-probability under the model where wanted: [(token,
    log-probability or None)].

    logits [N, V]; queries: the (sequence, position) of each row. The token of a scored sequence is the one
    that it has there. stop_ids: what may follow a whole JSON document. Waits for the device once.
    """
    adjusted = logits
    for i, (sequence, _) in enumerate(queries):
        if not sequence.scored and (sequence.grammar or sequence.params.adjusts):
            adjusted = logits.float().clone() if adjusted is logits else adjusted
            adjusted[i] = adjust(adjusted[i], sequence, stop_ids)
    if logits.device.type == "cpu":  # where numpy's argmax is ten times as fast
        tokens = torch.from_numpy(adjusted.float().numpy().argmax(-1))
    else:
        tokens = adjusted.argmax(-1)
    if drawn := [i for i, (s, _) in enumerate(queries) if s.params.temperature > 0 and not s.scored]:
        params = [queries[i][0].params for i in drawn]
        uniform = [queries[i][0].uniform(queries[i][1]) for i in drawn]
        tokens[drawn] = draw(adjusted[drawn].float(), params, uniform)
    if given := {i: s.ids[position + 1] for i, (s, position) in enumerate(queries) if s.scored}:
        tokens[[*given]] = torch.tensor([*given.values()], device=logits.device)
    wanted = [i for i, (s, _) in enumerate(queries) if s.scored or s.params.logprobs]
    every = logits[wanted].float().log_softmax(-1)
    add_top_logprobs(every, [queries[i][0] for i in wanted])
    logprobs = every.gather(1, tokens[wanted][:, None])[:, 0]
    numbers = torch.cat((tokens.double(), logprobs.double())).tolist()
    logprobs = dict(zip(wanted, numbers[len(queries) :], strict=True))
    return [(int(token), logprobs.get(i)) for i, token in enumerate(numbers[: len(queries)])]


def add_top_logprobs(logprobs, sequences):
    """Gives each sequence that asks for them the likeliest tokens of its row: logprobs fp32 [N, V]."""
    if count := max((sequence.params.top_logprobs for sequence in sequences), default=0):
        top = logprobs.topk(min(count, logprobs.shape[1]))
        for sequence, *row in zip(sequences, top.indices.tolist(), top.values.tolist(), strict=True):
            if sequence.params.top_logprobs:
                sequence.top_logprobs.append([*zip(*row, strict=True)][: sequence.params.top_logprobs])


def adjust(logits, sequence, stop_ids):
    """logits fp32 [V] after penalties and bias, with -inf for every token that the grammar does not allow.

    Allowed tokens leave enough of the token budget to finish the document (see constrain.py).
    """
    penalty = sequence.params.repetition_penalty
    if penalty != 1:
        used = torch.tensor([i for i in {*sequence.ids} if i < len(logits)], device=logits.device)
        values = logits[used]
        logits = logits.index_copy(0, used, torch.where(values > 0, values / penalty, values * penalty))
    params = sequence.params
    if sequence.generated and (params.presence_penalty or params.frequency_penalty):
        used, counts = torch.tensor(sequence.generated, device=logits.device).unique(return_counts=True)
        logits = logits.index_add(0, used, -(params.presence_penalty + params.frequency_penalty * counts))
    if params.logit_bias:
        ids = torch.tensor([*params.logit_bias], device=logits.device)
        biases = torch.tensor([*params.logit_bias.values()], dtype=logits.dtype, device=logits.device)
        logits = logits.index_add(0, ids, biases)
    if sequence.grammar:
        allowed, costs = sequence.grammar.allowed(sequence.grammar_state)
        allowed = allowed[costs < sequence.max_length - len(sequence.ids)]
        if cost(sequence.grammar_state) == 0:
            allowed = np.concatenate((allowed, [*stop_ids]))
        allowed = torch.from_numpy(allowed.astype(np.int64)).to(logits.device)
        logits = torch.full_like(logits, -torch.inf).index_copy(0, allowed, logits[allowed])
    return logits


def draw(logits, params, uniform):
    """A token for each row: logits fp32 [N, V], a SamplingParams and a number in [0, 1) for each -> ids int64
    [N].

    Temperature, then top-k, then top-p and min-p of what is left; then the token at which the running sum of
    probabilities passes the number. Rows do not depend on each other.
    """
    device, V = logits.device, logits.shape[1]
    columns = [[p.temperature, p.top_p, p.min_p, u] for p, u in zip(params, uniform, strict=True)]
    columns = torch.tensor(columns, dtype=torch.float64, device=device)
    temperature, top_p, min_p, uniform = columns.unsqueeze(-1).unbind(1)  # [N, 1] each
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(1e-30, 1e30).float()
    if rows := [i for i, p in enumerate(params) if 0 < p.top_k < V]:
        k = torch.tensor([[params[i].top_k - 1] for i in rows], device=device)
        threshold = logits[rows].topk(max(params[i].top_k for i in rows)).values.gather(1, k)
        logits[rows] = logits[rows].masked_fill(logits[rows] < threshold, -torch.inf)
    probabilities = logits.softmax(-1)
    if rows := [i for i, p in enumerate(params) if p.top_p < 1]:
        # on a CPU a whole sort takes ten times as long as the 1,024 likeliest, which are nearly always enough
        ordered = probabilities[rows].topk(min(V, 1024) if device.type == "cpu" else V).values
        if device.type == "cpu" and (ordered.double().sum(-1, keepdim=True) <= top_p[rows]).any():
            ordered = probabilities[rows].sort(descending=True).values
        kept = (ordered.double().cumsum(-1) - ordered < top_p[rows]).sum(
            -1, keepdim=True
        )  # the fewest that reach top_p
        probabilities[rows] *= probabilities[rows] >= ordered.gather(1, kept - 1)
    probabilities *= probabilities >= min_p * probabilities.amax(-1, keepdim=True)
    sums = probabilities.double().cumsum(-1)
    return (sums <= uniform * sums[:, -1:]).sum(-1)
