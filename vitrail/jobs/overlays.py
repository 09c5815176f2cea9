"""Annotations drawn on their pictures, so that a person sees what a network would be taught."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.data.boxes import PictureBoxes
from vitrail.data.image import decode
from vitrail.disk import write_atomically
from vitrail.tasks.draw_dense import Drawn, as_png, draw_boxes, draw_mask, side_by_side

OVERLAYS = 10
"""Pictures that are drawn."""


def draw_overlays(source: Any, numbers: Sequence[int], folder: Path) -> Path:
    """Ten pictures of a source, spread over `numbers`, with their boxes or masks: overlays.png."""
    spread = np.linspace(0, len(numbers) - 1, min(OVERLAYS, len(numbers))).astype(int)
    tiles = [draw_annotation(source, numbers[place]) for place in dict.fromkeys(spread.tolist())]
    rows = [tiles[start : start + 2] for start in range(0, len(tiles), 2)]
    what = "boxes" if source.kind == "boxes" else "masks"
    sheet = side_by_side(
        rows, f"What is annotated: {what} on {len(tiles)} pictures", ", ".join(source.classes)
    )
    path = folder / "overlays.png"
    write_atomically(path, as_png(sheet))
    return path


def draw_annotation(source: Any, index: int) -> Any:
    """One picture of a source with its boxes or its mask."""
    name = source.name(index)
    pixels = decode(source.read(index), name).permute(1, 2, 0).numpy()
    return draw_target(pixels, source.target(index), source.classes, Path(name).name)


def draw_target(pixels: Any, target: Any, labels: Sequence[str], title: str) -> Any:
    """A picture uint8 `[H, W, 3]` with the boxes or the mask that belong to it."""
    if not isinstance(target, PictureBoxes):
        return draw_mask(pixels, target, labels, title)
    boxes = [Drawn(int(n), tuple(c)) for n, c in zip(target.labels, target.boxes.tolist(), strict=True)]
    return draw_boxes(pixels, boxes, labels, title)
