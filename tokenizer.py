"""Text <-> token ids, and conversations -> ids with a loss mask.

    tokenizer = load_tokenizer("DIR")            # or a tokenizer.model or tokenizer.json file
    ids, mask = tokenizer.render([{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}])

Three kinds of file: tiktoken ranks (LLaMA 3's `tokenizer.model`), byte-level BPE (a Hugging Face `tokenizer.json`: LLaMA 3,
Qwen 2) and SentencePiece (`tokenizer.model`: Llama 2, Vicuna, Mistral, the stage). A chat format is a generator of segments;
text is always encoded apart from the markers around it, so nothing a user or a model writes ever becomes a special token.

    python tokenizer.py train [--data PATH ...] [--out FILE] [--vocab-size N]     makes the stage's tokenizer from its scenes
"""

import base64
import functools
import io
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
import sentencepiece
import tiktoken

from common import terminal
from common.files import ROOT, UsageError, read_json, write_whole

FILE, HF_FILE, HF_CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
STAGE_TOKENIZER = ROOT / "data" / "stage" / FILE

# How text splits into words before byte-pair merging; Qwen 2 takes digits one by one, LLaMA 3 up to three.
_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN, QWEN2_PATTERN = _PATTERN % "{1,3}", _PATTERN % ""
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WHOLE_PATTERNS = LLAMA3_PATTERN, QWEN2_PATTERN, GPT2_PATTERN  # each splits any text and leaves out nothing
REPLACEMENT = "\ufffd"  # for a character that a vocabulary without some bytes cannot spell
LLAMA3_RANKS = 128_000
LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
LONGEST_RUN = 25_000  # characters
SPACE = "\u2581"  # how SentencePiece writes a space
STAGE_SPECIALS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


# ---- chat formats -------------------------------------------------------------------------------------------------------


@dataclass
class Special:
    """A segment that is one special token."""

    name: str
    loss: bool = False


@dataclass
class Text:
    """A segment of text, encoded by itself; or these ids, where a model sampled it."""

    text: str
    loss: bool = False
    ids: list | None = None


def _content(message):
    return Text(message["content"], message["role"] == "assistant", message.get("ids"))


def llama3_format(messages, generate):
    yield Special("<|begin_of_text|>")
    for message in [*messages, *([{"role": "assistant"}] if generate else [])]:
        yield from (
            Special("<|start_header_id|>"),
            Text(message["role"]),
            Special("<|end_header_id|>"),
            Text("\n\n"),
        )
        if "content" in message:
            yield _content(message)
            yield Special("<|eot_id|>", message["role"] == "assistant")


def chatml_format(messages, generate):
    """Qwen 2: no beginning of text; the line end after a turn's end mark is not the speaker's."""
    for message in messages:
        own = message["role"] == "assistant"
        yield from (Special("<|im_start|>"), Text(message["role"] + "\n"), _content(message))
        yield from (Special("<|im_end|>", own), Text("\n"))
    if generate:
        yield from (Special("<|im_start|>"), Text("assistant\n"))


def stage_format(messages, generate):
    yield Special("<s>")
    for message in messages:
        own = message["role"] == "assistant"
        yield from (Special(f"<|{message['role']}|>"), _content(message), Special("<|end|>", own))
    if generate:
        yield Special("<|assistant|>")


def mistral_format(messages, generate, marker=Text):
    """v0.1 and Mixtral: the markers are plain text. There is no system role; its text opens the first user turn."""
    yield Special("<s>")
    for message in _system_into_user(messages):
        if message["role"] == "user":
            yield from (marker("[INST]"), Text(message["content"]), marker("[/INST]"))
        elif message["role"] == "assistant":
            yield from (_content(message), Special("</s>", True))


def mistral_v3_format(messages, generate):
    """v0.3: the markers are special tokens. Its makers move the system text to the last user turn; here it stays at the
    first, so that a chat only grows at its end and can be cached and trained on as one."""
    return mistral_format(messages, generate, Special)


def vicuna_format(messages, generate):
    """Vicuna 1.5: the system text stands in front, turns are labelled in plain text."""
    yield Special("<s>")
    for message in messages:
        if message["role"] == "system":
            yield Text(message["content"])
        elif message["role"] == "user":
            yield from (Text("USER:"), Text(message["content"]))
        else:
            yield from (Text("ASSISTANT:"), _content(message), Special("</s>", True))
    if generate:
        yield Text("ASSISTANT:")


