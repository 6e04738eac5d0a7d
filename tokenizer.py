"""Text <-> token ids, and conversations -> ids with a loss mask.

    tokenizer = load_tokenizer("DIR")            # or a tokenizer.model file
    ids, mask = tokenizer.render([{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}])

Two kinds of `tokenizer.model`: tiktoken ranks (LLaMA 3) and SentencePiece (the stage actor's own). Text is always encoded apart
from the markers around it, so nothing a user or a model writes ever becomes a special token.

    python tokenizer.py train [--data PATH ...] [--out FILE] [--vocab-size N]     makes the stage's tokenizer from its scenes
"""

import base64
import io
from pathlib import Path

import sentencepiece
import tiktoken

from cli import ROOT, UsageError

FILE = "tokenizer.model"
STAGE_TOKENIZER = ROOT / "data" / "stage" / FILE

# LLaMA 3's split of text into words before byte-pair merging.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
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
STAGE_SPECIALS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


class Tokenizer:
    """What all tokenizers share.

    vocab_size: ids are 0 .. vocab_size - 1. specials: marker -> id. bos_id: begins every rendered conversation.
    stop_ids: the ids that end a turn or a text.
    """

    def __init__(self, vocab_size, specials, bos_id, stop_ids, file):
        self.vocab_size, self.specials, self.bos_id, self.stop_ids = vocab_size, specials, bos_id, stop_ids
        self.file = Path(file)  # what a checkpoint's directory keeps, as it is

    def render(self, messages, add_generation_prompt=False):
        """(ids, mask) of a conversation; mask[i] is True where ids[i] is under loss: assistants' text and end of turn."""
        ids, mask = [self.bos_id], [False]
        for message in messages:
            role, content = message["role"], message["content"]
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"role {role!r} is not system, user or assistant")
            head, body = self.header(role), [*self.encode(content), self.end_of_turn]
            ids += head + body
            mask += [False] * len(head) + [role == "assistant"] * len(body)
        if add_generation_prompt:
            head = self.header("assistant")
            ids += head
            mask += [False] * len(head)
        return ids, mask


class Llama3Tokenizer(Tokenizer):
    """Byte-pair ranks through tiktoken, 256 specials above them, and the LLaMA 3 chat format."""

    def __init__(self, path):
        ranks = {}
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token)] = int(rank)
            except ValueError:
                raise UsageError(f"{path}: line {number} is not a token in base64 and its rank") from None
        if sorted(ranks.values()) != list(range(LLAMA3_RANKS)):
            raise UsageError(f"{path}: {len(ranks)} ranks, but LLaMA 3 has {LLAMA3_RANKS}, counted from 0")
        names = [LLAMA3_NAMED.get(i, f"<|reserved_special_token_{i}|>") for i in range(256)]
        specials = {name: LLAMA3_RANKS + i for i, name in enumerate(names)}
        self.bpe = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self.special_bytes = {i: name.encode() for name, i in specials.items()}
        stop_ids = [specials[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
        super().__init__(LLAMA3_RANKS + 256, specials, specials["<|begin_of_text|>"], stop_ids, path)
        self.end_of_turn = specials["<|eot_id|>"]

    def encode(self, text):
        """Ids of the text; whatever it holds, never a special one."""
        return self.bpe.encode_ordinary(text)

    def decode(self, ids):
        """Text of the ids; specials appear by name, torn characters as U+FFFD."""
        pieces = (self.special_bytes.get(i) or self.bpe.decode_single_token_bytes(i) for i in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def header(self, role):
        start, end = self.specials["<|start_header_id|>"], self.specials["<|end_header_id|>"]
        return [start, *self.encode(role), end, *self.encode("\n\n")]


class StageTokenizer(Tokenizer):
    """SentencePiece with a marker for each role: `<s> <|system|> text <|end|> <|user|> text <|end|> ...`."""

    def __init__(self, path):
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            self.pieces.load(str(path))
        except (RuntimeError, OSError):
            raise UsageError(f"{path}: neither tiktoken ranks nor a SentencePiece model") from None
        specials = {self.pieces.id_to_piece(i): i for i in range(len(self.pieces)) if self.pieces.is_control(i)}
        if not specials.keys() >= set(STAGE_SPECIALS):
            raise UsageError(f"{path}: a SentencePiece model without the stage's markers {', '.join(STAGE_SPECIALS)}")
        end = specials["<|end|>"]
        super().__init__(len(self.pieces), specials, self.pieces.bos_id(), [end, self.pieces.eos_id()], path)
        self.end_of_turn = end

    def encode(self, text):
        """Ids of the text; control pieces are never matched in text."""
        return self.pieces.encode(text)

    def decode(self, ids):
        """Text of the ids; specials appear by name, torn characters as U+FFFD."""
        text, plain = [], []
        for i in ids:
            if self.pieces.is_control(i):
                text += [self.pieces.decode(plain), self.pieces.id_to_piece(i)]
                plain = []
            else:
                plain.append(i)
        return "".join([*text, self.pieces.decode(plain)])

    def header(self, role):
        return [self.specials[f"<|{role}|>"]]


def load_tokenizer(path):
    """The tokenizer of a directory that holds a `tokenizer.model`, or of such a file. UsageError where there is none."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path}: no {FILE} here; give --tokenizer a directory (or file) that has one")
    with open(file, "rb") as stream:
        first = stream.readline(200).split()
    if len(first) == 2 and first[1].isdigit():
        return Llama3Tokenizer(file)
    return StageTokenizer(file)


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
    import cli
    from data.scenes import STAGE, load_scenes

    parser = cli.Parser(__doc__, "python tokenizer.py train --out data/stage/tokenizer.model")
    parser.add_argument("action", choices=["train"])
    parser.add_argument("--data", nargs="+", default=[STAGE], help="books to learn from (default: the bundled stories)")
    parser.add_argument("--out", default=STAGE_TOKENIZER, help="file to write (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()
    scenes = [scene for path in args.data for scene in load_scenes(path) if scene.tag == "train"]
    made = train_stage_tokenizer(scenes, args.vocab_size)
    with cli.write_whole(args.out, "wb") as file:
        file.write(made)
    tokenizer = load_tokenizer(args.out)
    text = " ".join(turn["message"] for scene in scenes for turn in scene.dialogues)
    cli.note(f"{args.out}: {tokenizer.vocab_size} pieces, {len(text) / len(tokenizer.encode(text)):.2f} characters a token")


if __name__ == "__main__":
    from cli import run

    run(main)
