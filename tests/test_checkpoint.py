"""Checkpoints: what is saved comes back and opens in transformers; what is damaged or foreign is refused in
one line."""

import dataclasses
import json
import os
import re
import shutil
import types

import pytest
import torch
from conftest import random_config, random_model, usage_error
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging

import checkpoint
from checkpoint import weights
from common import files
from common.files import UsageError
from model import RopeScaling

logging.disable_progress_bar()
WEIGHTS = "model.safetensors"


def assert_same(model, expected):
    """The same configuration and, bit for bit, the same tensors."""
    assert model.config == expected.config and not model.training
    tensors, expected = model.state_dict(), expected.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def edit_json(path, **changes):
    """Puts changes into a JSON object on disk; None takes the key out."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


@pytest.fixture
def actor(tiny_actor, tmp_path):
    """A copy of the tiny actor to be damaged, without the manifest, as one that was downloaded."""
    directory = shutil.copytree(tiny_actor, tmp_path / "actor")
    (directory / files.MANIFEST).unlink()
    return directory


@pytest.fixture
def refusal(script, actor):
    """Opens the damaged actor from the command line; returns the one line that refuses it."""
    return lambda: usage_error(script("generate", "--model", actor, "--prompt", "x", "--max-tokens", 1))


# ---- there and back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [1, 3000, 10**9])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_saved_comes_back(seed, max_shard_bytes, tmp_path):
    """Configuration and every bit of every tensor, in one file or in shards that keep to their size; nothing
    else is left."""
    model = random_model(random_config(seed), seed)
    checkpoint.save_model(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    assert_same(checkpoint.load_model(tmp_path / "model"), model)
    assert os.listdir(tmp_path) == ["model"]
    assert (
        len({file.stat().st_mode for file in (tmp_path / "model").iterdir()}) == 1
    )  # whoever may read one may read all
    shards = [load_file(file) for file in (tmp_path / "model").glob("*.safetensors")]
    assert sum(map(len, shards)) == len(dict(model.named_parameters()))
    assert all(
        len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= max_shard_bytes for shard in shards
    )
    assert (len(shards) > 1) == (max_shard_bytes < 10**9) == (tmp_path / "model" / weights.INDEX).exists()


@pytest.mark.parametrize("max_shard_bytes", [3000, 10**9])
@pytest.mark.parametrize("seed", range(3))
def test_transformers_opens_what_is_saved(seed, max_shard_bytes, tmp_path):
    """All of it, as the same configuration, with the same tensors, in the dtype it was saved in."""
    model = random_model(random_config(seed), seed).to(torch.bfloat16)
    checkpoint.save_model(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert isinstance(theirs, LlamaForCausalLM) and theirs.dtype == torch.bfloat16
    assert not any(info.values()), info
    for name, parameter in model.named_parameters():
        assert torch.equal(theirs.get_parameter(name), parameter), name
    for name in {f.name for f in dataclasses.fields(model.config)} & set(theirs.config.to_dict()) - {
        "rope_scaling"
    }:
        assert getattr(theirs.config, name) == getattr(model.config, name), name


@pytest.mark.parametrize("seed", range(6))
def test_what_transformers_saves_is_read(seed, tmp_path):
    """A directory of transformers 5 (`rope_parameters`, `dtype`) gives the same model back."""
    model = random_model(random_config(seed), seed)
    checkpoint.save_model(model, tmp_path / "ours")
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(
        tmp_path / "theirs", max_shard_size="20KB"
    )
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "rope_parameters" in written and "rope_theta" not in written
    assert_same(checkpoint.load_model(tmp_path / "theirs"), model)


def test_the_form_of_transformers_4(tmp_path):
    """The published LLaMA 3.1 8B configuration, as transformers 4 wrote it, is read whole; ours is written in
    that form."""
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = checkpoint.load_config(tmp_path)
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192) and config.rope_theta == 5e5
    assert (config.head_dim, config.num_attention_heads, config.num_key_value_heads) == (128, 32, 8)
    small = dataclasses.replace(
        config, hidden_size=32, head_dim=1, vocab_size=3, intermediate_size=2, num_hidden_layers=1
    )
    checkpoint.save_model(random_model(small), tmp_path / "model", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    for key in ("rope_scaling", "rope_theta", "torch_dtype", "model_type", "architectures", "rms_norm_eps"):
        assert written[key] == published[key], key


def test_what_an_old_configuration_leaves_out(tmp_path):
    """Without key/value heads, head size, theta or scaling, the values are those transformers takes."""
    config = random_config(0)
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "rms_norm_eps",
        "max_position_embeddings",
    )
    old = {key: getattr(config, key) for key in keys} | {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 48,
    }
    (tmp_path / "config.json").write_text(json.dumps({**old, "num_attention_heads": 6}))
    read, expected = checkpoint.load_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert read.num_key_value_heads == expected.num_key_value_heads == 6
    assert read.head_dim == expected.head_dim == 8
    assert read.rope_theta == expected.rope_parameters["rope_theta"] == 10_000
    assert read.rope_scaling is None and read.tie_word_embeddings is expected.tie_word_embeddings is False


def test_the_tokenizer_goes_with_the_model(tiny_actor, stage_tokenizer):
    """Its file is kept as it is, and transformers learns where texts begin and end."""
    assert (tiny_actor / "tokenizer.model").read_bytes() == stage_tokenizer.file.read_bytes()
    theirs = AutoModelForCausalLM.from_pretrained(tiny_actor)
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (
            stage_tokenizer.bos_id,
            stage_tokenizer.stop_ids,
        )


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_dtypes_are_converted(stored, tmp_path):
    """Half precision on disk is read into any dtype, and nothing more is lost than the rounding to it."""
    model = random_model(random_config(0))
    checkpoint.save_model(model, tmp_path / "half", dtype=stored)
    assert all(tensor.dtype == stored for tensor in load_file(tmp_path / "half" / WEIGHTS).values())
    assert next(model.parameters()).dtype == torch.float32
    assert_same(checkpoint.load_model(tmp_path / "half"), model.to(stored).float())


def test_tensors_that_may_be_there_and_are_not_needed(tmp_path):
    """A tied model's copy of its embeddings and the rotary tables of old checkpoints do no harm."""
    model = random_model(random_config(0, tie_word_embeddings=True))
    checkpoint.save_model(model, tmp_path / "model")
    (tmp_path / "model" / files.MANIFEST).unlink()
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model" / WEIGHTS)
    assert_same(checkpoint.load_model(tmp_path / "model"), model)


