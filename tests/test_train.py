"""train.py: the loss against a plain computation, the same on any split, runs that stop and go on."""

import contextlib
import functools
import json
import math
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, pack_rows, random_config, random_model, usage_error
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend

import kernels
from checkpoint import RandomWeights, fill, find_model, load_model, save_model
from common.files import UsageError
from data.brackets import CHANNELS
from data.packing import make_row
from data.scenes import STAGE, load_scenes, to_test_scene
from data.stream import Stream
from kernels.attention import attention_torch
from llm.local import BUNDLED_ACTOR
from tokenizer import load_tokenizer
from training import parallel
from training import step as training_step
from training.log import Log
from training.parallel import shard_model
from training.resume import find_checkpoints, restarted
from training.step import learning_rate, loss_sum, sample, stack, tally


def launch(*args, ranks=1, restarts=0, script="train.py", **options):
    """train.py as its users start it: through torchrun, or plainly on one rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*command, "--max-restarts", str(restarts), script] if ranks > 1 else [sys.executable, script]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "1000"}
    return subprocess.Popen([*command, *map(str, args)], cwd=ROOT, env=env, **pipes | options)


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    if process.returncode != code:
        print(out, err)  # pytest shows it whole
    assert process.returncode == code
    return err


def fail_on_a_terminal(*args):
    """What a run that ends with code 2 prints on stderr where that is a terminal."""
    leader, follower = pty.openpty()
    process, printed = launch(*args, stderr=follower), b""
    os.close(follower)
    with contextlib.suppress(OSError):  # EIO: the process has ended
        while part := os.read(leader, 4096):
            printed += part
    os.close(leader)
    assert process.wait(100) == 2, printed
    return printed.decode()


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
    return [
        "--model",
        directory,
        "--data",
        story,
        "--seq-len",
        1024,
        "--lr",
        1e-2,
        "--dtype",
        "float32",
        "--eval-every",
        1000,
    ]


def documents_of(config, lengths, seed):
    """Random documents (ids, channels): a share of their tokens is under loss, each in one of the
    channels."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, length: torch.randint(high, (length,), generator=generator).tolist()  # noqa: E731
    made = []
    for length in lengths:
        learnt = (torch.rand(length, generator=generator) < 0.4).tolist()
        made.append(
            (
                draw(config.vocab_size, length),
                [own * (1 + c) for own, c in zip(learnt, draw(3, length), strict=True)],
            )
        )
    return made


