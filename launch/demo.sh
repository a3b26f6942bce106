#!/usr/bin/env bash
# `make demo`: extend the lab model's window from 256 to 2,048 tokens and show the difference.
# Corpus, evaluation before, `deepspeed train.py recipe=pi`, evaluation after, report. On two CPU
# cores about five minutes; a second call goes on where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=outputs/demo
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
measure=(held_out=data/lab/held_out "lengths=[256,512,1024,2048]" "tasks=[perplexity,passkey]"
  "perplexity.protocols=[sliding_new_tokens,single_pass_buckets]" perplexity.stride=128 samples=4)

bash lab/corpus.sh
mkdir -p outputs
python evaluate.py "${measure[@]}" label="base" out="$out/base" > "$out.base.log" 2>&1 &
first=$!
python evaluate.py "${measure[@]}" rope=pi label="PI untrained" out="$out/untrained"
wait $first
rm "$out.base.log"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
deepspeed --num_gpus "$((gpus > 0 ? gpus : 2))" --master_port "$port" \
  train.py recipe=pi recipe_model=pi_lab_demo logger=none run_dir="$out/pi"
python evaluate.py "${measure[@]}" model="$out/pi/hf" label="PI after 200 steps" out="$out" \
  "compare=[$out/base,$out/untrained]"
