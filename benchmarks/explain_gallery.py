"""A gallery of overlays for every family, by the call that `vitrail explain` makes, and how often the maps point right.

    python benchmarks/explain_gallery.py [--steps 400] [--output docs/pictures/explain-gallery.png]

First the models that ship, trained on photographs, on two pictures that come with scikit-learn and scikit-image. Then
every family's smallest configuration, which this script trains: on noise with one handwritten digit (scikit-learn's)
in one of four tiles. There it is known where the evidence lies, so the table counts how often a map's strongest tile
is the digit's, of 200 pictures that were not trained on (chance: 25 %). Detectors learn the digit's box and segmenters
its pixels; explained is the surest box, or the region of the digit's class. No network has random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitrail.data.transforms import normalise
from vitrail.errors import ConfigError
from vitrail.explain.explainer import Explainer
from vitrail.explain.methods import METHODS, Options, heat_of
from vitrail.models import registry
from vitrail.models.model import Model
from vitrail.tasks.boxes import iou, to_corners
from vitrail.tasks.detect import BoxTarget
from vitrail.tasks.registry import make_task
from vitrail.weights.shipped import names

CLASSES = (0, 1, 3, 4, 7)
SIDE = 32
STEPS = 16
"""Of integrated gradients."""
WEIGHTS = [1.0] * len(CLASSES) + [0.05]
"""Of a segmenter's classes: nineteen pixels in twenty are noise."""

Row = tuple[str, dict[str, Any]]
"""What stands beside the pictures, and they by method, [H, W, 3]."""


class Scene(NamedTuple):
    """Pictures [B, 3, s, s] of bytes, and of each its label, the tile of its digit, and the digit's pixels."""

    pictures: Tensor
    labels: Tensor
    tiles: Tensor
    digit: Tensor

    def larger(self, times: int) -> Scene:
        """Every pixel so many times."""
        pictures, digit = (
            values.repeat_interleave(times, -1).repeat_interleave(times, -2)
            for values in (self.pictures, self.digit)
        )
        return self._replace(pictures=pictures, digit=digit)

    @property
    def boxes(self) -> Tensor:
        """Of the digits, [B, 4]: centre, width and height in 0..1."""
        edges = []
        for axis in (1, 2):  # columns, then rows
            seen = self.digit.any(dim=axis).float()
            first, last = seen.argmax(dim=1), seen.shape[1] - seen.flip(1).argmax(dim=1)
            edges.append(torch.stack([first, last], dim=1) / seen.shape[1])
        (x1, x2), (y1, y2) = (edge.unbind(dim=1) for edge in edges)
        return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=1)

    def targets(self, task: str) -> Any:
        """What a network of this task has to learn."""
        if task == "object-detection":
            return [
                BoxTarget(box[None], label[None]) for box, label in zip(self.boxes, self.labels, strict=True)
            ]
        if task == "image-segmentation":
            return torch.where(self.digit, self.labels[:, None, None], len(CLASSES))
        return self.labels


