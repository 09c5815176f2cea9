"""Where tokens lie: from the cells of a grid to the cells of the finer one before it, and to pixels.

Every part that changes a map's size is a window that slides: kernel, stride and padding say which cells a new
cell is made of, and where its middle lies. Places are measured as in `data.transforms.Geometry`: in pixels or
cells from the top left corner, edges and not centres.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.bit import BitStem
from vitrail.nn.downsample import Merge
from vitrail.nn.entry import Chain, Patchify, SoftSplit
from vitrail.nn.resnet import Stem
from vitrail.nn.shapes import Grid


class Reach(NamedTuple):
    """One axis of a sliding window: new cell i is made of old cells i · stride - padding and `kernel` - 1 on."""

    kernel: int
    stride: int
    padding: int
    after: int
    """New cells along the axis."""

    @property
    def shift(self) -> float:
        """Where the middle of a cell lies beyond (i + 1/2) · stride."""
        return self.kernel / 2 - self.padding - self.stride / 2

    def matrix(self, before: int) -> Float[Tensor, "a b"]:
        """Each new cell as the mean of the old cells that its window covers; zeros where it covers none."""
        first = torch.arange(self.after)[:, None] * self.stride - self.padding
        old = torch.arange(before)[None]
        covered = ((old >= first) & (old < first + self.kernel)).float()
        return covered / covered.sum(dim=1, keepdim=True).clamp_min(1)

    def shares(self, before: int) -> Float[Tensor, "a b"]:
        """How each new cell's share is handed to the old cells; rows sum to one, or less where a window hangs over.

        A cell that several windows cover gets less of each, so that an even map stays even: means over windows of
        3 at steps of 2 would draw a lattice. What a window has in the padding before the map is lost.
        """
        covered = (self.matrix(before) > 0).float()
        parts = covered / covered.sum(dim=0).clamp_min(1) / min(self.kernel, self.stride)
        return parts / parts.sum(dim=1, keepdim=True).clamp_min(1)

    @property
    def overlaps(self) -> bool:
        """Whether neighbouring windows share cells."""
        return self.kernel > self.stride

    def first(self, number: int) -> int:
        """The first old cell in the window of a new one; below 0 where the window hangs over."""
        return number * self.stride - self.padding


def joined(found: Sequence[Reach]) -> Reach:
    """Windows that slide one after the other, as one: all that a cell of the last map is made of."""
    kernel, stride, padding = 1, 1, 0
    for reach in found:
        padding += stride * reach.padding
        kernel += stride * (reach.kernel - 1)
        stride *= reach.stride
    return Reach(kernel, stride, padding, found[-1].after)


def sliding(size: int, kernel: int, stride: int, padding: int = 0) -> Reach:
    """A window that stays within the padded map, as convolutions do."""
    return Reach(kernel, stride, padding, (size + 2 * padding - kernel) // stride + 1)


def covering(size: int, kernel: int, stride: int) -> Reach:
    """A window whose map is padded to a whole number of strides (what TensorFlow calls SAME)."""
    after = -(-size // stride)
    return Reach(
        kernel, stride, max((after - 1) * stride + kernel - size, 0) // 2 if kernel > stride else 0, after
    )


class Axis(NamedTuple):
    """How the cells of one axis lie on those of a finer axis: cell place y lies at y · scale + shift."""

    scale: float
    shift: float
    matrix: Float[Tensor, "a b"]
    """How each cell's share goes to the cells that it is made of; what is lost to padding is missing in a row's sum."""


class Placement(NamedTuple):
    """Where the cells of a map lie in the network's input: place (y, x) at (y · scale + shift) on each axis."""

    scale_y: float
    scale_x: float
    shift_y: float = 0.0
    shift_x: float = 0.0

    def after(self, rows: Axis, columns: Axis) -> Placement:
        """The placement of cells that lie as the axes say on the cells placed here."""
        return Placement(
            self.scale_y * rows.scale,
            self.scale_x * columns.scale,
            self.scale_y * rows.shift + self.shift_y,
            self.scale_x * columns.shift + self.shift_x,
        )

    def middles(self, grid: Grid) -> tuple[Float[Tensor, " h"], Float[Tensor, " w"]]:
        """Where the middles of a grid's rows and columns lie."""
        return (
            (torch.arange(grid.rows) + 0.5) * self.scale_y + self.shift_y,
            (torch.arange(grid.columns) + 0.5) * self.scale_x + self.shift_x,
        )

    def edges(self, grid: Grid, size: tuple[int, int]) -> tuple[list[float], list[float]]:
        """Where a grid's rows and columns begin, and where the last ends; the outermost go on to the input's border."""
        rows, columns = (
            [0.0, *(min(max(number * scale + shift, 0.0), side) for number in range(1, count)), float(side)]
            for count, scale, shift, side in (
                (grid.rows, self.scale_y, self.shift_y, size[0]),
                (grid.columns, self.scale_x, self.shift_x, size[1]),
            )
        )
        return rows, columns