def plain_step(directory, documents):
    """The same by transformers, document by document: mean loss, {channel: mean loss}, {parameter:
    gradient}."""
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


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_step_is_the_plain_computation_however_it_is_split(tied, tmp_path):
    """Loss, loss per channel and gradients equal transformers', for 1, 2, 3 ranks by 1, 2, 4 accumulation
    steps, with hybrid sharding, with activations recomputed, with blocks compiled."""
    config = random_config(5, num_hidden_layers=2, tie_word_embeddings=tied)
    save_model(random_model(config), tmp_path / "start")
    documents = documents_of(config, [37, 1, 20, 50, 9, 64, 33, 2] * 5, 0)
    rows = pack_rows(documents, 64)
    rows += [make_row([], 64)] * (24 - len(rows))  # some ranks and micro-batches have nothing to learn
    assert len(rows) == 24
    save_file(
        {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, tmp_path / "rows.safetensors"
    )
    expected, by_channel, gradients = plain_step(tmp_path / "start", documents)
    for ranks, sizes in SPLITS.items():
        splits = [{"name": f"micro-batch-{size}", "micro_batch": size} for size in sizes]
        splits += [
            {"name": f"recompute-{how}", "micro_batch": sizes[1], "recompute": how}
            for how in ("selective", "full")
        ]
        splits += [{"name": "copies", "micro_batch": sizes[1], "shard_ranks": 1}]
        splits += [{"name": "compiled", "micro_batch": sizes[1], "compile": True}] * (not tied)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
        ]
        command += [str(ROOT / "tests" / "one_step.py"), str(tmp_path), json.dumps(splits)]
        subprocess.run(
            command, check=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for split in splits:
            found = load_file(tmp_path / f"{ranks}-{split['name']}.safetensors")
            assert found["line.loss"].item() == pytest.approx(expected.item(), rel=1e-5), split
            for channel, loss in by_channel.items():
                assert found[f"line.loss_{CHANNELS[channel - 1]}"].item() == pytest.approx(loss, rel=1e-5), (
                    split
                )
            for name, gradient in gradients.items():
                error = (found[name] - gradient).norm() / gradient.norm()
                assert error < 1e-5, (ranks, split, name, error)
            assert found["line.tokens"] == sum(len(ids) for ids, _ in documents)
            assert found["line.supervised"] == sum(map(bool, sum((own[1:] for _, own in documents), [])))


@pytest.mark.slow
def test_same_run_on_one_and_two_ranks_and_micro_batches(small, tmp_path):
    """Losses, gradient norms and held-out loss do not depend on ranks or accumulation."""
    runs = {}
    for name, ranks, micro in (("one", 1, 4), ("accumulated", 1, 1), ("two", 2, 1)):
        out = tmp_path / name
        finish(
            launch(
                *small, "--out", out, "--batch-size", 4, "--micro-batch", micro, "--max-steps", 3, ranks=ranks
            )
        )
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
    err = finish(
        launch(
            *small, "--out", out, "--batch-size", 2, "--max-steps", 8, "--save-every", 3, "--peak-tflops", 2
        )
    )
    lines = read_log(out)
    assert [line["step"] for line in lines] == list(range(1, 9))
    numbers = {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "supervised",
        "seconds",
        "tokens_per_second",
        "tflops",
        "mfu",
    }
    numbers |= {"loss_speech", "loss_action", "supervised_per_second", "peak_memory", "seconds_left"}
    assert numbers <= set(lines[-1]) and all(isinstance(lines[-1][name], int | float) for name in numbers)
    for line in lines:
        channels = [line[f"loss_{name}"] for name in CHANNELS if f"loss_{name}" in line]
        assert min(channels) <= line["loss"] <= max(channels)
        assert line["mfu"] == pytest.approx(line["tflops"] / 2)
        assert line["supervised_per_second"] == pytest.approx(line["supervised"] / line["seconds"])
    assert lines[0]["sample"] and lines[-1]["sample"] != lines[0]["sample"]
    assert all(
        word in err for word in ("held out", "tok/s", "MFU", "GiB", "s left", "speech", lines[-1]["sample"])
    )
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in find_checkpoints(out)] == ["step-6", "step-8"]
    assert "under loss" in err
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out / "final", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_held_out_loss_by_channel_against_transformers():
    actor = BUNDLED_ACTOR
    options = ("--seq-len", 2048, "--eval-rows", 2, "--dtype", "float32")
    process = launch("--model", actor, "--evaluate", *options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    line = json.loads(out)
    tokenizer = load_tokenizer(actor)
    peer = transformers.AutoModelForCausalLM.from_pretrained(actor, dtype=torch.float32)
    losses, sizes = {name: [] for name in CHANNELS}, dict.fromkeys(CHANNELS, 0)
    for row in Stream([STAGE], tokenizer, 2048).held_out()[:2]:
        starts = (row["positions"][: row["used"]] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], row["used"]], strict=True):
            with torch.inference_mode():
                logits = peer(row["tokens"][None, start:end]).logits[0]
            document = (row[name][start:end].tolist() for name in ("targets", "channels"))
            for place, (target, channel) in enumerate(zip(*document, strict=True)):
                if target >= 0:
                    name = CHANNELS[channel - 1]
                    losses[name].append(-logits[place].log_softmax(-1)[target].item())
                    sizes[name] += len(tokenizer.decode([target]).encode()) * (target not in tokenizer.names)
    for name in (name for name in CHANNELS if losses[name]):
        nats, count = sum(losses[name]), len(losses[name])
        assert line[f"eval_loss_{name}"] == pytest.approx(nats / count, rel=1e-4)
        bits = nats / math.log(2) / sizes[name]
        # torn characters decode to three bytes
        assert line[f"eval_bits_per_byte_{name}"] == pytest.approx(bits, rel=0.01)
    total = sum(map(sum, losses.values()))
    assert line["eval_loss"] == pytest.approx(total / sum(map(len, losses.values())), rel=1e-4)


@pytest.mark.parametrize("args", [[], ["--model", BUNDLED_ACTOR, "--dry-run"]])
def test_only_a_trained_model_can_be_evaluated(args):
    assert "give --model DIR, without --lora" in finish(launch("--evaluate", *args), 2)


def test_held_out_scenes_are_enough_to_evaluate(tmp_path, stage_tokenizer):
    """A test file has no training scene. Its rows are those of the same scenes beside training ones."""
    scenes = [scene for scene in load_scenes(STAGE) if scene.tag != "train"]
    (tmp_path / "test.json").write_text(json.dumps([to_test_scene(scene) for scene in scenes]))
    alone = Stream([tmp_path / "test.json"], stage_tokenizer, 2048, cache=tmp_path, training=False).held_out()
    beside = Stream([STAGE], stage_tokenizer, 2048, cache=tmp_path).held_out()
    assert len(alone) == len(beside) > 1
    assert all(torch.equal(row["tokens"], other["tokens"]) for row, other in zip(alone, beside, strict=True))


