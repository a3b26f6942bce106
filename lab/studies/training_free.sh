#!/usr/bin/env bash
# The training-free table of docs/results.md: the lab model beyond its window of 256 tokens without
# training, with Dual Chunk Attention and the methods it is compared with. About 15 minutes on two CPU
# cores. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=outputs/training_free
measure=("lengths=[256,512,1024,2048]" "tasks=[perplexity,passkey]" samples=10
  held_out=data/lab/held_out perplexity.stride=128 perplexity.document_tokens=4096
  "perplexity.protocols=[sliding_new_tokens]")

bash lab/corpus.sh
mkdir -p "$out"
try() { # name, then what is chosen
  python evaluate.py "${measure[@]}" label="$1" out="$out/$1" "${@:2}" > "$out/$1.log" 2>&1
}
running=0
while read -r name choice; do
  # shellcheck disable=SC2086
  try "$name" $choice &
  running=$((running + 1))
  [ $((running % 2)) -eq 0 ] && wait
done <<'METHODS'
plain attention=full
dynamic_ntk rope=dynamic_ntk
pi rope=pi
yarn rope=yarn
dca attention=dca
streaming attention=streaming
lm_infinite attention=lm_infinite
dca_intra attention=dca attention.parts=intra
dca_intra_inter attention=dca attention.parts=intra+inter
dca_reference_code attention=dca attention.preset=reference_code
METHODS
wait
python lab/pages/training_free.py "$out" training_free
