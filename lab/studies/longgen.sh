#!/usr/bin/env bash
# The LongGen tables of docs/results.md: full attention, the two hybrids, all layers sparse, and the
# placement of the full layers. All are trained alike with rows of 1,024 tokens, from the lab model that
# lab/studies/pi.sh extended to 2,048. About an hour on two CPU cores. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=outputs/longgen
start=outputs/lab/pi-200-hf
[ -f "$start/config.json" ] || bash lab/studies/pi.sh
mkdir -p "$out"
train=(recipe=longgen model="$start" rope=none data=lab data.seq_len=1024 data.packing=concat
  data.mask_documents=false data.long_tokens=null parallel=zero1 parallel.activation_checkpointing=false
  optim.lr=1e-3 optim.schedule=linear optim.final_fraction=0.1 optim.warmup_steps=4
  train.max_steps=80 train.batch_rows=8 train.micro_batch_rows=4 train.dtype=fp32 train.eval_rows=8
  train.eval_every=40 train.save_every=0 logger=none)
measure=("lengths=[256,512,1024]" "tasks=[perplexity,passkey]" samples=10 held_out=data/lab/held_out
  perplexity.stride=128 perplexity.document_tokens=4096 "perplexity.protocols=[sliding_new_tokens]")
window="attention=longgen_window attention.sink_tokens=16 attention.window_tokens=112"

measured() { # run directory, name
  python evaluate.py "${measure[@]}" model="$1/hf" label="$2" out="$out/$2-eval" \
    > "$out/$2.eval.log" 2>&1
}
try() { # name, then the attention
  [ -f "$out/$1/hf/config.json" ] ||
    python train.py "${train[@]}" run_dir="$out/$1" "${@:2}" > "$out/$1.log" 2>&1
  measured "$out/$1" "$1"
}
running=0
while read -r name choice; do
  # shellcheck disable=SC2086
  try "$name" $choice &
  running=$((running + 1))
  [ $((running % 2)) -eq 0 ] && wait
done <<METHODS
full attention=full
window $window
blocks attention=longgen_blocks attention.block_size=16 attention.local_blocks=4 attention.stride=16
sliding $window attention.sink_tokens=0 attention.window_tokens=128 attention.full_layers=[]
METHODS
wait
# shellcheck disable=SC2086
python train.py -m "${train[@]}" $window 'attention.full_layers=[],[0],[1],[3],[0,1],[2,3],[1,3]' \
  hydra.sweep.dir="$out/placement" hydra.launcher.kind=python hydra.launcher.nproc=1 \
  hydra.launcher.parallel=2
for point in "$out"/placement/*/; do
  measured "${point%/}" "$(basename "$point")"
done
python lab/pages/longgen.py lab "$out"
