"""Reads a Hugging Face `tokenizer.json`: byte-level BPE, refused where tiktoken would give other ids."""

import functools
import json

import numpy as np

from common.files import UsageError

# How text splits into words before byte-pair merging. Qwen 2 takes digits one by one, LLaMA 3 up to three.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN, QWEN2_PATTERN = _PATTERN % "{1,3}", _PATTERN % ""
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WHOLE_PATTERNS = LLAMA3_PATTERN, QWEN2_PATTERN, GPT2_PATTERN  # these split any text and leave nothing out
REPLACEMENT = "\ufffd"  # stands for a character that a vocabulary without some bytes cannot spell
ADDED = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}


def read_bpe(hf, path, added, stored=True):
    """The arguments of a BytePairTokenizer from hf, the JSON of a tokenizer.json.

    path: for messages. added: name -> id of special tokens that stand elsewhere. stored: whether the file at
    path holds this very JSON.
    """
    try:
        known = {token["content"] for token in hf["added_tokens"]}
        if extra := {name: i for name, i in added.items() if name not in known}:
            tokens = [{"id": i, "content": name, "special": True, **ADDED} for name, i in extra.items()]
            ids = set(extra.values())
            hf = {**hf, "added_tokens": [*(t for t in hf["added_tokens"] if t["id"] not in ids), *tokens]}
        model, patterns = hf["model"], _patterns(hf["pre_tokenizer"])
        byte_fallback = bool(model.get("byte_fallback"))
        _supported({"model": (model["type"], "BPE"), "byte_fallback": (byte_fallback, False)})
        to_byte = unicode_to_byte()
        specials = {token["content"]: token["id"] for token in hf["added_tokens"]}
        special_ids = {*specials.values()}
        vocab = {t: i for t, i in model["vocab"].items() if t not in specials and i not in special_ids}
        ids = {bytes(to_byte[c] for c in t): i for t, i in vocab.items()}
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        merged = [ids[bytes(to_byte[c] for c in left + right)] for left, right in pairs]
        missing = missing_bytes(ids)
        normalization, replaces = _normalizers(hf["normalizer"], missing)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path}: not a byte-level BPE that is known ({type(error).__name__}: {error})"
        ) from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if merged != sorted(merged):
        raise UsageError(
            f"{path}: its merges are not in the order of its ids, so tiktoken would give other ids"
        )
    if not model.get("ignore_merges"):  # a token that no merge makes is never found; tiktoken would find it
        reached = set(merged)
        ids = {token: i for token, i in ids.items() if len(token) == 1 or i in reached}
    missing = set() if replaces else missing
    content = None if stored and not missing and not extra else functools.partial(_content, hf, missing)
    return dict(ranks=ids, patterns=patterns, specials=specials, normalization=normalization, content=content)


def missing_bytes(ranks):
    """The set of bytes that are no token. ValueError if U+FFFD, which replaces what needs them, needs one
    itself."""
    missing = {byte for byte in range(256) if bytes([byte]) not in ranks}
    if not missing.isdisjoint(REPLACEMENT.encode()):
        raise ValueError(f"no tokens for {len(missing)} bytes")
    return missing


def _content(hf, missing):
    """The bytes of a tokenizer.json. A normalizer replaces characters that need missing bytes, as
    `encode_text` does; transformers would leave them out."""
    if missing:
        steps = [*_steps(hf["normalizer"], "normalizers"), _replacement(missing)]
        hf = {**hf, "normalizer": {"type": "Sequence", "normalizers": steps}}
    return json.dumps(hf, ensure_ascii=False).encode()


def _supported(found):
    """UsageError for the first of {what: (value, *supported values)} that is not supported."""
    for what, (value, *supported) in found.items():
        if value not in supported:
            raise UsageError(f"{what} {value!r} is not supported (only {', '.join(map(repr, supported))})")


def _steps(step, key):
    """The steps of a normalizer or pre-tokenizer, which is one step, a Sequence of steps, or None."""
    return [] if step is None else step[key] if step["type"] == "Sequence" else [step]


def _patterns(pre_tokenizer):
    """Patterns that split text one after the other, each the parts that the one before made; the last is a
    whole pattern."""
    *splits, byte_level = _steps(pre_tokenizer, "pretokenizers")
    _supported({"last pre-tokenizer": (byte_level["type"], "ByteLevel")})
    _supported({"prefix space": (byte_level.get("add_prefix_space", True), False)})
    patterns = []
    for split in splits:
        if split["type"] == "Digits":
            patterns.append(r"\p{N}" if split["individual_digits"] else r"\p{N}+")
            continue
        _supported({"split": (split["type"], "Split", "Digits")})
        _supported({"split behaviour": (split["behavior"], "Isolated"), "invert": (split["invert"], False)})
        patterns.append(split["pattern"].get("Regex"))
        _supported({"split pattern": (patterns[-1], *WHOLE_PATTERNS)})
    patterns += [GPT2_PATTERN] * byte_level.get("use_regex", True)
    _supported({"last split pattern": (patterns[-1] if patterns else None, *WHOLE_PATTERNS)})
    return patterns


def _normalizers(normalizer, missing):
    """(the form of Unicode normalization or None, whether the last step is our `_replacement`)."""
    steps = _steps(normalizer, "normalizers")
    replaces = bool(steps) and steps[-1].get("content") == REPLACEMENT and steps[-1] == _replacement(missing)
    steps = steps[:-1] if replaces else steps
    _supported({"normalizer": (steps, [], [{"type": "NFC"}])})
    return "NFC" if steps else None, replaces


def _replacement(missing):
    """A normalizer that replaces each character with one of these bytes by U+FFFD."""
    text = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    data = np.frombuffer(text.encode(), np.uint8)
    characters = np.cumsum((data & 0xC0) != 0x80) - 1
    points = [ord(text[i]) for i in np.unique(characters[np.isin(data, list(missing))])]
    starts = [point for point, before in zip(points, [-2, *points], strict=False) if point != before + 1]
    ends = [point for point, after in zip(points, [*points[1:], -1], strict=True) if point != after - 1]
    ranges = "".join(f"\\x{{{start:X}}}-\\x{{{end:X}}}" for start, end in zip(starts, ends, strict=True))
    return {"type": "Replace", "pattern": {"Regex": f"[{ranges}]"}, "content": REPLACEMENT}


def unicode_to_byte():
    """The characters that byte-level BPE writes for bytes: printable Latin-1 for itself, the others 256, 257,
    ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
