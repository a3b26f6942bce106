#!/usr/bin/env bash
# Instructions for `train.py recipe=chat_sft`, made from the lab's texts (lab/corpus.sh) and SQuAD
# (data_prep/qa_data.sh, which downloads 18 MB). Takes a minute; what already exists is kept.
# data/lab/raw_chat/squad_held_out.json has the articles reserved for `evaluate.py tasks=[qa]`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash lab/corpus.sh
bash data_prep/qa_data.sh
lab=data/lab
tokenizer=assets/lab-llama
[ -d "$lab/raw_chat" ] ||
  python lab/corpus/make_chat.py --text "$lab/raw" --qa data/qa/squad.json --output "$lab/raw_chat" \
    --tokenizer "$tokenizer"
[ -d "$lab/chat" ] ||
  python data_prep/build_store.py --input "$lab/raw_chat/chat" --output "$lab/chat" \
    --tokenizer "$tokenizer"