def test_links_are_followed(actor, tiny_actor, tmp_path):
    """A directory of links to files with other names, as in the Hugging Face cache, loads like any other."""
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(actor.iterdir()):
        (tmp_path / str(number)).write_bytes(file.read_bytes())
        (tmp_path / "snapshot" / file.name).symlink_to(f"../{number}")
    assert_same(checkpoint.load_model(tmp_path / "snapshot"), checkpoint.load_model(tiny_actor))


# ---- directories, whole or not at all ----------------------------------------------------------------------


def test_a_save_takes_the_place_of_the_one_before(tmp_path):
    """No shard of the old model stays behind in the new one's directory."""
    for seed, max_shard_bytes in ((0, 1), (1, 10**9)):
        model = random_model(random_config(seed), seed)
        checkpoint.save_model(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
        assert_same(checkpoint.load_model(tmp_path / "model"), model)
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        WEIGHTS,
        "config.json",
        files.MANIFEST,
    }
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_save_leaves_the_old_directory(tmp_path):
    """A save that fails at its last file leaves the old model as it was, and no rest of the new one."""
    old = random_model(random_config(0))
    checkpoint.save_model(old, tmp_path / "model")
    tokenizer = types.SimpleNamespace(
        bos_id=1, stop_ids=[2], file=tmp_path / "gone", content=(tmp_path / "gone").read_bytes
    )
    with pytest.raises(FileNotFoundError):
        checkpoint.save_model(random_model(random_config(1)), tmp_path / "model", tokenizer)
    assert os.listdir(tmp_path) == ["model"]
    assert_same(checkpoint.load_model(tmp_path / "model"), old)