def same_run(whole, other, rel=0.0):
    """Asserts that two runs have logged the same, but for times."""
    for line, got in zip(read_log(whole), read_log(other), strict=True):
        for key in ("step", "lr", "tokens", "supervised"):
            assert line[key] == got[key], (key, line, got)
        for key in ("loss", "grad_norm", "eval_loss"):
            mine, its = line.get(key), got.get(key)
            assert mine == its or abs(mine - its) <= rel * abs(mine), (key, line, got)


def same_state(whole, other):
    """Asserts that the last states of two runs, parameters and optimiser, and their final weights are the
    same bytes."""
    ours, theirs = (find_checkpoints(out)[-1] for out in (whole, other))
    assert ours.name == theirs.name
    shards = [{file.name: file.read_bytes() for file in out.glob("*.distcp")} for out in (ours, theirs)]
    assert shards[0] and shards[0] == shards[1]
    assert json.loads((ours / "progress.json").read_text()) == json.loads(
        (theirs / "progress.json").read_text()
    )
    assert (whole / "final" / "model.safetensors").read_bytes() == (
        other / "final" / "model.safetensors"
    ).read_bytes()


def wait_for(out, steps, process):
    """Waits until a run has logged so many steps."""
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("signal_", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted_run_goes_on_as_if_it_had_not_been(signal_, small, tmp_path):
    """Ctrl-C or SIGTERM saves and says how to go on, and --resume gives the bytes of an uninterrupted run; it
    cuts the log."""
    arguments = [*small, "--batch-size", 1, "--max-steps", 20]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(launch(*arguments, "--out", whole))
    process = launch(*arguments, "--out", stopped)
    wait_for(stopped, 5, process)
    process.send_signal(signal_)
    assert "--resume" in finish(process, code=130)
    at = read_log(stopped)[-1]["step"]
    assert 5 <= at < 20
    with open(stopped / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": at + 1, "loss": 0.0}) + "\n" + '{"step": 9')  # and a torn line
    finish(launch(*arguments, "--out", stopped, "--resume"))
    same_run(whole, stopped)
    same_state(whole, stopped)


def seen(file, ranks, steps):
    """Rows (lists of pieces) that the ranks of a spied run made in each of so many steps, in any order within
    a step."""
    made = [
        [json.loads(line) for line in Path(f"{file}.{rank}").read_text().splitlines()]
        for rank in range(ranks)
    ]
    each = sum(map(len, made)) // ranks // steps
    assert all(len(rows) == each * steps for rows in made)
    return [
        sorted(row for rows in made for row in rows[each * step : each * (step + 1)]) for step in range(steps)
    ]


@pytest.mark.slow
def test_resume_on_two_ranks_and_on_other_numbers(small, tmp_path):
    """Two ranks go on bit for bit. From two to one and from one to two, ten steps' losses are the same up to
    rounding, and so are the very documents of each step: in an epoch none is read twice or missed, wherever
    the run was cut."""
    arguments = [
        *small,
        "--batch-size",
        2,
        "--save-every",
        4,
        "--seed",
        3,
        "--max-steps",
        14,
        "--keep",
        9,
        "--seq-len",
        512,
    ]
    spied = lambda name, *more, ranks: finish(  # noqa: E731
        launch(
            tmp_path / f"{name}.rows",
            *arguments,
            "--out",
            tmp_path / name,
            *more,
            ranks=ranks,
            script="tests/spy.py",
        )
    )
    for ranks in (1, 2):
        whole = f"whole-{ranks}"
        spied(whole, ranks=ranks)
        rows = seen(tmp_path / f"{whole}.rows", ranks, 14)
        documents = [tuple(piece) for step in rows for row in step for piece in row]
        assert (
            len(documents) == len(set(documents)) and len({source for source, *_ in documents}) > 1
        )  # epochs
        for again in (1, 2):
            name = f"from-{ranks}-to-{again}"
            shutil.copytree(tmp_path / whole, tmp_path / name)
            for made in ("step-8", "step-12", "step-14", "final"):  # as a run that died after step 4
                shutil.rmtree(tmp_path / name / made)
            err = spied(name, "--resume", ranks=again)
            assert "resuming from" in err and "step-4" in err
            same_run(tmp_path / whole, tmp_path / name, rel=0.0 if again == ranks else 1e-5)
            assert seen(tmp_path / f"{name}.rows", again, 10) == rows[4:]
            if again == ranks:
                same_state(tmp_path / whole, tmp_path / name)


def workers(process):
    """Process ids of the ranks that a torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_rank_comes_back(small, tmp_path):
    """torchrun --max-restarts starts all ranks again, and they go on from the last checkpoint, with no
    --resume given."""
    arguments = [*small, "--batch-size", 2, "--max-steps", 12, "--save-every", 3]
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    finish(launch(*arguments, "--out", whole, ranks=2))
    process = launch(*arguments, "--out", hurt, ranks=2, restarts=1)
    wait_for(hurt, 5, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    assert "resuming from" in finish(process)
    same_run(whole, hurt)
    same_state(whole, hurt)


@pytest.mark.slow
def test_torchrun_stopped_saves(small, tmp_path):
    """SIGTERM to torchrun reaches the ranks, which save the step they are at and leave."""
    out = tmp_path / "run"
    process = launch(*small, "--batch-size", 2, "--max-steps", 500, "--out", out, ranks=2)
    wait_for(out, 3, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert (
        "the same command with --resume continues" in err
        and "File " + chr(34) + str(ROOT / "train.py") not in err
    )
    assert find_checkpoints(out)[-1].name == f"step-{read_log(out)[-1]['step']}"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_moment(ranks, small, tmp_path):
    """Killed at 20 random moments, saving included, torchrun or one of its ranks: it always goes on, loses at
    most one interval, and ends the same."""
    arguments = [*small, "--batch-size", 2, "--micro-batch", 2 // ranks, "--max-steps", 60, "--save-every", 2]
    whole, hurt, rng = tmp_path / "whole", tmp_path / "hurt", random.Random(0)
    finish(launch(*arguments, "--out", whole, ranks=ranks))
    pace = sum(line["seconds"] for line in read_log(whole)) / 60
    logged = lambda: (hurt / "log.jsonl").read_text().count("\n") if (hurt / "log.jsonl").exists() else 0  # noqa: E731
    for _ in range(20):
        before = logged()
        process = launch(*arguments, "--out", hurt, "--resume", ranks=ranks)
        while process.poll() is None and logged() == before:
            time.sleep(0.01)  # up to its first new step, or to the cut back to the last checkpoint
        time.sleep(rng.random() * 8 * pace)  # some steps and savings, whatever the machine's speed
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(
                rng.choice([process.pid, *workers(process)]) if ranks > 1 else process.pid, signal.SIGKILL
            )
        process.communicate(timeout=100)  # ends when no rank is left to hold the pipe
        lines, states = read_log(hurt), find_checkpoints(hurt)
        at = int(states[-1].name.removeprefix("step-")) if states else 0
        assert at >= len(lines) - 2
    finish(launch(*arguments, "--out", hurt, "--resume", ranks=ranks))
    same_run(whole, hurt)
    same_state(whole, hurt)


@pytest.mark.slow
def test_a_full_disk_leaves_the_state_before(small, tmp_path):
    """A checkpoint that cannot be written is one clear line, nothing of it is left, and the one before is
    good."""
    arguments = [*small, "--batch-size", 1, "--max-steps", 6, "--save-every", 2]
    whole, full = tmp_path / "whole", tmp_path / "full"
    finish(launch(*arguments, "--out", whole))
    shutil.copytree(whole, full)
    for name in ("step-4", "step-6", "final"):
        shutil.rmtree(full / name, ignore_errors=True)
    shutil.copytree(whole / "step-4", full / "step-4")
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731 (EFBIG, as ENOSPC would)
    err = finish(launch(*arguments, "--out", full, "--resume", preexec_fn=limited), code=2)
    assert (
        "step-6: the checkpoint could not be saved" in err
        and "unchanged: step-4" in err
        and "Traceback" not in err
    )
    assert sorted(path.name for path in full.iterdir()) == ["log.jsonl", "loss.png", "run.json", "step-4"]
    finish(launch(*arguments, "--out", full, "--resume"))
    same_state(whole, full)


def test_an_output_that_is_read_only(small, tmp_path):
    """Found out before the first step, in one line."""
    out = tmp_path / "out"
    out.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(out)], capture_output=True
    ).returncode:
        pytest.skip("mounting a read-only directory needs root and a kernel that lets it")
    try:
        err = finish(launch(*small, "--max-steps", 1, "--batch-size", 1, "--out", out), code=2)
    finally:
        subprocess.run(["umount", str(out)], check=True)
    assert f"{out}: not writable; choose another --out" in err and "Traceback" not in err


@pytest.mark.slow
def test_damaged_checkpoints(small, tmp_path):
    """One that is altered or cut is found out and named, and the run goes on from the one before, to the same
    end."""
    arguments = [*small, "--batch-size", 1, "--max-steps", 6, "--save-every", 2, "--keep", 3]
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    finish(launch(*arguments, "--out", whole))
    shutil.copytree(whole, hurt)
    shard = hurt / "step-6" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    metadata = hurt / "step-4" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-1] + b"x")
    err = finish(launch(*arguments, "--out", hurt, "--resume"))
    assert "__0_0.distcp: altered or truncated" in err and ".metadata: altered or truncated" in err
    assert "resuming from" in err and "step-2" in err
    same_run(whole, hurt)
    same_state(whole, hurt)
    for state in find_checkpoints(hurt):
        (state / "manifest.json").write_text("{")
    err = finish(launch(*arguments, "--out", hurt, "--resume"), code=2)
    assert "all 3 checkpoints are damaged" in err and "Traceback" not in err


SAVES = """
import sys, torch
from training import resume
from training.parallel import start_ranks
start_ranks()
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(model.parameters())
for step, keep in ((2, 9), (4, 9), (6, 9), (3, 1)):
    resume.save_state(f"{sys.argv[1]}/step-{step}", model, optimizer, {}, keep)
"""


FAILS = """
import json, os, sys, torch, types
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import checkpoint
from checkpoint import export
from common.files import UsageError
from training import lora, parallel, resume

device, out = parallel.start_ranks(), Path(sys.argv[2])
base = dict(dtype="float32", recompute="none", compile=False, shard_ranks=None, lora_alpha=4, model="base")
base |= dict(tokenizer=None, chat_format=None)
config = checkpoint.load_config(out / "start")
whole = export.save_model

def full(tensors, file):
    raise OSError(28, "No space left on device", str(file))

def small(*args, **options):
    return whole(*args, **options, max_shard_bytes=1000)  # the first of many shards fails

for number, rank in enumerate((None, 4)):
    args = types.SimpleNamespace(**base, lora=rank)
    model = parallel.shard_model(config, device, args)
    for module in (export, lora):
        module.save_tensors = full
    checkpoint.save_model = small
    try:
        resume.save_final(model, out, args, None)
    except UsageError as error:
        (out / f"error-{number}-{parallel.RANK}").write_text(str(error))
torch.distributed.barrier()
os._exit(0)  # what was to be seen is written; gloo's threads can abort an interpreter that winds down
"""


def test_a_full_disk_at_the_end_is_an_error_on_every_rank(tmp_path):
    """The final save fails on rank 0 before the others have gathered all: each rank gets its error, none
    waits."""
    config = random_config(3, num_hidden_layers=2)
    save_model(random_model(config), tmp_path / "start")
    (tmp_path / "fails.py").write_text(FAILS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "fails.py"), str(ROOT), str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        for rank in (0, 1):
            assert "No space left on device" in (tmp_path / f"error-{number}-{rank}").read_text()
    assert not (tmp_path / "final").exists()


def test_final_files_that_do_not_fit_are_one_line(tmp_path):
    """safetensors reports a full disk with an error of its own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises((UsageError, OSError)):
            save_model(random_model(random_config(3)), tmp_path / "final")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_what_a_run_went_back_behind_is_not_kept(tmp_path):
    """A run that goes on from an old checkpoint, since the newer ones are damaged, never removes its own in
    favour of those."""
    subprocess.run([sys.executable, "-c", SAVES, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-3"]


def test_a_restart_goes_on_only_in_its_own_run(tmp_path, monkeypatch):
    """torchrun --max-restarts starts a run again; one that was there before it and was refused is not gone on
    with."""
    assert not restarted(tmp_path)
    monkeypatch.setattr(parallel, "RESTARTS", 1)
    assert not restarted(tmp_path)
    for launcher, again in ((os.getppid(), True), (1, False), (None, False)):
        (tmp_path / "run.json").write_text(json.dumps({"launcher": launcher}))
        assert restarted(tmp_path) == again


def test_changed_settings_and_too_few_documents(small, tmp_path):
    """A resume with other settings says what was and is; more ranks than rows are refused; what does not
    matter may change."""
    general = tmp_path / "general.jsonl"
    turns = [
        {"role": "user", "content": "Who is there?"},
        {"role": "assistant", "content": "Nobody at all, and that is all."},
    ]
    general.write_text(json.dumps({"messages": turns}) + "\n")
    arguments = [
        *small,
        "--batch-size",
        1,
        "--max-steps",
        2,
        "--mix",
        f"{general}:0.01",
        "--out",
        tmp_path / "run",
    ]
    finish(launch(*arguments))
    said = general.read_text()
    general.write_text(said.replace("Nobody", "Somebody"))
    assert "--data was" in finish(launch(*arguments, "--resume"), code=2)
    general.write_text(said)
    state = (tmp_path / "run" / "step-2" / "progress.json").read_text()
    err = finish(launch(*arguments, "--seed", 7, "--resume"), code=2)
    assert "--seed was 0, is 7" in err and "Traceback" not in err
    assert (tmp_path / "run" / "step-2" / "progress.json").read_text() == state
    finish(launch(*arguments, "--resume", "--eval-every", 7, "--save-every", 9))
    err = finish(launch(*small, "--batch-size", 64, "--dry-run", 64))  # only a plan: said, not refused
    assert "rows of documents for 64 ranks" in err and "64 rank(s)" in err
    none = tmp_path / "none"
    err = finish(
        launch(*small, "--seq-len", 100_000, "--batch-size", 2, "--out", none, ranks=2), code=1
    )  # torchrun's own code
    assert "error: 1 rows of documents for 2 ranks; use fewer ranks" in err and not none.exists()


def test_what_is_not_finite(small, tmp_path, stage_tokenizer):
    """Stops before the optimiser and names step and row; --skip-nonfinite leaves the step out, counts it and
    goes on."""
    arguments = [*small, "--batch-size", 2, "--max-steps", 3, "--save-every", 1]
    start, data = Path(small[1]), small[3]
    stream = Stream([data], stage_tokenizer, 1024)
    seen = [set(row["tokens"].tolist()) for row in stream.take(6)[:]]
    step, row = next(
        (s, r)
        for s in (1, 2)
        for r in (0, 1)
        if seen[2 * s + r].difference(*seen[: 2 * s + r], *seen[2 * s + r + 1 :])
    )
    poison = min(seen[2 * step + row].difference(*seen[: 2 * step + row], *seen[2 * step + row + 1 :]))
    model = load_model(start)
    with torch.no_grad():
        model.model["embed_tokens"].weight[poison] = float("nan")
    save_model(model, start, stage_tokenizer)
    out = tmp_path / "run"
    err = fail_on_a_terminal(*arguments, "--out", out)
    assert err.rindex("\x1b[?25h") > err.rindex("\x1b[?25l")  # the progress bar gives the cursor back
    assert (
        f"step {step + 1}, stopped before the optimiser: loss nan" in err
        and f"rows of the batch: {row} " in err
    )
    assert "Traceback" not in err
    assert len(read_log(out)) == step and find_checkpoints(out)[-1].name == f"step-{step}"
    finish(launch(*arguments, "--out", out, "--resume", "--skip-nonfinite"))
    lines = read_log(out)
    assert [line["loss"] is None for line in lines] == [number == step for number in range(3)]
    assert [line.get("skipped", 0) for line in lines] == [int(number >= step) for number in range(3)]
    weights = load_file(out / "final" / "model.safetensors")
    bad = {name for name, tensor in weights.items() if not tensor.isfinite().all()}
    assert bad == {"model.embed_tokens.weight"}  # the poisoned row itself, nothing that was learnt


LOAD = """
import json, sys, types
sys.path.insert(0, sys.argv[1])
import checkpoint
import torch.distributed as dist
from training.parallel import shard_model, start_ranks

def resident(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

device = start_ranks()
args = types.SimpleNamespace(dtype="bfloat16", recompute="none", compile=False, shard_ranks=None, lora=None)
before = resident("VmRSS:")
model = shard_model(checkpoint.load_config(sys.argv[2]), device, args)
weights = checkpoint.Weights(sys.argv[2])
weights.check(model)
checkpoint.fill(model, weights)
grown = [None] * dist.get_world_size()
dist.all_gather_object(grown, resident("VmHWM:") - before)
if dist.get_rank() == 0:
    print(json.dumps(grown))
"""


@pytest.mark.slow
def test_no_rank_holds_a_whole_checkpoint(tmp_path):
    """Loading 1.3 GB of weights onto two ranks takes each a half of it, and one file of 100 MB, at its
    peak."""
    shape = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=8)
    config = random_config(
        0, vocab_size=32_000, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False, **shape
    )
    save_model(random_model(config), tmp_path / "large", max_shard_bytes=10**8)
    (tmp_path / "large" / "manifest.json").unlink()
    (tmp_path / "load.py").write_text(LOAD)
    size, grown = 4 * config.num_parameters(), {}
    for ranks in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
        ]
        command += [str(tmp_path / "load.py"), str(ROOT), str(tmp_path / "large")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        grown[ranks] = [round(each / size, 2) for each in json.loads(done.stdout.splitlines()[-1])]
    print(f"peak growth over {size / 1e9:.2f} GB of weights: {grown}")
    assert grown[1][0] > 0.95 and max(grown[2]) < 0.5 + 2e8 / size + 0.02, grown


def steps_of(model, batches):
    """Losses and summed gradients of a few batches."""
    losses = []
    for batch in batches:
        loss, _ = loss_sum(model, batch)
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "recompute"),
    [("triton", "none"), ("triton", "selective"), ("triton", "full"), ("torch", "none")],
)
def test_compiled_blocks_learn_the_same(version, recompute, monkeypatch):
    """Blocks captured by torch.compile, recomputation inside, give the losses and gradients of plain ones (no
    code generated).

    With the Triton kernels, as on a GPU, a block is one graph; batches with other documents and other numbers
    of supervised rows soon make no more of them. The twins of a CPU loop over documents, outside the graphs.
    """

    captured = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend=captured, fullgraph=version == "triton")
    )
    monkeypatch.setattr(kernels, "_chosen", version)
    torch._dynamo.reset()
    config = random_config(5, num_hidden_layers=3, head_dim=16)
    lengths = ([37, 27], [20, 30], [64], [9, 8, 7], [50, 11])
    batches = [
        stack(pack_rows(documents_of(config, each, seed), 64), "cpu") for seed, each in enumerate(lengths)
    ]
    found = []
    for compiled in (False, True):
        args = types.SimpleNamespace(
            dtype="float32", recompute=recompute, compile=compiled, shard_ranks=None, lora=None
        )
        model = shard_model(config, torch.device("cpu"), args)
        fill(model, RandomWeights(model, 0))
        found.append(steps_of(model, batches[:3]))
    assert kernels.attention_torch is attention_torch  # nothing global has changed
    frames = captured.frame_count
    assert (
        0 < frames <= 3 * (1 if version == "triton" else 5)
    )  # a block: without rows, with so many, with any number
    steps_of(model, batches[3:])
    assert captured.frame_count == frames
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)


