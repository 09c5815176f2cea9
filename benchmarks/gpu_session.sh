#!/usr/bin/env bash
# Everything that needs a GPU, sized for a machine that is lent for minutes. From the repository's root:
#
#     bash benchmarks/gpu_session.sh measure OUT PICTURES.zip   # 5 min: tests on CUDA, resuming, a few steps of each recipe,
#                                                               # and meanwhile the benchmarks' compiling, then their race
#     bash benchmarks/gpu_session.sh train OUT FOLDER           # the recipes for one GPU, side by side; FOLDER holds
#                                                               # cifar10.zip, imagenette-0.zip and imagenette-1.zip
#
# Results, logs and models are in OUT. A recipe's epochs follow from what `measure` says of its speed: EPOCHS_CIFAR,
# EPOCHS_VIT, EPOCHS_PVT change them.
set -u
mode=$1 out=$2 given=$3
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
began=$(date +%s)
say() { echo "$(($(date +%s) - began)) s: $*"; }
train() { # name, flags: one run, its log and its metrics
  local name=$1
  shift
  $python -m vitrail train "$@" --device cuda --output "$out/runs/$name" >"$out/$name.log" 2>&1
  say "$name ended with $?: $(tail -n 1 "$out/$name.log")"
}

if [ "$mode" = measure ]; then
  (cd benchmarks && $python gpu_train.py --timm-ways eager whole --ways eager blocks whole \
    --infer vit_base_patch16_224 vit_large_patch16_224 --infer-ways eager graphs \
    --rounds 3 --steps 4 --patience 170 --attention) >"$out/benchmarks.txt" 2>"$out/benchmarks.err" &
  race=$!
  (
    $python -m pytest -q tests/test_cuda.py >"$out/tests.txt" 2>&1
    say "tests: $(tail -n 1 "$out/tests.txt")"
    digits="digits --recipe digits --epochs 20 --warmup-epochs 2 --eval-every 20 --save-every 20"
    train digits-fp32 $digits --precision fp32
    train digits-bf16 $digits --precision bf16
    # Begun on the CPU, ended here; begun here, ended on the CPU.
    timeout -s INT 20 $python -m vitrail train $digits --precision fp32 --device cpu --output "$out/runs/to-gpu" >/dev/null 2>&1
    train to-gpu $digits --precision fp32
    timeout -s INT 15 $python -m vitrail train $digits --precision fp32 --device cuda --output "$out/runs/to-cpu" >/dev/null 2>&1
    $python -m vitrail train $digits --precision fp32 --device cpu --output "$out/runs/to-cpu" >"$out/to-cpu.log" 2>&1
    say "resuming was tried both ways"
  ) &
  train teacher "$given" --recipe imagenette-teacher --steps 150 &
  train cifar "$given" --recipe cifar10-gpu --steps 300 -b 256 &
  train vit "$given" --recipe imagenette-vit-tiny-gpu --steps 150 &
  train pvt "$given" --recipe imagenette-pvt-gpu --steps 150 &
  wait $race
  if $python -c "import torchao" 2>/dev/null; then # float8, from L upwards
    (cd benchmarks && $python gpu_train.py --models vit_large_patch16_224 vit_huge_patch14_224 --ways blocks fp8 \
      --timm-ways fp8 --rounds 3 --steps 4 --patience 90) >>"$out/benchmarks.txt" 2>>"$out/benchmarks.err"
  fi
  cat "$out/benchmarks.txt"
  tail -n 3 "$out/benchmarks.err"
  wait
else
  train cifar "$given/cifar10.zip" --recipe cifar10-gpu --epochs "${EPOCHS_CIFAR:-100}" &
  pictures="$given/imagenette-0.zip $given/imagenette-1.zip"
  train teacher $pictures --recipe imagenette-teacher
  later="--epochs 20 --lr 0.0005 --warmup-epochs 1 --teacher $out/runs/teacher"
  (
    train vit-small $pictures --recipe imagenette-vit-tiny-gpu --teacher "$out/runs/teacher" --epochs "${EPOCHS_VIT:-150}"
    train vit $pictures --recipe imagenette-vit-tiny-gpu $later --pretrained "$out/runs/vit-small" --img-size 224
  ) &
  (
    train pvt-small $pictures --recipe imagenette-pvt-gpu --teacher "$out/runs/teacher" --epochs "${EPOCHS_PVT:-150}"
    train pvt $pictures --recipe imagenette-pvt-gpu $later --pretrained "$out/runs/pvt-small" --img-size 192
  ) &
  wait
fi
say "over; $out holds the results"
