#!/usr/bin/env bash
# Makes the bundled model: all 30 layers of SmolLM2-135M-Instruct are adapted for a moment, 20 of them with 960 of their 1,536
# neurons each are kept, and these are trained. Each step resumes if it is interrupted; run the script again.
#
#     recipes/bundled.sh WORK_DIR PACKED.jsonl.gz [PACKED.jsonl.gz ...]
#
# recipes/README.md says what PACKED holds. STEPS (default 4000) is the length of the training in updates of 4,096 tokens:
# some 5.5 s each on two quiet cores of an EPYC (Zen 4). The average of the weights is what is taken from it, so it can end anywhere.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$1
packed=("${@:2}")
steps=${STEPS:-4000}
mkdir -p "$work"
cd "$work"

[ -f stories.jsonl ] || gunzip -c "$here/stories.jsonl.gz" > stories.jsonl
[ -f prose.jsonl ] || {
  python "$here/corpus.py" "${packed[@]}" stories.jsonl --sources smollm2 "novel: Fairy" grimm novel austen mobydick enwiki \
    endless_sky wesnoth cfi sotu:0.3 web_bible:0.15 --without "$here/../src/fsdfm/assets/heldout.jsonl.gz" --out prose.part
  mv prose.part prose.jsonl
}
[ -d data ] || fsdfm prepare prose.jsonl --tokenizer smollm2 --vocab-size 12288 --out data
fsdfm adapt smollm2 --lora 16 --data data --out whole --context-length 256 --batch-size 8 --steps 125 --warmup-steps 13 \
  --learning-rate 2e-3 --ema-decay 0.8 --sample-every 0
[ -d merged ] || fsdfm merge whole/base whole merged
[ -d small ] || fsdfm prune merged small --data data --layers 20 --mlp-size 960

fsdfm pretrain --init small --frozen-share 0.33 --data data --out teacher --seed 9 --context-length 1024 --short-share 0.9 \
  --batch-size 4 --steps "$steps" --decay-steps 4000 --learning-rate 5e-4 --warmup-steps 40 \
  --final-fraction 0.05 --ema-decay 0.99 --no-ema-warmup --evaluate-every 400 --sample-every 0 --checkpoint-every 50 \
  --validation-sequences 16
fsdfm distill --teacher teacher --data data --out student --context-length 256 --batch-size 8 --steps 480 \
  --learning-rate 1e-3 --warmup-steps 20 --ema-decay 0.97 --evaluate-every 480 --sample-every 0 --checkpoint-every 50
[ -d bundled ] || fsdfm quantize student bundled --data data
grep -q temperature bundled/generation.json || sed -i 's/"draws": 8,/&\n  "temperature": 0.7,/' bundled/generation.json
