"""lora.py: the layer and its files against PEFT, runs of train.py --lora on one and two ranks, and what is
refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, random_config, random_model, usage_error
from safetensors.torch import load_file, save_file
from test_train import finish, launch, read_log, same_run, small, story  # noqa: F401 (fixtures)

import checkpoint
from checkpoint import RandomWeights, Weights, adapters, fill, load_model, save_model
from common.files import UsageError
from llm.local import fingerprint
from model import PRESETS, ModelConfig
from training import costs
from training.lora import FreshAdapters, add_adapters, save_adapter

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(24).view(2, 12) * 7 % 50


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama with two layers, as a directory."""
    directory = tmp_path_factory.mktemp("base") / "tiny"
    save_model(random_model(random_config(7, num_hidden_layers=2, tie_word_embeddings=True)), directory)
    return directory


def adapted(directory, rank=3, alpha=5, seed=0):
    """Our model of a directory with adapters that do something: B is random as well."""
    model = load_model(directory)
    weights = FreshAdapters(RandomWeights(model, 0), add_adapters(model, rank, alpha), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(weights[name])
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    return model


def by_peft(directory, **options):
    """The base in transformers with a PEFT adapter whose A and B are random."""
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 3, "target_modules": ALL, "task_type": "CAUSAL_LM", **options})
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.15)  # larger ones make a model so steep that rounding shows
    return model.eval()


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "mixtral"])
def test_peft_opens_ours(family, tmp_path):
    """What save_adapter writes gives in PEFT the logits that load_model gives, and those of the model
    trained.

    Sizes are multiples of 16 bytes, which transformers' products of experts need.
    """
    peft = pytest.importorskip("peft")
    sizes = dict(
        hidden_size=32, head_dim=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
    )
    base = tmp_path / "base"
    save_model(random_model(random_config(5, family, num_hidden_layers=2, **sizes)), base)
    model = adapted(base, 4)
    save_adapter(model, tmp_path / "adapter", base, 4, 5)
    peer = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = peer(TOKENS).logits.detach()
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    ours = load_model(tmp_path / "adapter")
    with torch.no_grad():
        theirs = peer(TOKENS).logits
        assert_close(ours(TOKENS), theirs)
        for name, parameter in model.named_parameters():  # the file holds bf16
            if ".lora_" in name:
                parameter.copy_(parameter.bfloat16())
        assert_close(model(TOKENS), theirs)
        assert (plain - theirs).abs().max() > 0.1
    assert not any(".lora_" in name for name, _ in ours.named_parameters())


