#!/usr/bin/env bash
# `make demo`: the lab model beyond its window of 256 tokens, before and after a short training under
# Dual Chunk Attention in rows of 1,024. Corpus, evaluation of the base and of DCA without training,
# `deepspeed train.py recipe=dca_ft`, evaluation after, report. On two CPU cores less than six
# minutes; a second call goes on where the first one stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=outputs/demo
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=$((gpus > 0 ? gpus : 2))
measure=(held_out=data/lab/held_out "lengths=[256,512,1024,2048]" "tasks=[perplexity,passkey]"
  samples=10 "perplexity.protocols=[sliding_new_tokens]" perplexity.stride=128)
port() {
  python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}
say() { printf '\n== %s (after %d s)\n' "$1" "$SECONDS"; }

say "1/4: texts and token stores"
bash lab/corpus.sh text retrieval_1k held_out
mkdir -p "$out"
say "2/4: the base, and Dual Chunk Attention without training"
python evaluate.py "${measure[@]}" label="the model itself" out="$out/base" > "$out/base.log" 2>&1 &
first=$!
python evaluate.py "${measure[@]}" attention=dca label="DCA without training" \
  out="$out/untrained"
wait $first
rm "$out/base.log"
say "3/4: training"
deepspeed --num_gpus "$processes" --master_port "$(port)" \
  train.py recipe=dca_ft recipe_model=dca_ft_lab_demo logger=none run_dir="$out/dca"
say "4/4: the extended model"
torchrun --nproc-per-node "$processes" --master-port "$(port)" evaluate.py "${measure[@]}" \
  model="$out/dca/hf" label="DCA trained" out="$out" \
  "compare=[$out/base,$out/untrained]"
say "done: $out/report.md"