def test_a_save_that_cannot_take_its_name_leaves_the_old_directory(tmp_path, monkeypatch):
    """Even the very last step, the renaming, fails without loss."""
    old, rename = random_model(random_config(0)), os.rename
    checkpoint.save_model(old, tmp_path / "model")

    def failing(source, target):
        if target == tmp_path / "model" and source.name.endswith(".tmp"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        checkpoint.save_model(random_model(random_config(1)), tmp_path / "model")
    assert_same(checkpoint.load_model(tmp_path / "model"), old)


# ---- what is refused ---------------------------------------------------------------------------------------


def test_directories_that_are_no_checkpoint(script, tmp_path):
    """A path that is not there, a file, and a directory without a config.json are told from each other."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, word in {"absent": "no such", "file": "no such", "empty": "no config.json"}.items():
        line = usage_error(script("generate", "--model", tmp_path / name, "--prompt", "x"))
        assert word in line and name in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt_neox"}, ["model_type", "gpt_neox"]),
        ({"model_type": "mixtral"}, ["architectures", "LlamaForCausalLM"]),
        ({"model_type": None}, ["model_type"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            ["quantization", "bitsandbytes"],
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope", "yarn"]),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ["rope", "linear"]),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            ["rope", "dynamic"],
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "missing"]),
        ({"num_attention_heads": None}, ["num_attention_heads", "missing"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_configurations_that_are_refused(changes, words, actor, refusal):
    """What we cannot compute is refused by its name and value, never loaded into a model that answers
    wrongly."""
    edit_json(actor / "config.json", **changes)
    line = refusal()
    assert all(word in line for word in ["config.json", *words]), line


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_config_json_that_is_none(text, actor, refusal):
    """A configuration that is empty, cut off, no object or no text."""
    (actor / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal()


@pytest.mark.parametrize("fault", ["missing", "unexpected", "another shape", "another model"])
def test_tensors_that_do_not_fit_are_named(fault, actor, refusal):
    """Missing and unexpected tensors by name, those of another shape with both shapes, of many the first
    few."""
    tensors = load_file(actor / WEIGHTS)
    if fault == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
        words = ["missing model.layers.1.mlp.up_proj.weight"]
    elif fault == "unexpected":
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
        words = ["unexpected model.layers.0.self_attn.q_proj.bias"]
    elif fault == "another shape":
        tensors["model.norm.weight"] = torch.zeros(31)
        words = ["model.norm.weight", "[31]", "[32]"]
    else:
        tensors = random_model(random_config(7)).state_dict()
        words = [" more"]
    save_file(tensors, actor / WEIGHTS)
    line = refusal()
    assert all(word in line for word in words) and len(line) < 1000, line


@pytest.mark.parametrize(("dtype", "name"), [(torch.int32, "I32"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_tensors_of_another_type_are_named(dtype, name, actor, refusal):
    tensors = load_file(actor / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, actor / WEIGHTS)
    assert f"model.norm.weight is {name}, not F16, BF16, F32, F64" in refusal()


@pytest.mark.parametrize("part", [0, 1e-5, 1e-3, 0.5, 0.99999])
def test_truncated_weights(part, actor, refusal):
    """A weights file cut anywhere is found out and named."""
    whole = (actor / WEIGHTS).read_bytes()
    (actor / WEIGHTS).write_bytes(whole[: int(part * len(whole))])
    assert WEIGHTS in refusal()


def test_weights_that_are_not_there(actor, refusal):
    """Other formats of weights, pickles above all, are not even looked at."""
    (actor / WEIGHTS).rename(actor / "pytorch_model.bin")
    assert f"{WEIGHTS}: missing" in refusal()


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.model", "generation_config.json"])
@pytest.mark.parametrize("how", ["altered", "truncated", "gone"])
def test_files_that_changed_since_they_were_saved(name, how, tiny_actor, tmp_path):
    """With a manifest, a single altered bit of any file is found, and the file named."""
    directory = shutil.copytree(tiny_actor, tmp_path / "actor")
    whole = (directory / name).read_bytes()
    changed = {"altered": whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:], "truncated": whole[:-1]}
    (directory / name).write_bytes(changed[how]) if how in changed else (directory / name).unlink()
    with pytest.raises(UsageError, match=re.escape(f"{directory / name}: altered or truncated")):
        files.verify(directory)
    with pytest.raises(UsageError, match=re.escape(name)):
        checkpoint.load_model(directory)


@pytest.mark.parametrize(
    ("name", "text"),
    [(weights.INDEX, "{"), (weights.INDEX, "[]"), (weights.INDEX, "{}"), (files.MANIFEST, "{")],
)
def test_an_index_or_manifest_that_is_none(name, text, actor, refusal):
    """An index or a manifest that is cut off, no object, or says nothing."""
    (actor / name).write_text(text)
    assert name in refusal()


@pytest.mark.parametrize("where", ["../outside.safetensors", "absolute", "sub/../../outside.safetensors"])
def test_an_index_that_leaves_the_directory(where, actor, refusal, tmp_path):
    """Weights are read from the checkpoint's own directory, though a file elsewhere would do."""
    (actor / "sub").mkdir()
    names = list(load_file(actor / WEIGHTS))
    outside = (actor / WEIGHTS).rename(tmp_path / "outside.safetensors")
    where = str(outside) if where == "absolute" else where
    (actor / weights.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, where)}))
    line = refusal()
    assert where in line and "leaves the directory" in line


