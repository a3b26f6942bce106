#!/usr/bin/env bash
# Fine-tuning with Dual Chunk Attention on the lab model (docs/results.md): 100 steps, then the
# measurements that lab/studies/training_free.sh makes without training. About ten minutes on one core.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=outputs/dca_ft
[ -f outputs/training_free/dca/results.json ] || bash lab/studies/training_free.sh
python train.py recipe=dca_ft logger=none run_dir="$out/run"
python evaluate.py "lengths=[256,512,1024]" "tasks=[perplexity,passkey]" samples=10 \
  held_out=data/lab/held_out perplexity.stride=128 perplexity.document_tokens=4096 \
  "perplexity.protocols=[sliding_new_tokens]" model="$out/run/hf" label="DCA after 100 steps" \
  out="$out/eval"
python lab/pages/training_free.py "$out" dca_ft
