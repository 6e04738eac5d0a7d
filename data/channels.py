"""Tokenises a chat and gives every token under loss its channel: speech, action, thought, or general data.

The bracket rule (data/brackets.py) is applied to the bytes of each message; a token whose bytes have several
channels gets the highest. The name in front of a turn and the end-of-turn token are speech.
"""

import numpy as np

from data.brackets import GENERAL, SPEECH, BracketParser


def label(tokenizer, messages, character=None, parts=None):
    """A conversation as (ids uint32 [N], channels int8 [N]); channel 0 means no loss.

    character: speaker of the assistant turns that open with `Name: `; turns without the name (those of the
    next-speaker model) are all speech. None: general data. parts: as `Chat.parts`; None: one message a turn.
    """
    ids, mask = tokenizer.render(messages)
    ids, channels = np.array(ids, np.uint32), np.array(mask, np.int8)
    if character is None:
        return ids, channels * np.int8(GENERAL)
    lead = f"{character}: "
    parts = parts or [[turn["content"]] for turn in messages if turn["role"] == "assistant"]
    # start and end of each assistant turn
    spans = np.flatnonzero(np.diff(channels, prepend=0, append=0)).reshape(-1, 2)
    for (start, end), turn in zip(spans.tolist(), parts, strict=True):
        if turn[0].startswith(lead):
            # lengths are those of tokens, since a tokenizer may normalise text or put a space in front of it
            before = [lead, *("".join(turn[:n]) for n in range(1, len(turn)))]
            starts = [len(b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))) for text in before]
            tokens = [tokenizer.token_bytes(i) for i in ids[start:end].tolist()]
            channels[start:end] = token_channels(tokens, byte_channels(b"".join(tokens), starts))
    return ids, channels


def token_channels(tokens, channels):
    """The highest channel of each token's bytes, int8 [tokens]; speech for a token that has none."""
    lengths = np.array([len(token) for token in tokens])
    starts = np.cumsum(lengths) - lengths
    result = np.full(len(tokens), SPEECH, np.int8)
    if len(channels):
        result[lengths > 0] = np.maximum.reduceat(channels, starts[lengths > 0])
    return result


def byte_channels(text, starts=(0,)):
    """The channel of each byte of a turn, int8 [len(text)]. starts: of its messages; the name comes before.

    Read as Latin-1: brackets are ASCII, so no byte of a longer UTF-8 character looks like one.
    """
    channels = np.full(len(text), SPEECH, np.int8)
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        for part, channel in BracketParser().feed(text[start:end].decode("latin-1")):
            channels[start : start + len(part)] = channel
            start += len(part)
    return channels
