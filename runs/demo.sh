#!/usr/bin/env bash
# The whole loop once: watch the shipped actor play a scene it has never read, judge it, watch a training. Safe to run again.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "" smollm2

scene=the-last-ferry/5 # held out: the actor was never trained on it
play=out/plays/demo-$(date +%Y%m%d-%H%M%S)
say() { printf '\n== %s\n' "$*"; }

say "1. On stage: $scene, a scene the actor has never read (python simulate.py --scene $scene)"
python simulate.py --scene "$scene" --max-rounds 8 --out "$play"

say "2. The judge: how close to the scene as it was written? (python judge.py $play)"
python judge.py "$play"

say "3. A training one can watch: the small stage actor from nothing, 60 steps (torchrun train.py)"
torchrun train.py --max-steps 60 --eval-every 20 --out out/demo --resume

cat <<END_OF_TEXT

== What was made
   $play    what was played, and verdicts.jsonl beside it
   out/demo/final         the small actor, a Hugging Face checkpoint; out/demo/loss.png its loss curve

== What to try next (after: source .venv/bin/activate)
   python simulate.py --list                                other scenes
   python generate.py --chat --character "Hanne Brod"       meet a character
   python simulate.py --scene $scene --actor openai:MODEL   a large model in its place (OPENAI_API_KEY)
   bash runs/actor.sh                                       train the actor that you have just seen
   The README goes on from here to real weights.
END_OF_TEXT
