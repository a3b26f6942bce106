#!/usr/bin/env bash
# CEPED on the lab model (docs/results.md): teaches the lab model to answer in a template, warms up
# cross-attention on it, then runs the main stage with the next-token loss alone and with each
# divergence, from the same start and over the same rows. About an hour on two CPU cores. Run it again
# to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=outputs/ceped
encoder=outputs/cepe/cepe_mlm/hf
bash lab/chat_data.sh
mkdir -p "$out"
stage() { # run directory, recipe, then what differs
  [ -f "$out/$1/hf/config.json" ] ||
    python train.py recipe="$2" logger=none run_dir="$out/$1" "${@:3}" > "$out/$1.log" 2>&1
}
measured() { # name, model
  python evaluate.py model="$2" label="$1" out="$out/$1-eval" held_out=data/lab/held_out \
    "tasks=[contexts,template]" contexts.windows=4 "contexts.counts=[0,4,16]" \
    template.questions=40 "template.counts=[0,2]" > "$out/$1-eval.log" 2>&1
}
[ -f "$encoder/config.json" ] ||
  python train.py recipe=cepe_mlm logger=none run_dir=outputs/cepe/cepe_mlm
stage chat_sft chat_sft model=lab
chat=(model=lab_chat model.path="$out/chat_sft/hf" encoder.path="$encoder")
stage warmup_short cepe_warmup_short "${chat[@]}"
stage warmup cepe_warmup "${chat[@]}" cepe.start="$out/warmup_short/hf"
measured alone "$out/chat_sft/hf" &
measured warmup "$out/warmup/hf"
wait
running=0
while read -r name choice; do
  # shellcheck disable=SC2086
  (stage "$name" ceped "${chat[@]}" cepe.start="$out/warmup/hf" train.max_steps=150 $choice
    measured "$name" "$out/$name/hf") &
  running=$((running + 1))
  [ $((running % 2)) -eq 0 ] && wait
done <<MODES
ce_only kl.weight=0
full kl.mode=full
topk_rest kl.mode=topk_rest
topk_drop kl.mode=topk_drop
MODES
wait
python lab/pages/ceped.py "$out"
