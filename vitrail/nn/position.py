"""Where a token is: learned tables brought to any grid, and the sine/cosine codes.

Sources: ViT appendix D.4 (learned 1-D), Vaswani et al. 2017 section 3.5 (sine/cosine over the sequence),
google-research/big_vision `posemb_sincos_2d` (sine/cosine over rows and columns).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.nn.shapes import Grid

PositionKind = Literal["learned", "sincos1d", "sincos2d", "none"]
Resampling = Literal["bicubic", "bilinear"]


def resample_table(
    table: Float[Tensor, "one N D"], old: Grid, new: Grid, prefix: int = 0, method: Resampling = "bicubic"
) -> Float[Tensor, "one M D"]:
    """A table of positions at another grid, in float32; prefix rows are left alone.

    "bicubic" is antialiased (timm), "bilinear" is not (PVT).
    """
    if not torch.compiler.is_exporting() and old == new:  # an exported graph keeps its size free
        return table
    head, body = table[:, :prefix], table[:, prefix:]
    image = body.float().transpose(1, 2).unflatten(2, tuple(old))  # [1, D, h, w]
    antialias = method == "bicubic"
    image = F.interpolate(image, size=tuple(new), mode=method, antialias=antialias, align_corners=False)
    return torch.cat([head, image.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)  # [1, P + h' * w', D]


def sincos_1d(length: int, width: int) -> Float[Tensor, "one N D"]:
    """Sines at even channels, cosines at odd ones, wavelengths 2π to 10000·2π (Vaswani et al., section 3.5)."""
    positions = torch.arange(length, dtype=torch.float64)[:, None]
    rates = 10000.0 ** (-2 * (torch.arange(width) // 2).double() / width)
    angles = positions * rates  # [N, D]
    table = torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos())
    return table.float()[None]


def sincos_2d(grid: Grid, width: int) -> Float[Tensor, "one N D"]:
    """[sin x, cos x, sin y, cos y], a quarter of the width each, x the column (big_vision's order and divisor)."""
    if width % 4:
        raise ModelError(f"Sine/cosine positions in two dimensions need a width that 4 divides; got {width}.")
    quarter = width // 4
    rates = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / max(1, quarter - 1))
    rows, columns = torch.meshgrid(
        torch.arange(grid.rows).double(), torch.arange(grid.columns).double(), indexing="ij"
    )
    x, y = columns.reshape(-1, 1) * rates, rows.reshape(-1, 1) * rates  # [N, D / 4]
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()[None]


class LearnedPosition(nn.Module):
    """An entry that adds a learned table to the map, and to the prefix where the table has rows for it.

    `grid` is the grid that the table was made for; other grids get it resampled. `prefix` counts the prefix
    tokens that have a position of their own (1 in ViT, 0 where positions are added before [CLS]). `frozen` is a
    table that is kept with the weights but not trained (T2T-ViT's sinusoid). `resampling` is `resample_table`'s.
    """

    table: Tensor

    def __init__(
        self,
        width: int,
        grid: Grid,
        prefix: int = 0,
        dropout: float = 0.0,
        frozen: Tensor | None = None,
        resampling: Resampling = "bicubic",
    ) -> None:
        super().__init__()
        self.grid, self.prefix, self.resampling = grid, prefix, resampling
        if frozen is None:
            self.table = nn.Parameter(torch.zeros(1, prefix + grid.size, width))
        else:
            self.register_buffer("table", frozen)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, map: Float[Tensor, "B D h w"], prefix: Float[Tensor, "B P D"] | None
    ) -> tuple[Float[Tensor, "B D h w"], Float[Tensor, "B P D"] | None]:
        grid = Grid(map.shape[2], map.shape[3])
        table = resample_table(self.table, self.grid, grid, self.prefix, self.resampling)
        return _add(map, prefix, table, self.prefix, self.dropout)

    def extra_repr(self) -> str:
        return f"grid={tuple(self.grid)}, prefix={self.prefix}"


class SinCosPosition(nn.Module):
    """An entry that adds a fixed code, computed from the grid and never stored."""

    def __init__(
        self, width: int, kind: Literal["sincos1d", "sincos2d"], prefix: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if kind == "sincos2d" and prefix:
            raise ModelError(
                "Sine/cosine positions in two dimensions know no place for [CLS]: add them to the patches only"
                " (position_on_prefix=False), or take sincos1d or learned."
            )
        if kind == "sincos2d" and width % 4:
            raise ModelError(
                f"Sine/cosine positions in two dimensions need a width that 4 divides; got {width}."
            )
        self.width, self.kind, self.prefix = width, kind, prefix
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, map: Float[Tensor, "B D h w"], prefix: Float[Tensor, "B P D"] | None
    ) -> tuple[Float[Tensor, "B D h w"], Float[Tensor, "B P D"] | None]:
        grid = Grid(map.shape[2], map.shape[3])
        table = (
            sincos_1d(self.prefix + grid.size, self.width)
            if self.kind == "sincos1d"
            else sincos_2d(grid, self.width)
        )
        return _add(map, prefix, table.to(map), self.prefix, self.dropout)


def _add(
    map: Tensor, prefix: Tensor | None, table: Tensor, rows: int, dropout: nn.Module
) -> tuple[Tensor, Tensor | None]:
    """Add a table `[1, rows + h * w, D]`, whose first rows belong to the first prefix tokens."""
    height, width = map.shape[2:]
    map = dropout(map + table[:, rows:].transpose(1, 2).unflatten(2, (height, width)))
    if prefix is not None and rows:
        prefix = dropout(torch.cat([prefix[:, :rows] + table[:, :rows], prefix[:, rows:]], dim=1))
    return map, prefix
