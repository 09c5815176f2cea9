#!/usr/bin/env bash
# Everything that needs a GPU, sized for a machine that is lent for minutes. From the repository's root:
#
#     bash benchmarks/gpu_session.sh measure OUT [PICTURES.zip]  # about 5 min: tests on CUDA, resuming across devices, while the
#                                                                # benchmarks compile; then their race, with nothing beside it
#     bash benchmarks/gpu_session.sh train OUT FOLDER            # SECONDS_TRAIN (460): the recipes for one GPU, side by side;
#                                                                # FOLDER holds cifar10.zip, imagenette-0.zip, imagenette-1.zip
#
# OUT gets few files, each below 16 MB: tables, logs.tgz, and NAME.tar with a model in float16, its metrics and curves. Runs
# lie in RUNS. JPEGs need simplejpeg, the benchmarks timm. Each recipe's length follows from what its first steps say of its
# speed. FP8=1 races float8 too (torchao). DEVICE=cpu with small MODELS, SIZES, INFER, INFER_WAYS, END, END_BATCH, PATIENCE and an
# empty ATTENTION tries all of `measure` without a GPU.
set -u
mode=$1 out=$2 given=${3:-}
python=${PYTHON:-python3}
runs=${RUNS:-$(mktemp -d)}
limit=${SECONDS_TRAIN:-460}
device=${DEVICE:-cuda}
mkdir -p "$out" "$runs/logs"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=4
began=$(date +%s)
passed() { echo $(($(date +%s) - began)); }
say() { echo "$(passed) s: $*"; }
train() { # name, flags: one run and its log; cut short, it writes the model that it has
  local name=$1 left
  shift
  left=$((limit - $(passed)))
  [ $left -gt 10 ] || { say "no time is left for $name"; return 1; }
  timeout -s INT -k 20 $left $python -m vitrail train "$@" --output "$runs/$name" >"$runs/logs/$name.log" 2>&1
  say "$name ended with $?: $(tail -n 1 "$runs/logs/$name.log")"
}
fit() { # name, seconds, flags: as many steps as the time allows, by the speed of forty, which also fill the compiler's cache
  local name=$1 seconds=$2 start steps
  shift 2
  start=$(passed)
  train "$name-probe" "$@" --device "$device" --steps 40 --warmup-epochs 0
  steps=$($python - "$runs/$name-probe" "$((seconds - $(passed) + start))" <<'PY'
import json, sys, tomllib
from pathlib import Path
run, seconds = Path(sys.argv[1]), float(sys.argv[2])
rates = [row["images_per_second"] for row in map(json.loads, (run / "metrics.jsonl").open()) if "images_per_second" in row]
batch = tomllib.loads((run / "config.toml").read_text())["batch_size"]
print(max(50, int(0.85 * (seconds - 25) * max(rates[-3:]) / batch)))  # 25 s: start and scoring
PY
  ) || { say "$name: the probe says nothing of its speed"; return 1; }
  say "$name: $steps steps in what is left of $seconds s"
  train "$name" "$@" --device "$device" --steps "$steps"
}
pack() { # name: what comes back of a run
  local name=$1
  [ -f "$runs/$name/model/config.json" ] || return 1
  $python -m vitrail convert "$runs/$name/model" "$runs/$name/half" --half >>"$runs/logs/$name.log" 2>&1
  tar -C "$runs/$name" -cf "$out/$name.tar" half metrics.jsonl config.toml curves.png
}
cut() { # name, flags: a run that is interrupted after its first checkpoint
  local name=$1 pid
  shift
  $python -m vitrail train "$@" --output "$runs/$name" >"$runs/logs/$name-cut.log" 2>&1 &
  pid=$!
  until compgen -G "$runs/$name/checkpoints/step-*" >/dev/null || ! kill -0 $pid 2>/dev/null; do sleep 0.2; done
  kill -INT $pid 2>/dev/null
  wait $pid
  say "$name was cut: $(tail -n 1 "$runs/logs/$name-cut.log")"
}

