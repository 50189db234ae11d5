#!/usr/bin/env bash
# Makes the bundled model and its held-out text from SmolLM2-135M-Instruct. Each step resumes if it is
# interrupted; run the script again.
#
#     recipes/bundled.sh WORK_DIR PACKED.jsonl.gz [PACKED.jsonl.gz ...]
#
# recipes/README.md says what PACKED holds and how to rebuild it. STEPS (default 1000) is the length of the
# adaptation in updates of 2,048 tokens: the more, the better it writes (2 s each on two cores). Half of the text of the
# second stage are stories.jsonl.gz, which stories.py wrote; stories.py WORK_DIR/stories.jsonl adds more. The third
# stage has them beside fairy tales, the fourth and the fifth beside all of the prose.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$1
packed=("${@:2}")
steps=${STEPS:-1000}
mkdir -p "$work"
cd "$work"

joint_head() { # TEACHER DATA OUT UPDATES
  fsdfm distill --teacher "$1" --data "$2" --out "$3" --context-length 256 --batch-size 8 \
    --steps "$4" --learning-rate 1e-3 --warmup-steps 20 --ema-decay 0.97 --evaluate-every "$4" \
    --sample-every 0 --checkpoint-every 50
}
few_bits() { # STUDENT DATA OUT TEMPERATURE
  [ -d "$3" ] || fsdfm quantize "$1" "$3" --bits blocks=5 vocab_embed=6 joint=4 --data "$2"
  grep -q temperature "$3/generation.json" || sed -i "s/\"draws\": 8/&, \"temperature\": $4/" "$3/generation.json"
}

[ -f prose.jsonl ] || {
  python "$here/corpus.py" "${packed[@]}" --sources austen novel mobydick grimm cfi enwiki \
    endless_sky wesnoth sotu:0.4 web_bible:0.15 --out prose.part
  mv prose.part prose.jsonl
}
[ -d data ] || fsdfm prepare prose.jsonl --tokenizer smollm2 --vocab-size 12288 --out data
fsdfm adapt smollm2 --data data --out teacher256 --layers 0,1,2,3,7,10,14,17,21,24,28,29 --steps "$steps" --batch-size 8 \
  --learning-rate 6e-4 --ema-decay 0.997 --evaluate-every 200 --sample-every 400 --checkpoint-every 100
python "$here/heldout.py" data heldout.jsonl.gz

[ -f stories.jsonl ] || gunzip -c "$here/stories.jsonl.gz" > stories.jsonl
[ -f mixed.jsonl ] || {
  python "$here/corpus.py" "${packed[@]}" stories.jsonl --sources smollm2 austen:0.07 novel:0.07 \
    mobydick:0.07 grimm:0.07 cfi:0.07 enwiki:0.07 endless_sky:0.07 wesnoth:0.07 sotu:0.03 \
    web_bible:0.01 --without heldout.jsonl.gz --out mixed.part
  mv mixed.part mixed.jsonl
}
[ -d mixed ] || fsdfm prepare mixed.jsonl --tokenizer data/tokenizer.json --out mixed
fsdfm pretrain --init teacher256 --source mask --frozen-share 0.33 --data mixed --out simple256 \
  --context-length 256 --batch-size 8 --steps 1000 --learning-rate 5e-4 --warmup-steps 30 \
  --ema-decay 0.995 --evaluate-every 200 --sample-every 0 --checkpoint-every 100
[ -f tales.jsonl ] || {
  python "$here/corpus.py" "${packed[@]}" stories.jsonl --sources smollm2 austen:0.15 "novel: Fairy" novel:0.2 \
    mobydick:0.15 grimm enwiki:0.15 --without heldout.jsonl.gz --out tales.part
  mv tales.part tales.jsonl
}
[ -d tales ] || fsdfm prepare tales.jsonl --tokenizer data/tokenizer.json --out tales
fsdfm pretrain --init simple256 --source mask --frozen-share 0.33 --data tales --out tales256 \
  --context-length 256 --batch-size 8 --steps 1300 --learning-rate 5e-4 --warmup-steps 30 \
  --ema-decay 0.997 --evaluate-every 300 --sample-every 0 --checkpoint-every 100