def _system_into_user(messages):
    """For families without a system role: its text, a blank line, then the first user turn. ValueError where none follows."""
    roles = [message["role"] for message in messages]
    if "system" not in roles:
        return messages
    if roles[:2] != ["system", "user"] or "system" in roles[1:]:
        raise ValueError(
            f"this chat format takes a system text only before a first user turn, not {', '.join(roles)}"
        )
    system, user, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


_SYSTEM_FIRST = (
    "{%- set ns = namespace(system='') %}{%- set turns = messages %}{%- if messages[0]['role'] == 'system' %}"
    "{%- set ns.system = messages[0]['content'] + '\\n\\n' %}{%- set turns = messages[1:] %}{%- endif %}"
)


@dataclass
class ChatFormat:
    """segments: messages, whether to end on a generation prompt -> Special and Text; stops: the names that end a turn, the one
    that is written first; template: the same as Jinja, for checkpoints that others open."""

    segments: Callable
    stops: tuple
    template: str


CHAT_FORMATS = {
    "llama3": ChatFormat(
        llama3_format,
        ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        "<|begin_of_text|>{%- for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}",
    ),
    "chatml": ChatFormat(
        chatml_format,
        ("<|im_end|>", "<|endoftext|>"),
        "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}",
    ),
    "stage": ChatFormat(
        stage_format,
        ("<|end|>", "</s>"),
        "<s>{%- for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}",
    ),
    "mistral": ChatFormat(
        mistral_format,
        ("</s>",),
        _SYSTEM_FIRST
        + "<s>{%- for m in turns %}{%- if m['role'] == 'user' %}{{ '[INST] ' + ns.system + m['content'] + ' [/INST]' }}"
        "{%- set ns.system = '' %}{%- else %}{{ ' ' + m['content'] + '</s>' }}{%- endif %}{%- endfor %}",
    ),
    "mistral-v3": ChatFormat(
        mistral_v3_format,
        ("</s>",),
        _SYSTEM_FIRST
        + "<s>{%- for m in turns %}{%- if m['role'] == 'user' %}{{ '[INST]' + ns.system + m['content'] + '[/INST]' }}"
        "{%- set ns.system = '' %}{%- else %}{{ m['content'] + '</s>' }}{%- endif %}{%- endfor %}",
    ),
    "vicuna": ChatFormat(
        vicuna_format,
        ("</s>",),
        "<s>{%- for m in messages %}{%- if m['role'] == 'system' %}{{ m['content'] + ' ' }}{%- elif m['role'] == 'user' %}"
        "{{ 'USER: ' + m['content'] + ' ' }}{%- else %}{{ 'ASSISTANT: ' + m['content'] + '</s>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{%- endif %}",
    ),
}


# ---- tokenizers ---------------------------------------------------------------------------------------------------------


