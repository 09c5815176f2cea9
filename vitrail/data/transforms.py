"""From a decoded picture to the network's input, all in uint8 until the batch is on its device.

`Preprocess` is the reference: evaluation, prediction, explanation and serving all go through it. Training
goes through data/augment.py, with the same resizing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vitrail.errors import ConfigError
from vitrail.weights.card import Preprocessing

ELONGATION = 8
"""A picture more elongated than this is cut to its middle before a centre crop is resized, so that a strip
of 1×16,384 pixels does not become one of 248×4,063,232. The cut lies far outside the crop."""


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize uint8 `[C, H, W]` to `[C, *size]`, always antialiased, on the CPU.

    `interpolation` is a name of weights.card.INTERPOLATIONS. Bilinear and bicubic run in torch's uint8
    kernels (within 2/255 of Pillow's, three times as fast); the rest in Pillow.
    """
    if tuple(image.shape[1:]) == tuple(size):
        return image
    if interpolation in ("bilinear", "bicubic"):
        return functional.interpolate(image[None], size=size, mode=interpolation, antialias=True)[0]
    if interpolation == "nearest":
        return functional.interpolate(image[None], size=size, mode="nearest-exact")[0]
    from PIL import Image

    kind = Image.Resampling[interpolation.upper()]
    planes = [Image.fromarray(plane.numpy()).resize(size[::-1], kind) for plane in image]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))  # [C, h, w]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch work in one thread, as it should on single pictures: sharing out 50,000 pixels costs more
    than it saves, and a hundred times more where other programs hold the other cores."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Geometry(NamedTuple):
    """Where each pixel of the network's input lies in the upright picture: an exact affine map.

    Places are measured in pixels from the top left corner, edges and not centres: the middle of the first
    pixel is (0.5, 0.5). A place (y, x) of the input lies at (y * scale_y + shift_y, x * scale_x + shift_x).
    """

    picture: tuple[int, int]
    """Height and width of the upright picture."""
    output: tuple[int, int]
    """Rows and columns of the network's input."""
    scale_y: float
    scale_x: float
    shift_y: float
    shift_x: float

    def to_picture(self, y: float, x: float) -> tuple[float, float]:
        """From a place in the network's input to the place in the picture."""
        return y * self.scale_y + self.shift_y, x * self.scale_x + self.shift_x

    def to_output(self, y: float, x: float) -> tuple[float, float]:
        """From a place in the picture to the place in the network's input."""
        return (y - self.shift_y) / self.scale_y, (x - self.shift_x) / self.scale_x

    @property
    def window(self) -> tuple[float, float, float, float]:
        """Top, left, bottom, right in the picture of what the network sees (outside it with a border)."""
        return *self.to_picture(0, 0), *self.to_picture(*self.output)


Window = tuple[int, int, int, int]
"""Top, left, bottom, right, in whole pixels."""


class Plan(NamedTuple):
    """The steps of one preprocessing: cut `window`, resize to `size`, then crop (or pad) from `corner`."""

    window: Window
    size: tuple[int, int]
    corner: tuple[int, int]


