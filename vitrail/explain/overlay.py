"""A map over the picture that it explains, at the picture's own resolution."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from vitrail.data.transforms import Geometry
from vitrail.explain.heat import Heat

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

LOOKS, SIGNED = "inferno", "PuOr_r"
"""Colour scales of amounts and of values around zero: even in lightness, apart for every kind of eye."""


def on_picture(heat: Heat, geometry: Geometry, smooth: bool = True) -> Float[Tensor, "H W"]:
    """The first map of a batch at every pixel of the upright picture; NaN where the network did not look."""
    height, width = geometry.picture
    ys = (torch.arange(height) + 0.5 - geometry.shift_y) / geometry.scale_y
    xs = (torch.arange(width) + 0.5 - geometry.shift_x) / geometry.scale_x
    values = heat.at(ys, xs, smooth)[0]  # [H, W]
    outside_y = (ys < 0) | (ys > geometry.output[0])
    outside_x = (xs < 0) | (xs > geometry.output[1])
    return values.masked_fill(outside_y[:, None] | outside_x[None], float("nan"))


def shares(values: Tensor) -> tuple[Tensor, bool]:
    """Values as 0..1 for a colour scale, and whether they are signed: then 1/2 is zero."""
    seen = values[~values.isnan()]
    low, high = (float(seen.min()), float(seen.max())) if seen.numel() else (0.0, 0.0)
    if low < 0:
        reach = max(-low, high)
        return values / (2 * reach) + 0.5, True
    return (values - low) / ((high - low) or 1.0), False


def overlay(picture: UInt8[Tensor, "C H W"], values: Float[Tensor, "H W"]) -> Pixels:
    """The map in colours over the picture in greys; what the network did not see is left dark."""
    from matplotlib import colormaps

    share, signed = shares(values)
    grey = picture.float().mean(dim=0).numpy()[:, :, None] / 255  # [H, W, 1]
    colours = colormaps[SIGNED if signed else LOOKS](share.nan_to_num(0.5 if signed else 0.0).numpy())[
        :, :, :3
    ]
    strength = (2 * share - 1).abs() if signed else share
    weight = (0.25 + 0.5 * strength.nan_to_num(0.0)).numpy()[:, :, None]
    mixed = grey * (1 - weight) + colours * weight
    unseen = values.isnan().numpy()[:, :, None]
    shown = np.where(unseen, grey * 0.25, mixed)
    return (shown * 255).round().clip(0, 255).astype(np.uint8)


def outlined(pixels: Pixels, corners: tuple[float, float, float, float]) -> Pixels:
    """The picture with a box around what is meant: white between two dark lines, seen on any ground."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    width = max(1, round(min(picture.size) / 160))
    x1, y1, x2, y2 = corners
    for inset, colour, thick in ((-width, "black", 3 * width), (0, "white", width)):
        draw.rectangle((x1 + inset, y1 + inset, x2 - inset, y2 - inset), outline=colour, width=thick)
    return np.asarray(picture)


def contoured(pixels: Pixels, inside: Bool[Tensor, "H W"]) -> Pixels:
    """The picture with a line round a region, white within and dark without, seen on any ground."""
    width = max(1, round(min(inside.shape) / 240))
    shape = inside.float()[None, None]
    grown, shrunk = (
        sign * F.max_pool2d(sign * shape, 2 * width + 1, stride=1, padding=width) for sign in (1, -1)
    )
    drawn = pixels.copy()
    drawn[((grown > 0) & ~inside)[0, 0].numpy()] = 0
    drawn[(inside & (shrunk < 1))[0, 0].numpy()] = 255
    return drawn


def png(pixels: Pixels) -> bytes:
    """The PNG file of an image `[H, W, 3]`, or `[H, W, 4]` with transparency."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
