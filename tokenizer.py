"""Text <-> token ids, and conversations -> ids with a loss mask.

    tokenizer = load_tokenizer("DIR")            # or a tokenizer.model, tokenizer.json or GGUF file
    ids, mask = tokenizer.render([{"role": "user", "content": "..."}, ...])

Three kinds of file: tiktoken ranks (LLaMA 3's `tokenizer.model`), byte-level BPE (a Hugging Face
`tokenizer.json`: LLaMA 3, Qwen 2) and SentencePiece (`tokenizer.model`: Llama 2, Vicuna, Mistral, the stage).
A chat format is a generator of segments (text/chat.py), which a checkpoint's own chat template chooses
(text/template.py).

    python tokenizer.py train [--data PATH ...] [--out FILE] [--vocab-size N]    makes the stage's tokenizer
"""

import base64
import functools
import re
import unicodedata
from pathlib import Path

import regex
import sentencepiece
import tiktoken

from common import terminal
from common.files import ROOT, UsageError, read_json
from common.gguf import find_gguf, read_gguf
from text.chat import CHAT_FORMATS, Special, markers
from text.config import FILE, HF_FILE, read_config
from text.gguf import gguf_config, hf_tokenizer, sentencepiece_model
from text.hf import LLAMA3_PATTERN, REPLACEMENT, missing_bytes, read_bpe
from text.template import choose

STAGE_TOKENIZER = ROOT / "data" / "stage" / FILE
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


