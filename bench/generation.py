"""Prefill and decode, against transformers or llama.cpp."""

import tempfile

import torch

import checkpoint
from bench import machine
from bench.figures import seconds
from bench.models import LlamaCpp, Ours, Transformers, in_transformers, open_model, ours_in

SIZES = {  # --batch and --prompt by default
    "toy": ([1, 2], [9]),
    "prefill": ([1], [512, 2048]),
    "decode, cuda": ([1, 32, 128], [1800]),
    "decode, cpu": ([1, 16], [128]),
}


def measure(args):
    """Tokens a second of prefill and of decode, and the bytes that decode reads as a share of a copy's.

    Prompts are random ids, new ones in each round, since all sides have a prefix cache.
    """
    cuda, decode = args.device == "cuda", args.name == "decode"
    args.model = args.model or ("8b" if cuda else "135m")
    batches, lengths = SIZES["toy" if args.toy else f"decode, {args.device}" if decode else "prefill"]
    batches, lengths = args.batch or batches, args.prompt or lengths
    dtype, new = args.dtype or ("bfloat16" if cuda else "float32"), args.new if decode else 0
    model = open_model(args, checkpoint.DTYPES.get(dtype, torch.float32))
    sides, generator = {f"ours, {dtype}": Ours(ours_in(model, dtype))}, torch.Generator().manual_seed(0)
    if args.peer == "transformers":
        with tempfile.TemporaryDirectory() as directory:
            peer = in_transformers(model, f"{directory}/model")
        sides["transformers, dynamic cache"] = Transformers(peer, static=False)
        sides["transformers, static cache"] = Transformers(peer, static=True)
    elif args.peer:
        sides["llama.cpp, GGUF"] = LlamaCpp(args, max(batches), max(lengths) + new + 1)
    c = model.config
    cases = [(length, batch) for length in lengths for batch in batches]
    for number in range(args.rounds + 1):
        copy = machine.copy_rate(args.device, args.toy)  # in each round: what a machine gives changes
        for length, batch in cases:
            prompts = torch.randint(0, c.vocab_size, (batch, length), generator=generator).tolist()
            for name, side in sides.items():
                took = seconds(lambda: side.prefill(prompts, new), args.device)  # noqa: B023
                figures = {"prefill tok/s": batch * length / took}
                if decode:
                    step = seconds(lambda: side.decode(new), args.device) / new  # noqa: B023
                    token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * side.itemsize
                    read = (side.weights + batch * (length + new / 2) * token) / step  # bytes a second
                    figures = {"decode tok/s": batch / step} | figures
                    figures |= {"decode GB/s": read / 1e9, "of copy": read / copy}
                yield number, {"side": name, "batch": batch, "prompt": length}, figures
