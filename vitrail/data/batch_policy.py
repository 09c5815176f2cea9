"""RandAugment and TrivialAugment on whole batches, for pictures that live on the device.

Each picture draws an operation, and pictures with the same one go through it together, so a policy costs about one
operation. Operations and ranges are torchvision's (`RandAugment`, `TrivialAugmentWide`), which are the papers'
(Cubuk et al. 1909.13719; Müller and Hutter 2103.10158): strengths in 31 even steps, geometry by the nearest pixel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

Pixels = UInt8[Tensor, "B 3 h w"]
Strengths = Float[Tensor, " B"]
Fill = tuple[float, float, float]
"""Colour of what geometry leaves bare, 0..255."""

STEPS = 31
"""Strengths of an operation, from none to its most."""


class Operation(NamedTuple):
    """One kind of change. `most(side)` is its strength at full magnitude, for pictures of so many pixels a side."""

    apply: Callable[[Pixels, Strengths, Fill], Pixels]
    most: Callable[[int], float]
    signed: bool = False
    """Whether half the pictures take the strength with a minus."""


def rand(
    pictures: Pixels, generator: torch.Generator, fill: Fill, layers: int = 2, magnitude: int = 9
) -> Pixels:
    """RandAugment: `layers` operations in a row on each picture, all at `magnitude` of 0..30."""
    for _ in range(layers):
        share = torch.full((len(pictures),), magnitude / (STEPS - 1))
        pictures = _drawn(pictures, OPERATIONS_RAND, share, generator, fill)
    return pictures


def trivial(pictures: Pixels, generator: torch.Generator, fill: Fill) -> Pixels:
    """TrivialAugment, wide: one operation on each picture, at a strength drawn evenly."""
    share = torch.randint(STEPS, (len(pictures),), generator=generator) / (STEPS - 1)
    return _drawn(pictures, OPERATIONS_TRIVIAL, share, generator, fill)


def _drawn(
    pictures: Pixels,
    operations: tuple[Operation, ...],
    share: Strengths,
    generator: torch.Generator,
    fill: Fill,
) -> Pixels:
    """Each picture after an operation of its own, at this share of its full strength."""
    count, side = len(pictures), min(pictures.shape[2:])
    # The last kind leaves the picture alone.
    kind = torch.randint(len(operations) + 1, (count,), generator=generator)
    sign = 1 - 2 * torch.randint(2, (count,), generator=generator)
    most = torch.tensor([*(operation.most(side) for operation in operations), 0.0])
    signed = torch.tensor([*(operation.signed for operation in operations), False])
    strength = share * most[kind] * torch.where(signed[kind], sign, 1)
    # Two copies to the device for all operations: each one makes the host wait for it.
    order = torch.argsort(kind, stable=True)
    groups = torch.bincount(kind, minlength=len(operations) + 1).tolist()
    rows = order.to(pictures.device, non_blocking=True).split(groups)
    strengths = strength[order].to(pictures.device, torch.float32, non_blocking=True).split(groups)
    changed = pictures.clone()
    for operation, there, own in zip(operations, rows, strengths, strict=False):
        if len(there):
            changed[there] = operation.apply(pictures[there], own, fill)
    return changed


@functools.lru_cache(maxsize=64)
def _kept(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A few numbers on a device, copied there once."""
    return torch.tensor(values, device=device)


def shear_x(pictures: Pixels, strength: Strengths, fill: Fill) -> Pixels:
    """Rows slide to the right by `strength` pixels for each row below the top."""
    return _moved(pictures, fill, xy=strength, origin=(0.0, 0.0))


def shear_y(pictures: Pixels, strength: Strengths, fill: Fill) -> Pixels:
    """Columns slide down by `strength` pixels for each column right of the left edge."""
    return _moved(pictures, fill, yx=strength, origin=(0.0, 0.0))


def translate_x(pictures: Pixels, strength: Strengths, fill: Fill) -> Pixels:
    """To the right by whole pixels."""
    return _moved(pictures, fill, right=strength.trunc())


def translate_y(pictures: Pixels, strength: Strengths, fill: Fill) -> Pixels:
    """Down by whole pixels."""
    return _moved(pictures, fill, down=strength.trunc())


def rotate(pictures: Pixels, strength: Strengths, fill: Fill) -> Pixels:
    """Against the clock, by degrees, about the middle."""
    angle = strength * (math.pi / 180)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return _moved(pictures, fill, xx=cos, xy=sin, yx=-sin, yy=cos)


def _moved(
    pictures: Pixels,
    fill: Fill,
    *,
    xx: Tensor | float = 1.0,
    xy: Tensor | float = 0.0,
    yx: Tensor | float = 0.0,
    yy: Tensor | float = 1.0,
    right: Tensor | float = 0.0,
    down: Tensor | float = 0.0,
    origin: tuple[float, float] | None = None,
) -> Pixels:
    """The affine map (x, y) -> (xx·x + xy·y + right, yx·x + yy·y + down) about a point of [0, w] x [0, h], by default
    the middle; the nearest pixel is taken, and `fill` where there is none."""
    count, _, height, width = pictures.shape
    across, along = (width / 2, height / 2) if origin is None else origin
    xx, xy, yx, yy, right, down = (
        _kept((value,), pictures.device).expand(count)[:, None, None]
        if isinstance(value, float)
        else value[:, None, None]
        for value in (xx, xy, yx, yy, right, down)
    )
    x = torch.arange(width, device=pictures.device) + 0.5 - across - right  # [B, 1, w]
    y = (torch.arange(height, device=pictures.device) + 0.5 - along)[:, None] - down  # [B, h, 1]
    area = xx * yy - xy * yx
    source_x = (yy * x - xy * y) / area + across  # [B, h, w]
    source_y = (xx * y - yx * x) / area + along
    column, row = source_x.floor().long(), source_y.floor().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)  # [B, h, w]
    taken = pictures.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, 3, -1)).view_as(pictures)
    bare = _kept(fill, pictures.device).round().to(torch.uint8)[:, None, None]
    return torch.where(inside[:, None], taken, bare)