def test_padding_is_not_computed():
    """Rows trimmed to their longest used length give the loss, the gradients and the counts of whole rows."""
    config = random_config(5, num_hidden_layers=2)
    rows = [make_row(documents_of(config, lengths, 1), 512) for lengths in ([70, 30], [20], [])]
    whole, trimmed = stack(rows, "cpu"), stack(rows, "cpu", trim=True)
    assert whole["tokens"].shape == (3, 512) and trimmed["tokens"].shape == (3, 128)
    assert stack(rows[2:], "cpu", trim=True)["tokens"].shape == (1, 64)
    assert torch.equal(tally([whole], None), tally([trimmed], None))
    found = []
    for batch in (whole, trimmed):
        model = random_model(config).train()
        found.append(steps_of(model, [batch]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_a_sample_is_that_of_a_model_without_a_cache(stage_tokenizer, monkeypatch):
    """With keys and values kept, a sample is what whole passes over all tokens draw."""
    config = random_config(2, vocab_size=stage_tokenizer.vocab_size, num_hidden_layers=2)
    model, opening, noise = random_model(config), list(range(300, 320)), torch.Generator().manual_seed(7)
    monkeypatch.setattr(training_step.dist, "broadcast", lambda *_: None)
    text, ids = sample(model, opening, stage_tokenizer, 7, "cpu", length=12), opening[:]
    for _ in range(12):
        chances = (model(torch.tensor([ids]))[0, -1].detach() / 0.7).softmax(-1)
        token = (chances / torch.empty_like(chances).exponential_(generator=noise)).argmax().item()
        if token in stage_tokenizer.stop_ids:
            break
        ids.append(token)
    assert len(ids) > 25 and text == " ".join(stage_tokenizer.decode(ids[20:]).split())


def test_defaults_are_shown_and_fit_together(script, story, tmp_path):
    """--help names the defaults of both recipes, the plan the settings; --micro-batch alone raises the
    batch."""
    code, out, _ = script("train", "--help")
    text = " ".join(out.split())
    assert code == 0
    defaults = [
        "7 for the stage actor, 8 for other models, 2 with --lora",
        "0.002 for the stage actor, 1e-05",
    ]
    for default in [*defaults, "2,048 for the stage actor, 16,384 for", "1 for the stage actor, 48 for"]:
        assert default in text
    plan = ("train", "--data", story, "--dry-run", "--out", tmp_path / "none")
    code, _, err = script(*plan, "--micro-batch", 2)
    assert code == 0 and "--batch-size 2 --epochs 7.0 --lr 0.002 --weight-decay 0.1 --micro-batch 2" in err
    code, _, err = script(*plan[:4], 3, *plan[4:], "--micro-batch", 2)
    assert code == 0 and "--batch-size 6" in err


def test_learning_rate_warms_up_and_decays():
    """Linear up to the peak, a cosine down to a tenth of it."""
    args = type("Args", (), {"lr": 1.0, "warmup": 0.1})
    rates = [learning_rate(step, 100, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates) == pytest.approx(1.0)
    assert rates[54] == pytest.approx(0.1 + 0.9 * 0.5, abs=0.02)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert all(before >= after for before, after in zip(rates[9:], rates[10:], strict=False))


def test_dry_run_allocates_nothing(script, story):
    """--dry-run of the 70B shape prints its 70,553,706,496 parameters, and makes no directory."""
    options = ["--tokenizer", STAGE / "tokenizer.model", "--dry-run", "--out", story.parent / "none"]
    code, _, err = script("train", "--model", "llama-3.1-70b", "--data", story, *options)
    parameters = (
        70_553_706_496 - 2 * (128_256 - 4096) * 8192
    )  # published for 128,256 tokens; here the stage's 4,096
    assert code == 0
    assert f"{parameters:,} parameters" in err
    assert not (story.parent / "none").exists()


def test_dry_run_downloads_no_weights(script, small, tmp_path, monkeypatch):
    """With a Hub id it asks for the config and the tokenizer; the same without --dry-run asks for the weights
    too."""
    asked = []

    def snapshot_download(spec, allow_patterns):
        asked.append(
            (spec, shutil.ignore_patterns(*allow_patterns)(None, os.listdir(small[1])))
        )  # the names that match
        shutil.copytree(small[1], tmp_path / "got", ignore=lambda _, names: set(names) - asked[-1][1])
        return tmp_path / "got"

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download)
    )
    code, _, err = script("train", "--model", "someone/tiny", *small[2:], "--batch-size", 1, "--dry-run")
    assert code == 0 and "parameters" in err
    assert asked[0][0] == "someone/tiny" and {"config.json", "tokenizer.model"} <= asked[0][1]
    assert not any(name.endswith(".safetensors") for name in asked[0][1])
    shutil.rmtree(tmp_path / "got")
    find_model("someone/tiny")
    assert asked[1][1] - asked[0][1] == {"model.safetensors"}


def test_events_for_tensorboard(tmp_path, monkeypatch):
    """Where TensorBoard is installed, numbers and samples go there as well, and a resume purges what it cuts;
    else one line."""
    written, made = [], []

    class Writer:
        def __init__(self, directory, purge_step):
            made.append((directory, purge_step))

        def add_scalar(self, *event):
            written.append(event)

        add_text = add_scalar

        def close(self):
            pass

    line = {
        "step": 3,
        "loss": 2.0,
        "lr": 0.1,
        "grad_norm": 1.0,
        "tokens": 9,
        "supervised": 3,
        "seconds": 1.0,
        "sample": "Hm.",
    }
    line |= {"tokens_per_second": 9.0, "supervised_per_second": 3.0, "peak_memory": 1}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        Log(tmp_path, 5, 2, tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    with Log(tmp_path, 5, 2, tensorboard=True) as log:
        log.write(line)
    assert made == [(tmp_path / "tensorboard", 3)]
    assert {("loss", 2.0, 3), ("sample", "Hm.", 3), ("seconds_left", 2.0, 3)} <= set(written)
    assert not any(name == "step" for name, *_ in written)


def test_bad_input_is_one_line_and_exit_2(script, small, story, tmp_path):
    """What a user can get wrong, said in one line, before anything is written."""
    out = tmp_path / "out"
    base = ["--out", out, "--max-steps", 1]
    assert "no such file" in usage_error(script("train", *base, "--data", tmp_path / "missing.json"))
    (tmp_path / "empty.json").write_text("")
    assert "empty" in usage_error(script("train", *base, "--data", tmp_path / "empty.json"))
    assert "no such checkpoint directory" in usage_error(script("train", *base, "--model", "llama-4"))
    assert "--batch-size 3" in usage_error(
        script("train", *base, "--data", story, "--batch-size", 3, "--micro-batch", 2)
    )
    assert "--lr must be above 0" in usage_error(script("train", *base, "--lr", 0))
    wrong = [
        ("--epochs", "inf"),
        ("--warmup", "nan"),
        ("--warmup", -1),
        ("--warmup", 3),
        ("--weight-decay", -1),
        ("--seed", 10**20),
    ]
    for flag, value in wrong:
        assert flag in usage_error(script("train", *base, flag, value))
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