def test_an_index_whose_shard_is_not_there(actor, refusal):
    """A download that lacks one of its shards says which."""
    names = sorted(load_file(actor / WEIGHTS))
    weight_map = dict.fromkeys(names, WEIGHTS) | {names[0]: "model-00002-of-00002.safetensors"}
    (actor / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "model-00002-of-00002.safetensors: missing" in refusal()


@pytest.fixture
def shards(actor):
    """A checkpoint in two shards without an index: the directory."""
    tensors = load_file(actor / WEIGHTS)
    (actor / WEIGHTS).unlink()
    for n in (0, 1):
        part = {name: tensors[name] for name in sorted(tensors)[n::2]}
        save_file(part, actor / f"model-0000{n + 1}-of-00002.safetensors")
    return actor


def test_shards_without_an_index_are_read(shards, tiny_actor):
    """A complete set is the model; one that lacks a shard, and two sets, are refused."""
    loaded, expected = (checkpoint.load_model(directory) for directory in (shards, tiny_actor))
    assert all(torch.equal(p, expected.get_parameter(name)) for name, p in loaded.named_parameters())
    shutil.copy(shards / "model-00001-of-00002.safetensors", shards / "model-00001-of-00001.safetensors")
    with pytest.raises(UsageError, match="2 sets of shards"):
        checkpoint.load_model(shards)
    (shards / "model-00001-of-00001.safetensors").unlink()
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match="1 shards are here, which are no complete set"):
        checkpoint.load_model(shards)


def test_an_index_of_other_shards_than_those_there(shards):
    """As in CoSER's own upload: what to do is said, and doing it helps."""
    names = [name for file in shards.glob("model-*") for name in load_file(file)]
    weight_map = dict.fromkeys(names, "model-00001-of-00004.safetensors")
    (shards / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        UsageError, match=r"00004\.safetensors: missing.*complete: delete model\.safetensors\.index\.json"
    ):
        checkpoint.load_model(shards)
    (shards / weights.INDEX).unlink()
    checkpoint.load_model(shards)


def test_a_tokenizer_larger_than_the_model(actor, refusal):
    """A model that lacks some of its tokenizer's tokens is refused with both sizes."""
    edit_json(actor / "config.json", vocab_size=100)
    tensors = load_file(actor / WEIGHTS)
    save_file(
        {name: t[:100].clone() if "embed" in name or "lm_head" in name else t for name, t in tensors.items()},
        actor / WEIGHTS,
    )
    assert "100" in refusal()


# ---- weights to begin with ---------------------------------------------------------------------------------


def test_random_weights_depend_on_seed_and_name():
    """The same seed gives the same weights, another seed or name others; norms are ones, and the spread is as
    stated."""
    config = random_config(0, hidden_size=64, num_hidden_layers=3)
    models = [checkpoint.build_model(config, "cpu", torch.float32) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        checkpoint.fill(model, checkpoint.RandomWeights(model, seed))
    first, again, other = (dict(model.named_parameters()) for model in models)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        if parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            assert not torch.equal(parameter, other[name])
            depth = (
                2 * config.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            )
            expected = (config.hidden_size * depth) ** -0.5
            assert abs(parameter.std().item() / expected - 1) < 5 / parameter.numel() ** 0.5
    layers = [first[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)]
    assert not torch.equal(layers[0], layers[1]) and not torch.equal(layers[1], layers[2])
