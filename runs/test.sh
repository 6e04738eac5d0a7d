#!/usr/bin/env bash
# Installs what tests need and runs all tests but those marked slow. More arguments go to pytest.
#   runs/test.sh --slow           with the slow ones
#   runs/test.sh --isa avx2       the engine's tests as on a processor with AVX2 only; `default`: without vector extensions
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test smollm2

marks=(-m "not slow")
if [ "${1:-}" = --slow ]; then
    marks=()
    shift
fi
if [ "${1:-}" = --isa ]; then
    # torch, oneDNN and MKL read these once, so a process of its own; they can only take instructions away
    export ATEN_CPU_CAPABILITY=${2:?--isa avx2, or --isa default} ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
    shift 2
    exec python -m pytest "${marks[@]}" tests/test_cpu.py tests/test_engine.py tests/test_sampling.py tests/test_streaming.py tests/test_model.py "$@"
fi
ruff check .
ruff format --check .
python -m pytest "${marks[@]}" "$@"
