# Sourced by the other scripts: goes to the checkout, makes .venv or reuses it, installs from the pinned constraints.
#   source runs/setup.sh [extra]         PYTHON=python3.11 names another interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:-}
python=${PYTHON:-python3}
if [ ! -x .venv/bin/pip ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        { echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python" >&2; exit 2; }
    echo "making .venv ..." >&2
    "$python" -m venv --clear .venv
fi
PATH="$PWD/.venv/bin:$PATH"

# what is installed is remembered by its recipe, so that a second run needs no network
recipe=$(cat setup.py constraints.txt | cksum | tr ' ' '-')
stamp=.venv/.installed-${extra:-core}-$recipe
if [ ! -e "$stamp" ]; then
    echo "installing into .venv (PyTorch is large; this is the only slow part) ..." >&2
    PIP_CONSTRAINT="$PWD/constraints.txt" .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
    touch "$stamp"
fi
