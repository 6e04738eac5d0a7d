"""runs/setup.sh on machines that are not as they should be: one clear line each, exit code 2."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT


@pytest.fixture
def checkout(tmp_path):
    """A folder with what setup.sh reads, and a `bin` that comes first on PATH."""
    for name in ("setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copy(ROOT / "runs" / "setup.sh", tmp_path / "runs")
    (tmp_path / "bin").mkdir()
    return tmp_path


def program(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def setup(checkout, **env):
    """(exit code, stderr) of a script that sources setup.sh."""
    env = {**os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", **env}
    command = ["bash", "-c", f"source {checkout / 'runs' / 'setup.sh'}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_a_python_that_does_not_run_or_is_too_old(checkout):
    """A shim on PATH without a Python behind it, and one of an older version: say which one to name."""
    shim = program(checkout / "bin" / "shim", "exit 127")
    old = program(checkout / "bin" / "old", "echo 3.9 1")
    for python, why in ((shim, "does not run"), (old, "is Python 3.9, and 3.11 or newer is needed")):
        code, err = setup(checkout, PYTHON=str(python))
        assert code == 2 and err.startswith(f"error: {python} {why}") and err.count("\n") == 1
        assert "PYTHON=/path/to/python3" in err


def test_a_disk_that_is_nearly_full(checkout):
    """Said before anything is made."""
    program(checkout / "bin" / "df", "echo header; echo disk 1 1 102400 99% /")
    code, err = setup(checkout)
    assert code == 2 and err.startswith("error: only 100 MB free") and err.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_an_index_without_the_packages_then_no_network(checkout):
    """pip's own first error and where the rest is; once installed, pip is not asked again."""
    calls = checkout / "calls"
    python = checkout / ".venv" / "bin" / "python"
    fails = "case $* in *install*) echo 'ERROR: No matching distribution for torch'; exit 1;; esac"
    program(python, fails)
    code, err = setup(checkout)
    assert code == 2 and "error: pip could not install: ERROR: No matching distribution for torch" in err
    assert "install.log" in err and "pip config list" in err
    program(python, f"echo $* >> {calls}")
    assert setup(checkout)[0] == 0 and "install" in calls.read_text()
    calls.unlink()
    assert setup(checkout) == (0, "") and not calls.exists()