class Tokenizer:
    """What all tokenizers share.

    vocab_size: ids are 0 .. vocab_size - 1. specials: name -> id. chat_format: a key of CHAT_FORMATS. stop_ids: the ids that
    end a turn or a text. bos_id: begins a text, or None. file: where it was read from. content: a function that
    gives the bytes a checkpoint's directory keeps of it; the file's own where it is None.
    """

    def __init__(self, vocab_size, specials, chat_format, file, content=None):
        self.vocab_size, self.specials, self.file = vocab_size, specials, Path(file)
        self.content = content or self.file.read_bytes
        self.chat_format = chat_format
        self.format = CHAT_FORMATS[chat_format]
        turns = [{"role": role, "content": ""} for role in ("system", "user", "assistant")]
        for segment in self.format.segments(turns, True):
            if isinstance(segment, Special) and segment.name not in specials:
                raise UsageError(
                    f"{file}: no {segment.name} in this tokenizer, so {chat_format} is not its chat format"
                )
        self.stop_ids = [specials[name] for name in self.format.stops if name in specials]
        first = next(self.format.segments([], False), None)
        self.bos_id = specials[first.name] if first else None
        self.names = {i: name for name, i in specials.items()}

    def render(self, messages, add_generation_prompt=False):
        """(ids, mask) of a conversation; mask[i] is True where ids[i] is under loss: assistants' text and end of turn.

        A message may carry `ids`, its content as a model sampled it: they stand as they are, so that a chat that goes on begins
        with the very tokens that are cached.
        """
        for message in messages:
            if message["role"] not in ("system", "user", "assistant"):
                raise ValueError(f"role {message['role']!r} is not system, user or assistant")
        ids, mask = [], []
        for segment in self.format.segments(messages, add_generation_prompt):
            if isinstance(segment, Special):
                new = [self.specials[segment.name]]
            else:
                new = self.encode(segment.text) if segment.ids is None else segment.ids
            ids += new
            mask += [segment.loss] * len(new)
        return ids, mask

    def encode(self, text):
        """Ids of the text; whatever it holds, never a special one. UsageError where it holds half a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"not UTF-8 text: character {error.start} is half of a surrogate pair") from None
        return self.encode_text(text)

    def token_bytes(self, i):
        """The bytes that a token adds to a text; none for special tokens and ids of no token. (A SentencePiece text may begin
        with a space that was put in front.)"""
        return self.tokens.get(i, b"")

    def decode(self, ids):
        """Text of the ids; specials appear by name, torn characters and ids of no token as U+FFFD."""
        text, plain = [], []
        for i in ids:
            if i in self.names or not 0 <= i < self.vocab_size:
                text += [self.decode_text(plain), self.names.get(i, "\ufffd")]
                plain = []
            else:
                plain.append(i)
        return "".join([*text, self.decode_text(plain)])


def split_runs(text):
    """Parts of a text, cut only inside runs of more than LONGEST_RUN spaces or other characters, as LLaMA 3's own code cuts
    them: tiktoken's pattern overflows its stack on longer ones, and merging takes the square of their length."""
    if len(text) <= LONGEST_RUN:
        return [text]
    parts, start = [], 0
    for run in re.finditer(r"\s+|\S+", text):
        for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            parts.append(text[start:cut])
            start = cut
    return [*parts, text[start:]]


class BytePairTokenizer(Tokenizer):
    """Byte-level BPE through tiktoken. ranks: token bytes -> id; a lower id merges first. patterns: regular expressions
    that split text, each the parts that the one before it made. A character that needs a byte without a token is encoded
    as U+FFFD; a note says so once."""

    def __init__(self, ranks, patterns, specials, chat_format, file, normalization=None, content=None):
        self.ranks, self.normalization = ranks, normalization
        *first, last = patterns
        self.first = [regex.compile(f"({pattern})") for pattern in first]
        self.bpe = tiktoken.Encoding("bpe", pat_str=last, mergeable_ranks=ranks, special_tokens={})
        self.tokens = {i: token for token, i in ranks.items()}
        self.missing, self.noted = missing_bytes(ranks), False
        super().__init__(max(*ranks.values(), *specials.values()) + 1, specials, chat_format, file, content)

    def encode_text(self, text):
        text = unicodedata.normalize(self.normalization, text) if self.normalization else text
        if self.missing and not self.missing.isdisjoint(text.encode()):
            text = "".join(c if self.missing.isdisjoint(c.encode()) else REPLACEMENT for c in text)
            if not self.noted:
                lacks = f"no tokens for {len(self.missing)} of the 256 bytes"
                terminal.note(f"{self.file}: {lacks}; characters that need them are read as U+FFFD")
            self.noted = True
        parts = split_runs(text)
        for pattern in self.first:
            parts = [piece for part in parts for piece in pattern.split(part) if piece]
        return [i for part in parts for i in self.bpe.encode_ordinary(part)]

    def decode_text(self, ids):
        return b"".join(self.tokens.get(i, b"\xff") for i in ids).decode("utf-8", errors="replace")


