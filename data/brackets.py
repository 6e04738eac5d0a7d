"""The bracket rule: what in a message is thought, action or speech.

`[thoughts]` are hidden from the other characters, `(actions)` are seen by all, everything else is speech.
Both include their brackets, which nest; within a thought, round brackets are text. An unclosed bracket ends
with the message; a closing one without an opening one is text.
"""

import re

CHANNELS = ("speech", "action", "thought", "general")  # of tokens under loss, numbered from 1; 0 is no loss
SPEECH, ACTION, THOUGHT, GENERAL = range(1, 5)


class BracketParser:
    """Labels one message, which may arrive in pieces. Every message needs a new parser."""

    def __init__(self):
        self.thoughts = self.actions = 0  # open brackets of each kind

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
    """The message as the other characters perceive it: no thoughts, lines stripped, blank lines dropped."""
    visible = "".join(part for part, channel in BracketParser().feed(message) if channel != THOUGHT)
    lines = (line.strip() for line in visible.split("\n"))
    return "\n".join(line for line in lines if line)


def as_thought(text):
    """The text as one closed thought: in as many square brackets as those in the text require."""
    depth = lowest = 0
    for c in text:
        depth += (c == "[") - (c == "]")
        lowest = min(lowest, depth)
    return "[" * (1 - lowest) + text + "]" * (1 - lowest + depth)
