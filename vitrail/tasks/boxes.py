"""Boxes: two ways to write them down, and how much two of them share.

    centres   (cx, cy, w, h)
    corners   (x1, y1, x2, y2), x to the right, y down; x2 >= x1 and y2 >= y1

Any unit will do; answers of areas are in its square.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def to_corners(boxes: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 4"]:
    """Centres to corners."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([middle - half, middle + half], dim=-1)


def area(corners: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B"]:
    """Width times height."""
    sides = corners[..., 2:] - corners[..., :2]
    return sides[..., 0] * sides[..., 1]


def iou(one: Float[Tensor, "*B 4"], other: Float[Tensor, "*B 4"]) -> tuple[Tensor, Tensor]:
    """Intersection over union of corners, and the union; shapes broadcast. 0 where both have no area."""
    sides = torch.min(one[..., 2:], other[..., 2:]) - torch.max(one[..., :2], other[..., :2])
    sides = sides.clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    union = area(one) + area(other) - shared
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny), union


def generalized_iou(one: Float[Tensor, "*B 4"], other: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B"]:
    """IoU less the share of the hull that neither covers (Rezatofighi et al. 2019, 1902.09630); in -1..1."""
    shared, union = iou(one, other)
    sides = torch.max(one[..., 2:], other[..., 2:]) - torch.min(one[..., :2], other[..., :2])
    hull = sides[..., 0] * sides[..., 1]
    return shared - (hull - union) / hull.clamp(min=torch.finfo(hull.dtype).tiny)


def to_pixels(boxes: Float[Tensor, "N 4"], size: Sequence[int]) -> Float[Tensor, "N 4"]:
    """Centres in 0..1 to corners in pixels of a picture of (rows, columns)."""
    rows, columns = (int(side) for side in size)
    return to_corners(boxes) * boxes.new_tensor([columns, rows, columns, rows])
