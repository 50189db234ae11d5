#!/usr/bin/env bash
# Texts of one model at every budget, to be judged elsewhere: the judge is too large to be carried.
#
#     OUT=/tmp/out MODEL=DIR gpu/texts.sh                      # MODEL: default the bundled model
#     DEVICE=cpu SAMPLES=2 STEPS="1 2" OUT=/tmp/out gpu/texts.sh             # rehearsal
#
# Then, with the judge at hand:
#     fsdfm evaluate --model DIR --steps 1 --reference "1024 steps=OUT/1024.jsonl" ... --out report
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:?set OUT to a folder for the results}
export PYTHONPATH=$PWD/src:$PWD/runs/packages
mkdir -p "$out"
for steps in ${STEPS:-1 2 4 8 16 64 1024}; do
  python3 -m fsdfm generate ${MODEL:+--model "$MODEL"} --device "${DEVICE:-cuda}" --json \
    --steps "$steps" --num-samples "${SAMPLES:-64}" --batch-size "${BATCH:-64}" --temperature 1 \
    >"$out/$steps.part"
  mv "$out/$steps.part" "$out/$steps.jsonl"
done
