"""Pictures whose evidence is known, and small networks trained on them within the tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.models import registry
from vitrail.models.model import Model

Batch = tuple[Tensor, Tensor, Tensor]
"""Images, soft targets, and where the evidence lies."""


def train(
    network: Model, draw: Callable[[int, torch.Generator], Batch], steps: int, rate: float = 2e-3
) -> Model:
    """Train on fresh batches; the evidence's place is not shown."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=steps)
    network.train()
    for _ in range(steps):
        images, targets, _ = draw(64, generator)
        loss = F.cross_entropy(network(images), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval()


def small_vit(img_size: int, patch: int, classes: int, depth: int = 4, **changes: object) -> Model:
    """A ViT that trains in a minute on one core."""
    torch.manual_seed(0)
    return registry.create_model(
        "vit_tiny_patch16_224", img_size=img_size, patch_size=(patch, patch), width=64, depth=depth, heads=4,
        hidden=128, num_classes=classes, **changes,
    )  # fmt: skip


class Planted:
    """Noise with one patch, at a random cell of a grid, that decides the label by its pattern."""

    def __init__(self, classes: int = 4, cells: int = 6, patch: int = 4) -> None:
        self.classes, self.cells, self.patch = classes, cells, patch
        generator = torch.Generator().manual_seed(7)
        self.patterns = torch.randn(classes, 3, patch, patch, generator=generator) * 1.5
        self.size = cells * patch

    def __call__(self, count: int, generator: torch.Generator) -> Batch:
        images = torch.randn(count, 3, self.size, self.size, generator=generator) * 0.5
        labels = torch.randint(self.classes, (count,), generator=generator)
        places = torch.randint(self.cells**2, (count,), generator=generator)
        for image, label, place in zip(images, labels, places, strict=True):
            row, column = divmod(int(place), self.cells)
            box = (
                slice(row * self.patch, (row + 1) * self.patch),
                slice(column * self.patch, (column + 1) * self.patch),
            )
            image[:, box[0], box[1]] = self.patterns[label]
        return images, F.one_hot(labels, self.classes).float(), places


class Mosaic:
    """Handwritten digits of four classes in the tiles of a square; for training one to three, each of its own class.

    The target is shared evenly between the classes that are there.
    """

    CLASSES = (0, 1, 4, 7)
    TILE = 12

    def __init__(self, part: slice) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images[part]).float()[:, None] / 8 - 1  # [n, 1, 8, 8], -1..1
        images = F.interpolate(images, size=(self.TILE, self.TILE), mode="bilinear", align_corners=False)[
            :, 0
        ]
        labels = torch.tensor(digits.target[part])
        self.groups = [images[labels == label] for label in self.CLASSES]

    def draw(self, count: int, generator: torch.Generator, full: bool) -> Batch:
        """Images, targets, and for each class the tile that shows it, or -1."""
        side = 2 * self.TILE
        order = torch.rand(count, 4, generator=generator).argsort(dim=1)  # tile of each class
        shown = torch.randint(1, 4, (count,), generator=generator) if not full else torch.full((count,), 4)
        present = torch.rand(count, 4, generator=generator).argsort(dim=1) < shown[:, None]  # [B, classes]
        images = (
            torch.randn(count, 1, side, side, generator=generator) * 0.2
        )  # 0 is the ground, as after normalising
        for number in range(count):
            for kind in torch.nonzero(present[number])[:, 0].tolist():
                group, (row, column) = self.groups[kind], divmod(int(order[number, kind]), 2)
                digit = group[int(torch.randint(len(group), (1,), generator=generator))]
                images[number, 0, row * self.TILE :, column * self.TILE :][: self.TILE, : self.TILE] += (
                    digit + 1
                )
        targets = present.float() / present.sum(dim=1, keepdim=True)
        return images.expand(-1, 3, -1, -1).contiguous(), targets, torch.where(present, order, -1)

    def __call__(self, count: int, generator: torch.Generator) -> Batch:
        return self.draw(count, generator, full=False)
