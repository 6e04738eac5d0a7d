"""Writes a tokenizer for transformers: `tokenizer.json` and `tokenizer_config.json` beside the tokenizer's
own file."""

import json
from pathlib import Path

from text.config import FILE, HF_CONFIG, HF_FILE
from text.hf import ADDED, LLAMA3_PATTERN, unicode_to_byte
from tokenizer import SPACE, BytePairTokenizer


def save_tokenizer(tokenizer, directory):
    """Writes the tokenizer's own file and those that transformers' AutoTokenizer reads."""
    directory = Path(directory)
    is_json = isinstance(tokenizer, BytePairTokenizer) and tokenizer.file.suffix in (".json", ".gguf")
    (directory / (HF_FILE if is_json else FILE)).write_bytes(tokenizer.content())
    if not is_json:
        hf = json.dumps(_hf_tokenizer(tokenizer), ensure_ascii=False)
        (directory / HF_FILE).write_text(hf, encoding="utf-8")
    bos = tokenizer.bos_id
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if bos is None else tokenizer.names[bos],
        "eos_token": tokenizer.names[tokenizer.stop_ids[0]],
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.format.template,
        "chat_format": tokenizer.chat_format,
        **tokenizer.format.tokens,
    }
    (directory / HF_CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def _hf_tokenizer(tokenizer):
    """A `tokenizer.json` that gives the same ids. Merges are all pairs of tokens that make a token, the best
    token first."""
    names = sorted(tokenizer.names.items())
    added = [{"id": i, "content": name, "special": True, **ADDED} for i, name in names]
    make = _byte_level if isinstance(tokenizer, BytePairTokenizer) else _sentencepiece
    vocab, options, pipeline, priority, plain = make(tokenizer)
    added += [{"id": i, "content": text, "special": False, **ADDED} for text, i in plain]
    merges = sorted(
        (priority(i), vocab[token[:at]], vocab[token[at:]], token[:at], token[at:])
        for token, i in vocab.items()
        if i not in tokenizer.names
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    )
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": [[left, right] for *_, left, right in merges],
        **options,
    }
    return {"version": "1.0", "added_tokens": added, "post_processor": None, **pipeline, "model": model}


def _byte_level(tokenizer):
    """(vocabulary, options of the model, the other stages, priority of a merge, added tokens that are not
    special)."""
    to_char = {byte: char for char, byte in unicode_to_byte().items()}
    vocab = {"".join(to_char[byte] for byte in token): i for token, i in tokenizer.ranks.items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    pipeline = {"normalizer": None, "pre_tokenizer": pre_tokenizer, "decoder": byte_level}
    return vocab, {"ignore_merges": True}, pipeline, int, []  # a lower id merges first


def _sentencepiece(tokenizer):
    pieces = tokenizer.pieces
    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if tokenizer.prefixed else []
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    pipeline = {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
    options = {"byte_fallback": True, "unk_token": pieces.id_to_piece(pieces.unk_id())}
    plain = [("\n", vocab["\n"])] if "\n" in vocab else []  # the stage's user-defined symbol
    return vocab, options, pipeline, lambda i: (-pieces.get_score(i), i), plain  # a higher score merges first
