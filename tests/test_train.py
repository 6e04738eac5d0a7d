"""train.py: the loss against a plain computation, the same on any split, runs that stop and go on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, random_config, random_model, usage_error

import train
from checkpoint import save_model
from data.packing import IGNORE, pack
from data.scenes import STAGE


def launch(*args, ranks=1, **env):
    """train.py as its users start it: through torchrun, or plainly on one rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*command, "train.py"] if ranks > 1 else [sys.executable, "train.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        [*command, *map(str, args)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, out, err)
    return err


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Two plots of a bundled story, one of them held out: small enough to train on in a moment."""
    book = json.loads((STAGE / "the_last_ferry.json").read_text())
    book["plots"], book["split_plot_index"] = [book["plots"][0], book["plots"][4]], 1
    path = tmp_path_factory.mktemp("data") / "story.json"
    path.write_text(json.dumps(book))
    return path


@pytest.fixture
def small(story, tmp_path_factory, stage_tokenizer):
    """Arguments of a run of a few seconds: a tiny checkpoint to start from, short rows, fp32."""
    directory = tmp_path_factory.mktemp("start") / "tiny"
    config = random_config(3, vocab_size=stage_tokenizer.vocab_size, max_position_embeddings=1024)
    save_model(random_model(config), directory, stage_tokenizer)
    return ["--model", directory, "--data", story, "--seq-len", 1024, "--lr", 1e-2, "--dtype", "float32", "--eval-every", 1000]


def test_loss_is_cross_entropy_of_supervised_tokens():
    """loss_sum and its gradients equal transformers' logits, documents one by one, with a plain cross-entropy."""
    config = random_config(5)
    model = random_model(config).train()
    generator = torch.Generator().manual_seed(0)
    documents = []
    for length in (37, 1, 20, 50, 9):
        ids = torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()
        documents.append((ids, (torch.rand(length, generator=generator) < 0.4).tolist()))
    rows = pack(documents, 64)
    loss = sum(train.loss_sum(model, train.stack([row], "cpu")) for row in rows)
    loss.backward()

    hf_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling and {"rope_type": "llama3", **vars(config.rope_scaling)},
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    peer = transformers.LlamaForCausalLM(hf_config)
    peer.load_state_dict(model.state_dict(), strict=False)
    expected = torch.zeros(())
    for ids, mask in documents:
        labels = torch.tensor([token if own else IGNORE for token, own in zip(ids, mask, strict=True)])
        if len(ids) > 1:
            logits = peer(torch.tensor([ids])).logits[0, :-1]
            expected = expected + F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=IGNORE)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_same_run_on_one_and_two_ranks_and_micro_batches(small, tmp_path):
    """Losses, gradient norms and held-out loss do not depend on ranks or accumulation."""
    runs = {}
    for name, ranks, micro in (("one", 1, 4), ("accumulated", 1, 1), ("two", 2, 1)):
        out = tmp_path / name
        finish(launch(*small, "--out", out, "--batch-size", 4, "--micro-batch", micro, "--max-steps", 3, ranks=ranks))
        runs[name] = read_log(out)
    for name in ("accumulated", "two"):
        for line, other in zip(runs["one"], runs[name], strict=True):
            assert line["supervised"] == other["supervised"]
            assert 3 * 1024 < line["tokens"] == other["tokens"] <= 4 * 1024
            for key in ("loss", "grad_norm"):
                assert line[key] == pytest.approx(other[key], rel=1e-4), (name, key, line, other)
        assert runs["one"][-1]["eval_loss"] == pytest.approx(runs[name][-1]["eval_loss"], rel=1e-4)


