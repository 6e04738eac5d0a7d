"""Guesses at how a text goes on, for texts that repeat themselves (prompt lookup decoding, Saxena 2023, within the reply)."""

from engine.pages import common_prefix


class Lookup:
    """What one reply has said so far: `places` has three tokens -> where what last followed them stands."""

    def __init__(self):
        self.places, self.indexed = {}, 0  # how many tokens places knows
        self.guessed, self.trust = [], 0  # at the last call, and how many tokens to guess

    def guess(self, ids, begin, most):
        """Tokens that may follow ids, of which those from begin on are the reply: what followed the last three where they were
        said last, over and over. As many as would have been right of late, at most so many; none for a single one."""
        came = ids[self.indexed :]
        right = common_prefix(self.guessed, came)
        all_right = right == min(len(self.guessed), len(came))
        self.trust = min(self.trust + right, most) if all_right else self.trust // 2
        self.places.update((tuple(ids[i - 3 : i]), i) for i in range(max(begin + 3, self.indexed), len(ids)))
        self.indexed, at = len(ids), self.places.get(tuple(ids[-3:]))
        self.guessed = (
            [ids[at + i % (len(ids) - at)] for i in range(max(1, self.trust))] if at is not None else []
        )
        return self.guessed if self.trust > 1 else []
