"""Counts the prompt tokens that the agents of a scene needed, independent of what else the models were
doing."""


class TokenCounts:
    """The token counts of one scene, over all calls of its agents.

    prefilled: prompt tokens computed for this scene. cached: prompt tokens found in the cache, at most those
    that the agent's own last call left there, so the counts do not depend on other scenes; a resumed run
    counts what the interrupted one would have found. decoded: tokens sampled. least: the minimum to prefill:
    of each agent's chat at its last call, all tokens that the model had not sampled itself.
    """

    def __init__(self):
        self.prefilled = self.decoded = self.cached = 0
        self.last_calls = {}  # agent: (its last Reply, number of the run in which it came)

    def add(self, agent, reply, run):
        """Counts an agent's reply, which came in this run (Journal.run)."""
        if reply.error is not None:
            return
        cached = cached_tokens(reply, run, *self.last_calls.get(agent, (None, run)))
        self.last_calls[agent] = reply, run
        self.prefilled += reply.prompt_tokens - cached
        self.cached += cached
        self.decoded += reply.completion_tokens

    def stats(self):
        least = sum(reply.prompt_tokens - reply.own_tokens for reply, _ in self.last_calls.values())
        return dict(prefilled=self.prefilled, decoded=self.decoded, cached=self.cached, least=least)


def cached_tokens(reply, run, before, run_before):
    """The prompt tokens of a reply that the agent's call before had left in the cache: no more than were
    measured, unless that call came in an earlier run, whose cache is gone."""
    if reply.ids is None:  # an endpoint: its own count
        return reply.cached_tokens
    left = 0
    if before is not None:
        kept = reply.own_tokens - before.own_tokens  # tokens of the reply before that stand as sampled
        # the last token of a reply cut at max_tokens was sampled, but never an input
        not_computed = kept == len(before.ids) and before.finish_reason == "length"
        left = min(before.prompt_tokens + kept - not_computed, reply.prompt_tokens - 1)
    return left if run != run_before else min(reply.cached_tokens, left)
