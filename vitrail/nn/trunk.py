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

from vitrail.nn.block import Block, Branch, Mlp, ParallelBlock
from vitrail.nn.recompute import recomputed
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


def leave_out(
    tokens: Float[Tensor, "B N D"], grid: Grid, share: float
) -> tuple[Float[Tensor, "B M D"], Grid]:
    """Tokens without a share of their patches, others in every picture; the prefix stays (FLIP, 2212.00794).

    The number that stays is the same for all, one at least. What is left has no rows and columns any more: its grid
    is one row.
    """
    count = grid.size
    front, kept = tokens.shape[1] - count, max(1, round(count * (1.0 - share)))
    order = torch.rand(len(tokens), count, device=tokens.device).argsort(dim=1)[:, :kept]  # [B, M - P]
    patches = tokens[:, front:].gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([tokens[:, :front], patches], dim=1), Grid(1, kept)


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
        self.left_out = 0.0  # share of patches left out in training, set by set_patch_drop

    @property
    def blind(self) -> bool:
        """Whether no block looks at where a token lies, so that some may be left out."""
        bodies: list[nn.Module] = []
        for block in self.blocks:
            if isinstance(block, ParallelBlock):
                bodies += [cast(Branch, branch).body for branch in (*block.mixers, *block.mlps)]
            elif type(block) is Block:
                bodies += [block.mixer, block.mlp]
            else:
                return False
        return all(isinstance(body, Mlp) or not getattr(body, "sees_grid", True) for body in bodies)

    def forward(
        self, map: Float[Tensor, "B C _ _"], prefix: Float[Tensor, "B P C"] | None
    ) -> tuple[Float[Tensor, "B N D"], Grid, list[Tensor]]:
        """Tokens after the norm, their grid, and the tapped tokens before it."""
        map, prefix = self.entry(map, prefix)
        grid = Grid(map.shape[2], map.shape[3])
        tokens = join(map, prefix)
        if self.left_out and self.training:
            tokens, grid = leave_out(tokens, grid, self.left_out)
        tapped = []
        for number, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                tokens = recomputed(block, tokens, grid)
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
