"""The one parser of thoughts and actions: `[thoughts]` are hidden from the others, `(actions)` are seen by all, the rest is speech.

From a `[` to the `]` that closes it is thought, brackets included, and to the end of the message if none closes it; brackets nest.
From a `(` outside of thoughts to the `)` that closes it (or the end) is action. A closing bracket without an opening one is text.
"""

import re

SPEECH, ACTION, THOUGHT = 1, 2, 3  # as in a packed row's `channels`; 0 there is a token not under loss


class BracketParser:
    """Labels a message that may arrive in pieces; one parser a message."""

    def __init__(self):
        self.thoughts = self.actions = 0  # brackets that are open

    def feed(self, text):
        """Yields the next piece of the message as (part, channel) pairs; the parts joined are `text`."""
        for part in re.split(r"([\[\]()])", text):
            self.thoughts += part == "["
            self.actions += part == "(" and not self.thoughts
            if part:
                yield part, THOUGHT if self.thoughts else ACTION if self.actions else SPEECH
            self.thoughts -= part == "]" and self.thoughts > 0
            self.actions -= part == ")" and self.actions > 0 and not self.thoughts


def remove_thoughts(message):
    """The message as others perceive it: thoughts gone, lines stripped, blank lines dropped."""
    visible = "".join(part for part, channel in BracketParser().feed(message) if channel != THOUGHT)
    lines = (line.strip() for line in visible.split("\n"))
    return "\n".join(line for line in lines if line)