class Preprocess:
    """The reference preprocessing of a model: uint8 RGB `[3, H, W]` to uint8 `[in_chans, *input_size]`.

    `center`: the short side is resized to input_size / crop_pct and the middle cut out. `squash`: both sides
    are resized to it, whatever the shape. `border`: the whole picture is fitted in and the rest filled with
    the mean colour. `fit`: the whole picture at a size of its own (DETR's way). One input channel means grey
    (ITU-R 601 luma). Raises ConfigError for another number of channels than 1 or 3, which no picture has.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        if preprocessing.in_chans not in (1, 3):
            raise ConfigError(
                f"Pictures have 1 or 3 channels, the model wants {preprocessing.in_chans}; "
                "hand it tensors of your own instead of image files."
            )
        self.preprocessing = preprocessing

    def __call__(self, image: Tensor, seed: int = 0) -> Tensor:
        """`seed` is there for loaders, which hand it to every transform; nothing here is random."""
        record = self.preprocessing
        plan = self.plan(image.shape[1], image.shape[2])
        top, left, bottom, right = plan.window
        image = resize(image[:, top:bottom, left:right], plan.size, record.interpolation)
        if record.in_chans == 1:
            image = luma(image)
        return _window(image, plan.corner, self._output(plan), colour(record)).contiguous()

    def _output(self, plan: Plan) -> tuple[int, int]:
        return plan.size if self.preprocessing.crop_mode == "fit" else self.preprocessing.input_size

    def plan(self, height: int, width: int) -> Plan:
        """The integers of every step, from the size of the picture alone."""
        record = self.preprocessing
        (rows, columns), (to_rows, to_columns) = record.input_size, record.resize
        window = (0, 0, height, width)
        if record.crop_mode == "fit":
            return Plan(window, fit_between(height, width, min(rows, columns), max(rows, columns)), (0, 0))
        if record.crop_mode == "squash":
            size = (to_rows, to_columns)
        elif record.crop_mode == "border":
            size = _fit(height, width, to_rows, to_columns, within=True)
        else:
            window, size = cover(height, width, to_rows, to_columns)
        return Plan(window, size, (round((size[0] - rows) / 2), round((size[1] - columns) / 2)))

    def geometry(self, height: int, width: int) -> Geometry:
        """The exact map between the input and an upright picture of this size."""
        plan = self.plan(height, width)
        top, left, bottom, right = plan.window
        scale_y, scale_x = (bottom - top) / plan.size[0], (right - left) / plan.size[1]
        return Geometry(
            (height, width),
            self._output(plan),
            scale_y,
            scale_x,
            plan.corner[0] * scale_y + top,
            plan.corner[1] * scale_x + left,
        )


def _fit(height: int, width: int, rows: int, columns: int, within: bool) -> tuple[int, int]:
    """The size that keeps the shape and covers rows × columns, or lies within them; rounded down."""
    by_rows = (height * columns <= width * rows) is not within
    if by_rows:
        return rows, max(1, width * rows // height)
    return max(1, height * columns // width), columns


def fit_between(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """The size of the same shape with this short side, or a smaller one where the long side would exceed `long`.

    Rounded as DETR's own code does it.
    """
    small, large = min(height, width), max(height, width)
    if large * short > long * small:
        short = max(1, round(long * small / large))
    longer = min(short * large // small, long + short)
    return (longer, short) if width < height else (short, longer)


def cover(height: int, width: int, rows: int, columns: int) -> tuple[Window, tuple[int, int]]:
    """The window of a picture that is resized, and the size for it that just covers rows × columns."""
    tall, wide = min(height, ELONGATION * width), min(width, ELONGATION * height)
    top, left = (height - tall) // 2, (width - wide) // 2
    return (top, left, top + tall, left + wide), _fit(tall, wide, rows, columns, within=False)


def luma(image: Tensor) -> Tensor:
    """Grey `[1, H, W]` of uint8 RGB `[3, H, W]`, by ITU-R 601 in Pillow's whole numbers."""
    red, green, blue = image.to(torch.int32)
    grey: Tensor = (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16
    return grey.to(torch.uint8)[None]  # [1, H, W]


def _window(image: Tensor, corner: tuple[int, int], size: tuple[int, int], fill: Tensor) -> Tensor:
    """Cut `[C, *size]` out of an image from a corner on; what lies outside it gets the fill colour."""
    (top, left), (rows, columns) = corner, size
    height, width = image.shape[1:]
    if top >= 0 and left >= 0 and top + rows <= height and left + columns <= width:
        return image[:, top : top + rows, left : left + columns]
    canvas = fill[:, None, None].expand(-1, rows, columns).clone()
    piece = image[:, max(top, 0) : top + rows, max(left, 0) : left + columns]
    y, x = max(-top, 0), max(-left, 0)
    canvas[:, y : y + piece.shape[1], x : x + piece.shape[2]] = piece
    return canvas


def colour(preprocessing: Preprocessing) -> Tensor:
    """The mean colour, uint8 `[C]`: what lies at 0 after normalising."""
    values = [round(255 * min(max(value, 0.0), 1.0)) for value in preprocessing.mean]
    return torch.tensor(values, dtype=torch.uint8).expand(preprocessing.in_chans)


def constants(preprocessing: Preprocessing) -> tuple[list[float], list[float]]:
    """Per channel, the factor and the summand that take a pixel of 0..255 to the network's input."""
    channels = preprocessing.in_chans
    mean = (preprocessing.mean * channels)[:channels]
    std = (preprocessing.std * channels)[:channels]
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


@functools.lru_cache(maxsize=16)
def _constants(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    factor, summand = constants(preprocessing)
    return (
        torch.tensor(factor, dtype=torch.float32, device=device)[:, None, None],
        torch.tensor(summand, dtype=torch.float32, device=device)[:, None, None],
    )


def normalise(
    batch: Tensor,
    preprocessing: Preprocessing,
    dtype: torch.dtype = torch.float32,
    padding: Tensor | None = None,
) -> Tensor:
    """(pixel / 255 - mean) / std of a uint8 batch `[B, C, h, w]`, on the device where it lies.

    Computed in float32, handed back in `dtype`. Where `padding` `[B, h, w]` is True the result is exactly 0.
    """
    factor, summand = _constants(preprocessing, batch.device)
    images = batch.to(torch.float32, copy=True)
    images.mul_(factor).add_(summand)  # in place: on a CPU, new memory costs more than the sums
    if padding is not None:
        images.masked_fill_(padding.to(batch.device)[:, None], 0.0)
    return images.to(dtype)  # [B, C, h, w]
