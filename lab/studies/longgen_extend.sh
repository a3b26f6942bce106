#!/usr/bin/env bash
# LongGen's own recipe on the lab model (docs/results.md): extends the window of 256 to 2,048 and to
# 4,096 in the same steps that make two thirds of the layers sparse, and trains full attention alike for
# comparison. About 20 minutes on two CPU cores. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=outputs/longgen_extend
mkdir -p "$out"
extended() { # name, row, rows a step, then what differs
  [ -f "$out/$1/hf/config.json" ] ||
    python train.py recipe=longgen model=lab data.seq_len="$2" train.batch_rows="$3" train.max_steps=60 \
      train.micro_batch_rows=1 train.eval_every=0 train.save_every=0 logger=none run_dir="$out/$1" \
      "${@:4}" > "$out/$1.log" 2>&1
  python evaluate.py model="$out/$1/hf" label="$1" out="$out/$1-eval" held_out=data/lab/held_out \
    "lengths=[256,1024,2048,4096]" "tasks=[perplexity]" perplexity.stride=128 \
    "perplexity.protocols=[sliding_new_tokens]" perplexity.document_tokens=4096 \
    > "$out/$1-eval.log" 2>&1
}
extended window_2048 2048 16 &
extended full_2048 2048 16 "attention.full_layers=[0,1,2,3]" &
wait
extended window_4096 4096 8 rope.base=1.9e5 # factor 16
python lab/pages/longgen.py extend "$out"
