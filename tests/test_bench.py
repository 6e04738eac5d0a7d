"""bench.py: every benchmark at toy shapes, its figures as JSON, what Ctrl-C leaves, errors in one line."""

import json
import os
import runpy
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, usage_error

from bench import figures, machine
from common import terminal
from common.files import UsageError

THREADS = torch.get_num_threads()


@pytest.fixture
def bench(monkeypatch, capsys):
    """bench("decode", ...) -> (exit code, stdout, stderr); `import bench` would find the package."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, args)])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as exit_:
                terminal.run(runpy.run_path(str(ROOT / "bench.py"))["main"])
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    return run


def rows_of(result):
    """The rows of the line of JSON that ends stdout; each must have been noted on stderr before."""
    code, out, err = result
    assert code == 0, err
    line = json.loads(out.splitlines()[-1])
    assert line["command"].startswith("python bench.py ") and line["processor"] and line["torch"]
    assert err.count("round 1: ") == err.count("warm-up: ") == len(line["rows"])
    assert all(row["rounds"] == 1 for row in line["rows"])
    return line["rows"]


TOY = ("--toy", "--rounds", 1)


def test_machine(bench):
    rows = rows_of(bench("machine", *TOY))
    assert {row["of"] for row in rows} == {"copy", "product, float32", "product, bfloat16"}
    assert {row["threads"] for row in rows} == {1}
    assert all(0.01 < row["rate"] < 1e6 for row in rows)
    description = machine.describe("cpu")
    assert f"{THREADS} thread(s)" in description
    if "avx2" in torch.backends.cpu.get_cpu_capability().lower():
        assert "avx2" in description


def test_kernels(bench):
    rows = rows_of(bench("kernels", *TOY))
    kernels = {(row["kernel"], row["direction"]) for row in rows if row["side"] == "ours"}
    assert len(kernels) == 9  # four with a backward pass, and decoding
    assert all(row["rate"] > 0 and row["ms"] > 0 for row in rows)


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_generation_against_transformers(bench, name):
    rows = rows_of(bench(name, *TOY, "--new", 3, "--peer", "transformers"))
    assert [row["side"] for row in rows[:3]] == [
        "ours, float32", "transformers, dynamic cache", "transformers, static cache",
    ]  # fmt: skip
    assert len(rows) == 6 and all(row["prefill tok/s"] > 0 for row in rows)
    figure = f"{name} tok/s"
    for ours, *peers in (rows[:3], rows[3:]):
        for peer in peers:
            assert peer["ours / this"] == pytest.approx(ours[figure] / peer[figure])
    if name == "decode":  # bytes read: one layer of the toy and its embeddings, then keys and values
        row, weights = rows[0], 4 * (49_152 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 3 * 64)
        bytes_ = weights + (9 + 3 / 2) * 2 * 2 * 16 * 4
        assert row["decode GB/s"] * 1e9 == pytest.approx(bytes_ * row["decode tok/s"], rel=1e-6)


def test_training(bench):
    [row] = rows_of(bench("train", *TOY, "--seq-len", 512))
    assert 7 < row["loss"] < 10  # ln 4096 = 8.3
    assert 0.05 < row["peak GiB"] < 8 and row["tok/s"] > 0 and row["TFLOP/s"] > 0


@pytest.mark.slow
def test_training_against_transformers(bench):
    rows = rows_of(bench("train", *TOY, "--seq-len", 512, "--rows", 2, "--peer", "transformers"))
    assert [row["side"] for row in rows] == ["ours", "transformers, packed", "transformers, padded"]
    assert len({round(row["loss"], 3) for row in rows}) == 1
    assert all(0.05 < row["peak GiB"] < 8 and row["tok/s"] > 0 for row in rows)


@pytest.mark.slow
def test_training_of_adapters_against_peft(bench):
    rows = rows_of(bench("train", *TOY, "--seq-len", 512, "--peer", "transformers", "--lora", 4))
    assert [row["side"] for row in rows] == ["ours", "transformers, packed"]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)


def test_simulation_says_the_same_as_transformers(bench):
    options = ("--model", "135m", "--scenes", 2, "--max-rounds", 3, "--turn", 6)
    ours, peer = rows_of(bench("simulate", *TOY, *options, "--peer", "transformers"))
    assert ours["scenes"] == peer["scenes"] == 2 and peer["same text"] == 1
    assert ours["spoken"] == peer["spoken"] == 2 * 3 * 6  # a turn has no end at random weights
    assert ours["read"] == ours["least to read"] > 0


def test_simulation_of_more_scenes_than_there_are(bench):
    options = ("--model", "135m", "--scenes", 41, "--max-rounds", 1, "--turn", 1, "--peer-scenes", 1)
    ours, one = rows_of(bench("simulate", *TOY, *options))
    assert (ours["scenes"], one["scenes"]) == (41, 1)


def test_llama_cpp(bench):
    pytest.importorskip("xllamacpp")
    file = os.environ.get("GGUF", "")
    if not file:
        pytest.skip("GGUF=FILE.gguf names no model")
    rows = rows_of(bench("decode", *TOY, "--peer", "llama.cpp", "--peer-model", file))
    assert rows[1]["side"] == "llama.cpp, GGUF" and rows[1]["decode tok/s"] > 0
    options = ("--model", "135m", "--scenes", 1, "--max-rounds", 5, "--turn", 3)  # its words make no sense
    _, peer = rows_of(bench("simulate", *TOY, *options, "--peer", "llama.cpp", "--peer-model", file))
    assert peer["scenes"] == 1 and 0 < peer["spoken"] <= 5 * 3 + 4 * 32


def test_json_goes_to_a_file_too(bench, tmp_path):
    code, out, _ = bench("machine", *TOY, "--json", tmp_path / "machine.json")
    assert code == 0 and (tmp_path / "machine.json").read_text() == out.splitlines()[-1] + "\n"


def test_what_is_known_when_stopped(monkeypatch, capsys):
    def measurements():
        for number, rate in enumerate((1.0, 10.0, 30.0, 20.0)):
            yield number, {"side": "ours"}, {"rate": rate}
            if number == 3:
                raise KeyboardInterrupt
            yield number, {"side": "peer"}, {"rate": rate * 2}
            if not number:
                yield number, {"side": "slow"}, {"rate": 4.0}

    rows, stopped = figures.collect(measurements())
    assert isinstance(stopped, KeyboardInterrupt)
    assert rows == [
        {"side": "ours", "rate": 20.0, "rounds": 3},
        {"side": "peer", "rate": 40.0, "rounds": 2, "ours / this": 0.5},
        {"side": "slow", "rate": 4.0, "rounds": 0, "ours / this": 5.0},  # its warm-up is all there is
    ]
    figures.report(SimpleNamespace(name="decode", model=None, toy=False, json=None), rows, "a processor")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == rows


def test_a_timeout_leaves_a_table():
    command = [sys.executable, "bench.py", "machine", "--toy", "--rounds", "100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "warm-up" in process.stderr.readline()
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in err
    assert json.loads(out.splitlines()[-1])["rows"][0]["rate"] > 0


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("decode", "--rounds", 0), "--rounds must be at least 1, not 0"),
        (("decode", "--batch", 1, 0), "--batch must be at least 1"),
        (("decode", "--toy", "--peer", "llama.cpp"), "--peer llama.cpp needs a GGUF file, not 135m"),
        (("train", "--peer", "llama.cpp"), "--peer transformers"),
        (("train", "--model", "DIR"), "train takes --model 135m, stage, 8b"),
        (("decode", "--model", "no-such-directory"), "no-such-directory"),
    ],
)
def test_errors_take_one_line(bench, args, reason):
    assert reason in usage_error(bench(*args))


def test_without_xllamacpp(bench, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    (tmp_path / "a.gguf").touch()
    result = bench("decode", "--toy", "--peer", "llama.cpp", "--peer-model", tmp_path / "a.gguf")
    assert "pip install -e .[bench]" in usage_error(result)


def test_a_difference_between_losses_is_an_error_after_the_table():
    def measurements():
        yield 0, {"side": "ours"}, {"rate": 1.0}
        raise UsageError("the losses differ")

    rows, stopped = figures.collect(measurements())
    assert len(rows) == 1 and "differ" in str(stopped)


@pytest.mark.slow
def test_every_line_of_the_gpu_script(tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run(["runs/gpu.sh", "--dry"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.stdout.count("== exit code 0 ") == 5, run.stdout + run.stderr
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["benchmark"] for line in lines] == ["kernels", "train", "decode", "simulate"]
    bars = (tmp_path / "bars.txt").read_text()
    assert "train, ours, tok/s" in bars and "toy" in bars and "met" not in bars
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bars.txt", "log", "results.jsonl"]


def test_int8_is_for_a_cpu_only(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "int8 is for a CPU only" in usage_error(bench("decode", *TOY, "--dtype", "int8"))
