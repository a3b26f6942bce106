#!/usr/bin/env bash
# The lab's texts and token stores under data/lab; what already exists is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
lab=data/lab
tokenizer=assets/lab-llama

python lab/corpus/fetch.py --output "$lab"
[ -d "$lab/raw_retrieval" ] ||
  python lab/corpus/make_retrieval.py --text "$lab/raw" --output "$lab/raw_retrieval" \
    --tokenizer "$tokenizer"
[ -d "$lab/raw_retrieval_long" ] ||
  python lab/corpus/make_retrieval.py --text "$lab/raw" --output "$lab/raw_retrieval_long" \
    --tokenizer "$tokenizer" --count 4000 --max-tokens 2040 --seed 2 \
    --shares scattered=0.5 template=0.3 prose=0.2
for store in text:raw retrieval:raw_retrieval retrieval_long:raw_retrieval_long held_out:raw_held_out; do
  [ -d "$lab/${store%%:*}" ] ||
    python data_prep/build_store.py --input "$lab/${store#*:}" --output "$lab/${store%%:*}" \
      --tokenizer "$tokenizer"
done
