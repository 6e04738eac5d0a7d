"""The tokenizer of a GGUF file as a Hugging Face `tokenizer.json`, or as a SentencePiece model."""

import re
import struct

from common import terminal
from common.files import UsageError
from tokenizer import LLAMA3_PATTERN, QWEN2_PATTERN

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(
    2, 7
)  # token types, as in SentencePiece; 1 is a normal token
PATTERNS = {  # tokenizer.ggml.pre -> how text splits; smollm by digits, then as GPT-2
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), LLAMA3_PATTERN),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2_PATTERN),
    "smollm": None,
}


def _tokens(file):
    """(tokens, types), refused where they are not lists of one length."""
    tokens, types = (file.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    if not (isinstance(tokens, list) and isinstance(types, list) and len(tokens) == len(types)):
        raise ValueError("as many tokens as token types are needed")
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
    plain = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    kinds = list(enumerate(zip(tokens, types, strict=True)))
    vocab = {token: i for i, (token, kind) in kinds if kind != UNUSED}
    added = [(i, token, kind == CONTROL) for i, (token, kind) in kinds if kind in (CONTROL, USER_DEFINED)]
    merges, ignore_merges = metadata["tokenizer.ggml.merges"], PATTERNS[pre] == LLAMA3_PATTERN
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": special, **plain} for i, token, special in added
        ],
        "normalizer": {"type": "NFC"} if PATTERNS[pre] == QWEN2_PATTERN else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [first, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges},
    }


def sentencepiece_model(file):
    """The SentencePiece BPE model (a serialized ModelProto) of a GGUF's tokens, scores and types.

    A user-defined token that looks like a marker becomes a control token, so that no text turns into it.
    """
    (tokens, types), made, unknown = _tokens(file), bytearray(), "<unk>"
    for token, score, kind in zip(tokens, file.metadata["tokenizer.ggml.scores"], types, strict=True):
        if kind == USER_DEFINED and re.fullmatch(r"<.*>|\[.*\]", token):
            kind = CONTROL
        unknown = token if kind == UNKNOWN else unknown
        made += _field(1, _field(1, token) + _field(2, float(score)) + _field(3, kind))
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    trainer = {
        3: 2,
        4: len(tokens),
        35: BYTE in types,
        45: unknown,
    }  # BPE, vocab_size, byte_fallback, unk_piece
    normalizer = {
        1: "identity",
        3: prefix,
        4: False,
        5: True,
    }  # name, add_dummy_prefix, remove_extra.., escape_whitespaces
    for number, fields in ((2, trainer), (3, normalizer)):
        made += _field(number, b"".join(_field(*field) for field in fields.items()))
    return bytes(made)


def _field(number, value):
    """A field of a protobuf message."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(int(value))
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value):
    made = b""
    while value > 127:
        made, value = made + bytes([value & 127 | 128]), value >> 7
    return made + bytes([value])
