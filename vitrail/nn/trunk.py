"""Stage and Trunk: the one assembler of transformer backbones.

A stage is an entry, blocks and a norm. An entry takes (map, prefix) and returns (map, prefix). ViT has one
stage, Swin, PVT and PiT three or four, CaiT two (patches alone, then the class token's).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitrail.nn.shapes import Features, Grid, Level


def join(map: Float[Tensor, "B D h w"], prefix: Float[Tensor, "B P D"] | None) -> Float[Tensor, "B N D"]:
    """Tokens from a map and its prefix: prefix first, then the map row by row."""
    tokens = map.flatten(2).transpose(1, 2)  # [B, h * w, D]
    return tokens if prefix is None else torch.cat([prefix, tokens], dim=1)  # [B, P + h * w, D]


def split(
    tokens: Float[Tensor, "B N D"], grid: Grid
) -> tuple[Float[Tensor, "B D h w"], Float[Tensor, "B P D"] | None]:
    """Map and prefix of tokens, as views."""
    prefix = tokens.shape[1] - grid.size
    map = tokens[:, prefix:].transpose(1, 2).unflatten(2, tuple(grid))  # [B, D, h, w]
    return map, tokens[:, :prefix] if prefix else None


class Stage(nn.Module):
    """Entry, blocks, norm. `taps` are numbers of blocks (from 0) whose output is kept as a feature map.

    Without taps the stage's own output is the map; `shown=False` keeps it back (CaiT's patches, which its second
    stage hands on).
    """

    def __init__(
        self,
        entry: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module | None = None,
        taps: Sequence[int] = (),
        shown: bool = True,
    ) -> None:
        super().__init__()
        self.entry = entry
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity() if norm is None else norm
        self.taps, self.shown = tuple(taps), shown
        self.recompute = False  # activation checkpointing, switched by set_grad_checkpointing

    def forward(
        self, map: Float[Tensor, "B C _ _"], prefix: Float[Tensor, "B P C"] | None
    ) -> tuple[Float[Tensor, "B N D"], Grid, list[Tensor]]:
        """Tokens after the norm, their grid, and the tapped tokens before it."""
        map, prefix = self.entry(map, prefix)
        grid = Grid(map.shape[2], map.shape[3])
        tokens = join(map, prefix)
        tapped = []
        for number, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, grid, use_reentrant=False)
            else:
                tokens = block(tokens, grid)
            if number in self.taps:
                tapped.append(tokens)
        return self.norm(tokens), grid, tapped


class Trunk(nn.Module):
    """Stages one after the other. `levels` states channels and stride of each map that `forward` answers."""

    def __init__(self, stages: Sequence[Stage], levels: Sequence[Level]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.levels = tuple(levels)

    def tap(self, numbers: Sequence[int]) -> None:
        """Answer the outputs of these blocks of a trunk's only stage, before any norm, in place of its last map."""
        (only,) = self.stages
        stage = cast(Stage, only)
        stage.taps, stage.norm = tuple(numbers), nn.Identity()
        self.levels = (self.levels[-1],) * len(numbers)

    def tokens(self, images: Float[Tensor, "B C I J"]) -> tuple[Float[Tensor, "B N D"], Grid]:
        """The last stage's tokens after its norm, and their grid."""
        map, prefix = images, None
        for stage in self.stages:
            tokens, grid, _ = stage(map, prefix)
            map, prefix = split(tokens, grid)
        return tokens, grid

    def forward(self, images: Float[Tensor, "B C I J"]) -> Features:
        """Every tapped map, or every stage's last map, fine to coarse; the prefix of the last stage."""
        map, prefix = images, None
        maps: list[Tensor] = []
        for stage in self.stages:
            tokens, grid, tapped = stage(map, prefix)
            map, prefix = split(tokens, grid)
            maps.extend(split(kept, grid)[0] for kept in tapped)
            if not tapped and stage.shown:
                maps.append(map)
        return Features(tuple(maps), prefix)
