#!/usr/bin/env bash
# Installs what tests need and runs all but those marked slow; --slow adds them. More arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test

marks=(-m "not slow")
if [ "${1:-}" = --slow ]; then
    marks=()
    shift
fi
ruff check .
ruff format --check .
python -m pytest "${marks[@]}" "$@"
