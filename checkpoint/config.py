"""Reads and writes `config.json` of a Hugging Face directory."""

from pathlib import Path

import torch

from common.files import UsageError, read_json
from model import ModelConfig, RopeScaling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(directory):
    """The ModelConfig of a checkpoint: a directory that transformers 4 or 5 wrote, a GGUF, or an adapter's
    directory, which has the config of its base. UsageError for what is not supported.
    """
    from checkpoint.adapters import base_directory
    from checkpoint.gguf import config_dict
    from common.gguf import find_gguf

    directory = base_directory(directory, weights=False)
    gguf, path = find_gguf(directory), Path(directory) / "config.json"
    if not gguf and not Path(directory).is_dir():
        raise UsageError(f"{directory}: no such checkpoint directory")
    if not gguf and not path.is_file():
        raise UsageError(f"{directory}: no config.json here, so this is not a checkpoint directory")
    try:
        return _config_from(config_dict(gguf), gguf) if gguf else _config_from(read_json(path), path)
    except KeyError as error:
        raise UsageError(f"{gguf or path}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{gguf or path}: a value of the wrong type ({error})") from None


# model_type in config.json -> transformers' class, the one in `architectures`
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def _config_from(hf, path):
    family = hf.get("model_type")
    for key, supported in {
        "model_type": tuple(FAMILIES),
        "architectures": ([FAMILIES.get(family)], None),
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),  # Qwen 2 could have a window in some layers only
        "quantization_config": (None,),
    }.items():
        if hf.get(key) not in supported:
            raise UsageError(
                f"{path}: {key} {hf.get(key)!r} is not supported (only {', '.join(map(repr, supported))})"
            )
    rope = hf.get("rope_parameters") or {
        **(hf.get("rope_scaling") or {}),
        "rope_theta": hf.get("rope_theta", 10_000.0),
    }
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UsageError(f"{path}: rope type {rope_type!r} is not supported (only 'default' and 'llama3')")
    scaling = (
        RopeScaling(**{name: rope[name] for name in RopeScaling.__dataclass_fields__})
        if rope_type == "llama3"
        else None
    )
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if type(hf[key]) is not int or hf[key] < 1:
            raise UsageError(f"{path}: {key} {hf[key]!r} is not a whole number above 0")
    if hf.get("sliding_window") == 0:
        raise UsageError(f"{path}: with sliding_window 0 no token sees another; for no window write null")
    heads = hf["num_attention_heads"]
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_hidden_layers=hf["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rms_norm_eps=hf["rms_norm_eps"],
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=scaling,
        max_position_embeddings=hf["max_position_embeddings"],
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        model_type=family,
        qkv_bias=family == "qwen2",
        sliding_window=hf.get("sliding_window") if family in ("mistral", "mixtral") else None,
        num_local_experts=hf["num_local_experts"] if family == "mixtral" else 0,
        num_experts_per_tok=hf.get("num_experts_per_tok", 2) if family == "mixtral" else 2,
    )


def _config_to(config, dtype, tokenizer):
    """The config.json of transformers 4, which 4 and 5 read."""
    fields = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__ if name != "qkv_bias"}
    scaling = fields.pop("rope_scaling")
    if config.model_type == "llama":
        fields |= {"attention_bias": False, "mlp_bias": False}
    if config.model_type == "qwen2":
        fields |= {"use_sliding_window": False}
    if config.model_type != "mixtral":
        del fields["num_local_experts"], fields["num_experts_per_tok"]
    return {
        "architectures": [FAMILIES[config.model_type]],
        "hidden_act": "silu",
        **fields,
        "rope_scaling": scaling and {"rope_type": "llama3", **vars(scaling)},
        "torch_dtype": str(dtype).removeprefix("torch."),
        **({"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.stop_ids} if tokenizer else {}),
    }
