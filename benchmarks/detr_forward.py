"""A picture whose long side has 1333 pixels through DETR, ours and transformers': time, memory, and that they agree.

    python benchmarks/detr_forward.py [MODEL ...] [--repeats 3] [--size 800 1333] [--threads N]

Both networks hold the same random weights, ours read from transformers' state dict. Times are taken in turns in one
process, so that whatever else the machine does troubles both alike (and the process's own CPU seconds stand beside
them, which hold on a busy machine); memory is taken in processes of their own and
is what the forward adds to the weights (Linux tells). transformers' DETR runs with its default attention.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

MODELS = ("detr_resnet50", "detr_resnet50_dc5")
Answer = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--memory", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    image = torch.randn(1, 3, *given.size)
    if given.memory:
        whose, name = given.memory.split(":")
        print(f"{added(networks(name)[whose], image):.0f}")
        return
    rows, columns = given.size
    print(
        f"{columns} x {rows}, float32, {torch.get_num_threads()} threads, best of {given.repeats} taken in turns"
    )
    print(f"{'network':20} {'whose':14} {'seconds':>8} {'CPU s':>8} {'MB above weights':>18} {'apart':>10}")
    for name in given.models:
        seconds, apart = timed(networks(name), image, given.repeats)
        for whose, (least, spent) in seconds.items():
            command = [
                sys.executable,
                __file__,
                "--memory",
                f"{whose}:{name}",
                "--size",
                str(rows),
                str(columns),
            ]
            command += ["--threads", str(torch.get_num_threads())]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            memory = done.stdout.strip().splitlines()[-1]
            print(f"{name:20} {whose:14} {least:>8.2f} {spent:>8.2f} {memory:>18} {apart:>10.1e}", flush=True)


def networks(name: str) -> dict[str, Callable[[Tensor], Answer]]:
    """Both networks' forward, to logits and boxes."""
    from safetensors.torch import save_file
    from transformers import DetrConfig, DetrForObjectDetection

    from vitrail import create_model

    torch.manual_seed(0)
    kind: Any = DetrConfig
    config = kind(num_labels=91, backbone=name.split("_")[1], dilation=name.endswith("dc5"))
    theirs: Any = DetrForObjectDetection(config)
    theirs.eval()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "theirs.safetensors"
        save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, file)
        ours: Any = create_model(name, file).eval()

    def answer(image: Tensor) -> Answer:
        output = ours(image)
        return output.logits, output.boxes

    def answer_theirs(image: Tensor) -> Answer:
        output = theirs(image)
        return output.logits, output.pred_boxes

    return {"vitrail": answer, "transformers": answer_theirs}


def timed(
    forwards: dict[str, Callable[[Tensor], Answer]], image: Tensor, repeats: int
) -> tuple[dict[str, tuple[float, float]], float]:
    """The least seconds of each, on the clock and of the process, taken in turns after one warm-up; and how far
    boxes and logits are apart."""
    taken: dict[str, list[tuple[float, float]]] = {whose: [] for whose in forwards}
    answers: dict[str, Answer] = {}
    with torch.inference_mode():
        for number in range(repeats + 1):
            for whose, forward in forwards.items():
                start, busy = time.perf_counter(), time.process_time()
                answers[whose] = forward(image)
                if number:
                    taken[whose].append((time.perf_counter() - start, time.process_time() - busy))
    one, other = answers.values()
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))
    least = {
        whose: tuple(min(column) for column in zip(*pairs, strict=True)) for whose, pairs in taken.items()
    }
    return {whose: (pair[0], pair[1]) for whose, pair in least.items()}, apart


def added(forward: Callable[[Tensor], Answer], image: Tensor) -> float:
    """MB that one forward needs above what is held before it."""
    with torch.inference_mode():
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again from here
        before = resident("VmRSS")
        forward(image)
    return resident("VmHWM") - before


def resident(word: str) -> float:
    """VmRSS (now) or VmHWM (the most since the last reset) of this process, in MB; Linux alone tells."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line for line in lines if line.startswith(word)).split()[1]) / 1024


if __name__ == "__main__":
    main()
