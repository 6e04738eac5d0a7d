#!/usr/bin/env bash
# The whole loop once: train the stage actor, put it on stage, judge it. Safe to run again: a trained actor is kept.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""

scene=the-last-ferry/1
play=out/plays/demo-$(date +%Y%m%d-%H%M%S)
say() { printf '\n== %s\n' "$*"; }

say "1. Training the stage actor on the bundled scenes (torchrun train.py)"
torchrun train.py --resume

say "2. On stage: $scene, one of the scenes it was trained on (python simulate.py --scene $scene)"
python simulate.py --scene "$scene" --max-rounds 10 --temperature 0.7 --out "$play"

say "3. The judge: how close to the original? (python judge.py $play)"
python judge.py "$play"

cat <<END

== What was made
   out/stage/final        the trained actor, a Hugging Face checkpoint
   out/stage/loss.png     its loss curve; out/stage/log.jsonl has every step
   $play    what was played, and verdicts.jsonl beside it

== What to try next (after: source .venv/bin/activate)
   python simulate.py --list                           the other scenes
   python simulate.py --scene the-last-ferry/5         a scene it has never seen
   python generate.py --chat --character "Hanne Brod"  meet a character
   python simulate.py --scene $scene --actor openai:MODEL   a large model in its place (OPENAI_API_KEY)
   The README goes on from here to real weights.
END
