#!/usr/bin/env bash
# Makes the bundled model and its held-out text: three hours and a half on two shared cores with AVX512-BF16.
# Each step resumes if it is interrupted; run the script again.
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
common=(--data data --evaluate-every 1000 --sample-every 1000 --checkpoint-every 250)
fsdfm pretrain "${common[@]}" --out teacher256 --preset tiny --context-length 256 \
  --batch-size 16 --steps 5000 --learning-rate 2e-3 --warmup-steps 200 --ema-decay 0.998
fsdfm pretrain "${common[@]}" --out teacher256-on --init teacher256 --context-length 256 \
  --batch-size 16 --steps 7000 --learning-rate 2e-3 --warmup-steps 200 --ema-decay 0.998
common=(--data data --evaluate-every 200 --sample-every 200 --checkpoint-every 50)
fsdfm pretrain "${common[@]}" --out teacher --init teacher256-on --context-length 1024 \
  --batch-size 4 --steps 500 --learning-rate 1e-3 --warmup-steps 20 --ema-decay 0.99
fsdfm distill "${common[@]}" --out student --teacher teacher --context-length 256 \
  --batch-size 16 --steps 1000 --learning-rate 2e-3 --warmup-steps 30 --ema-decay 0.99
python "$here/bundle.py" student bundled
python "$here/heldout.py" data heldout.jsonl.gz