PATTERNS = dict(
    rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 5},
    alpha_pattern={"up_proj": 7, "1.self_attn.v_proj": 1},
)
VARIANTS = {
    "all": {},
    "default": dict(target_modules=["q_proj", "v_proj"], r=8),
    "regex": dict(target_modules=r".*\.(q_proj|down_proj)"),
    "all-linear": dict(target_modules="all-linear", exclude_modules=["k_proj"]),
    "rslora": dict(use_rslora=True, lora_alpha=3),
    "patterns": PATTERNS,
    "patterns-rslora": dict(use_rslora=True, **PATTERNS),
    "one-layer": dict(layers_to_transform=[1]),
    "full-name": dict(target_modules=["model.layers.0.mlp.up_proj", "o_proj"]),
    "gaussian": dict(init_lora_weights="gaussian"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_we_open_what_peft_writes(variant, base, tmp_path):
    """load_model of a PEFT directory gives PEFT's logits, whatever its rank, scale and modules are."""
    model = by_peft(base, **VARIANTS[variant])
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        theirs = model(TOKENS).logits
        assert_close(load_model(tmp_path / "adapter")(TOKENS), theirs)
        assert (load_model(base)(TOKENS) - theirs).abs().max() > 0.1
    assert isinstance(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"], int)


def test_gradients_are_those_of_peft(base, tmp_path):
    """Of every A and B, from the same loss; no parameter of the base has one."""
    peft = pytest.importorskip("peft")
    model = adapted(base)
    save_adapter(model, tmp_path / "adapter", base, 3, 5)
    peer = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter", is_trainable=True).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(parameter.bfloat16())
    targets = TOKENS.roll(-1).flatten()
    model.train()(TOKENS, rows=torch.arange(len(targets)), targets=targets)[0].backward()
    torch.nn.functional.cross_entropy(peer(TOKENS).logits.flatten(0, 1), targets, reduction="sum").backward()
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in peer.named_parameters()
    }
    compared = 0
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert (parameter.grad - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name
            compared += 1
        else:
            assert parameter.grad is None
    assert compared == 2 * 7 * 2


def test_first_values_depend_on_seed_and_name_alone(base):
    """A fresh adapter changes nothing; A has PEFT's bound, and is drawn from the seed and its name."""
    model, plain = load_model(base), load_model(base)
    weights = FreshAdapters(Weights(base), add_adapters(model, 4, 8), 1)
    fill(model, weights)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    name = "model.layers.1.mlp.down_proj.lora_A.weight"
    A = weights[name]
    assert 0.8 * A.shape[1] ** -0.5 < A.abs().max() <= A.shape[1] ** -0.5
    assert not torch.equal(A, weights[name.replace("1", "0")])
    assert not torch.equal(A, FreshAdapters(Weights(base), model, 2)[name])
    assert torch.equal(A, FreshAdapters(None, model, 1)[name])


def test_merging_is_in_fp32(base, tmp_path):
    """A bf16 model gets the rounded sum, not the sum of rounded parts."""
    save_adapter(adapted(base), tmp_path / "adapter", base, 3, 5)
    exact, rounded = load_model(tmp_path / "adapter"), load_model(tmp_path / "adapter", dtype=torch.bfloat16)
    for mine, theirs in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(mine.bfloat16(), theirs)
    layer = "model.layers.0.self_attn.q_proj"
    tensors = load_file(tmp_path / "adapter" / adapters.TENSORS)
    A, B = (tensors[f"base_model.model.{layer}.lora_{part}.weight"].float() for part in "AB")
    torch.testing.assert_close(
        exact.get_parameter(f"{layer}.weight"), Weights(base)[f"{layer}.weight"][:] + 5 / 3 * B @ A
    )


# ---- runs -------------------------------------------------------------------------------------


@pytest.fixture
def run(small):  # noqa: F811
    """Arguments of a LoRA run of a few seconds."""
    return [*small, "--lora", 4, "--batch-size", 2, "--seq-len", 512]


def last_state(out):
    return max(out.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def test_a_run_learns_resumes_and_leaves_a_peft_directory(run, tmp_path):
    """The loss falls; the base's files stay; a resumed run ends in the same bytes; states hold the adapter
    alone; PEFT opens final/, whose logits are load_model's; another base is refused."""
    peft = pytest.importorskip("peft")
    whole, cut, model = tmp_path / "whole", tmp_path / "cut", Path(run[1])
    before = fingerprint(model)
    finish(launch(*run, "--max-steps", 8, "--save-every", 4, "--out", whole))
    lines = read_log(whole)
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] and lines[-1]["loss"] < lines[0]["loss"]
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "step-8")
    shutil.rmtree(cut / "final")
    arguments = [*run, "--max-steps", 8, "--save-every", 4, "--out", cut, "--resume"]
    assert "step-4" in finish(launch(*arguments))
    same_run(whole, cut)
    states = [
        {file.name: file.read_bytes() for file in last_state(out).glob("*.distcp")} for out in (whole, cut)
    ]
    assert states[0] and states[0] == states[1]
    config = checkpoint.load_config(model)
    trained = costs.adapter_parameters(config, 4)
    assert 12 * trained <= sum(map(len, states[0].values())) < 12 * trained + 4 * config.num_parameters()
    ours, theirs = (load_file(out / "final" / adapters.TENSORS) for out in (whole, cut))
    assert sum(tensor.numel() for tensor in ours.values()) == trained
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert fingerprint(model) == before
    peer = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peer = peft.PeftModel.from_pretrained(peer, whole / "final").eval()
    with torch.no_grad():
        assert_close(load_model(whole / "final")(TOKENS), peer(TOKENS).logits)

    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "manifest.json").unlink()
    process = launch(*arguments)
    assert "base was" in finish(process, code=2)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_two_ranks_are_as_one(dtype, run, tmp_path):
    """Losses, gradient norms and adapters do not depend on the number of ranks, nor on what is recomputed."""
    runs, run = {}, [*run, "--dtype", dtype]
    for name, ranks, more in (("one", 1, []), ("two", 2, ["--recompute", "full"])):
        out = tmp_path / name
        finish(launch(*run, *more, "--max-steps", 3, "--out", out, ranks=ranks))
        runs[name] = read_log(out), load_file(out / "final" / adapters.TENSORS)
    rel = 1e-4 if dtype == "float32" else 0.05
    for line, other in zip(runs["one"][0], runs["two"][0], strict=True):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=rel), (key, line, other)
    for name, tensor in runs["one"][1].items():
        assert (tensor.float() - runs["two"][1][name].float()).norm() <= max(
            rel, 0.02
        ) * tensor.float().norm(), name


@pytest.mark.parametrize(("model", "ranks", "seq_len", "card"), [("8b", 1, 8192, 24), ("70b", 8, 16_384, 80)])
def test_the_plan_says_which_card(model, ranks, seq_len, card, script, story):  # noqa: F811
    """8B fits one card of 24 GB and 70B a node of eight cards of 80 GB; trained whole, neither fits what LoRA
    fits."""
    preset = f"llama-3.1-{model}"
    options = [
        "--tokenizer",
        ROOT / "data" / "stage" / "tokenizer.model",
        "--data",
        story,
        "--dtype",
        "bfloat16",
    ]
    for rank, more in ((16, ["--lora", 16]), (None, [])):
        command = ["train", "--model", preset, *options, *more, "--seq-len", seq_len, "--dry-run", ranks]
        code, _, err = script(*command)
        assert code == 0 and (" of adapters" in err) == bool(rank)
        said = re.search(r"fits a card of (\d+) GB", err)
        assert (said is not None and int(said[1]) <= card) == bool(rank), err
        config = ModelConfig(vocab_size=128_256, **PRESETS[preset])  # the same with LLaMA 3's own vocabulary
        needed = sum(costs.memory_plan(config, seq_len, 2, "full", ranks, rank).values())
        fits = costs.smallest_card(needed)
        assert (fits is not None and fits <= card) == bool(rank), (fits, needed / 2**30)


