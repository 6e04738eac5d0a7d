"""Checkpoints: Hugging Face safetensors directories, read into a model or its shards, and written whole.

    model = load_model("DIR")                    # any directory of a supported family that transformers opens
    save_model(model, "DIR", tokenizer)          # one that transformers opens

Weights come from safetensors alone. The same `fill` loads a model in one piece or the shards of an FSDP one: each rank
reads only its own rows. Directories are written under a temporary name with a manifest of checksums, then renamed; `verify`
checks a directory against its manifest, and no weight is read from one that does not match it.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from cli import UsageError, make_dir, read_json, write_whole
from model import ModelConfig, RopeScaling, Transformer
from tokenizer import save_tokenizer

INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# ---- config.json --------------------------------------------------------------------------------------------------------


def load_config(directory):
    """ModelConfig of a Hugging Face directory, as transformers 4 or 5 wrote it; UsageError for what is not supported."""
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise UsageError(f"{directory}: no such checkpoint directory")
    if not path.is_file():
        raise UsageError(f"{directory}: no config.json here, so this is not a checkpoint directory")
    try:
        return _config_from(read_json(path), path)
    except KeyError as error:
        raise UsageError(f"{path}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: a value of another type than it should have ({error})") from None


# model_type in config.json -> the class that transformers names in `architectures`
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
            raise UsageError(f"{path}: {key} {hf.get(key)!r} is not supported (only {', '.join(map(repr, supported))})")
    rope = hf.get("rope_parameters") or {**(hf.get("rope_scaling") or {}), "rope_theta": hf.get("rope_theta", 10_000.0)}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise UsageError(f"{path}: rope type {rope_type!r} is not supported (only 'default' and 'llama3')")
    scaling = RopeScaling(**{name: rope[name] for name in RopeScaling.__dataclass_fields__}) if rope_type == "llama3" else None
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if type(hf[key]) is not int or hf[key] < 1:
            raise UsageError(f"{path}: {key} {hf[key]!r} is not a number from 1")
    if hf.get("sliding_window") == 0:
        raise UsageError(f"{path}: sliding_window 0 would see nothing; null is no window")
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
    """config.json in the form of transformers 4, which both 4 and 5 read."""
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


# ---- weights ------------------------------------------------------------------------------------------------------------


class Weights:
    """The tensors of a safetensors directory, by name: `weights[name]` is a slice that is read when indexed.

    One file is open at a time, and `order` sorts names by file, so that going through them never holds more than one. Of
    several ranks each verifies its share of the files.
    """

    def __init__(self, directory, rank=0, world=1):
        self.directory = Path(directory)
        verify(directory, rank, world)
        self.files, self.shapes, self.dtypes = {}, {}, {}  # tensor name -> its file, its shape, its type there
        self.open_path = self.open_file = None
        for name in self._shards():
            path = self.directory / name
            if not path.is_file():
                pickled = " (weights in .bin files are pickles and are not read; save them as safetensors)"
                found = pickled if list(self.directory.glob("*.bin")) else ""
                raise UsageError(f"{path}: missing; a checkpoint directory holds its weights in safetensors files{found}")
            file = self._open(path)
            for tensor in file.keys():  # noqa: SIM118 (not a dict)
                if tensor in self.files:
                    raise UsageError(f"{self.directory}: {tensor} stands in both {self.files[tensor].name} and {name}")
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
                raise UsageError(f"{path}: damaged or truncated ({error}); copy or download it again") from None
        return self.open_file

    def __getitem__(self, name):
        return self._open(self.files[name]).get_slice(name)

    def order(self, names):
        return sorted(names, key=self.files.get)

    def check(self, model):
        """UsageError that names what is missing, unexpected or of another shape than the model's."""
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        extra = self.files.keys() - shapes.keys() - {"lm_head.weight"}  # tied models may carry a copy of the embeddings
        wrong = [f"missing {name}" for name in shapes if name not in self.files]
        wrong += [f"unexpected {name}" for name in sorted(extra) if not name.endswith("rotary_emb.inv_freq")]
        for name, shape in shapes.items():
            if name in self.files and self.shapes[name] != shape:
                wrong.append(f"{name} is {self.shapes[name]}, config.json says {shape}")
        wrong += [f"{name} is {dtype}, not floats" for name, dtype in self.dtypes.items() if not re.match(r"B?F\d+$", dtype)]
        tied_copy = "lm_head.weight" in self.files and "lm_head.weight" not in shapes and not wrong
        if tied_copy and not torch.equal(self["lm_head.weight"][:], self["model.embed_tokens.weight"][:]):
            wrong.append("lm_head.weight differs from the embeddings it should be tied to")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UsageError(f"{self.directory}: the weights do not match config.json: {'; '.join(wrong[:3])}{more}")


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
        digest = hashlib.sha256(f"{self.seed}|{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        std = self.config.hidden_size**-0.5
        if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
            std /= (2 * self.config.num_hidden_layers) ** 0.5
        return torch.randn(self.shapes[name], generator=generator) * std

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
            local, everything = parameter.to_local(), torch.arange(parameter.shape[0], device=parameter.device_mesh.device_type)
            mine = distribute_tensor(everything, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
            if not len(mine):
                continue
            rows = slice(int(mine[0]), int(mine[-1]) + 1)
        local.copy_(weights[name][rows])
    return model


def find_model(spec, weights=True):
    """The directory of a checkpoint: a path, or a Hub id such as `Neph0s/CoSER-Llama-3.1-8B`, downloaded if need be.

    Without weights only what describes it is: its config, its tokenizer, a few MB.
    """
    owner = Path(spec).parent  # of a path that is only mistyped, the folder is often there
    if Path(spec).is_dir() or not re.fullmatch(r"[\w-]+/[\w.-]+", str(spec)) or owner.is_dir():
        return Path(spec)
    command = f"hf download {spec} --local-dir DIR"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UsageError(f"{spec}: no such directory; to get it from the Hub, pip install huggingface_hub, {command}") from None
    try:
        wanted = ["*.json", "tokenizer.model", *["model*.safetensors"] * weights]
        return Path(snapshot_download(spec, allow_patterns=wanted))
    except Exception as error:
        why = str(error).split("\n")[0]
        raise UsageError(f"{spec}: no such directory, and the Hub did not give it ({why}); try {command}") from None


def build_model(config, device, dtype):
    """A Transformer with memory but no values yet."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    return model.to_empty(device=device)


def load_model(directory, device="cpu", dtype=torch.float32):
    """The Transformer of a Hugging Face directory, in eval mode. UsageError says what is wrong with a directory."""
    config = load_config(directory)
    weights = Weights(directory)
    weights.check(build_model(config, "meta", dtype))
    return fill(build_model(config, device, dtype), weights).eval()


def save_model(model, directory, tokenizer=None, dtype=None, max_shard_bytes=5 * 10**9):
    """Writes `config.json`, `generation_config.json`, safetensors shards, the tokenizer, a manifest: whole or not at all.

    Works on one process or on every rank of a sharded model (a collective then; rank 0 writes, a tensor at a time is gathered).
    """
    writer = not dist.is_initialized() or dist.get_rank() == 0
    dtype = dtype or next(model.parameters()).dtype
    with whole_directory(directory) if writer else contextlib.nullcontext() as temporary:
        shard, size, shards = {}, 0, []

        def flush():
            shards.append(list(shard))
            file = temporary / f"{len(shards) - 1}.safetensors"
            file.touch()
            mode = file.stat().st_mode  # that of every new file; safetensors would let nobody else read it
            save_file(shard, file, metadata={"format": "pt"})
            file.chmod(mode)

        total = 0
        for name, parameter in model.named_parameters():
            tensor = parameter.detach()
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if not writer:
                continue
            bytes_ = tensor.numel() * dtype.itemsize
            if shard and size + bytes_ > max_shard_bytes:
                flush()
                shard, size = {}, 0
            shard[name] = tensor.to("cpu", dtype).contiguous()
            size, total = size + bytes_, total + bytes_
        if not writer:
            return
        flush()
        if len(shards) == 1:
            os.rename(temporary / "0.safetensors", temporary / "model.safetensors")
        else:
            weight_map = {}
            for i, part in enumerate(shards):
                file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
                os.rename(temporary / f"{i}.safetensors", temporary / file)
                weight_map |= dict.fromkeys(part, file)
            _write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(temporary / "config.json", _config_to(model.config, dtype, tokenizer))
        if tokenizer:
            stops = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.stop_ids}
            _write_json(temporary / "generation_config.json", stops)
            save_tokenizer(tokenizer, temporary)


# ---- directories, whole or not at all -----------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_directory(directory):
    """Yields a temporary neighbour; on success it gets a manifest and takes the place of `directory`, else it is removed."""
    directory = Path(directory)
    temporary = directory.with_name(f".{directory.name}.tmp")
    make_dir(directory.parent)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        manifest = {str(file.relative_to(temporary)): checksum(file) for file in files}
        _write_json(temporary / MANIFEST, manifest)
        sync_directory(temporary)
        old = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            os.rename(directory, old)
        try:
            os.rename(temporary, directory)
        except OSError:
            if old.exists():
                os.rename(old, directory)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def verify(directory, rank=0, world=1):
    """UsageError if a directory with a manifest lacks one of its files or one was altered. Without a manifest, nothing.

    Of several ranks each reads its share of the files.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        return
    for name, expected in sorted(read_json(directory / MANIFEST).items())[rank::world]:
        file = directory / name
        if not file.is_file() or checksum(file) != expected:
            raise UsageError(f"{file}: altered or truncated since it was saved; use another checkpoint")


def checksum(file):
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_directory(directory):
    """Puts the names in a directory on the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path, value):
    with write_whole(path) as file:
        json.dump(value, file, indent=1)
