#!/usr/bin/env bash
# CoSER-70B: LLaMA-3.1-70B on several nodes of 8 GPUs, settings as in train_8b.sh. Run it on every node, the same each time:
#
#   NODES=6 HEAD=first-node:29500 BOOKS=books/ GENERAL=general.jsonl runs/train_70b.sh
#   ... runs/train_70b.sh --without-thoughts     the ablation; further arguments go to train.py
#   ... runs/train_70b.sh --dry-run 48           parameters, memory, tokens and steps, no more
#
# 48 ranks take a row each. SHARD: the ranks over which one copy of the model is spread (all by default); with 24 of 48,
# there are two copies, and only their gradients cross between the two groups.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800 # seconds from Ctrl-C to the end of the step and its checkpoint; torchrun's own are 30

: "${BOOKS:?the CoSER books: a directory, or files without spaces in their names}"
: "${GENERAL:?general SFT data, JSONL of messages; half of the tokens come from it}"
case " $* " in
*" --dry-run"*) launch=(python) ;;
*) launch=(torchrun --nnodes "${NODES:-6}" --nproc_per_node "${GPUS:-8}" --max-restarts 3 --rdzv-backend c10d
    --rdzv-id coser-70b --rdzv-endpoint "${HEAD:?the first node, HOST:PORT}") ;;
esac

"${launch[@]}" train.py --model "${MODEL:-meta-llama/Llama-3.1-70B-Instruct}" --data $BOOKS --mix "$GENERAL:0.5" \
    --out "${OUT:-out/coser-70b}" --seq-len 16384 --batch-size 48 --epochs 8 --lr 1e-5 \
    ${SHARD:+--shard-ranks "$SHARD"} --dtype bfloat16 --recompute full --compile --resume "$@"