# ---- an adapter is a model --------------------------------------------------------------------


def test_an_adapter_is_an_actor(tiny_actor, tmp_path, script):
    """It speaks through the engine with its base's tokenizer, its base is found beside it, and its
    fingerprint covers both."""
    shutil.copytree(tiny_actor, tmp_path / "base")
    save_adapter(adapted(tmp_path / "base"), tmp_path / "adapter", "../base", 3, 5)
    spoken = {}
    for name in ("base", "adapter"):
        code, out, _ = script(
            "generate", "--model", tmp_path / name, "--prompt", "The ferry", "--temperature", 0
        )
        assert code == 0
        spoken[name] = out
    assert spoken["base"] != spoken["adapter"]
    before = fingerprint(tmp_path / "adapter")
    assert before != fingerprint(tmp_path / "base")
    (tmp_path / "base" / "manifest.json").write_text("{}")
    assert fingerprint(tmp_path / "adapter") != before
    assert script("checkpoint.__main__", tmp_path / "adapter", tmp_path / "merged")[0] == 0
    for mine, theirs in zip(
        load_model(tmp_path / "merged").parameters(),
        load_model(tmp_path / "adapter").parameters(),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    code, _, err = script(
        "train", "--model", tmp_path / "adapter", "--dry-run", "--batch-size", 1, "--seq-len", 2048
    )
    assert code == 0 and "parameters" in err  # a whole training may begin at it
    assert "stacked" in usage_error(
        script("train", "--model", tmp_path / "adapter", "--lora", 2, "--dry-run")
    )


REFUSED = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 1]],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "lora_bias": True,
    "peft_type": "IA3",
    "something_new": {"depth": 2},
    "r": "many",
    "target_modules": 3,
    "base_model_name_or_path": "no/such_model_here",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_supported_is_refused_by_name(key, base, tmp_path, monkeypatch):
    save_adapter(adapted(base), tmp_path / "adapter", base, 3, 5)
    (tmp_path / "adapter" / "manifest.json").unlink()
    file = tmp_path / "adapter" / adapters.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: REFUSED[key]}))
    monkeypatch.setattr(adapters, "find_model", lambda spec, weights: Path(spec))
    with pytest.raises(UsageError) as error:
        load_model(tmp_path / "adapter")
    named = {
        "r": "does not match",
        "target_modules": "wrong type",
        "base_model_name_or_path": "no/such_model_here",
    }
    assert named.get(key, key) in str(error.value) and "\n" not in str(error.value)


def test_damaged_and_strange_files_are_one_line(base, tmp_path):
    """Tensors too many, too few, of another shape; a pickle; a torn or an altered file; an adapter over an
    adapter."""
    save_adapter(adapted(base), tmp_path / "good", base, 3, 5)
    good = load_file(tmp_path / "good" / adapters.TENSORS)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(tensors=None, change=lambda directory: None):
        directory = tmp_path / "bad"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tmp_path / "good", directory)
        if tensors is not None:
            save_file(tensors, directory / adapters.TENSORS)
            (directory / "manifest.json").unlink()
        change(directory)
        with pytest.raises(UsageError) as error:
            load_model(directory)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no lora_A" in refused({name: tensor for name, tensor in good.items() if name != key})
    extra = "base_model.model.model.embed_tokens.lora_embedding_A"
    assert extra in refused(good | {extra: torch.zeros(3, 50)})
    assert "lora_magnitude_vector" in refused(
        good | {key.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(3)}
    )
    assert "not [3," in refused(good | {key: torch.zeros(2, good[key].shape[1])})
    assert "not floats" in refused(good | {key: good[key].int()})
    assert "no lora_A" in refused({})

    def pickled(directory):
        (directory / "manifest.json").unlink()
        (directory / adapters.TENSORS).rename(directory / "adapter_model.bin")

    def torn(directory):
        (directory / "manifest.json").unlink()
        file = directory / adapters.TENSORS
        file.write_bytes(file.read_bytes()[:-9])

    def altered(directory):
        file = directory / adapters.TENSORS
        file.write_bytes(file.read_bytes()[:-1] + b"x")

    def stacked(directory):
        (directory / "manifest.json").unlink()
        file = directory / adapters.CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "../good"}))

    assert "pickle" in refused(change=pickled)
    assert "damaged" in refused(change=torn)
    assert "altered" in refused(change=altered)
    assert "stacked" in refused(change=stacked)


def test_flags_that_do_not_fit(script, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert "--lora RANK" in usage_error(script("train", *out, "--lora-alpha", 4))
    assert "--lora must be above 0" in usage_error(script("train", *out, "--lora", 0))
    assert "without weights" in usage_error(script("train", *out, "--lora", 4))
    assert not (tmp_path / "out").exists()
