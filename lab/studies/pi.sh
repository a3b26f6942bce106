#!/usr/bin/env bash
# The lab table of docs/results.md: Position Interpolation and direct fine-tuning, 256 -> 2,048, after
# 0, 50, 100 and 200 steps. About an hour on two CPU cores. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=outputs/lab
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
text=(held_out=data/lab/held_out perplexity.stride=128 perplexity.document_tokens=4096
  "perplexity.protocols=[sliding_new_tokens,single_pass_buckets]")
measure=("${text[@]}" "lengths=[256,512,1024,2048]" "tasks=[perplexity,k_max]"
  k_max.points=32 samples=10)

bash lab/corpus.sh
mkdir -p "$out"
python evaluate.py "${text[@]}" "lengths=[256]" "tasks=[perplexity,passkey]" samples=20 \
  label="base in its window" out="$out/base-256"
python evaluate.py "${measure[@]}" label="base" out="$out/direct_ft-0" &
first=$!
python evaluate.py "${measure[@]}" rope=pi label="PI untrained" out="$out/pi-0"
wait $first
for recipe in pi direct_ft; do
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  deepspeed --num_gpus "$((gpus > 0 ? gpus : 2))" --master_port "$port" \
    train.py recipe=$recipe logger=none run_dir="$out/$recipe"
done

after() { # recipe, step: export that checkpoint and measure it
  [ -d "$out/$1-$2-hf" ] ||
    python -m longctx export "$out/$1/checkpoints/step_$(printf %08d "$2")" "$out/$1-$2-hf"
  python evaluate.py "${measure[@]}" model="$out/$1-$2-hf" label="$1 after $2 steps" out="$out/$1-$2"
}
for step in 50 100 200; do
  after pi $step &
  first=$!
  after direct_ft $step
  wait $first
done
python lab/pages/results.py lab "$out"
