"""Why the norm comes first: pre-norm and post-norm ViTs at growing depth, with and without warm-up.

    python benchmarks/norm_order.py ../shared/data/cifar10/train.zip --output docs/pictures/norm-order.png

Every network is the same narrow ViT but for the place of its norms and its depth, trained by the training job
with AdamW, no clipping, for the same steps on the same pictures. The claim is from arXiv 1906.01787 (deep
Transformers need the norm before the branch) and 1809.10853; 2002.04745 explains why post-norm needs warm-up.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from vitrail.jobs.train import train
from vitrail.runs import TrainRun


def measure(arguments: argparse.Namespace, order: str, depth: int, warmup: bool) -> dict[str, Any]:
    """One training; top-1 on held-back pictures, and the mean training loss of the last tenth."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            TrainRun(
                data=tuple(arguments.data),
                val_share=0.05,
                model="vit_nano_patch4_32",
                model_kwargs=(
                    f"depth={depth}",
                    f"norm_order={order}",
                    f"width={arguments.width}",
                    f"hidden={4 * arguments.width}",
                ),
                steps=arguments.steps,
                batch_size=arguments.batch_size,
                opt="adamw",
                lr=arguments.lr,
                weight_decay=0.05,
                warmup_epochs=0.3 * arguments.steps * arguments.batch_size / 47_500 if warmup else 0.0,
                clip_grad=0.0,
                smoothing=0.0,
                model_ema=0.0,
                drop_path=0.0,
                crop="pad",
                aa="none",
                mixup=0.0,
                cutmix=0.0,
                eval_every=0.0,
                save_every=0.0,
                workers=0,
                seed=arguments.seed,
                output=folder + "/run",
            )
        )
        lines = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [line["loss"] for line in map(json.loads, lines) if line.get("kind") == "train"]
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "order": order,
        "depth": depth,
        "warmup": warmup,
        "top1": 100 * result.scores["val"]["acc1"],
        "loss": sum(tail) / len(tail) if tail else float("nan"),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Training loss at the end, and top-1, against depth; a line for each order and warm-up."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")
    colours = {"pre": "#31688e", "post": "#d8843b"}
    shown = (
        ("loss", "training loss, mean of the last tenth", math.log(10)),
        ("top1", "top-1 on held-back pictures, %", 10.0),
    )
    depths = sorted({row["depth"] for row in rows})
    for axis, (value, words, chance) in zip(panels, shown, strict=True):
        for order in ("pre", "post"):
            for warmup in (True, False):
                own = [row for row in rows if row["order"] == order and row["warmup"] == warmup]
                axis.plot(
                    [row["depth"] for row in own],
                    [row[value] for row in own],
                    color=colours[order],
                    marker="o" if warmup else "s",
                    linestyle="-" if warmup else "--",
                    label=f"{order}-norm, {'warm-up' if warmup else 'no warm-up'}",
                )
        axis.axhline(chance, color="#999999", linewidth=0.8, label="chance, ten classes")
        axis.set_xscale("log")
        axis.set_xticks(depths, [str(depth) for depth in depths])
        axis.minorticks_off()
        axis.set_xlabel("depth, blocks")
        axis.set_ylabel(words)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    panels[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", help="training pictures, such as cifar10/train.zip")
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24, 48])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/norm-order.png"))
    arguments = parser.parse_args()
    rows = []
    print(f"{'norm':6}{'warm-up':9}{'depth':>6}{'top-1':>9}{'loss':>9}")
    for depth in arguments.depths:
        for order in ("pre", "post"):
            for warmup in (True, False):
                row = measure(arguments, order, depth, warmup)
                rows.append(row)
                word = "yes" if warmup else "no"
                print(f"{order:6}{word:9}{depth:6d}{row['top1']:8.2f}%{row['loss']:9.4f}", flush=True)
    draw(rows, arguments.output)
    print(f"figure: {arguments.output}")


if __name__ == "__main__":
    main()
