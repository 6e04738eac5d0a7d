"""python tokenizer.py train [--data PATH ...] [--out FILE] [--vocab-size N]

Makes the stage's tokenizer from the training scenes of books.
"""

import io

import sentencepiece

from common import terminal
from common.files import UsageError, write_whole
from tokenizer import STAGE_TOKENIZER, load_tokenizer

STAGE_SPECIALS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def train_stage_tokenizer(scenes, vocab_size):
    """The bytes of a SentencePiece BPE model with byte fallback, made from the chats of scenes; it changes no
    text."""
    from data.chats import scene_to_chats

    texts = dict.fromkeys(
        message["content"]
        for epoch in range(8)
        for scene in scenes
        for chat in scene_to_chats(scene, epoch, next_speaker_share=1)
        for message in chat.messages
    )
    lines = dict.fromkeys(line for text in texts for line in text.split("\n") if line)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
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
    return model.getvalue()


def main():
    from data.scenes import STAGE, load_scenes

    parser = terminal.Parser(__doc__, "python tokenizer.py train --out data/stage/tokenizer.model")
    parser.add_argument("action", choices=["train"])
    parser.add_argument(
        "--data", nargs="+", default=[STAGE], help="books to learn from (default: the bundled stories)"
    )
    parser.add_argument("--out", default=STAGE_TOKENIZER, help="file to write (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="default: %(default)s")
    args = parser.parse_args()
    scenes = [scene for path in args.data for scene in load_scenes(path) if scene.tag == "train"]
    if not scenes:
        raise UsageError(f"{args.data[0]}: no training scene in it; give a book with --data")
    try:
        model = train_stage_tokenizer(scenes, args.vocab_size)
    except RuntimeError as error:  # SentencePiece says what is wrong with the size
        raise UsageError(f"--vocab-size {args.vocab_size}: {str(error).rsplit('] ', 1)[-1]}") from None
    with write_whole(args.out, "wb") as file:
        file.write(model)
    tokenizer = load_tokenizer(args.out)
    text = " ".join(turn["message"] for scene in scenes for turn in scene.dialogues)
    density = f"{len(text) / len(tokenizer.encode(text)):.2f} characters per token"
    terminal.note(f"{args.out}: {tokenizer.vocab_size} pieces, {density}")