def test_training_lowers_the_loss_and_leaves_a_hugging_face_directory(small, tmp_path):
    """The log has its fields, the loss falls, the curve is a PNG, transformers opens final/."""
    out = tmp_path / "run"
    err = finish(launch(*small, "--out", out, "--batch-size", 2, "--max-steps", 8, "--save-every", 3))
    lines = read_log(out)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {"step", "loss", "lr", "grad_norm", "tokens", "supervised", "seconds"} <= set(lines[0])
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in train.find_checkpoints(out)] == ["step-6", "step-8"]
    assert "under loss" in err
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out / "final", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_interrupted_run_goes_on_as_if_it_had_not_been(small, tmp_path):
    """SIGINT saves and says how to go on; --resume then gives the losses of an uninterrupted run, and cuts a longer log."""
    arguments = [*small, "--batch-size", 1, "--max-steps", 40]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(launch(*arguments, "--out", whole))
    process = launch(*arguments, "--out", stopped)
    while not (stopped / "log.jsonl").exists() or len(read_log(stopped)) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "--resume" in finish(process, code=130)
    at = read_log(stopped)[-1]["step"]
    assert 5 <= at < 40
    with open(stopped / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": at + 1, "loss": 0.0}) + "\n" + '{"step": 9')  # and a torn line
    finish(launch(*arguments, "--out", stopped, "--resume"))
    for line, other in zip(read_log(whole), read_log(stopped), strict=True):
        assert (line["step"], line["loss"], line["grad_norm"], line["lr"]) == tuple(
            other[key] for key in ("step", "loss", "grad_norm", "lr")
        )
    ours, theirs = (directory / "final" / "model.safetensors" for directory in (whole, stopped))
    assert ours.read_bytes() == theirs.read_bytes()


def test_learning_rate_warms_up_and_decays():
    """Linear up to the peak, a cosine down to a tenth of it."""
    args = type("Args", (), {"lr": 1.0, "warmup": 0.1})
    rates = [train.learning_rate(step, 100, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates) == pytest.approx(1.0)
    assert rates[54] == pytest.approx(0.1 + 0.9 * 0.5, abs=0.02)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert all(before >= after for before, after in zip(rates[9:], rates[10:], strict=False))


def test_dry_run_allocates_nothing(script, story):
    """--dry-run of the 70B shape prints its 70,553,706,496 parameters, and makes no directory."""
    options = ["--tokenizer", STAGE / "tokenizer.model", "--dry-run", "--out", story.parent / "none"]
    code, _, err = script("train", "--model", "llama-3.1-70b", "--data", story, *options)
    parameters = 70_553_706_496 - 2 * (128_256 - 4096) * 8192  # published for 128,256 tokens; here the stage's 4,096
    assert code == 0
    assert f"{parameters:,} parameters" in err
    assert not (story.parent / "none").exists()


def test_bad_input_is_one_line_and_exit_2(script, small, story, tmp_path):
    """What a user can get wrong, said in one line, before anything is written."""
    out = tmp_path / "out"
    base = ["--out", out, "--max-steps", 1]
    assert "no such file" in usage_error(script("train", *base, "--data", tmp_path / "missing.json"))
    (tmp_path / "empty.json").write_text("")
    assert "empty" in usage_error(script("train", *base, "--data", tmp_path / "empty.json"))
    assert "no such checkpoint directory" in usage_error(script("train", *base, "--model", "llama-4"))
    assert "--batch-size 3" in usage_error(script("train", *base, "--data", story, "--batch-size", 3, "--micro-batch", 2))
    assert "--lr must be above 0" in usage_error(script("train", *base, "--lr", 0))
    assert "tokenizer.model" in usage_error(script("train", *base, "--tokenizer", tmp_path))
    assert "--tokenizer" in usage_error(script("train", *base, "--model", "llama-3.1-8b"))
    assert "--seq-len" in usage_error(script("train", *base, "--seq-len", 1))
    assert "unrecognized" in usage_error(script("train", *base, "--learning-rate", 1))
    only_held_out = json.loads(story.read_text()) | {"split_plot_index": 0}
    (tmp_path / "held_out.json").write_text(json.dumps(only_held_out))
    assert "no training scene" in usage_error(script("train", *base, "--data", tmp_path / "held_out.json"))
    assert not out.exists()
    out.mkdir()
    for made in ("log.jsonl", "step-3"):
        (out / made).mkdir() if made == "step-3" else (out / made).write_text("")
        assert "--resume" in usage_error(script("train", *base, "--data", story))
        (out / made).rmdir() if made == "step-3" else (out / made).unlink()
