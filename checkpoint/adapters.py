"""Reads LoRA adapters in PEFT's layout (`adapter_config.json`, `adapter_model.safetensors`) and merges them.

Such a directory is a model like any other: `checkpoint.load_model` finds its base and adds s B A to the
weights, where s = alpha / rank. training/lora.py trains and writes adapters.
"""

import math
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoint.weights import find_model
from common.files import UsageError, read_json, verify
from text.config import FILE, HF_FILE

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before the module's own name

# Keys of a configuration that are read or change nothing. A value under any other key is refused, since it
# changes what is computed (use_dora, modules_to_save, ...).
ALLOWED = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern"}
ALLOWED |= {
    "use_rslora",
    "bias",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
}
ALLOWED |= {"layers_pattern", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode"}
ALLOWED |= {"lora_dropout", "megatron_core", "qalora_group_size"}
ONLY = {  # the values that some of them may have
    "peft_type": ["LORA"],
    "bias": ["none"],
    "layers_pattern": [None, [], "layers", ["layers"]],
    "init_lora_weights": [True, False, "gaussian", "orthogonal"],  # the others change the base
}


def is_adapter(directory):
    return (Path(directory) / CONFIG).is_file()


def base_directory(directory, weights=True):
    """The directory of an adapter's base model; a directory without an adapter is returned as it is.

    weights: whether a base from the Hub is downloaded with its weights, or only its config and tokenizer.
    """
    if not is_adapter(directory):
        return directory
    path = Path(directory) / CONFIG
    spec = read_json(path).get("base_model_name_or_path")
    if not isinstance(spec, str) or not spec:
        what = f"base_model_name_or_path {spec!r} names no base model"
        raise UsageError(f"{path}: {what}; put its directory or Hub id there")
    beside = Path(directory) / spec
    base = beside if beside.exists() else find_model(spec, weights)
    if not Path(base).exists():
        where = "neither a path relative to the adapter or to the working directory, nor on the Hub"
        raise UsageError(f"{path}: its base model {spec} is {where}")
    if is_adapter(base):
        raise UsageError(f"{path}: its base {spec} is itself an adapter; adapters cannot be stacked")
    return base


def tokenizer_directory(directory):
    """The directory of a model's tokenizer: an adapter without one has its base's."""
    own = any((Path(directory) / name).is_file() for name in (FILE, HF_FILE))
    return directory if own else base_directory(directory, weights=False)


def open_adapter(directory, shapes):
    """{name of a base weight: (A, B, scale)} of an adapter's directory.

    shapes: {name: shape} of the base's weights. UsageError if something is damaged, does not fit this base,
    or is not supported.
    """
    directory = Path(directory)
    verify(directory)
    path, config = directory / CONFIG, read_json(directory / CONFIG)
    for key, value in config.items():
        if key in ONLY and value not in ONLY[key]:
            values = ", ".join(map(repr, ONLY[key]))
            raise UsageError(f"{path}: {key} {value!r} is not supported (only {values})")
        if value and key not in ALLOWED:
            raise UsageError(f"{path}: {key} is not supported; merge the adapter into its base with PEFT")
    if "peft_type" not in config:
        raise UsageError(f"{path}: peft_type is missing")
    file = directory / TENSORS
    if not file.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        why = "; adapter_model.bin is a pickle, which can run code and is not read" if pickled else ""
        raise UsageError(f"{file}: missing{why}")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file}: damaged or truncated ({error}); copy or download it again") from None
    try:
        return _pair(tensors, config, shapes, file)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
        raise UsageError(f"{path}: a value is missing or of the wrong type ({error!r})") from None


def _pair(tensors, config, shapes, path):
    """Matches tensors, configuration and base weights; UsageError if a part of any has no counterpart."""
    pairs, wrong = {}, []
    linear = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    for module in sorted(module for module in linear if _targeted(module, config)):
        A, B = (tensors.pop(f"{PREFIX}{module}.lora_{part}.weight", None) for part in "AB")
        rank = _pattern_value(config, "rank_pattern", module, config.get("r", 8))
        alpha = _pattern_value(config, "alpha_pattern", module, config.get("lora_alpha", 8))
        out, in_ = shapes[f"{module}.weight"]
        if A is None or B is None:
            wrong.append(f"no lora_{'A' if A is None else 'B'} for {module}")
        elif (A.shape, B.shape) != ((rank, in_), (out, rank)):
            found = f"A {list(A.shape)} and B {list(B.shape)}"
            wrong.append(f"{module} has {found}, not {[rank, in_]} and {[out, rank]}")
        elif not (A.is_floating_point() and B.is_floating_point()):
            wrong.append(f"{module} has {A.dtype}, not floats")
        else:
            scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
            pairs[f"{module}.weight"] = A, B, scale
    wrong += [f"{name} belongs to no adapted layer" for name in sorted(tensors)]
    if wrong or not pairs:
        what = "; ".join(wrong[:3]) or "empty"
        what += f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(f"{path}: does not match {CONFIG} and the base model: {what}")
    return pairs


def _pattern_value(config, key, module, default):
    """A layer's value in PEFT's rank_pattern or alpha_pattern, {expression for the end of a name: value}."""
    patterns = (config.get(key) or {}).items()
    matching = (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matching, default)


def _targeted(module, config):
    """Whether the configuration gives a linear layer of the base an adapter."""

    def named(modules):
        if isinstance(modules, str):
            return re.fullmatch(modules, module)
        return any(f".{module}".endswith(f".{name}") for name in modules or ())

    targets, layers = config["target_modules"], config.get("layers_to_transform")
    if named(config.get("exclude_modules")):
        return False
    if targets == "all-linear":
        return ".layers." in module and not module.endswith(".gate")
    if layers not in (None, []) and not isinstance(targets, str) and module not in targets:
        layer = re.search(r"\.layers\.(\d+)\.", module)
        if not layer or int(layer[1]) not in (layers if isinstance(layers, list) else [layers]):
            return False
    return named(targets)


class MergedWeights:
    """For `checkpoint.fill`: the base's weights with an adapter merged into them: W + s B A, in fp32."""

    def __init__(self, weights, directory, model):
        self.weights, self.order = weights, weights.order
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.pairs = open_adapter(directory, shapes)

    def __getitem__(self, name):
        if name not in self.pairs:
            return self.weights[name]
        A, B, scale = self.pairs[name]
        return self.weights[name][:].float() + scale * (B.float() @ A.float())
