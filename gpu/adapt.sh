#!/usr/bin/env bash
# Train a model on: at 256 tokens, then at 1,024, then its joint head, then pack it. Resumable: call it again on the
# same machine until it says it is done. START is the model, by default the bundled one. Needs data prepared with its tokenizer in
# runs/gpu/data: what recipes/bundled.sh calls data.
#
#     OUT=/tmp/out gpu/adapt.sh
#     DEVICE=cpu STEPS=2 BATCH=2 OUT=/tmp/out gpu/adapt.sh      # rehearsal
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:?set OUT to a folder for the results}
start=${START:-src/fsdfm/assets/bundled} blocks=${BLOCKS:-4}
steps=${STEPS:-8000} batch=${BATCH:-128} work=runs/gpu
export PYTHONPATH=$PWD/src:$PWD/runs/packages
ends=$(($(date +%s) + ${SECONDS_EACH:-540}))
mkdir -p "$out"

run() { # a command of fsdfm, stopped in time; it goes on at the next call
  local left=$((ends - $(date +%s)))
  [ "$left" -gt 5 ] || { echo "Out of time: call again."; exit 0; }
  timeout -s INT "$left" python3 -m fsdfm "$@" --device "${DEVICE:-cuda}" --sample-every 0 || {
    [ $? -eq 130 ] || [ $? -eq 124 ] && { echo "Out of time: call again."; exit 0; }
    exit 1
  }
}

flow=(pretrain --source mask --frozen-share 0.33 --data "$work/data")
run "${flow[@]}" --init "$start" --out "$work/on256" --context-length 256 \
  --batch-size "$batch" --steps "$steps" --learning-rate 5e-4 --warmup-steps $((steps / 20)) \
  --ema-decay 0.999
run "${flow[@]}" --init "$work/on256" --out "$work/on1024" --context-length 1024 \
  --batch-size $((batch / 4 + 1)) --steps $((steps / 8 + 1)) --learning-rate 2e-4 \
  --warmup-steps $((steps / 100)) --ema-decay 0.99
run distill --data "$work/data" --teacher "$work/on1024" --out "$work/student" \
  --context-length 256 --batch-size "$batch" --steps $((steps / 8 + 1)) \
  --warmup-steps $((steps / 100)) --ema-decay 0.99
python3 -m fsdfm quantize "$work/student" "$work/packed" --bits blocks="$blocks" vocab_embed=6 joint=4 --data "$work/data"
sed -i 's/"draws": 8,/&\n  "temperature": 0.7,/' "$work/packed/generation.json"
cp -r "$work/packed" "$out"
for name in on256 on1024 student; do cp "$work/$name/metrics.jsonl" "$out/$name.jsonl"; done
echo "Done."
