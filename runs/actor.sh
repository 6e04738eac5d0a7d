#!/usr/bin/env bash
# The actor that is shipped: a LoRA adapter over SmolLM2-135M-Instruct, trained on the bundled stories (32 training scenes;
# the 8 held-out ones are never seen). Safe to run again: it goes on where it stopped.
#
#   runs/actor.sh                                    out/actor/smollm2, evaluated on the held-out scenes
#   runs/actor.sh MODEL                              over another model: a folder, a GGUF file, a Hub id
#   runs/actor.sh MODEL --data data/stage BOOKS ...  on more; further arguments go to train.py (--without-thoughts, --epochs)
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""

model=${1:-smollm2}
name=$(basename "$model" .gguf)
shift || true
python train.py --model "$model" --lora 16 --seq-len 4096 --batch-size 1 --epochs 2 --lr 1e-3 --eval-every 21 \
    --eval-rows 6 --save-every 14 --out "out/actor/$name" --resume "$@"
