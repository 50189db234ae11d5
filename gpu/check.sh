#!/usr/bin/env bash
# A first look at generation on a GPU machine, then the tests (those that need packages which the machine
# lacks fail at import, and do not stop the others).
#
#     DEVICE=cpu SAMPLES=1 OUT=/tmp/out gpu/check.sh          # rehearsal
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
out=${OUT:?set OUT to a folder for the results}
export PYTHONPATH=$PWD/src:$PWD/runs/packages
mkdir -p "$out"
for steps in 1 8 1024; do
  python3 -m fsdfm generate --steps "$steps" --seed 1 --num-samples "${SAMPLES:-4}" --batch-size 4 \
    --device "$device" --json >"$out/generate-$device-$steps.jsonl"
done
python3 -m fsdfm generate --steps 8 --seed 1 --device cpu --precision float32 --json \
  >"$out/generate-cpu-8.jsonl"
python3 -m pytest --continue-on-collection-errors --durations=10 2>&1 | tee "$out/pytest.log"
