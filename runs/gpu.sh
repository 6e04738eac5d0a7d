#!/usr/bin/env bash
# Every measurement on one GPU, in at most eight minutes: kernel tests, kernels, training, decoding, a simulation.
#
#   runs/gpu.sh           at the sizes of the bars below; without CUDA as with --dry
#   runs/gpu.sh --dry     every line of it at toy sizes, on any machine
#
# PYTHON (python3) needs torch; where it has none, .venv is made. Each part has its own limit, and one that fails
# or is stopped does not end the others. In OUT (out/gpu): log, as it comes; results.jsonl, a line of JSON from each
# benchmark as it ends; bars.txt, measured against wanted. TRAIN: more flags for the training step, as --compile.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} out=${OUT:-out/gpu}
if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    source runs/setup.sh test || exit 2
    set +e
    PYTHON=.venv/bin/python
fi
mkdir -p "$out" || exit 2
rm -f "$out"/{log,results.jsonl,bars.txt}
export PYTHONUNBUFFERED=1
if [ "${1:-}" = --dry ] || ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    size=toy
    tests=(-k "rms_norm and twin") kernels=(--toy) decode=(--toy --batch 1 2 3) train=(--toy --dtype bfloat16)
    simulate=(--toy --turn 2 --scenes 42 --max-rounds 2 --peer-scenes 2)
else
    size=real tests=() kernels=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && tests=(-n 6) # compiling takes most of the time
    decode=(--batch 1 32 128) train=(--rows 4)
    simulate=(--scenes 200 --max-rounds 14 --peer-scenes 4)
fi

# part LIMIT COMMAND...: at most LIMIT seconds, and never beyond the eight minutes
part() {
    local limit=$1 left=$((470 - SECONDS))
    shift
    [ "$left" -lt "$limit" ] && limit=$left
    printf '\n== %s s: %s, limit %s s\n' "$SECONDS" "$*" "$limit"
    if [ "$limit" -lt 1 ]; then
        echo "no time left"
        return
    fi
    timeout -k 8 -s "${signal:-TERM}" "$limit" "$PYTHON" "$@" 2>&1 # SIGTERM: the table of what is known follows
    echo "== exit code $? (0: all of it; 124: stopped at its limit), at $SECONDS s"
}

# bench NAME LIMIT FLAGS...: a part, its line of JSON, and the table of bars so far
bench() {
    local name=$1 limit=$2
    shift 2
    part "$limit" bench.py "$name" --json "$out/line" "$@"
    [ -e "$out/line" ] && cat "$out/line" >>"$out/results.jsonl" && rm "$out/line"
    "$PYTHON" - "$out/results.jsonl" "$size" <<'END' | tee "$out/bars.txt"
import json, os, sys

BARS = [  # benchmark, what the row has, figure, wanted (at most: negative)
    ("kernels", {"kernel": "attention", "side": "sdpa cudnn", "direction": "forward"}, "ours / this", 0.75),
    ("kernels", {"kernel": "attention", "side": "sdpa cudnn", "direction": "backward"}, "ours / this", 0.65),
    ("kernels", {"kernel": "attention, packed", "side": "sdpa cudnn, dense"}, "ours / this", 2),
    ("kernels", {"kernel": "RMSNorm", "side": "ours", "direction": "forward"}, "of the limit", 0.85),
    ("kernels", {"kernel": "RMSNorm", "side": "ours", "direction": "backward"}, "rate", 2500),
    ("train", {"side": "ours"}, "tok/s", 14_500),
    ("train", {"side": "ours"}, "MFU", 0.578),
    ("decode", {"batch": 1}, "decode tok/s", 250),
    ("decode", {"batch": 32}, "decode tok/s", 0),
    ("decode", {"batch": 128}, "decode tok/s", 9_000),
    ("simulate", {"side": "ours"}, "scenes", 200),
    ("simulate", {"side": "ours"}, "seconds", -150),
    ("simulate", {"side": "ours, one by one"}, "ours / this", 10),
]
lines = open(sys.argv[1]).readlines() if os.path.exists(sys.argv[1]) else []
found = {line["benchmark"]: line["rows"] for line in map(json.loads, lines)}
print(f"{'bar':78} {'wanted':>10} {'measured':>10}")
for name, wanted, figure, bar in BARS:
    for row in [row for row in found.get(name, []) if wanted.items() <= row.items()] or [{}]:
        labels = wanted | {key: row[key] for key in ("shape", "direction") if key in row}
        label, value = ", ".join(map(str, [name, *labels.values(), figure])), row.get(figure)
        met = "met" if value is not None and (value >= bar if bar > 0 else value <= -bar) else "MISSED"
        met = "" if value is None or not bar else "toy" if sys.argv[2] == "toy" else met
        print(f"{label:78} {abs(bar) or '':>10} {'none' if value is None else f'{value:.4g}':>10} {met}")
END
}

{
    signal=INT part 110 -m pytest tests/test_kernels.py -q -p no:cacheprovider "${tests[@]}"
    bench kernels 70 --rounds 2 "${kernels[@]}"
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True bench train 85 --model 8b --rounds 3 "${train[@]}" ${TRAIN:-}
    bench decode 65 --model 8b --rounds 1 "${decode[@]}"
    bench simulate 150 --model 8b --rounds 1 "${simulate[@]}"
    echo "== $SECONDS s in all; $out has log, results.jsonl and bars.txt"
} 2>&1 | tee "$out/log"