def missing_bytes(ranks):
    """The set of bytes that are no token. ValueError where U+FFFD, which stands in for them, needs one of these."""
    missing = {byte for byte in range(256) if bytes([byte]) not in ranks}
    if not missing.isdisjoint(REPLACEMENT.encode()):
        raise ValueError(f"no tokens for {len(missing)} bytes")
    return missing


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece; control pieces are never matched in text."""

    def __init__(self, path, chat_format=None, model_type=None, content=None):
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            self.pieces.load_from_serialized_proto(content() if content else Path(path).read_bytes())
            specials = {
                self.pieces.id_to_piece(i): i for i in range(len(self.pieces)) if self.pieces.is_control(i)
            }
        except (RuntimeError, OSError, UnicodeDecodeError):
            found = "its tokens make no" if content else "neither tiktoken ranks nor a"
            raise UsageError(f"{path}: {found} SentencePiece model") from None
        if chat_format is None:
            chat_format = (
                "stage" if "<|end|>" in specials
                else "mistral-v3" if "[INST]" in specials
                else "mistral" if model_type in ("mistral", "mixtral")
                else "vicuna"
            )  # fmt: skip
        self.tokens = {}
        for i in range(len(self.pieces)):
            piece = self.pieces.id_to_piece(i)
            if self.pieces.is_byte(i):
                self.tokens[i] = bytes([int(piece[3:-1], 16)])
            elif not (self.pieces.is_control(i) or self.pieces.is_unknown(i)):
                self.tokens[i] = piece.replace(SPACE, " ").encode()
        super().__init__(len(self.pieces), specials, chat_format, path, content)

    def encode_text(self, text):
        """A literal U+2581, which SentencePiece would take for a space, is spelt in bytes where no prefix is added to parts."""
        first, *rest = text.split(SPACE) if self.chat_format == "stage" else [text]
        sign = [self.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return [*self.pieces.encode(first), *(i for part in rest for i in [*sign, *self.pieces.encode(part)])]

    def decode_text(self, ids):
        return self.pieces.decode(ids)


def load_tokenizer(path, chat_format=None):
    """The tokenizer of a checkpoint directory or a `tokenizer.model`, `tokenizer.json` or GGUF; else UsageError.

    chat_format overrides what our own tokenizer_config.json, then the markers, then `model_type` in config.json say.
    """
    from common.gguf import find_gguf

    path = Path(path)
    saved = path / HF_CONFIG
    if chat_format is None and saved.is_file() and read_json(saved).get("chat_format") in CHAT_FORMATS:
        chat_format = read_json(saved)["chat_format"]
    if chat_format is not None and chat_format not in CHAT_FORMATS:
        raise UsageError(f"chat format {chat_format!r} is not one of {', '.join(CHAT_FORMATS)}")
    if gguf := find_gguf(path):
        return _load_gguf(gguf, chat_format)
    file = next((path / name for name in (FILE, HF_FILE) if (path / name).is_file()), path)
    if not file.is_file():
        raise UsageError(
            f"{path}: no {FILE} or {HF_FILE} here; give --tokenizer a directory (or file) that has one"
        )
    if file.suffix == ".json":
        return _load_hf(file, read_json(file), chat_format)
    with open(file, "rb") as stream:
        first = stream.readline(200).split()
    if len(first) == 2 and first[1].isdigit():
        return _load_llama3(file, chat_format)
    config = file.with_name("config.json")
    model_type = read_json(config).get("model_type") if config.is_file() else None
    return SentencePieceTokenizer(file, chat_format, model_type)


def _load_llama3(path, chat_format):
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UsageError(f"{path}: line {number} is not a token in base64 and its rank") from None
    if sorted(ranks.values()) != list(range(LLAMA3_RANKS)) or any(
        bytes([byte]) not in ranks for byte in range(256)
    ):
        raise UsageError(f"{path}: {len(ranks)} ranks, but LLaMA 3 has {LLAMA3_RANKS}, counted from 0")
    names = [LLAMA3_NAMED.get(i, f"<|reserved_special_token_{i}|>") for i in range(256)]
    specials = {name: LLAMA3_RANKS + i for i, name in enumerate(names)}
    return BytePairTokenizer(ranks, [LLAMA3_PATTERN], specials, chat_format or "llama3", path)


def _load_gguf(path, chat_format):
    from common.gguf import read_gguf
    from text.gguf import hf_tokenizer, sentencepiece_model

    file = read_gguf(path)
    kind, template = (file.metadata.get(f"tokenizer.{key}") for key in ("ggml.model", "chat_template"))
    try:
        if kind == "gpt2":
            return _load_hf(path, hf_tokenizer(file), chat_format, kept=False)
        if kind == "llama":
            mistral = template and "[INST]" in template and "<<SYS>>" not in template  # those are Llama 2's
            content = functools.partial(sentencepiece_model, file)
            return SentencePieceTokenizer(path, chat_format, "mistral" if mistral else None, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: no tokenizer that is known ({type(error).__name__}: {error})") from None
    raise UsageError(f"{path}: tokenizer.ggml.model {kind!r} is not supported (only 'gpt2' and 'llama')")


def _load_hf(path, hf, chat_format, kept=True):
    """The tokenizer of hf, the JSON of a Hugging Face byte-level BPE; refused where tiktoken would give other ids.

    kept: whether the file at path holds this very JSON.
    """
    try:
        model, patterns = hf["model"], _patterns(hf["pre_tokenizer"])
        byte_fallback = bool(model.get("byte_fallback"))
        _supported({"model": (model["type"], "BPE"), "byte_fallback": (byte_fallback, False)})
        to_byte = _unicode_to_byte()
        specials = {token["content"]: token["id"] for token in hf["added_tokens"]}
        vocab = {token: i for token, i in model["vocab"].items() if token not in specials}
        ids = {bytes(to_byte[c] for c in token): i for token, i in vocab.items()}
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
            f"{path}: its merges are not in the order of its ids, so tiktoken would split words otherwise"
        )
    if not model.get("ignore_merges"):  # a token that no merge makes is never found; tiktoken would find it
        reached = set(merged)
        ids = {token: i for token, i in ids.items() if len(token) == 1 or i in reached}
    if chat_format is None:
        chat_format = "llama3" if "<|start_header_id|>" in specials else "chatml"
    missing = set() if replaces else missing
    content = None if kept and not missing else functools.partial(_hf_content, hf, missing)
    return BytePairTokenizer(ids, patterns, specials, chat_format, path, normalization, content)


def _hf_content(hf, missing):
    """The bytes of a tokenizer.json. Where bytes are missing it says what `encode_text` does with them: transformers
    would leave such characters out."""
    if missing:
        steps = [*_steps(hf["normalizer"], "normalizers"), _replacement(missing)]
        hf = {**hf, "normalizer": {"type": "Sequence", "normalizers": steps}}
    return json.dumps(hf, ensure_ascii=False).encode()


def _supported(known):
    """UsageError for the first of {what: (found, *supported)} that is not supported."""
    for what, (found, *supported) in known.items():
        if found not in supported:
            raise UsageError(f"{what} {found!r} is not supported (only {', '.join(map(repr, supported))})")


def _steps(step, key):
    """The steps of a normalizer or pre-tokenizer, which is one step, a Sequence of steps, or None."""
    return [] if step is None else step[key] if step["type"] == "Sequence" else [step]


def _patterns(pre):
    """The patterns of a pre_tokenizer in turn, each for the parts of the one before, the last one a whole pattern."""
    *splits, byte_level = _steps(pre, "pretokenizers")
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
    """(the form of Unicode normalization or None, whether it replaces characters with a missing byte as we do)."""
    steps = _steps(normalizer, "normalizers")
    replaces = bool(steps) and steps[-1].get("content") == REPLACEMENT and steps[-1] == _replacement(missing)
    steps = steps[:-1] if replaces else steps
    _supported({"normalizer": (steps, [], [{"type": "NFC"}])})
    return "NFC" if steps else None, replaces


def _replacement(missing):
    """The normalizer of a tokenizer.json that replaces every character with one of these bytes by U+FFFD."""
    text = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    data = np.frombuffer(text.encode(), np.uint8)
    characters = np.cumsum((data & 0xC0) != 0x80) - 1
    points = [ord(text[i]) for i in np.unique(characters[np.isin(data, list(missing))])]
    starts = [point for point, before in zip(points, [-2, *points], strict=False) if point != before + 1]
    ends = [point for point, after in zip(points, [*points[1:], -1], strict=True) if point != after - 1]
    ranges = "".join(f"\\x{{{start:X}}}-\\x{{{end:X}}}" for start, end in zip(starts, ends, strict=True))
    return {"type": "Replace", "pattern": {"Regex": f"[{ranges}]"}, "content": REPLACEMENT}


def _unicode_to_byte():
    """The characters byte-level BPE writes for bytes: printable Latin-1 stands for itself, the others for 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


