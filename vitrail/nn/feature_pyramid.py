"""Feature pyramids (Lin et al. 2017, 1612.03144): deep maps lend their meaning to the fine ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.shapes import Level

Maps = tuple[Float[Tensor, "B _ _ _"], ...]


class FeaturePyramid(nn.Module):
    """Maps from fine to coarse to maps of the same sizes and one width.

    Each is brought to the width by a 1 x 1 convolution and gets the next coarser sum, enlarged by repeating cells;
    a 3 x 3 convolution ends it. `levels` states what comes out.
    """

    def __init__(self, levels: Sequence[Level], width: int = 256) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(level.channels, width, 1) for level in levels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in levels)
        self.levels = tuple(Level(width, level.stride) for level in levels)

    def forward(self, maps: Maps) -> Maps:
        out: list[Tensor] = []
        total: Tensor | None = None
        for place in reversed(range(len(self.lateral))):
            map = self.lateral[place](maps[place])
            if total is not None:
                map = map + F.interpolate(total, size=map.shape[2:], mode="nearest")
            total = map
            out.append(self.smooth[place](total))
        return tuple(reversed(out))
