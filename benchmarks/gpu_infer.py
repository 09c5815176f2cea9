"""Inference speed on one GPU, beside timm in the same run: images/s, memory, and the share of the chip's peak.

    python benchmarks/gpu_infer.py
    python benchmarks/gpu_infer.py --infer swin_tiny_patch4_window7_224 --infer-batch 512
    python benchmarks/gpu_infer.py --device cpu --infer vit_nano_patch4_32 --infer-batch 8 --rounds 2 --steps 2

Weights and synthetic images in bfloat16 on the device; two FLOPs for each of the forward's multiply-adds. How it is
measured stands in gpu_train.py.
"""

from __future__ import annotations

from gpu_train import main

if __name__ == "__main__":
    main(__doc__, models=[], infer=["vit_base_patch16_224", "vit_large_patch16_224"])
