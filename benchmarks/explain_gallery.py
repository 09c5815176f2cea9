"""A gallery of overlays for every family, on small models that this script trains, and how often they point right.

    python benchmarks/explain_gallery.py [--steps 400] [--output docs/pictures/explain-gallery.png]

The pictures are noise with one handwritten digit (scikit-learn's) in one of four tiles, so it is known where the
evidence lies: the table counts how often a map's strongest tile is the digit's, of 200 pictures that were not
trained on (chance: 25 %). Every family trains its smallest configuration the same way.
"""

from __future__ import annotations

import argparse
import importlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.transforms import Geometry
from vitrail.explain.methods import METHODS, Options, heat_of, methods_for
from vitrail.explain.overlay import on_picture, overlay
from vitrail.models import registry
from vitrail.models.model import Model

CLASSES = (0, 1, 3, 4, 7)
SIDE = 32


class World(NamedTuple):
    """Digits of each class, [n, 16, 16], 0..1."""

    groups: list[Tensor]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [B, 3, 32, 32] of 0..1, labels, and the tile of the digit."""
        pictures = 0.35 + 0.12 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
        labels = torch.randint(len(CLASSES), (count,), generator=generator)
        tiles = torch.randint(4, (count,), generator=generator)
        for picture, label, tile in zip(pictures, labels.tolist(), tiles.tolist(), strict=True):
            group, half = self.groups[label], SIDE // 2
            digit = group[int(torch.randint(len(group), (1,), generator=generator))]
            row, column = half * (tile // 2), half * (tile % 2)
            picture[:, row : row + half, column : column + half] += 0.6 * digit
        return pictures.clamp(0, 1), labels, tiles


def worlds() -> tuple[World, World]:
    """For training and for looking: no digit is in both."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images).float()[:, None] / 16
    images = F.interpolate(images, size=(SIDE // 2, SIDE // 2), mode="bilinear", align_corners=False)[:, 0]
    labels = torch.tensor(digits.target)
    parts = (slice(0, 1400), slice(1400, None))
    return (
        World([images[parts[0]][labels[parts[0]] == label] for label in CLASSES]),
        World([images[parts[1]][labels[parts[1]] == label] for label in CLASSES]),
    )


def normal(pictures: Tensor) -> Tensor:
    """Around zero, which is the grey of the noise."""
    return (pictures - 0.35) / 0.3


def trained(family: str, world: World, steps: int) -> Model:
    """The family's smallest model after so many steps of 64 pictures."""
    torch.manual_seed(0)
    module = importlib.import_module(registry.FAMILIES[family])
    config = registry.changed(module.TINY, num_classes=len(CLASSES), img_size=(SIDE, SIDE))
    model = registry.from_config(next(iter(module.VARIANTS)), config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        pictures, labels, _ = world.draw(64, generator)
        loss = F.cross_entropy(model(normal(pictures)), labels)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


def pointed(maps: Tensor, tiles: Tensor) -> float:
    """Share of maps whose strongest tile (by mean) is the digit's."""
    return float((F.adaptive_avg_pool2d(maps[:, None], 2).flatten(1).argmax(1) == tiles).float().mean())


def column(model: Model, world: World, shown: int) -> tuple[float, dict[str, float], dict[str, Any]]:
    """Accuracy, hits of each method, and each method's overlay of one picture, eight times as large."""
    pictures, labels, tiles = world.draw(200, torch.Generator().manual_seed(1))
    images = normal(pictures)
    with torch.no_grad():
        right = float((model(images).argmax(1) == labels).float().mean())
    hits: dict[str, float] = {}
    drawn: dict[str, Any] = {}
    options = Options(grid=(8, 8), steps=16)
    zoom = 8
    geometry = Geometry((SIDE * zoom, SIDE * zoom), (SIDE, SIDE), zoom, zoom, 0, 0)
    picture = (pictures[shown] * 255).byte().repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    for method in methods_for(model):
        slow = method in ("integrated_gradients", "occlusion")
        count = 50 if slow else 200
        heat = heat_of(model, images[:count], labels[:count], method, options)
        hits[method] = pointed(heat.resized((SIDE, SIDE), smooth=False), tiles[:count])
        one = heat_of(model, images[shown : shown + 1], labels[shown : shown + 1], method, options)
        if method == "integrated_gradients":
            one = type(one)(
                values=one.regions((SIDE, SIDE), (16, 16)),
                placement=type(one.placement)(2, 2),
                units=one.units,
            )
        drawn[method] = overlay(picture, on_picture(one, geometry))
    return right, hits, {"picture": picture.permute(1, 2, 0).numpy(), **drawn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/explain-gallery.png"))
    parser.add_argument("--families", nargs="*", default=list(registry.families()))
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    training, looking = worlds()
    print("| family | accuracy | " + " | ".join(METHODS) + " |")
    print("|---|---|" + "---|" * len(METHODS))
    gallery = {}
    for family in given.families:
        right, hits, gallery[family] = column(trained(family, training, given.steps), looking, shown=3)
        cells = [f"{hits[method]:.0%}" if method in hits else "–" for method in METHODS]
        print(f"| {family} | {right:.0%} | " + " | ".join(cells) + " |", flush=True)
    draw(gallery, given.output)


def draw(gallery: dict[str, dict[str, Any]], output: Path) -> None:
    """Families down, methods across."""
    from matplotlib.figure import Figure

    names = ["picture", *METHODS]
    figure = Figure(
        figsize=(1.5 * len(names), 1.55 * len(gallery) + 0.4), layout="constrained", facecolor="white"
    )
    for row, (family, drawn) in enumerate(gallery.items()):
        for place, name in enumerate(names):
            axes = figure.add_subplot(len(gallery), len(names), row * len(names) + place + 1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(name.replace("_", " "), fontsize=9, color="#1c2128")
            if place == 0:
                axes.set_ylabel(family, fontsize=10, color="#1c2128")
            if name in drawn:
                axes.imshow(drawn[name], interpolation="nearest")
            else:
                axes.text(0.5, 0.5, "not defined", ha="center", va="center", fontsize=8, color="#5b6570")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main()
