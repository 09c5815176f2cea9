"""The head of FCOS (Tian et al. 2019, 1904.01355): classes, boxes and centredness at every cell of a pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.shapes import Level


class ConvTower(nn.Sequential):
    """3 x 3 convolutions of one width, each with a group norm and a ReLU."""

    def __init__(self, width: int, depth: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(math.gcd(32, width // 2), width),
                nn.ReLU(),
            ]
        super().__init__(*layers)


class FartherMaps(nn.Module):
    """Coarser maps behind a pyramid's last, each by a 3 x 3 convolution of stride 2 (P6 and P7)."""

    def __init__(self, level: Level, count: int) -> None:
        super().__init__()
        width = level.channels
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, 2, padding=1) for _ in range(count))
        self.levels = tuple(Level(width, level.stride * 2 ** (number + 1)) for number in range(count))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found = list(maps)
        for number, conv in enumerate(self.convs):
            found.append(conv(F.relu(found[-1]) if number else found[-1]))
        return tuple(found)


class CellHead(nn.Module):
    """Two towers that all levels share: one for classes, one for distances to the box's sides and centredness.

    Distances are counted in cells, behind an exponential with a factor that each level learns.
    """

    def __init__(self, width: int, num_classes: int, levels: int, depth: int = 4) -> None:
        super().__init__()
        self.classes, self.sides = ConvTower(width, depth), ConvTower(width, depth)
        self.linear = nn.Conv2d(width, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(width, 4, 3, padding=1)
        self.centre = nn.Conv2d(width, 1, 3, padding=1)
        self.factors = nn.Parameter(torch.ones(levels))

    def forward(
        self, maps: Sequence[Float[Tensor, "B D _ _"]], cells: Float[Tensor, "_ N 4"]
    ) -> tuple[Float[Tensor, "B N K"], Float[Tensor, "B N 4"], Float[Tensor, "B N"]]:
        """Logits, boxes (cx, cy, w, h) and centredness of all levels' cells; `cells` as nn.cells makes them."""
        logits, distances, centres = [], [], []
        for map, factor in zip(maps, self.factors, strict=True):
            sides = self.sides(map)
            logits.append(_rows(self.linear(self.classes(map))))
            distances.append((_rows(self.distances(sides)).float() * factor).clamp(max=8).exp())
            centres.append(_rows(self.centre(sides))[..., 0])
        reach = torch.cat(distances, dim=1)  # [B, N, 4]: left, top, right, bottom, in cells
        low = cells[..., :2] - reach[..., :2] * cells[..., 2:]
        high = cells[..., :2] + reach[..., 2:] * cells[..., 2:]
        boxes = torch.cat([(low + high) / 2, high - low], dim=-1)  # [B, N, 4]
        return torch.cat(logits, dim=1), boxes, torch.cat(centres, dim=1)

    def init_weights(self) -> None:
        """Convolutions N(0, 0.01), biases zero; classes are rare (0.01)."""
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=0.01)
                nn.init.zeros_(part.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.linear.bias, -math.log(99))  # type: ignore[arg-type]
        nn.init.ones_(self.factors)

    def reset(self, num_classes: int) -> None:
        """A new class layer."""
        old = self.linear
        layer = nn.Conv2d(old.in_channels, num_classes, 3, padding=1)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.constant_(layer.bias, -math.log(99))  # type: ignore[arg-type]
        self.linear = layer.to(device=old.weight.device, dtype=old.weight.dtype)


def _rows(map: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N C"]:
    return map.flatten(2).transpose(1, 2)  # [B, h * w, C]
