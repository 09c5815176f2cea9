"""Large pictures through a window: logits are averaged where windows overlap."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.errors import ConfigError
from vitrail.nn.shapes import MaskOutput


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride`, the last one moved back so that it ends at the border."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [min(place * stride, max(side - window, 0)) for place in range(count)]


def slide(
    forward: Callable[[Tensor], Tensor | MaskOutput],
    images: Tensor,
    window: tuple[int, int],
    stride: tuple[int, int] | None = None,
    *,
    together: int = 1,
) -> Float[Tensor, "B K I J"]:
    """Logits of images of any size, from windows of one size; a picture smaller than the window goes through whole.

    Every pixel gets the mean of the logits that windows over it give (SETR: two thirds of the window as stride;
    Cityscapes 768 and 512, ADE20K 512 and 341).

    Args:
        forward: from a batch of windows `[B, C, h, w]` to their logits `[B, K, h, w]`: a segmenter, an engine.
        images: `[B, C, I, J]`, in whatever type `forward` takes.
        window: rows and columns of a window.
        stride: rows and columns from a window to the next; left out, two thirds of the window.
        together: windows that go through the network at once: faster on a GPU, more memory.

    Raises:
        ConfigError: a window below one pixel, or a stride that leaves gaps.
    """
    step = (max(1, window[0] * 2 // 3), max(1, window[1] * 2 // 3)) if stride is None else stride
    if min(window) < 1 or together < 1:
        raise ConfigError(f"window and together must be at least 1; got {window} and {together}.")
    if any(not 1 <= one <= side for one, side in zip(step, window, strict=True)):
        raise ConfigError(f"The stride must lie between 1 and the window, {window}; got {step}.")
    rows, columns = images.shape[2:]
    height, width = min(window[0], rows), min(window[1], columns)
    places = [
        (top, left) for top in starts(rows, height, step[0]) for left in starts(columns, width, step[1])
    ]
    total: Tensor | None = None
    for first in range(0, len(places), together):
        chunk = places[first : first + together]
        cuts = [images[:, :, top : top + height, left : left + width] for top, left in chunk]
        output = forward(torch.cat(cuts) if len(cuts) > 1 else cuts[0])
        logits = output.logits if isinstance(output, MaskOutput) else output
        if len(places) == 1:
            return logits
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[1], rows, columns)
        for (top, left), part in zip(chunk, logits.split(len(images)), strict=True):
            total[:, :, top : top + height, left : left + width] += part
    assert total is not None
    return total.div_(_coverage(places, (height, width), (rows, columns)).to(total))


def _coverage(places: list[tuple[int, int]], window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """How many windows lie over each pixel."""
    count = torch.zeros(size)
    for top, left in places:
        count[top : top + window[0], left : left + window[1]] += 1
    return count