class Tokenizer:
    """What all tokenizers share.

    vocab_size: ids are 0 .. vocab_size - 1. specials: name -> id. names: id -> name. file: what it was read
    from. content: a function that returns the bytes of the file that a checkpoint keeps. After `use`:
    chat_format (a key of CHAT_FORMATS, or "template"), chat_format_reason (why, in one line), format (a
    ChatFormat), stop_ids (end a turn or a text, first the one that is written), bos_id (begins a text, or
    None).
    """

    def __init__(self, vocab_size, specials, file, content=None):
        self.specials, self.file = specials, Path(file)
        self.vocab_size = max([vocab_size - 1, *specials.values()]) + 1
        self.content = content or self.file.read_bytes
        self.names = {i: name for name, i in specials.items()}

    def use(self, chat_format, reason, form=None, stop_ids=()):
        """Sets the chat format; stop_ids: what ends a text besides. UsageError if its markers are not in the
        vocabulary."""
        self.chat_format, self.chat_format_reason = chat_format, reason
        self.format = form or CHAT_FORMATS[chat_format]
        if missing := sorted(markers(self.format) - self.specials.keys()) if form is None else []:
            raise UsageError(
                f"{self.file}: no {missing[0]} in this tokenizer, so {chat_format} is not its chat format"
            )
        own = [self.specials[name] for name in self.format.stops if name in self.specials]
        self.stop_ids = list(dict.fromkeys([*own, *(i for i in stop_ids if 0 <= i < self.vocab_size)]))
        self.bos_id = self.specials.get(self.format.bos)
        return self

    def render(self, messages, add_generation_prompt=False):
        """(ids, mask) of a conversation; mask[i] is True where ids[i] is under loss: assistants' text and end
        of turn.

        A message may carry `ids`, its content as a model sampled it: they are used as they are, so that the
        next prompt begins with the very tokens that are cached. ValueError for a conversation that the format
        cannot express.
        """
        for message in messages:
            if message["role"] not in ("system", "user", "assistant"):
                raise ValueError(f"role {message['role']!r} is not system, user or assistant")
        ids, mask, after_text = [], [], False
        for segment in self.format.segments(messages, add_generation_prompt):
            if isinstance(segment, Special):
                new, after_text = [self.specials[segment.name]], False
            else:
                encode = self.encode_rest if after_text else self.encode
                new = encode(segment.text) if segment.ids is None else segment.ids
                after_text = self.format.continues
            ids += new
            mask += [segment.loss] * len(new)
        return ids, mask

    def encode(self, text):
        """Ids of the text, never special ones whatever it contains. UsageError if it holds half a surrogate
        pair."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"not UTF-8 text: character {error.start} is half of a surrogate pair") from None
        return self.encode_text(text)

    def encode_rest(self, text):
        """Ids of text that directly follows other text."""
        return self.encode(text)

    def token_bytes(self, i):
        """The bytes that a token adds to a text; none for special tokens and ids of no token. (A
        SentencePiece text may begin with a space that was put in front.)"""
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
    """Parts of a text, cut only inside runs of more than LONGEST_RUN spaces or other characters, as LLaMA 3's
    own code cuts them: tiktoken's pattern overflows its stack on longer ones, and merging takes the square of
    their length."""
    if len(text) <= LONGEST_RUN:
        return [text]
    parts, start = [], 0
    for run in re.finditer(r"\s+|\S+", text):
        for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            parts.append(text[start:cut])
            start = cut
    return [*parts, text[start:]]


class BytePairTokenizer(Tokenizer):
    """Byte-level BPE through tiktoken. ranks: token bytes -> id; a lower id merges first. patterns: regular
    expressions that split text, each the parts that the one before it made. normalization: a Unicode form. A
    character that needs a byte without a token is encoded as U+FFFD; a note says so once."""

    def __init__(self, ranks, patterns, specials, file, normalization=None, content=None):
        self.ranks, self.normalization = ranks, normalization
        *first, last = patterns
        self.first = [regex.compile(f"({pattern})") for pattern in first]
        self.bpe = tiktoken.Encoding("bpe", pat_str=last, mergeable_ranks=ranks, special_tokens={})
        self.tokens = {i: token for token, i in ranks.items()}
        self.missing, self.noted = missing_bytes(ranks), False
        super().__init__(max(ranks.values()) + 1, specials, file, content)

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


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece; control pieces are never matched in text. added: name -> id of special tokens that are
    no pieces. prefixed: whether a space is put in front of each text."""

    def __init__(self, path, added=(), content=None):
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            self.pieces.load_from_serialized_proto(content() if content else Path(path).read_bytes())
            pieces = [self.pieces.id_to_piece(i) for i in range(len(self.pieces))]
        except (RuntimeError, OSError, UnicodeDecodeError):
            problem = "its tokens make no" if content else "neither tiktoken ranks nor a"
            raise UsageError(f"{path}: {problem} SentencePiece model") from None
        specials = {piece: i for i, piece in enumerate(pieces) if self.pieces.is_control(i)}
        specials |= {name: i for name, i in dict(added).items() if i >= len(pieces)}
        self.prefixed = self.pieces.encode("a")[0] != self.pieces.piece_to_id("a")
        self.tokens = {}
        for i, piece in enumerate(pieces):
            if self.pieces.is_byte(i):
                self.tokens[i] = bytes([int(piece[3:-1], 16)])
            elif not (self.pieces.is_control(i) or self.pieces.is_unknown(i)):
                self.tokens[i] = piece.replace(SPACE, " ").encode()
        super().__init__(len(pieces), specials, path, content)

    def encode_text(self, text):
        """A literal U+2581, which SentencePiece would take for a space, is spelt in bytes where no prefix is
        put in front."""
        first, *rest = [text] if self.prefixed else text.split(SPACE)
        sign = [self.pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        return [*self.pieces.encode(first), *(i for part in rest for i in [*sign, *self.pieces.encode(part)])]

    def encode_rest(self, text):
        if not self.prefixed:
            return self.encode(text)
        return self.encode("\n" + text)[len(self.pieces.encode("\n")) :]

    def decode_text(self, ids):
        return self.pieces.decode(ids)


# ---- loading -----------------------------------------------------------------------------------------------


def load_tokenizer(path, chat_format=None):
    """The tokenizer of a checkpoint directory, or of a `tokenizer.model`, `tokenizer.json` or GGUF; else
    UsageError.

    chat_format: a key of CHAT_FORMATS, or "template" for the checkpoint's own chat template as it is. By
    default what our own tokenizer_config.json says, then the format that the chat template is, then what the
    markers and config.json suggest.
    """
    path = Path(path)
    if chat_format not in (None, "template", *CHAT_FORMATS):
        raise UsageError(f"chat format {chat_format!r} is not one of {', '.join(CHAT_FORMATS)}")
    if gguf := find_gguf(path):
        tokenizer, config = _load_gguf(gguf)
    else:
        file = next((path / name for name in (FILE, HF_FILE) if (path / name).is_file()), path)
        if not file.is_file():
            raise UsageError(
                f"{path}: no {FILE} or {HF_FILE} here; give --tokenizer a directory (or file) that has one"
            )
        config = read_config(file)
        tokenizer = _load_file(file, config.added)
    eos = tokenizer.specials.get(config.tokens.get("eos_token"))
    stop_ids = [*([] if eos is None else [eos]), *config.stop_ids]
    if chat_format in CHAT_FORMATS:
        return tokenizer.use(chat_format, f"{chat_format}: as asked for", stop_ids=stop_ids)
    if chat_format is None and config.chat_format in CHAT_FORMATS:
        why = f"{config.chat_format}: tokenizer_config.json says so"
        return tokenizer.use(config.chat_format, why, stop_ids=stop_ids)
    if config.template:
        name, form, why = choose(
            config.template, config.where, config.tokens, tokenizer.specials, chat_format
        )
        return tokenizer.use(name, why, form if name == "template" else None, stop_ids)
    if chat_format == "template":
        raise UsageError(
            f"{path}: no chat template here; give --chat-format, one of {', '.join(CHAT_FORMATS)}"
        )
    guess = _guess(tokenizer, config.model_type)
    return tokenizer.use(
        guess, f"{guess}: there is no chat template, so its special tokens decide", stop_ids=stop_ids
    )


def _guess(tokenizer, model_type):
    if isinstance(tokenizer, BytePairTokenizer):
        return "llama3" if "<|start_header_id|>" in tokenizer.specials else "chatml"
    if "<|end|>" in tokenizer.specials:
        return "stage"
    if "[INST]" in tokenizer.specials:
        return "mistral-v3"
    return "mistral" if model_type in ("mistral", "mixtral") else "vicuna"


def _load_file(file, added):
    if file.suffix == ".json":
        return BytePairTokenizer(file=file, **read_bpe(read_json(file), file, added))
    with open(file, "rb") as stream:
        first = stream.readline(200).split()
    if len(first) == 2 and first[1].isdigit():
        return _load_llama3(file, added)
    return SentencePieceTokenizer(file, added)


def _load_llama3(path, added):
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UsageError(f"{path}: line {number} is not a token in base64 and its rank") from None
    complete = all(bytes([byte]) in ranks for byte in range(256))
    if sorted(ranks.values()) != list(range(LLAMA3_RANKS)) or not complete:
        raise UsageError(f"{path}: {len(ranks)} ranks, but LLaMA 3 has {LLAMA3_RANKS}, counted from 0")
    names = [LLAMA3_NAMED.get(i, f"<|reserved_special_token_{i}|>") for i in range(256)]
    by_id = {LLAMA3_RANKS + i: name for i, name in enumerate(names)}
    new = {i: name for name, i in added.items() if i >= LLAMA3_RANKS and name not in names}
    by_id |= new  # a fine-tune gives reserved tokens a name, or adds tokens
    specials = {name: i for i, name in by_id.items()}
    return BytePairTokenizer(ranks, [LLAMA3_PATTERN], specials, path)


def _load_gguf(path):
    """(tokenizer, TokenizerConfig) of a GGUF."""
    file = read_gguf(path)
    kind = file.metadata.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            config = gguf_config(file)
            return BytePairTokenizer(
                file=path, **read_bpe(hf_tokenizer(file), path, {}, stored=False)
            ), config
        if kind == "llama":
            content = functools.partial(sentencepiece_model, file)
            return SentencePieceTokenizer(path, content=content), gguf_config(file)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: no tokenizer that is known ({type(error).__name__}: {error})") from None
    raise UsageError(f"{path}: tokenizer.ggml.model {kind!r} is not supported (only 'gpt2' and 'llama')")


def main():
    from text.training import main as train  # it imports this module

    train()


if __name__ == "__main__":
    terminal.run(main)
