"""A small data set decoded once and kept in memory, so that no epoch decodes it again.

Fifty thousand pictures of 32×32 take 154 MB. Forked workers share it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vitrail.data.image import LIMITS, Limits, decode, inspect
from vitrail.data.sources import Source
from vitrail.data.stores import LARGEST, Array, Names
from vitrail.errors import ImageError

BUDGET = 512 * 2**20
"""Bytes that a cached data set may take by default."""

SAMPLED = 64
"""Headers that are read to judge the size of a whole data set."""


class Decoded:
    """A store of decoded pictures of any sizes, one after another in one buffer."""

    folders: tuple[str, ...] = ()

    def __init__(self, names: Names, pixels: Array, shapes: Array, reasons: dict[int, str]) -> None:
        self.place = ""
        self.names = names
        self._pixels = pixels  # uint8, all pictures
        self._pixels.flags.writeable = False
        self._shapes = shapes  # int64 [N, 2]: height and width
        self._starts = np.concatenate([[0], np.cumsum(shapes.prod(axis=1) * 3)])
        self._reasons = reasons

    def read(self, entry: int, most: int = LARGEST) -> Array:
        if entry in self._reasons:
            raise ImageError(self._reasons[entry])
        height, width = self._shapes[entry].tolist()
        found: Array = self._pixels[self._starts[entry] : self._starts[entry + 1]].reshape(height, width, 3)
        return found

    def size(self, entry: int) -> int:
        return int(self._shapes[entry].prod() * 3)


def decoded_bytes(source: Source, limits: Limits = LIMITS) -> int:
    """About how many bytes the decoded pictures take, judged by the headers of a few."""
    found: list[int] = []
    for index in np.linspace(0, len(source) - 1, min(SAMPLED, len(source))).astype(int).tolist():
        try:
            data = source.read(index)
            if isinstance(data, np.ndarray):
                height, width = data.shape[:2]
            else:
                header = inspect(data, source.name(index), limits)
                height, width = header.height, header.width
            found.append(height * width * 3)
        except ImageError:
            continue
    return round(len(source) * sum(found) / len(found)) if found else 0


def cached(
    source: Source,
    budget: int = BUDGET,
    limits: Limits = LIMITS,
    watch: Callable[[int, int], None] | None = None,
) -> Source:
    """The source with its pictures decoded in memory; the source itself where they would take more than
    `budget` bytes. Unreadable pictures stay unreadable, with their reason. `watch` hears (done, total).
    """
    if decoded_bytes(source, limits) > budget:
        return source
    pieces: list[Array] = []
    shapes = np.zeros((len(source), 2), dtype=np.int64)
    reasons: dict[int, str] = {}
    taken = 0
    for index in range(len(source)):
        try:
            pixels = decode(source.read(index), source.name(index), limits).permute(1, 2, 0).numpy()
        except ImageError as error:
            reasons[index] = str(error)
        else:
            taken += pixels.size
            if taken > budget:
                return source
            shapes[index] = pixels.shape[:2]
            pieces.append(pixels.reshape(-1))
        if watch is not None:
            watch(index + 1, len(source))
    buffer = np.concatenate([np.empty(0, dtype=np.uint8), *pieces])
    store = Decoded(Names(source.name(index) for index in range(len(source))), buffer, shapes, reasons)
    rows = np.stack([np.zeros(len(source), np.int64), np.arange(len(source))], axis=1)
    return source.at([store], rows)