PIXELS = Placement(1.0, 1.0)
"""Every pixel is its own cell."""


def stretched(grid: Grid, size: tuple[int, int]) -> Placement:
    """Cells that share a size out evenly: what is assumed of a part that is not known."""
    return Placement(size[0] / grid.rows, size[1] / grid.columns)


def axes(entry: nn.Module, before: tuple[int, int], after: tuple[int, int]) -> tuple[Axis, Axis]:
    """How an entry's new cells lie on those that came in, for rows and for columns."""
    found = reaches(entry, before)
    return (
        _compose([pair[0] for pair in found], before[0], after[0]),
        _compose([pair[1] for pair in found], before[1], after[1]),
    )


def reaches(entry: nn.Module, size: tuple[int, int]) -> list[tuple[Reach, Reach]]:
    """The windows that slide in an entry, one after the other, for rows and columns of a map of this size."""
    if isinstance(entry, Chain | nn.Sequential):
        found: list[tuple[Reach, Reach]] = []
        for part in entry.children():
            found += reaches(part, size)
            if found:
                size = (found[-1][0].after, found[-1][1].after)
        return found
    if isinstance(entry, BitStem):
        return _bit(entry, size)
    if isinstance(entry, SoftSplit):
        return [_both(sliding(side, entry.kernel, entry.stride, entry.padding) for side in size)]
    if isinstance(entry, Merge):
        return [_both(covering(side, 2, 2) for side in size)]
    if isinstance(entry, Patchify) and entry.rest == "pad":
        return [_both(covering(side, patch, patch) for side, patch in zip(size, entry.patch, strict=True))]
    if isinstance(entry, Stem):
        return _stem(entry, size)
    if isinstance(entry, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return [window(entry, size)]
    for name in ("proj", "conv", "layers"):  # Patchify, OverlapPatch, ConvPool; the stems' sequences
        inner = getattr(entry, name, None)
        if isinstance(inner, nn.Conv2d | nn.Sequential):
            return reaches(inner, size)
    return []


def window(module: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d, size: tuple[int, int]) -> tuple[Reach, Reach]:
    """The window of one convolution or pooling; a dilated kernel is as long as it reaches."""
    dilation = _pair(getattr(module, "dilation", 1))
    kernel = tuple(
        (side - 1) * step + 1 for side, step in zip(_pair(module.kernel_size), dilation, strict=True)
    )
    terms = zip(size, kernel, _pair(module.stride), _pair(module.padding), strict=True)
    return _both(sliding(*term) for term in terms)


def _both(found: Iterable[Reach]) -> tuple[Reach, Reach]:
    rows, columns = found
    return rows, columns


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _bit(stem: BitStem, size: tuple[int, int]) -> list[tuple[Reach, Reach]]:
    """The hybrids' stem: a root of 7, a pooling of 3, then a window of 3 for each unit; SAME padding throughout."""
    windows = [(7, 2), (3, 2)]
    for number, stage in enumerate(stem.stages):
        units = len(list(stage.children()))
        windows += [(3, 2 if number and unit == 0 else 1) for unit in range(units)]
    found = []
    for kernel, stride in windows:
        found.append(_both(covering(side, kernel, stride) for side in size))
        size = (found[-1][0].after, found[-1][1].after)
    return found


def _stem(stem: Stem, size: tuple[int, int]) -> list[tuple[Reach, Reach]]:
    """A residual network's: its convolutions, then the pooling of 3 that it calls as a function."""
    found: list[tuple[Reach, Reach]] = []
    for layer in stem.layers:
        found += reaches(layer, size)
        size = (found[-1][0].after, found[-1][1].after)
    if stem.pool is not None:
        padding = int(stem.pool == "pad")
        up = int(stem.pool == "ceil")  # takes what remains at the end: a cell more where something does
        found.append(_both(Reach(3, 2, padding, (side + 2 * padding - 3 + up) // 2 + 1) for side in size))
    return found


def _compose(found: list[Reach], before: int, after: int) -> Axis:
    """One window after the other. Where the cells do not come out so, they are taken to share the map evenly."""
    if (found[-1].after if found else before) != after:
        return _even(before, after)
    if not found:
        return Axis(1.0, 0.0, torch.eye(before))
    matrix, size = torch.eye(before), before
    for reach in found:
        matrix, size = reach.shares(size) @ matrix, reach.after
    whole = joined(found)
    return Axis(float(whole.stride), whole.shift, matrix)


def _even(before: int, after: int) -> Axis:
    """Cells that share the old ones out evenly, by how much of each they cover."""
    scale = before / after
    first = torch.arange(after)[:, None] * scale
    old = torch.arange(before)[None]
    covered = (torch.minimum(first + scale, old + 1.0) - torch.maximum(first, old.float())).clamp_min(0)
    return Axis(scale, 0.0, covered / covered.sum(dim=1, keepdim=True))


class Keys(NamedTuple):
    """Where the keys of attention lie on the grid of its queries."""

    prefix: int
    """Keys that are prefix tokens; they stand first."""
    rows: Float[Tensor, "m h"]
    """What each row of keys is made of, in rows of the grid; zeros for padding."""
    columns: Float[Tensor, "m w"]

    @property
    def grid(self) -> Grid:
        """Rows and columns of keys."""
        return Grid(self.rows.shape[0], self.columns.shape[0])


def keys_of(mixer: nn.Module, count: int, grid: Grid, prefix: int) -> Keys | None:
    """The layout of so many keys of a mixer whose queries lie on a grid behind a prefix; None if none fits.

    Keys are the tokens themselves, the tokens of a map that was padded (windows), or those of a reduced map.
    """
    for before in (prefix, 0) if prefix else (0,):
        if count == before + grid.size:
            return Keys(before, torch.eye(grid.rows), torch.eye(grid.columns))
    window = getattr(mixer, "window", None)
    if window is not None:
        padded = [
            -(-size // min(size, side)) * min(size, side) for size, side in zip(grid, window, strict=True)
        ]
        if padded[0] * padded[1] == count:
            return Keys(0, torch.eye(padded[0], grid.rows), torch.eye(padded[1], grid.columns))
    reduction = getattr(mixer, "reduction", None)
    if isinstance(reduction, int) and (grid.rows // reduction) * (grid.columns // reduction) == count:
        rows, columns = (sliding(size, reduction, reduction).matrix(size) for size in grid)
        return Keys(0, rows, columns)
    if getattr(mixer, "subsample", "none") != "none" and (grid.rows // 2) * (grid.columns // 2) == count:
        return Keys(0, *(sliding(size, 2, 2).matrix(size) for size in grid))
    side = round(count**0.5)
    if reduction == "pool" and side * side == count:
        return Keys(0, pooled(grid.rows, side), pooled(grid.columns, side))
    for step in range(2, max(grid) + 1):  # a mixer that is not known: a whole step that fits
        steps = [covering(size, step, step) for size in grid]
        if steps[0].after * steps[1].after == count:
            return Keys(0, steps[0].matrix(grid.rows), steps[1].matrix(grid.columns))
    return None


def pooled(size: int, cells: int) -> Float[Tensor, "c s"]:
    """What adaptive average pooling makes each of its cells of, along one axis."""
    return F.adaptive_avg_pool1d(torch.eye(size)[None], cells)[0].t()  # [c, s]