# ---- for others to open -------------------------------------------------------------------------------------------------


def save_tokenizer(tokenizer, directory):
    """Writes the tokenizer's own file, and those that transformers' AutoTokenizer reads."""
    directory = Path(directory)
    json_suffixes = (".json", ".gguf") if isinstance(tokenizer, BytePairTokenizer) else ()
    name = HF_FILE if tokenizer.file.suffix in json_suffixes else FILE
    (directory / name).write_bytes(tokenizer.content())
    if name == FILE:
        (directory / HF_FILE).write_text(
            json.dumps(_hf_tokenizer(tokenizer), ensure_ascii=False), encoding="utf-8"
        )
    bos = tokenizer.bos_id
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if bos is None else tokenizer.names[bos],
        "eos_token": tokenizer.names[tokenizer.stop_ids[0]],
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.format.template,
        "chat_format": tokenizer.chat_format,
    }
    (directory / HF_CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def _hf_tokenizer(tokenizer):
    """A `tokenizer.json` that gives the same ids. Merges are every way to make a token out of two, the best token first."""
    specials = [
        {
            "id": i,
            "content": name,
            "special": True,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for i, name in sorted(tokenizer.names.items())
    ]
    if isinstance(tokenizer, BytePairTokenizer):
        to_char = {byte: char for char, byte in _unicode_to_byte().items()}
        vocab = {"".join(to_char[byte] for byte in token): i for token, i in tokenizer.ranks.items()}
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        split = {
            "type": "Split",
            "pattern": {"Regex": LLAMA3_PATTERN},
            "behavior": "Isolated",
            "invert": False,
        }
        rest = {
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "decoder": byte_level,
        }
        options, worse = {"ignore_merges": True}, int  # a lower id merges first
    else:
        pieces = tokenizer.pieces
        vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
        prefix = (
            [{"type": "Prepend", "prepend": SPACE}]
            if pieces.encode("a")[0] != pieces.piece_to_id("a")
            else []
        )
        space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        decoders = [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
        ]
        rest = {
            "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
        }
        options = {"byte_fallback": True, "unk_token": pieces.id_to_piece(pieces.unk_id())}

        def worse(i):  # a higher score merges first
            return -pieces.get_score(i), i

        user = [
            i for i in range(len(pieces)) if pieces.id_to_piece(i) == "\n"
        ]  # the stage's user-defined symbol
        specials += [{**specials[0], "id": i, "content": "\n", "special": False} for i in user]
    merges = sorted(
        (worse(i), vocab[token[:at]], vocab[token[at:]], token[:at], token[at:])
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
    return {"version": "1.0", "added_tokens": specials, "post_processor": None, **rest, "model": model}


def train_stage_tokenizer(scenes, vocab_size):
    """A SentencePiece BPE model (bytes) of the prompts and messages of training scenes; text comes back as it went in."""
    from data.chats import scene_to_chats

    texts = dict.fromkeys(
        message["content"]
        for epoch in range(8)
        for scene in scenes
        for chat in scene_to_chats(scene, epoch, next_speaker_share=1)
        for message in chat.messages
    )
    lines = dict.fromkeys(line for text in texts for line in text.split("\n") if line)
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=made,
        model_type="bpe",
        vocab_size=vocab_size,
        control_symbols=list(STAGE_SPECIALS),
        user_defined_symbols=["\n"],
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        max_sentence_length=100_000,
        num_threads=1,
        minloglevel=2,
    )
    return made.getvalue()


def main():
    from data.scenes import STAGE, load_scenes

    parser = terminal.Parser(__doc__, "python tokenizer.py train --out data/stage/tokenizer.model")
    parser.add_argument("action", choices=["train"])
    parser.add_argument(
        "--data", nargs="+", default=[STAGE], help="books to learn from (default: the bundled stories)"
    )
    parser.add_argument("--out", default=STAGE_TOKENIZER, help="file to write (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()
    scenes = [scene for path in args.data for scene in load_scenes(path) if scene.tag == "train"]
    if not scenes:
        raise UsageError(f"{args.data[0]}: no training scene in it; give a book with --data")
    try:
        made = train_stage_tokenizer(scenes, args.vocab_size)
    except RuntimeError as error:  # SentencePiece's own words on a vocabulary too small or too large
        raise UsageError(f"--vocab-size {args.vocab_size}: {str(error).rsplit('] ', 1)[-1]}") from None
    with write_whole(args.out, "wb") as file:
        file.write(made)
    tokenizer = load_tokenizer(args.out)
    text = " ".join(turn["message"] for scene in scenes for turn in scene.dialogues)
    terminal.note(
        f"{args.out}: {tokenizer.vocab_size} pieces, {len(text) / len(tokenizer.encode(text)):.2f} characters a token"
    )


if __name__ == "__main__":
    terminal.run(main)
