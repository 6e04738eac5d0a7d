"""LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, read and merged into their base.

A directory that holds these is a model like any other: `checkpoint.load_model` finds its base and adds s B A to the weights,
where s = alpha / rank. training/lora.py trains and writes adapters.
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


# what a configuration may hold; any other key with a value (use_dora, modules_to_save, ...) changes what is computed
READ = {
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "bias",
}
READ |= {"init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
NO_EFFECT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
}
NO_EFFECT |= {"qalora_group_size"}
ONLY = {"peft_type": ["LORA"], "bias": ["none"], "layers_pattern": [None, [], "layers", ["layers"]]}
ONLY["init_lora_weights"] = [True, False, "gaussian", "orthogonal"]  # the others change the base


def is_adapter(directory):
    return (Path(directory) / CONFIG).is_file()


def base_directory(directory, weights=True):
    """The directory of the base model of an adapter's directory; of any other, the directory itself.

    weights: whether a base from the Hub is wanted whole, or only what describes it.
    """
    if not is_adapter(directory):
        return directory
    path = Path(directory) / CONFIG
    spec = read_json(path).get("base_model_name_or_path")
    if not isinstance(spec, str) or not spec:
        raise UsageError(
            f"{path}: base_model_name_or_path {spec!r} names no base model; put its directory or Hub id there"
        )
    beside = Path(directory) / spec
    base = beside if beside.exists() else find_model(spec, weights)
    if not Path(base).exists():
        raise UsageError(
            f"{path}: its base model {spec} is neither a path from there or from here nor on the Hub"
        )
    if is_adapter(base):
        raise UsageError(f"{path}: its base {spec} is an adapter itself; adapters cannot be stacked")
    return base


def tokenizer_directory(directory):
    """Where the tokenizer of a model is: of an adapter without one of its own, with its base."""
    own = any((Path(directory) / name).is_file() for name in (FILE, HF_FILE))
    return directory if own else base_directory(directory, weights=False)


def open_adapter(directory, shapes):
    """{name of a base weight: (A, B, scale)} of an adapter's directory; shapes: {name: shape} of the base's weights.

    UsageError names what is damaged, does not belong to this base, or is of a kind that is not supported.
    """
    directory = Path(directory)
    verify(directory)
    path, config = directory / CONFIG, read_json(directory / CONFIG)
    for key, value in config.items():
        if key in ONLY and value not in ONLY[key]:
            raise UsageError(
                f"{path}: {key} {value!r} is not supported (only {', '.join(map(repr, ONLY[key]))})"
            )
        if value and key not in READ | NO_EFFECT:
            raise UsageError(f"{path}: {key} is not supported; merge the adapter into its base with PEFT")
    if "peft_type" not in config:
        raise UsageError(f"{path}: peft_type is missing")
    if not (directory / TENSORS).is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        why = "; adapter_model.bin is a pickle, which can run code and is not read" if pickled else ""
        raise UsageError(f"{directory / TENSORS}: missing{why}")
    try:
        tensors = load_file(directory / TENSORS)
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{directory / TENSORS}: damaged or truncated ({error}); copy or download it again"
        ) from None
    try:
        return _pair(tensors, config, shapes, directory / TENSORS)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
        raise UsageError(
            f"{path}: a value is missing or of another type than it should have ({error!r})"
        ) from None


def _pair(tensors, config, shapes, path):
    """Matches the tensors with the base's weights and the configuration; every one of both must find its place."""
    pairs, wrong = {}, []
    linear = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    wanted = {module for module in linear if _targeted(module, config)}
    for module in sorted(wanted):
        A, B = (tensors.pop(f"{PREFIX}{module}.lora_{part}.weight", None) for part in "AB")
        rank, alpha = (
            next(
                (value for key, value in (config.get(pattern) or {}).items() if _ends(key, module)),
                config.get(default, 8),
            )
            for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        out, in_ = shapes[f"{module}.weight"]
        if A is None or B is None:
            wrong.append(f"no lora_{'A' if A is None else 'B'} for {module}")
        elif (A.shape, B.shape) != ((rank, in_), (out, rank)):
            wrong.append(
                f"{module} has A {list(A.shape)} and B {list(B.shape)}, not {[rank, in_]} and {[out, rank]}"
            )
        elif not (A.is_floating_point() and B.is_floating_point()):
            wrong.append(f"{module} has {A.dtype}, not floats")
        else:
            scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
            pairs[f"{module}.weight"] = A, B, scale
    wrong += [f"{name} belongs to nothing that is adapted" for name in sorted(tensors)]
    if wrong or not pairs:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(
            f"{path}: does not match {CONFIG} and the base model: {'; '.join(wrong[:3]) or 'empty'}{more}"
        )
    return pairs


def _ends(pattern, module):
    """Whether PEFT's rank_pattern or alpha_pattern means a module: a regular expression for the end of its name."""
    return re.match(rf"(.*\.)?({pattern})$", module)


def _targeted(module, config):
    """Whether the configuration puts an adapter on a linear module of the base."""

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
    """For `checkpoint.fill`: a base's weights with an adapter added, W + s B A, in fp32, one tensor at a time."""

    def __init__(self, weights, directory, model):
        self.weights, self.order = weights, weights.order
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.pairs = open_adapter(directory, shapes)

    def __getitem__(self, name):
        if name not in self.pairs:
            return self.weights[name]
        A, B, scale = self.pairs[name]
        return self.weights[name][:].float() + scale * (B.float() @ A.float())
