#!/usr/bin/env bash
# Speed and memory of sampling on a GPU: engine, published sampler, autoregressive model.
# Each part writes $OUT/PART/results.{json,md} as it goes, and is stopped after its share of ten minutes.
#
#     DEVICE=cpu SHAPES=tiny BATCHES="1 2" STEPS="1 2" LENGTH=32 OUT=/tmp/out gpu/bench.sh  # rehearsal
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:?set OUT to a folder for the results}
export PYTHONPATH=$PWD/src:$PWD/runs/packages
mkdir -p "$out"
read -ra batches <<<"${BATCHES:-1 2 4 8 16 32 64}"
read -ra steps <<<"${STEPS:-1 2 4 8}"
read -ra shapes <<<"${SHAPES:-0.17B 1.3B}"

part() { # SECONDS NAME FLAGS...
  local seconds=$1 name=$2
  shift 2
  timeout --signal=INT --kill-after=10 "$seconds" python3 benchmarks/sampling.py \
    --device "${DEVICE:-cuda}" --length "${LENGTH:-1024}" --peak-tflops 989 --out "$out/$name" "$@" \
    2>"$out/$name.log" || echo "$name: not finished, see $name.log"
}

for shape in "${shapes[@]}"; do
  part 190 "$shape" --shapes "$shape" --batches "${batches[@]}" --steps "${steps[@]}" \
    --sides reference-bf16 engine --repeats 3
done
# The last budget alone: neither float32 nor the autoregressive model is there to be swept.
part 190 others --shapes "${shapes[@]}" --batches "${batches[0]}" "${batches[-1]}" \
  --steps "${steps[-1]}" --repeats 1 engine=3 --sides \
  reference-float32 engine-float32 autoregressive-float32 autoregressive-bf16 engine
