"""What covering says: how much a class loses when a region is hidden (Zeiler and Fergus 2014, 1311.2901)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.explain.heat import Heat
from vitrail.explain.places import Placement
from vitrail.explain.still import held_still


def occlusion(
    network: nn.Module,
    images: Float[Tensor, "B C I J"],
    targets: Sequence[int] | Tensor,
    grid: tuple[int, int],
    *,
    chunk: int = 32,
) -> Heat:
    """The fall of the class's log probability when a region gets the mean colour, for every region of a grid.

    Regions share the input out evenly; each costs one forward. Negative where covering helps the class.
    """
    wanted = torch.as_tensor(targets, device=images.device)
    size = (images.shape[2], images.shape[3])
    labels = region_labels(size, grid).to(images.device)
    falls = torch.zeros(images.shape[0], grid[0] * grid[1])
    with held_still(network), torch.no_grad():
        whole = log_probabilities(network, images, wanted)
        for number in range(images.shape[0]):
            for first in range(0, falls.shape[1], chunk):
                places = torch.arange(first, min(first + chunk, falls.shape[1]), device=images.device)
                covered = images[number] * (labels != places[:, None, None])[:, None]  # 0 is the mean colour
                fall = whole[number] - log_probabilities(network, covered, wanted[number].expand(len(places)))
                falls[number, first : first + len(places)] = fall.float().cpu()
    return Heat(
        values=falls.unflatten(1, grid),
        placement=Placement(size[0] / grid[0], size[1] / grid[1]),
        units="fall of the class's log probability when covered, in nats",
        where=f"regions of {size[0] / grid[0]:g} x {size[1] / grid[1]:g} pixels",
    )


def log_probabilities(network: nn.Module, images: Tensor, targets: Tensor) -> Float[Tensor, " B"]:
    """The log probability of one class an image."""
    return network(images).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]


def region_labels(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The number of the region that each pixel belongs to, [I, J]; regions differ by a pixel where they must."""
    rows = torch.arange(size[0]) * grid[0] // size[0]
    columns = torch.arange(size[1]) * grid[1] // size[1]
    return rows[:, None] * grid[1] + columns


def finest_stride(network: nn.Module) -> int:
    """Pixels to a cell of the finest map that a network states."""
    levels = getattr(network, "levels", ())
    return int(levels[0].stride) if levels else 1


def region_grid(size: tuple[int, int], stride: int, most: int = 16) -> tuple[int, int]:
    """A grid of at most so many regions a side, each a whole number of cells of the finest map where that fits."""
    sides = []
    for pixels in size:
        side = stride
        while pixels / side > most:
            side *= 2
        sides.append(max(1, round(pixels / side)))
    return sides[0], sides[1]
