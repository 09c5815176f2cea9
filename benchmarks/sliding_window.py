"""A picture of 1024 x 512 through segmenters: in one piece, and by sliding window; time and memory.

    python benchmarks/sliding_window.py [MODEL ...] [--repeats 3] [--together 1] [--threads N]
    python benchmarks/sliding_window.py --beside                     # against transformers' ViT under the same window

No other library offers SETR on a CPU here, so the fair peer of a sliding window is the same network in the same
windows: `--beside` puts transformers' ViT, holding our encoder's weights, under our decoder, slides it over the
picture as mmsegmentation does (every window's logits padded to the whole picture and added up), and takes turns with
ours in one process; the outputs must agree.

Otherwise each network runs in a process of its own; its memory is what the forward adds to the weights (Linux tells). A
window has the network's input size and moves by two thirds of it. transformers' SegFormer-B0 (random weights, the
whole picture) runs in the same table, as a network that many people know.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODELS = (
    "setr_naive_base",
    "setr_pup_base",
    "trans2seg_medium",
    "fpn_pvt_v2_b0",
    "setr_pup_nano",
    "trans2seg_nano",
)
SIZE = (512, 1024)
PEER = "transformers SegFormer-B0"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--together", type=int, default=1, help="windows that go through the network at once")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--beside", action="store_true", help="take turns with transformers' ViT")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.beside:
        beside(given.repeats)
        return
    if given.one:
        print(row(given.one, given.repeats, given.together))
        return
    print(f"{SIZE[1]} x {SIZE[0]}, float32, {torch.get_num_threads()} threads, best of {given.repeats}")
    print(f"{'network':28} {'parameters':>10}  {'way':24} {'seconds':>8} {'MB above weights':>20}")
    for model in [*given.models, PEER]:
        for way in ("whole", "slide") if model != PEER else ("whole",):
            command = [sys.executable, __file__, "--one", f"{model}:{way}", "--repeats", str(given.repeats)]
            command += ["--together", str(given.together), "--threads", str(given.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            print(done.stdout.strip() or f"{model:28} {done.stderr.strip().splitlines()[-1]}", flush=True)


def row(job: str, repeats: int, together: int) -> str:
    """One line of the table."""
    name, _, way = job.rpartition(":")
    torch.manual_seed(0)
    model, forward, told = peer() if name == PEER else ours(name, way, together)
    count = sum(parameter.numel() for parameter in model.parameters())
    image = torch.randn(1, 3, *SIZE)
    forget_peak()
    before = resident("VmRSS")
    taken = []
    with torch.inference_mode():
        for _ in range(repeats + 1):  # the first is warm-up
            start = time.perf_counter()
            logits = forward(image)
            taken.append(time.perf_counter() - start)
    assert tuple(logits.shape[2:]) == SIZE
    return f"{name:28} {count / 1e6:>8.1f} M  {told:24} {min(taken[1:]):>8.2f} {resident('VmHWM') - before:>20.0f}"


def ours(name: str, way: str, together: int) -> tuple[torch.nn.Module, Callable[[Tensor], Tensor], str]:
    """One of our networks, whole or by window."""
    from vitrail import create_model
    from vitrail.tasks.sliding import slide, starts

    model = create_model(name, num_classes=19).eval()
    window = model.config.img_size
    if way == "whole":
        return model, lambda image: model(image).logits, "whole"
    rows, columns = (starts(side, piece, piece * 2 // 3) for side, piece in zip(SIZE, window, strict=True))
    told = f"{len(rows)} x {len(columns)} windows {window[1]} x {window[0]}"
    return model, lambda image: slide(model, image, window, together=together), told


def peer() -> tuple[torch.nn.Module, Callable[[Tensor], Tensor], str]:
    """SegFormer-B0, its logits brought to the picture's size as ours are."""
    transformers: Any = importlib.import_module("transformers")
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=19)).eval()

    def forward(image: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(model(image).logits, size=SIZE, mode="bilinear")

    return model, forward, "whole"


def beside(repeats: int) -> None:
    """SETR naive on ViT-Base under a window of 512 x 512, ours and transformers', in turns."""
    from vitrail import create_model
    from vitrail.tasks.sliding import slide, starts

    torch.manual_seed(0)
    model: Any = create_model("setr_naive_base", num_classes=19, img_size=512).eval()
    theirs, window = encoder_of(model), (512, 512)
    tops, lefts = (starts(side, piece, piece * 2 // 3) for side, piece in zip(SIZE, window, strict=True))

    def other(image: Tensor) -> Tensor:
        total, count = image.new_zeros(1, 19, *SIZE), image.new_zeros(1, 1, *SIZE)
        for top in tops:
            for left in lefts:
                cut = image[:, :, top : top + window[0], left : left + window[1]]
                hidden = theirs(cut).last_hidden_state[:, 1:]
                map = hidden.transpose(1, 2).reshape(1, -1, window[0] // 16, window[1] // 16)
                logits = model.head((map,), window)
                edges = (left, SIZE[1] - left - window[1], top, SIZE[0] - top - window[0])
                total += torch.nn.functional.pad(logits, edges)
                count[:, :, top : top + window[0], left : left + window[1]] += 1
        return total / count

    image = torch.randn(1, 3, *SIZE)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "vitrail": lambda image: slide(model, image, window),
        "transformers ViT": other,
    }
    taken: dict[str, list[tuple[float, float]]] = {whose: [] for whose in ways}
    answers: dict[str, Tensor] = {}
    with torch.inference_mode():
        for turn in range(repeats + 1):  # the first is warm-up
            for whose, forward in ways.items():
                start, busy = time.perf_counter(), time.process_time()
                answers[whose] = forward(image)
                if turn:
                    taken[whose].append((time.perf_counter() - start, time.process_time() - busy))
    one, two = answers.values()
    apart = float((one - two).norm() / one.norm())
    print(
        f"setr_naive_base, {SIZE[1]} x {SIZE[0]}, {len(tops) * len(lefts)} windows of 512 x 512, float32,"
        f" {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; outputs {apart:.1e} apart"
    )
    for whose, pairs in taken.items():
        clock, spent = ([pair[place] for pair in pairs] for place in (0, 1))
        print(
            f"{whose:18} best {min(clock):6.2f} s, median {statistics.median(clock):6.2f} s, CPU {min(spent):6.2f} s"
        )


def encoder_of(model: Any) -> Any:
    """transformers' ViT with the weights of a SETR's encoder, without its last norm, which SETR has not."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.ViTConfig(image_size=512, patch_size=16, layer_norm_eps=1e-6)
    theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
    theirs.layernorm = torch.nn.Identity()
    (stage,) = model.backbone.stages
    same = {"norm1": "layernorm_before", "norm2": "layernorm_after", "mixer.proj": "attention.o_proj"}
    same |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    tensors = {
        "embeddings.cls_token": stage.entry.prefix.cls,
        "embeddings.position_embeddings": stage.entry.positions.table,
    }
    for kind in ("weight", "bias"):
        tensors[f"embeddings.patch_embeddings.projection.{kind}"] = getattr(stage.entry.patches.proj, kind)
        for number, block in enumerate(stage.blocks):
            for mine, other in same.items():
                tensors[f"layers.{number}.{other}.{kind}"] = getattr(block.get_submodule(mine), kind)
            for letter, part in zip("qkv", getattr(block.mixer.qkv, kind).chunk(3), strict=True):
                tensors[f"layers.{number}.attention.{letter}_proj.{kind}"] = part
    theirs.load_state_dict(tensors)
    return theirs


def resident(word: str) -> float:
    """VmRSS (now) or VmHWM (the most since the last reset) of this process, in MB; Linux alone tells."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line for line in lines if line.startswith(word)).split()[1]) / 1024


def forget_peak() -> None:
    """Let VmHWM start again from what is held now: building a network is not what is measured."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


if __name__ == "__main__":
    main()
