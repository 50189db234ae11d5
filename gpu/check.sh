#!/usr/bin/env bash
# Tests and a first look at generation on a GPU machine. DEVICE=cpu rehearses it.
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
out=${OUT:?set OUT to a folder for the results}
python3 -m pip install --quiet --no-deps --no-build-isolation . 2>"$out/pip.log" || {
  export PYTHONPATH=$PWD/src
}
fsdfm() { python3 -m fsdfm "$@"; }
for steps in 1 8 1024; do
  fsdfm generate --steps "$steps" --seed 1 --num-samples 4 --batch-size 4 --device "$device" --json \
    >"$out/generate-$device-$steps.jsonl"
done
fsdfm generate --steps 8 --seed 1 --device cpu --json >"$out/generate-cpu-8.jsonl"
python3 -m pytest -x --durations=10 2>&1 | tee "$out/pytest.log"
