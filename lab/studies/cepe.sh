#!/usr/bin/env bash
# CEPE on the lab model: an encoder from random weights (cepe_mlm), two warm-up stages, the main stage,
# then the loss with true, shuffled and no contexts. Without an argument it makes the tables of
# docs/results.md, in about an hour on two CPU cores. With `demo` (`make demo RECIPE=cepe`) it takes
# fewer steps and about six minutes, too few to show an effect: after 100 steps the encoder is too weak
# for cross-attention to learn where to look. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=outputs/cepe
declare -A few=()
measure=("tasks=[contexts]" held_out=data/lab/held_out contexts.windows=8)
if [ "${1:-}" = demo ]; then
  out=outputs/demo_cepe
  few=([cepe_mlm]=train.max_steps=100 [cepe_warmup]=train.max_steps=200 [cepe]=train.max_steps=60)
  measure=("tasks=[contexts]" held_out=data/lab/held_out contexts.windows=4 "contexts.counts=[0,4,16]")
fi
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')

bash lab/corpus.sh
mkdir -p "$out"
stage() { # recipe, then what differs
  [ -f "$out/$1/hf/config.json" ] && return
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  # shellcheck disable=SC2086
  deepspeed --num_gpus "$((gpus > 0 ? gpus : 2))" --master_port "$port" train.py recipe="$1" \
    logger=none run_dir="$out/$1" ${few[$1]:-} "${@:2}"
}
stage cepe_mlm
stage cepe_warmup_short encoder.path="$out/cepe_mlm/hf"
stage cepe_warmup encoder.path="$out/cepe_mlm/hf" cepe.start="$out/cepe_warmup_short/hf"
stage cepe encoder.path="$out/cepe_mlm/hf" cepe.start="$out/cepe_warmup/hf"
python evaluate.py "${measure[@]}" label="the decoder alone" out="$out/alone" > "$out/alone.log" 2>&1 &
first=$!
python evaluate.py "${measure[@]}" model="$out/cepe_warmup/hf" label="after the warm-up" \
  out="$out/warmup" > "$out/warmup.log" 2>&1
wait $first
python evaluate.py "${measure[@]}" model="$out/cepe/hf" label="CEPE" out="$out/main" \
  "compare=[$out/alone,$out/warmup]"
[ "${1:-}" = demo ] || python lab/pages/cepe.py lab "$out"
