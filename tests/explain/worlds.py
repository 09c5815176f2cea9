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
    network: Model,
    draw: Callable[[int, torch.Generator], Batch],
    steps: int,
    rate: float = 2e-3,
    decay: float = 0.01,
    smoothing: float = 0.0,
) -> Model:
    """Train on fresh batches; the evidence's place is not shown."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=steps)
    network.train()
    for _ in range(steps):
        images, targets, _ = draw(64, generator)
        loss = F.cross_entropy(network(images), targets, label_smoothing=smoothing)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval()


def small_vit(img_size: int, patch: int, classes: int, depth: int = 4, **changes: object) -> Model:
    """A ViT that trains in a minute on one core."""
    torch.manual_seed(0)
    sizes = {"width": 64, "hidden": 128, "depth": depth, "heads": 4, **changes}
    return registry.create_model(
        "vit_tiny_patch16_224", img_size=img_size, patch_size=(patch, patch), num_classes=classes, **sizes
    )


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
    """Handwritten digits of four classes in the tiles of a square; for training none to three, each of its own class.

    Those for training are moved, turned, stretched and of any contrast, so that none is learnt by heart. The target is
    shared evenly between the classes that are there.
    """

    CLASSES = (0, 1, 4, 7)
    TILE = 12

    def __init__(self, part: slice) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images[part]).float()[:, None] / 8  # [n, 1, 8, 8], 0..2
        size = (self.TILE, self.TILE)
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        labels = torch.tensor(digits.target[part])
        groups = [images[labels == label] for label in self.CLASSES]
        self.digits = torch.cat(groups)  # those of one class side by side
        self.counts = torch.tensor([len(group) for group in groups])

    def draw(self, count: int, generator: torch.Generator, full: bool) -> Batch:
        """Images, targets, and for each class its tile, or -1; all four, as they were written, if `full`."""
        order = torch.rand(count, 4, generator=generator).argsort(dim=1)  # tile of each class
        shown = torch.randint(0, 4, (count,), generator=generator) if not full else torch.full((count,), 4)
        present = torch.rand(count, 4, generator=generator).argsort(dim=1) < shown[:, None]  # [B, classes]
        chosen = (torch.rand(count, 4, generator=generator) * self.counts).long()
        tiles = self.digits[(self.counts.cumsum(0) - self.counts + chosen).flatten()]  # [B * 4, 1, t, t]
        tiles = tiles if full else varied(tiles, generator)
        tiles = tiles.view(count, 4, self.TILE, self.TILE) * present[:, :, None, None]
        tiles = tiles.gather(1, order.argsort(dim=1)[:, :, None, None].expand_as(tiles))  # by place
        side = 2 * self.TILE
        square = tiles.view(count, 2, 2, self.TILE, self.TILE).transpose(2, 3).reshape(count, 1, side, side)
        images = square + 0.2 * torch.randn(count, 1, side, side, generator=generator)  # 0 is the ground
        there = present.sum(dim=1, keepdim=True)
        targets = torch.where(there > 0, present / there.clamp_min(1), torch.full((), 0.25))
        return images.expand(-1, 3, -1, -1).contiguous(), targets, torch.where(present, order, -1)

    def __call__(self, count: int, generator: torch.Generator) -> Batch:
        return self.draw(count, generator, full=False)


def varied(tiles: Tensor, generator: torch.Generator) -> Tensor:
    """Each tile `[n, 1, t, t]` turned by up to 14 degrees, stretched, moved by up to a pixel, made fainter."""

    def around(reach: float) -> Tensor:
        return (torch.rand(len(tiles), generator=generator) * 2 - 1) * reach

    angle, size, across, down = around(0.25), 1 + around(0.15), around(0.17), around(0.17)
    rows = (
        torch.stack([angle.cos() / size, -angle.sin() / size, across], dim=1),
        torch.stack([angle.sin() / size, angle.cos() / size, down], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(tiles.shape), align_corners=False)
    contrast = (1 - 0.3 * torch.rand(len(tiles), generator=generator)) * (1 + around(0.15))
    return F.grid_sample(tiles, grid, align_corners=False) * contrast[:, None, None, None]
