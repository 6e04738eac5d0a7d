"""What kind of token each supervised one is: speech, action or thought.

Brackets decide, as in `remove_thoughts`: from a `[` to the `]` that closes it is thought, brackets included, and to the end of
the turn if none does; from a `(` outside of thoughts to the `)` that closes it (or the end) is action; the rest, the name in
front and the end of the turn is speech. A token that straddles takes the highest of what its characters are: thought before
action before speech.
"""

import numpy as np

from data.brackets import SPEECH, BracketParser
from data.packing import CHANNELS

GENERAL = 1 + CHANNELS.index("general")


def label(tokenizer, messages, character=None):
    """A conversation as (ids uint32 [N], channels int8 [N]), 0 where a token is not under loss.

    character: whose turns these are, each opening with `Name: `; for the next-speaker model all is speech; None: general data.
    """
    ids, mask = tokenizer.render(messages)
    ids, learnt = np.array(ids, np.uint32), np.array(mask, np.int8)
    if character is None:
        return ids, learnt * np.int8(GENERAL)
    lead = b"".join(map(tokenizer.token_bytes, tokenizer.encode(f"{character}: ")))
    edges = np.flatnonzero(np.diff(learnt, prepend=0, append=0)).reshape(-1, 2)
    for start, end in edges.tolist():
        words = [tokenizer.token_bytes(i) for i in ids[start:end].tolist()]
        text = b"".join(words)
        if text.startswith(lead):
            learnt[start:end] = token_channels(words, byte_channels(text, len(lead)))
    return ids, learnt


def token_channels(words, channels):
    """The highest channel of each token's bytes; speech for a token without any."""
    lengths = np.array([len(word) for word in words])
    made = np.full(len(words), SPEECH, np.int8)
    starts = np.cumsum(lengths) - lengths
    if len(channels):
        made[lengths > 0] = np.maximum.reduceat(channels, starts[lengths > 0])
    return made


def byte_channels(text, lead=0):
    """The channel of each byte of a turn, int8 [len(text)]; the first `lead` bytes are the name, which is speech.

    Brackets are ASCII, so no byte of another character is one, and a byte can be read as a character of Latin-1.
    """
    channels = np.full(len(text), SPEECH, np.int8)
    at = lead
    for part, channel in BracketParser().feed(text[lead:].decode("latin-1")):
        channels[at : at + len(part)] = channel
        at += len(part)
    return channels
