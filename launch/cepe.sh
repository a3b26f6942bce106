#!/usr/bin/env bash
# The CEPE tables of docs/results.md: an encoder from random weights (cepe_mlm), the warm-up, the main
# stage, all on the lab model; then loss with true, shuffled and no context. About half an hour on two
# CPU cores; a second call goes on where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=outputs/cepe
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
measure=("tasks=[contexts]" held_out=data/lab/held_out contexts.windows=16)

bash launch/corpus.sh
mkdir -p "$out"
for recipe in cepe_mlm cepe_warmup cepe; do
  run=outputs/$recipe-lab # where the next recipe looks
  [ -f "$run/hf/config.json" ] && continue
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  deepspeed --num_gpus "$((gpus > 0 ? gpus : 2))" --master_port "$port" \
    train.py recipe=$recipe logger=none
done
python evaluate.py "${measure[@]}" label="the decoder alone" out="$out/alone" &
first=$!
python evaluate.py "${measure[@]}" model=outputs/cepe_warmup-lab/hf label="after the warm-up" \
  out="$out/warmup"
wait $first
python evaluate.py "${measure[@]}" model=outputs/cepe-lab/hf label="CEPE" out="$out/main" \
  "compare=[$out/alone,$out/warmup]"
python benchmarks/cepe_page.py lab "$out"
