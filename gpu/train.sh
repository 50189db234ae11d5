#!/usr/bin/env bash
# Teacher and student on a GPU, resumable over calls. Needs prepared data in runs/gpu/data.
#
#     DEVICE=cpu PRESET=tiny STEPS=20 OUT=/tmp/out gpu/train.sh      # rehearsal
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
out=${OUT:?set OUT to a folder for the results}
steps=${STEPS:-20000}
work=runs/gpu
export PYTHONPATH=$PWD/src:$PWD/runs/packages
mkdir -p "$out"
common=(--data "$work/data" --device "$device" --batch-size "${BATCH:-32}")
python3 -m fsdfm pretrain "${common[@]}" --out "$work/teacher" --preset "${PRESET:-small}" \
  --context-length 1024 --steps "$steps" --learning-rate 1e-3 --warmup-steps $((steps / 20))
python3 -m fsdfm distill "${common[@]}" --out "$work/student" --teacher "$work/teacher" \
  --steps $((steps / 4)) --warmup-steps $((steps / 100))
for run in teacher student; do
  mkdir -p "$out/$run"
  cp "$work/$run"/{config.json,model.safetensors,tokenizer.json,generation.json,metrics.jsonl} \
    "$out/$run"
done
