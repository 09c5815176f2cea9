"""What explanations cost, in forwards of the same network: one picture, eager, float32.

    python benchmarks/explain_cost.py [MODEL ...] [--repeats 5]

Two columns: operations of matrix products and convolutions (backward included), and the best time of interleaved
rounds over the best time of a forward. Weights are random: they change neither.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vitrail.explain.methods import METHODS, Options, methods_for
from vitrail.models.registry import create_model

MODELS = (
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "deit_small_distilled_patch16_224",
    "cait_xxs24_224",
    "t2t_vit_14",
    "performer_small_patch16_224",
    "pvt_tiny",
    "swin_tiny_patch4_window7_224",
    "pit_s_224",
)
CHEAP = ("attention", "rollout", "relevance", "gradcam")


def forward(network: nn.Module, images: Tensor) -> Callable[[], object]:
    """One plain forward, as prediction does it."""

    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = network(images)
        return out

    return run


def explaining(network: nn.Module, images: Tensor, method: str) -> Callable[[], object]:
    """One explanation."""
    return lambda: METHODS[method].run(network, images, [0], Options())


class Counter(TorchDispatchMode):
    """Adds up the operations of matrix products and convolutions, forward and backward.

    torch's own counter also follows modules, by hooks that cannot stand a gradient that ends in the network's middle.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of one call."""
    with Counter() as counter:
        run()
    return counter.total


def measure(name: str, repeats: int) -> list[tuple[str, float, float]]:
    """For each cheap method: operations and time, over a forward's."""
    torch.manual_seed(0)
    network = create_model(name).eval()
    rows, columns = network.config.img_size
    images = torch.randn(1, network.config.in_chans, rows, columns)
    runs: dict[str, Callable[[], object]] = {"forward": forward(network, images)}
    runs |= {
        method: explaining(network, images, method) for method in CHEAP if method in methods_for(network)
    }
    counted = {method: flops(run) for method, run in runs.items()}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for method, run in runs.items():
            begun = time.process_time()
            run()
            best[method] = min(best[method], time.process_time() - begun)
    return [
        (method, counted[method] / counted["forward"], best[method] / best["forward"])
        for method in runs
        if method != "forward"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | " + " | ".join(f"{method}: operations, time" for method in CHEAP) + " |")
    print("|---|" + "---|" * len(CHEAP))
    for name in given.models:
        found = {method: (work, span) for method, work, span in measure(name, given.repeats)}
        cells = [
            f"{found[method][0]:.2f}, {found[method][1]:.2f}" if method in found else "–" for method in CHEAP
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
