"""The tokenizer of a GGUF file as a Hugging Face `tokenizer.json` or as a SentencePiece model, and what the
file says of chats."""

import re
import struct

from common import terminal
from common.files import UsageError
from text.config import TokenizerConfig
from text.hf import ADDED, LLAMA3_PATTERN, QWEN2_PATTERN

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(
    2, 7
)  # token types, as in SentencePiece; 1 is a normal token
PATTERNS = {  # tokenizer.ggml.pre -> how text splits; smollm by digits, then as GPT-2
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), LLAMA3_PATTERN),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2_PATTERN),
    "smollm": None,
}


def gguf_config(file):
    """The TokenizerConfig of a GGUF's metadata."""
    tokens, _ = _tokens(file)

    def token_id(name):
        i = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return i if type(i) is int and 0 <= i < len(tokens) else None

    ids = {name: token_id(name) for name in ("bos", "eos", "unknown", "padding")}
    names = {"unknown": "unk", "padding": "pad"}
    stops = [i for i in map(token_id, ("eos", "eot", "eom")) if i is not None]
    template = file.metadata.get("tokenizer.chat_template")
    return TokenizerConfig(
        template=template if isinstance(template, str) else None,
        where=f"{file.path} (tokenizer.chat_template)",
        tokens={f"{names.get(n, n)}_token": tokens[i] for n, i in ids.items() if i is not None},
        stop_ids=stops,
    )


def _tokens(file):
    """(tokens, types), refused where they are not lists of one length."""
    tokens, types = (file.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    if not (isinstance(tokens, list) and isinstance(types, list) and len(tokens) == len(types)):
        raise ValueError("there must be as many tokens as token types")
    return tokens, types


def hf_tokenizer(file):
    """The tokenizer.json of a byte-level BPE in a GGUF."""
    (tokens, types), metadata = _tokens(file), file.metadata
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        pre = "llama-bpe" if len(tokens) == 128_256 else metadata["general.architecture"]
        terminal.note(f"{file.path}: no tokenizer.ggml.pre, as in files of before May 2024; taken for {pre}")
    if pre not in PATTERNS:
        raise UsageError(
            f"{file.path}: tokenizer.ggml.pre {pre!r} is not supported (only {', '.join(PATTERNS)})"
        )
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": pre == "smollm",
    }
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pre]}, "behavior": "Isolated", "invert": False}
    first = {"type": "Digits", "individual_digits": True} if pre == "smollm" else split
    numbered = list(enumerate(zip(tokens, types, strict=True)))
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": kind == CONTROL, **ADDED}
            for i, (token, kind) in numbered
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if PATTERNS[pre] == QWEN2_PATTERN else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [first, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, (token, kind) in numbered if kind != UNUSED},
            "merges": metadata["tokenizer.ggml.merges"],
            "ignore_merges": PATTERNS[pre] == LLAMA3_PATTERN,
        },
    }


def sentencepiece_model(file):
    """The SentencePiece BPE model (a serialized ModelProto) of a GGUF's tokens, scores and types.

    A user-defined token that looks like a marker becomes a control token, so that no text turns into it.
    """
    (tokens, types), model, unknown = _tokens(file), bytearray(), "<unk>"
    for token, score, kind in zip(tokens, file.metadata["tokenizer.ggml.scores"], types, strict=True):
        if kind == USER_DEFINED and re.fullmatch(r"<.*>|\[.*\]", token):
            kind = CONTROL
        unknown = token if kind == UNKNOWN else unknown
        model += _field(1, _field(1, token) + _field(2, float(score)) + _field(3, kind))
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    # model_type BPE, vocab_size, byte_fallback, unk_piece
    trainer = {3: 2, 4: len(tokens), 35: BYTE in types, 45: unknown}
    # name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = {1: "identity", 3: prefix, 4: False, 5: True}
    for number, fields in ((2, trainer), (3, normalizer)):
        model += _field(number, b"".join(_field(*item) for item in fields.items()))
    return bytes(model)


def _field(number, value):
    """A field of a protobuf message."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(int(value))
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value):
    encoded = b""
    while value > 127:
        encoded, value = encoded + bytes([value & 127 | 128]), value >> 7
    return encoded + bytes([value])