class World(NamedTuple):
    """Digits of each class, [n, 16, 16], 0..1."""

    groups: list[Tensor]

    def draw(self, count: int, generator: torch.Generator) -> Scene:
        """So many pictures of 32 x 32."""
        pictures = 0.35 + 0.12 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
        labels = torch.randint(len(CLASSES), (count,), generator=generator)
        tiles = torch.randint(4, (count,), generator=generator)
        ink = torch.zeros(count, SIDE, SIDE)
        for sheet, label, tile in zip(ink, labels.tolist(), tiles.tolist(), strict=True):
            group, half = self.groups[label], SIDE // 2
            row, column = half * (tile // 2), half * (tile % 2)
            number = int(torch.randint(len(group), (1,), generator=generator))
            sheet[row : row + half, column : column + half] = group[number]
        pictures = (pictures + 0.6 * ink[:, None]).clamp(0, 1)
        return Scene((pictures * 255).byte(), labels, tiles, ink > 0.3)


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


def trained(family: str, world: World, steps: int) -> tuple[Model, int]:
    """The family's smallest model after so many steps, and how much larger than drawn its pictures are."""
    torch.manual_seed(0)
    module = importlib.import_module(registry.FAMILIES[family])
    task = registry.from_config(next(iter(module.VARIANTS)), module.TINY).card.task
    dense = task != "image-classification"
    times, batch = (2, 16) if dense else (1, 64)
    labels = [str(digit) for digit in CLASSES] + ["noise"] * (task == "image-segmentation")
    config = registry.changed(module.TINY, num_classes=len(labels), img_size=(SIDE * times, SIDE * times))
    model = registry.from_config(next(iter(module.VARIANTS)), config).train()
    whole = dataclasses.replace(model.card.preprocessing, crop_pct=1.0)  # nothing is cut off
    model.card = dataclasses.replace(model.card, labels=tuple(labels), preprocessing=whole)
    judge = make_task(task, labels, weights=WEIGHTS if "noise" in labels else None)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        scene = world.draw(batch, generator).larger(times)
        output = model(normalise(scene.pictures, model.card.preprocessing))
        loss = judge.loss(output, scene.targets(task))["loss"]
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval(), times


def right(model: Model, scene: Scene) -> float:
    """Share of digits that were told: their class; the surest box too (IoU 1/2); or most of their pixels."""
    with torch.no_grad():
        output: Any = model(normalise(scene.pictures, model.card.preprocessing))
    if model.card.task == "image-classification":
        found = output.argmax(1) == scene.labels
    elif model.card.task == "image-segmentation":
        same = (output.logits.argmax(1) == scene.labels[:, None, None]) & scene.digit
        found = same.sum(dim=(1, 2)) > scene.digit.sum(dim=(1, 2)) / 2
    else:
        judge = make_task(model.card.task, model.card.labels or ())
        found = torch.zeros(len(scene.labels), dtype=torch.bool)
        for number, (_, classes, boxes) in enumerate(judge.detections(output)):
            box = scene.boxes[number : number + 1]
            near = len(boxes) > 0 and float(iou(to_corners(boxes[:1]), to_corners(box))[0]) > 0.5
            found[number] = near and bool(classes[0] == scene.labels[number])
    return float(found.float().mean())


def hits(explainer: Explainer, scene: Scene) -> dict[str, float]:
    """Of each method, how often the strongest tile of its map (by mean) is the digit's."""
    images = normalise(scene.pictures, explainer.engine.card.preprocessing)
    options = Options(grid=explainer.regions, steps=STEPS)
    found = {}
    for method in explainer.methods:
        count = 50 if method in ("integrated_gradients", "occlusion") else 200  # those are slow
        heat = heat_of(explainer.network, images[:count], scene.labels[:count], method, options)
        maps = heat.resized((SIDE, SIDE), smooth=False)
        strongest = F.adaptive_avg_pool2d(maps[:, None], 2).flatten(1).argmax(1)
        found[method] = float((strongest == scene.tiles[:count]).float().mean())
    return found


def overlays(explainer: Explainer, picture: Any, target: str | None, pixels: Tensor | None = None) -> Row:
    """The picture and every method's overlay; what was explained, and how sure the model is of it."""
    drawn = {"picture": np.asarray(picture)}
    told = ""
    for method in explainer.methods:
        steps: dict[str, Any] = {"steps": STEPS} if method == "integrated_gradients" else {}
        try:
            found = explainer(picture, target, method, pixels=pixels, **steps)
        except ConfigError:  # the digit was not found
            found = explainer(picture, None, method, pixels=pixels, **steps)
        drawn[method] = found.overlay()
        told = f"{found.label}, {found.score:.0%}"
    return told, drawn


def shipped() -> dict[str, dict[str, Any]]:
    """The models that ship, on a temple and on a cat."""
    from skimage import data as pictures
    from sklearn.datasets import load_sample_image

    temple, cat = load_sample_image("china.jpg"), pictures.chelsea()  # type: ignore[no-untyped-call]
    rows = {}
    for name in names():
        picture, label = (cat[:, 75:375], "cat") if "cifar10" in name else (temple[:, 50:477], "church")
        told, drawn = overlays(Explainer(name), np.ascontiguousarray(picture), label)
        architecture, data = name.split(".")
        rows[f"{architecture.replace('_patch', chr(10) + 'patch')}\n{data}:\n{told}"] = drawn
    return rows


def small(family: str, training: World, looking: World, steps: int) -> Row:
    """One family, trained on digits: its name with its accuracy, and its overlays of one picture."""
    model, times = trained(family, training, steps)
    scene = looking.draw(200, torch.Generator().manual_seed(1)).larger(times)
    explainer = Explainer(model)
    share = right(model, scene)
    found = hits(explainer, scene) if model.card.task == "image-classification" else {}
    cells = [f"{found[method]:.0%}" if method in found else "–" for method in METHODS]
    print(f"| {family} | {share:.0%} | " + " | ".join(cells) + " |", flush=True)
    pixels = scene.pictures[3]
    large = pixels.repeat_interleave(8 // times, 1).repeat_interleave(8 // times, 2).permute(1, 2, 0).numpy()
    label = explainer.labels[int(scene.labels[3])]
    _, drawn = overlays(explainer, large, label, pixels)
    return f"{family}\n{share:.0%} right", drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/explain-gallery.png"))
    every = [
        *registry.families(),
        *registry.families("object-detection"),
        *registry.families("image-segmentation"),
    ]
    parser.add_argument("--families", nargs="*", default=every)
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    training, looking = worlds()
    gallery = shipped()
    print("| family | right | " + " | ".join(METHODS) + " |")
    print("|---|---|" + "---|" * len(METHODS))
    for family in given.families:
        name, drawn = small(family, training, looking, given.steps)
        gallery[name] = drawn
    draw(gallery, given.output)


def draw(gallery: dict[str, dict[str, Any]], output: Path) -> None:
    """Models down, methods across."""
    from matplotlib.figure import Figure

    columns = ["picture", *METHODS]
    heights = [drawn["picture"].shape[0] / drawn["picture"].shape[1] for drawn in gallery.values()]
    figure = Figure(
        figsize=(1.5 * len(columns), sum(1.5 * height + 0.05 for height in heights) + 0.4),
        layout="constrained",
        facecolor="white",
    )
    grid = figure.add_gridspec(len(gallery), len(columns), height_ratios=heights)
    for row, (model, drawn) in enumerate(gallery.items()):
        for place, name in enumerate(columns):
            axes = figure.add_subplot(grid[row, place])
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(name.replace("_", " "), fontsize=9, color="#1c2128")
            if place == 0:
                axes.set_ylabel(model, fontsize=8, color="#1c2128")
            if name in drawn:
                axes.imshow(drawn[name], interpolation="antialiased")
            else:
                axes.text(0.5, 0.5, "not defined", ha="center", va="center", fontsize=8, color="#5b6570")
    output.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    whole = Image.open(buffer).convert("RGB")
    # 256 colours, dithered: less than half of the bytes
    whole.quantize(palette=whole.quantize(256), dither=Image.Dither.FLOYDSTEINBERG).save(
        output, optimize=True
    )


if __name__ == "__main__":
    main()
