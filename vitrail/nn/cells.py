"""The cells of feature maps, told in 0..1 of the picture without its padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitrail.nn.shapes import Level


def cells_of(
    maps: Sequence[Float[Tensor, "B _ _ _"]],
    levels: Sequence[Level],
    size: tuple[int, int],
    padding: Bool[Tensor, "B I J"] | None = None,
) -> Float[Tensor, "_ N 4"]:
    """Centre and distance to the next cell, (x, y, dx, dy), of the maps' cells row by row, maps in turn.

    `[1, N, 4]` where nothing is padded. Centres outside 0..1 lie in the padding. `size` is the batch's rows and
    columns in pixels; float32 whatever the maps' type.
    """
    device = maps[0].device
    if padding is None:
        sides = torch.tensor([[size[1], size[0]]], dtype=torch.float32, device=device)  # [1, 2]
    else:
        sides = torch.stack([(~padding[:, 0]).sum(dim=1), (~padding[:, :, 0]).sum(dim=1)], dim=1).float()
    found = []
    for map, level in zip(maps, levels, strict=True):
        rows, columns = map.shape[2:]
        y = (torch.arange(rows, dtype=torch.float32, device=device) + 0.5) * level.stride
        x = (torch.arange(columns, dtype=torch.float32, device=device) + 0.5) * level.stride
        places = torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1)
        places = places.flatten(0, 1)  # [N, 2]
        centres = places / sides[:, None]  # [B or 1, N, 2]
        steps = (level.stride / sides)[:, None].expand_as(centres)
        found.append(torch.cat([centres, steps], dim=-1))
    return torch.cat(found, dim=1)


def outside(cells: Float[Tensor, "B N 4"]) -> Bool[Tensor, "B N"]:
    """Which cells have their centre in the padding."""
    return (cells[..., :2] > 1).any(dim=-1)
