"""Every command that the README gives: the script is there, and knows each flag."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

TEXTS = ("README.md", "docs/reading.md", "docs/reproduction.md")


def commands():
    """(script or module, its flags) of each indented command line; shell variables and comments aside."""
    found = {}
    for name in TEXTS:
        text = (ROOT / name).read_text(encoding="utf-8") if (ROOT / name).exists() else ""
        for line in re.findall(r"^    (.+)$", text.replace("\\\n", " "), re.MULTILINE):
            line = line.split("  #")[0]
            match = re.search(r"\b(?:python|torchrun)\b(.*)", line)
            if match and (script := re.search(r"(?:-m ([\w.]+)|(\w+\.py))", match[1])):
                flags = re.findall(r"(?<= )--[a-z-]+", match[1].split(script[0], 1)[1])
                found.setdefault(script[1] or script[2], set()).update(flags)
            for shell in re.findall(r"runs/\w+\.sh", line):
                found.setdefault(shell, set())
    return found


@pytest.mark.parametrize(("script", "flags"), sorted(commands().items()))
def test_a_command_of_the_readme_exists(script, flags):
    """Scripts answer --help with every flag that is used; shell scripts are valid bash."""
    if script.endswith(".sh"):
        subprocess.run(["bash", "-n", ROOT / script], check=True)
        return
    if script in ("venv", "pip"):
        return
    command = [sys.executable, script] if script.endswith(".py") else [sys.executable, "-m", script]
    said = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {flag for flag in flags if flag not in said}
