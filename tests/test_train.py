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
from safetensors.torch import load_file, save_file

import train
from checkpoint import save_model
from data.packing import CHANNELS, make_row, pack
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


def documents_of(config, lengths, seed):
    """Random documents (ids, channels): a share of their tokens is under loss, each in one of the channels."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, length: torch.randint(high, (length,), generator=generator).tolist()  # noqa: E731
    made = []
    for length in lengths:
        learnt = (torch.rand(length, generator=generator) < 0.4).tolist()
        made.append((draw(config.vocab_size, length), [own * (1 + c) for own, c in zip(learnt, draw(3, length), strict=True)]))
    return made


def plain_step(directory, documents):
    """The same by transformers, document by document: mean loss, {channel: mean loss}, {parameter: gradient}."""
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    losses, channels = [], []
    for ids, own in documents:
        if len(ids) > 1:
            logits = peer(torch.tensor([ids])).logits[0, :-1]
            losses.append(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
            channels += own[1:]
    losses, channels = torch.cat(losses), torch.tensor(channels)
    loss = losses[channels > 0].mean()
    loss.backward()
    gradients = {name: p.grad for name, p in peer.named_parameters()}
    return loss, {c: losses[channels == c].mean().item() for c in (1, 2, 3)}, gradients


SPLITS = {  # of 24 rows: ranks -> rows in a micro-batch, for 1, 2 and 4 accumulation steps
    1: (24, 12, 6),
    2: (12, 6, 3),
    3: (8, 4, 2),
}


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_is_the_plain_computation_however_it_is_split(tied, tmp_path):
    """Loss, loss per channel and gradients equal transformers', for 1, 2, 3 ranks by 1, 2, 4 accumulation steps, with hybrid
    sharding and with activations recomputed."""
    config = random_config(5, num_hidden_layers=2, tie_word_embeddings=tied)
    save_model(random_model(config), tmp_path / "start")
    documents = documents_of(config, [37, 1, 20, 50, 9, 64, 33, 2] * 5, 0)
    rows = pack(documents, 64)
    rows += [make_row([], 64)] * (24 - len(rows))  # some ranks and micro-batches have nothing to learn
    assert len(rows) == 24
    save_file({name: torch.stack([row[name] for row in rows]) for name in rows[0]}, tmp_path / "rows.safetensors")
    expected, by_channel, gradients = plain_step(tmp_path / "start", documents)
    for ranks, sizes in SPLITS.items():
        splits = [{"name": f"micro-batch-{size}", "micro_batch": size} for size in sizes]
        splits += [{"name": f"recompute-{how}", "micro_batch": sizes[1], "recompute": how} for how in ("selective", "full")]
        splits += [{"name": "copies", "micro_batch": sizes[1], "shard_ranks": 1}]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command += [str(ROOT / "tests" / "one_step.py"), str(tmp_path), json.dumps(splits)]
        subprocess.run(command, check=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for split in splits:
            found = load_file(tmp_path / f"{ranks}-{split['name']}.safetensors")
            assert found["line.loss"].item() == pytest.approx(expected.item(), rel=1e-5), split
            for channel, loss in by_channel.items():
                assert found[f"line.loss_{CHANNELS[channel - 1]}"].item() == pytest.approx(loss, rel=1e-5), split
            for name, gradient in gradients.items():
                error = (found[name] - gradient).norm() / gradient.norm()
                assert error < 1e-5, (ranks, split, name, error)
            assert found["line.tokens"] == sum(len(ids) for ids, _ in documents)
            assert found["line.supervised"] == sum(map(bool, sum((own[1:] for _, own in documents), [])))


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
