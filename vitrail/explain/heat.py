"""The result of a method: a map over cells, and where the cells lie."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitrail.explain.places import Placement


@dataclass(frozen=True, kw_only=True)
class Heat:
    """How much each cell counts, for a batch of images."""

    values: Float[Tensor, "B h w"]
    """Float32 on the CPU. Signed where the method tells for from against, else 0 or more."""
    placement: Placement
    """Where the cells lie in the network's input."""
    units: str
    """What a value means."""
    where: str = ""
    """The layer, head or token that it was read from."""
    elsewhere: Float[Tensor, " B"] | None = None
    """Share that lies on prefix tokens or padding, and so nowhere on the image; None where that means nothing."""

    def at(
        self, ys: Float[Tensor, " y"], xs: Float[Tensor, " x"], smooth: bool = True
    ) -> Float[Tensor, "B y x"]:
        """The map at places of the network's input: between the cells' middles, or as the cells' boxes.

        Beyond the outermost middles it goes on as it is there.
        """
        rows, columns = self.values.shape[1:]
        y = (ys - self.placement.shift_y) / self.placement.scale_y - 0.5  # in cells, middles at whole numbers
        x = (xs - self.placement.shift_x) / self.placement.scale_x - 0.5
        if not smooth:
            near_y = y.round().long().clamp(0, rows - 1)
            near_x = x.round().long().clamp(0, columns - 1)
            return self.values[:, near_y][:, :, near_x]
        return _between(_between(self.values, y, 1), x, 2)

    def resized(self, size: tuple[int, int], smooth: bool = True) -> Float[Tensor, "B I J"]:
        """The map at every pixel of the network's input."""
        return self.at(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, smooth)

    def regions(self, size: tuple[int, int], grid: tuple[int, int]) -> Float[Tensor, "B r c"]:
        """Means over a grid that shares an input of this size out evenly."""
        return F.adaptive_avg_pool2d(self.resized(size, smooth=False)[:, None], grid)[:, 0]

    def ranked(self, size: tuple[int, int], grid: tuple[int, int]) -> Float[Tensor, "B r c"]:
        """One value for each token of a grid: the map's own where it has as many cells, else means over the grid.

        Cells that lie beside an even grid's, behind a stem, would be blurred by means.
        """
        return self.values if tuple(self.values.shape[1:]) == tuple(grid) else self.regions(size, grid)

    def shown(self, size: tuple[int, int], grid: tuple[int, int]) -> Heat:
        """The map as it is drawn and scored: one of single pixels as means over a grid's regions.

        Single pixels are too fine for the eye, and their signs flip from one to the next.
        """
        if self.placement.scale_y > 1 or self.placement.scale_x > 1:
            return self
        scale = Placement(size[0] / grid[0], size[1] / grid[1])
        return dataclasses.replace(self, values=self.regions(size, grid), placement=scale)


def _between(values: Float[Tensor, "B h w"], places: Float[Tensor, " n"], axis: int) -> Tensor:
    """Linear between neighbours along one axis."""
    most = values.shape[axis] - 1
    places = places.clamp(0, most)
    low = places.floor().long().clamp(max=max(most - 1, 0))
    share = (places - low).to(values.dtype)
    share = share[:, None] if axis == 1 else share
    below, above = values.index_select(axis, low), values.index_select(axis, (low + 1).clamp(max=most))
    return below + (above - below) * share
