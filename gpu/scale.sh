#!/usr/bin/env bash
# Pretraining at 0.17B for a few updates, each way: what share of the device's bfloat16 peak it reaches (aim:
# 40 %), and whether the sharded path runs on a GPU (FSDP2 over one process). Needs prepared data in runs/gpu/data;
# its vocabulary decides how much of the work is the head's (GPT-2's is the paper's).
# $OUT/NAME.jsonl are the metrics of a way, $OUT/NAME.log what it said, $OUT/table.md the medians.
#
#     OUT=/tmp/out gpu/scale.sh
#     DEVICE=cpu PRESET=tiny LENGTH=32 BATCHES=4 STEPS=12 EVERY=2 PEAK=0.1 OUT=/tmp/out gpu/scale.sh   # rehearsal
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:?set OUT to a folder for the results}
export PYTHONPATH=$PWD/src:$PWD/runs/packages
read -ra batches <<<"${BATCHES:-32 64}"
ends=$(($(date +%s) + ${SECONDS_EACH:-560}))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
common=(pretrain --data runs/gpu/data --device "${DEVICE:-cuda}" --preset "${PRESET:-0.17B}" --sample-every 0
  --context-length "${LENGTH:-1024}" --steps "${STEPS:-60}" --log-every "${EVERY:-10}" --validation-sequences 1
  ${PEAK:+--peak-tflops "$PEAK"})

way() { # NAME STARTER... -- FLAGS...; stopped after 150 seconds or when the ten minutes are over
  local name=$1 start=() left=$((ends - $(date +%s)))
  shift
  while [ "$1" != -- ]; do start+=("$1") && shift; done
  shift
  [ "$left" -gt 20 ] || { echo "$name: no time left" && return; }
  timeout -s INT -k 20 $((left < 150 ? left : 150)) python3 "${start[@]}" -m fsdfm "${common[@]}" \
    --out "$work/$name" "$@" >"$out/$name.log" 2>&1 || echo "$name: not finished, see $name.log"
  cp "$work/$name/metrics.jsonl" "$out/$name.jsonl" 2>/dev/null || true
  rm -rf "${work:?}/$name"
}

for batch in "${batches[@]}"; do
  way "plain-$batch" -- --batch-size "$batch"
  way "compiled-$batch" -- --batch-size "$batch" --compile
done
sharded=(-m torch.distributed.run --standalone --nproc-per-node 1)
way "sharded-${batches[0]}" "${sharded[@]}" -- --batch-size "${batches[0]}" --sharding fsdp
way "sharded-compiled-${batches[0]}" "${sharded[@]}" -- --batch-size "${batches[0]}" --sharding fsdp --compile
way "recomputed-${batches[-1]}" -- --batch-size "${batches[-1]}" --recompute

python3 - "$out" <<'PY' | tee "$out/table.md"
import json, pathlib, statistics, sys

print("| way | updates | tokens a second | share of the peak | last loss |\n|---|---|---|---|---|")
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.jsonl")):
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if "loss" in line]
    warm = lines[2:] or lines  # the first ones hold the start and what is compiled
    if warm:
        rate, share = (statistics.median(x.get(k, 0) for x in warm) for k in ("tokens_per_second", "utilisation"))
        print(f"| {path.stem} | {lines[-1]['step']} | {rate:.0f} | {share:.1%} | {lines[-1]['loss']:.4f} |")
PY
