#!/usr/bin/env bash
# The lab's texts and token stores under data/lab; what is there already is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
lab=data/lab
tokenizer=assets/lab-llama

python data_prep/fetch_lab_corpus.py --output "$lab"
[ -d "$lab/raw_retrieval" ] ||
  python data_prep/make_retrieval.py --text "$lab/raw" --output "$lab/raw_retrieval" \
    --tokenizer "$tokenizer"
for store in text:raw retrieval:raw_retrieval held_out:raw_held_out; do
  [ -d "$lab/${store%%:*}" ] ||
    python data_prep/build_store.py --input "$lab/${store#*:}" --output "$lab/${store%%:*}" \
      --tokenizer "$tokenizer"
done
