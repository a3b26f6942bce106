#!/usr/bin/env bash
# The lab's texts and token stores under data/lab; what already exists is kept.
# bash lab/corpus.sh [STORE ...]: those stores; without names, all but the demo's retrieval_1k.
set -euo pipefail
cd "$(dirname "$0")/.."
lab=data/lab
tokenizer=assets/lab-llama

retrieval() { # name, then options: documents in which keys are hidden and asked for
  [ -d "$lab/raw_$1" ] ||
    python lab/corpus/make_retrieval.py --text "$lab/raw" --output "$lab/raw_$1" \
      --tokenizer "$tokenizer" "${@:2}"
}

python lab/corpus/fetch.py --output "$lab"
[ $# -gt 0 ] || set -- text retrieval retrieval_long held_out
for store in "$@"; do
  raw=raw_$store
  case $store in
    text) raw=raw ;;
    retrieval) retrieval retrieval ;;
    retrieval_long)
      retrieval retrieval_long --count 4000 --max-tokens 2040 --seed 2 \
        --shares scattered=0.5 template=0.3 prose=0.2
      ;;
    retrieval_1k)
      retrieval retrieval_1k --count 2500 --max-tokens 1020 --seed 3 \
        --shares named=0.5 template=0.3 prose=0.2
      ;;
  esac
  [ -d "$lab/$store" ] ||
    python data_prep/build_store.py --input "$lab/$raw" --output "$lab/$store" \
      --tokenizer "$tokenizer"
done
