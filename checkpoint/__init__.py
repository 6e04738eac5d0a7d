"""Checkpoints: Hugging Face safetensors directories and GGUF files, read into a model or into its shards, and
written.

    model = load_model("DIR")                    # any directory of a supported family that transformers opens
    save_model(model, "DIR", tokenizer)          # one that transformers opens

Weights are read from safetensors and GGUF only. `fill` loads a whole model or the shards of an FSDP model,
where each rank reads only its own rows. Directories are written under a temporary name with a manifest of
checksums, then renamed.
"""

from checkpoint.config import DTYPES, load_config
from checkpoint.export import save_model
from checkpoint.weights import RandomWeights, Weights, build_model, fill, find_model, load_model, open_weights

__all__ = [
    "DTYPES", "RandomWeights", "Weights", "build_model", "fill", "find_model", "load_config", "load_model",
    "open_weights", "save_model",
]  # fmt: skip