if [ "$mode" = measure ]; then
  (cd benchmarks && $python gpu_train.py --device "$device" --models ${MODELS:-vit_small_patch16_224 vit_base_patch16_224 \
    vit_large_patch16_224 vit_huge_patch14_224 swin_tiny_patch4_window7_224 pvt_v2_b2 cait_s24_224} ${SIZES:-} \
    --ways eager blocks whole --timm-ways eager whole --brief --infer ${INFER:-vit_base_patch16_224 vit_large_patch16_224} \
    --infer-ways ${INFER_WAYS:-graphs} --rounds 3 --steps 4 --patience "${PATIENCE:-170}" --at-once 8 --hold "$runs/quiet" ${ATTENTION---attention} \
    ) >"$out/benchmarks.txt" 2>"$runs/logs/benchmarks.err" &
  race=$!
  # torch says once that cuBLAS makes a context, which is no fault; and the tests' set-up wants packages that may lack here
  timeout 120 $python -m pytest -q --noconftest -W default tests/test_cuda.py >"$out/tests.txt" 2>&1
  say "tests: $(tail -n 1 "$out/tests.txt")"
  digits="digits --recipe digits --epochs 12 --warmup-epochs 2 --eval-every 12 --precision fp32"
  train digits-fp32 $digits --device "$device" &
  train digits-bf16 $digits --precision bf16 --device "$device" &
  (cut to-gpu $digits --save-every 1 --device cpu && train to-gpu $digits --save-every 1 --device "$device") &
  (cut to-cpu $digits --save-every 1 --device "$device" && train to-cpu $digits --save-every 1 --device cpu) &
  for job in $(jobs -p); do [ "$job" = $race ] || wait "$job"; done
  for name in digits-fp32 digits-bf16 to-gpu to-cpu; do cp "$runs/$name/metrics.jsonl" "$runs/logs/$name.jsonl"; done
  touch "$runs/quiet"
  wait $race
  if [ -n "$given" ]; then
    (cd benchmarks && $python -c "
import sys; from gpu_train import end_to_end
print(f'${END:-vit_base_patch16_224}: {end_to_end(\"${END:-vit_base_patch16_224}\", sys.argv[1:], ${END_BATCH:-256}, \"$device\", steps=60):,.0f} images/s from files')
" "$given") >>"$out/benchmarks.txt" 2>>"$runs/logs/benchmarks.err"
  fi
  if [ "${FP8:-}" ]; then # float8, from L upwards
    (cd benchmarks && $python gpu_train.py --models vit_large_patch16_224 vit_huge_patch14_224 --ways blocks fp8 \
      --timm-ways fp8 --rounds 3 --steps 4 --patience 90) >>"$out/benchmarks.txt" 2>>"$runs/logs/benchmarks.err"
  fi
  cat "$out/benchmarks.txt"
  tail -n 3 "$runs/logs/benchmarks.err"
else
  pictures="$given/imagenette-0.zip $given/imagenette-1.zip"
  (fit cifar $((limit - 30)) "$given/cifar10.zip" --recipe cifar10-gpu; pack cifar) &
  fit teacher $((limit / 4)) $pictures --recipe imagenette-teacher
  half=$(((limit - $(passed)) * 6 / 10))
  both() { # name, recipe, larger side
    fit "$1-small" $half $pictures --recipe "$2" --teacher "$runs/teacher"
    fit "$1" $((limit - $(passed) - 20)) $pictures --recipe "$2" --teacher "$runs/teacher" --pretrained "$runs/$1-small" \
      --img-size "$3" --lr 0.0005 --warmup-epochs 1
    pack "$1" || pack "$1-small"
  }
  both vit imagenette-vit-tiny-gpu 224 &
  both pvt imagenette-pvt-gpu 192 &
  wait
fi
tar -C "$runs" -czf "$out/logs.tgz" logs
say "over; $out holds the results"
