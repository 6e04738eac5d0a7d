#!/usr/bin/env bash
# CoSER-8B: LLaMA-3.1-8B on one node of 8 GPUs, with the settings the paper states (lr 1e-5, 16,384 tokens a row, 8 epochs,
# 48 rows a step, half of the tokens general SFT data). What it does not state is train.py's default: AdamW (0.9, 0.95), 3%
# warm-up and a cosine, no weight decay, best-fit packing with documents kept apart.
#
#   BOOKS=books/ GENERAL=general.jsonl runs/train_8b.sh                       MODEL, OUT, GPUS: see below
#   BOOKS=books/ GENERAL=general.jsonl runs/train_8b.sh --without-thoughts    the ablation; further arguments go to train.py
#   BOOKS=books/ GENERAL=general.jsonl runs/train_8b.sh --dry-run 8           parameters, memory, tokens and steps, no more
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800 # seconds from Ctrl-C to the end of the step and its checkpoint; torchrun's own are 30

: "${BOOKS:?the CoSER books: a directory, or files without spaces in their names}"
: "${GENERAL:?general SFT data, JSONL of messages; half of the tokens come from it}"
launch=(torchrun --nproc_per_node "${GPUS:-8}" --max-restarts 3)
case " $* " in *" --dry-run"*) launch=(python) ;; esac

"${launch[@]}" train.py --model "${MODEL:-meta-llama/Llama-3.1-8B-Instruct}" --data $BOOKS --mix "$GENERAL:0.5" \
    --out "${OUT:-out/coser-8b}" --seq-len 16384 --batch-size 48 --epochs 8 --lr 1e-5 \
    --dtype bfloat16 --recompute full --compile --resume "$@"