fsdfm pretrain --init tales256 --source mask --frozen-share 0.33 --data tales --out tales1024 \
  --context-length 1024 --batch-size 2 --steps 60 --learning-rate 2e-4 --warmup-steps 6 \
  --ema-decay 0.93 --evaluate-every 60 --sample-every 0 --checkpoint-every 40 --validation-sequences 8
joint_head tales1024 tales talesstudent 220
few_bits talesstudent tales talesbundle 0.8

# The fourth stage went on from the rounded weights. It was planned for 1,700 updates and stopped at 970.
[ -f long.jsonl ] || {
  python "$here/corpus.py" "${packed[@]}" stories.jsonl --sources smollm2 "novel: Fairy" grimm novel austen \
    mobydick:0.7 enwiki:0.7 endless_sky:0.5 wesnoth cfi:0.5 sotu:0.03 --without heldout.jsonl.gz --out long.part
  mv long.part long.jsonl
}
[ -d long ] || fsdfm prepare long.jsonl --tokenizer data/tokenizer.json --out long
fsdfm pretrain --init talesbundle --source mask --frozen-share 0.33 --data long --out long256 \
  --context-length 256 --batch-size 8 --steps 970 --decay-steps 1700 --learning-rate 3e-4 --warmup-steps 40 \
  --final-fraction 0.05 --ema-decay 0.995 --no-ema-warmup --evaluate-every 200 --sample-every 0 --checkpoint-every 50
fsdfm pretrain --init long256 --source mask --frozen-share 0.33 --data long --out calm256 \
  --context-length 256 --batch-size 8 --steps 120 --learning-rate 1.4e-4 --warmup-steps 5 --final-fraction 0.05 \
  --ema-decay 0.95 --no-ema-warmup --evaluate-every 120 --sample-every 0 --checkpoint-every 20
fsdfm pretrain --init calm256 --source mask --frozen-share 0.33 --data long --out long1024 \
  --context-length 1024 --batch-size 2 --steps 60 --learning-rate 1e-4 --warmup-steps 6 \
  --ema-decay 0.93 --evaluate-every 60 --sample-every 0 --checkpoint-every 20 --validation-sequences 8
joint_head long1024 long longstudent 120
few_bits longstudent long longbundle 0.7

# So did the fifth, on still more of the prose. It was planned for 2,600 updates and stopped at 1,224; the rate fell over the
# updates of 1,024 tokens.
[ -f more.jsonl ] || {
  python "$here/corpus.py" "${packed[@]}" stories.jsonl --sources smollm2 "novel: Fairy" grimm novel austen mobydick enwiki \
    endless_sky wesnoth cfi sotu:0.3 web_bible:0.15 --without heldout.jsonl.gz --out more.part
  mv more.part more.jsonl
}
[ -d more ] || fsdfm prepare more.jsonl --tokenizer data/tokenizer.json --out more
fsdfm pretrain --init longbundle --frozen-share 0.33 --data more --out more256 --seed 5 \
  --context-length 256 --batch-size 16 --steps 1224 --decay-steps 2600 --learning-rate 4e-4 --warmup-steps 40 \
  --final-fraction 0.05 --ema-decay 0.995 --no-ema-warmup --evaluate-every 200 --sample-every 0 --checkpoint-every 50
fsdfm pretrain --init more256 --frozen-share 0.33 --data more --out teacher --seed 6 \
  --context-length 1024 --batch-size 4 --steps 120 --learning-rate 2.5e-4 --warmup-steps 5 --final-fraction 0.05 \
  --ema-decay 0.95 --no-ema-warmup --evaluate-every 120 --sample-every 0 --checkpoint-every 20 --validation-sequences 8
joint_head teacher more student 120
few_bits student more bundled 0.7