def brightness(pictures: Pixels, strength: Strengths, fill: Fill) -> Pixels:
    """Times 1 + strength; this and the next three mix with something dull, or go beyond the picture."""
    return _mixed(pictures, torch.zeros((), device=pictures.device), strength)


def saturation(pictures: Pixels, strength: Strengths, fill: Fill) -> Pixels:
    """1 + strength of the picture, the rest its grey version."""
    return _mixed(pictures, grey(pictures.float()).floor(), strength)


def contrast(pictures: Pixels, strength: Strengths, fill: Fill) -> Pixels:
    """1 + strength of the picture, the rest its mean grey."""
    middle = grey(pictures.float()).floor().mean(dim=(1, 2, 3), keepdim=True)
    return _mixed(pictures, middle, strength)


def sharpness(pictures: Pixels, strength: Strengths, fill: Fill) -> Pixels:
    """1 + strength of the picture, the rest its smoothed version (3 x 3; the border stays)."""
    kernel = _kept((1.0, 1.0, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0), pictures.device).view(3, 3)
    kernel = (kernel / kernel.sum()).expand(3, 1, 3, 3)
    soft = pictures.float()
    soft[:, :, 1:-1, 1:-1] = F.conv2d(pictures.float(), kernel, groups=3).round()
    return _mixed(pictures, soft, strength)


def _mixed(pictures: Pixels, dull: Tensor, strength: Strengths) -> Pixels:
    factor = 1 + strength[:, None, None, None]
    return (dull + (pictures.float() - dull) * factor).clamp(0, 255).to(torch.uint8)


def posterize(pictures: Pixels, strength: Strengths, fill: Fill) -> Pixels:
    """The `strength` lowest bits of each number become 0."""
    bits = strength.round().to(torch.uint8)[:, None, None, None]
    return (pictures >> bits) << bits


def solarize(pictures: Pixels, strength: Strengths, fill: Fill) -> Pixels:
    """What is at least 255 - strength is turned over."""
    bright = pictures.float() >= 255 - strength[:, None, None, None]
    return torch.where(bright, 255 - pictures, pictures)


def auto_contrast(pictures: Pixels, strength: Strengths, fill: Fill) -> Pixels:
    """Each channel stretched to 0..255."""
    images = pictures.float()
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    stretched = (images - low) * (255 / (high - low).clamp(min=1))
    return torch.where(high > low, stretched, images).clamp(0, 255).to(torch.uint8)


def equalize(pictures: Pixels, strength: Strengths, fill: Fill) -> Pixels:
    """Each channel with its levels spread so that all are about equally frequent, as Pillow does it."""
    flat = pictures.flatten(2).flatten(0, 1).long()  # [B * 3, h * w]
    counts = torch.zeros(len(flat), 256, device=flat.device, dtype=torch.long)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    highest = flat.amax(dim=1, keepdim=True)
    step = (flat.shape[1] - counts.gather(1, highest)) // 255  # [B * 3, 1]
    before = counts.cumsum(1) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    spread = torch.where(step > 0, table.gather(1, flat), flat)
    return spread.to(torch.uint8).view_as(pictures)


def grey(images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B 1 h w"]:
    """Grey by ITU-R 601."""
    weights = _kept((0.299, 0.587, 0.114), images.device)[:, None, None]
    return (images * weights).sum(dim=1, keepdim=True)


def operations(
    *, shear: float, shift: Callable[[int], float], degrees: float, colour: float, bits: int
) -> tuple[Operation, ...]:
    """The thirteen kinds of change, at these strengths of geometry, colour and posterizing."""
    signed = [(shear_x, shear), (shear_y, shear), (rotate, degrees)]
    signed += [(blend, colour) for blend in (brightness, saturation, contrast, sharpness)]
    plain = [(posterize, float(bits)), (solarize, 255.0), (auto_contrast, 0.0), (equalize, 0.0)]
    return (
        *(Operation(change, shift, signed=True) for change in (translate_x, translate_y)),
        *(Operation(change, _constant(most), signed=True) for change, most in signed),
        *(Operation(change, _constant(most)) for change, most in plain),
    )


def _constant(value: float) -> Callable[[int], float]:
    return lambda side: value


OPERATIONS_RAND = operations(shear=0.3, shift=lambda side: 150 / 331 * side, degrees=30.0, colour=0.9, bits=4)
OPERATIONS_TRIVIAL = operations(shear=0.99, shift=_constant(32.0), degrees=135.0, colour=0.99, bits=6)
