"""Where a token is: learned tables brought to any grid, and the sine/cosine codes.

Sources: ViT appendix D.4 (learned 1-D), Vaswani et al. 2017 section 3.5 (sine/cosine over the sequence),
google-research/big_vision `posemb_sincos_2d` (sine/cosine over rows and columns).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.nn.shapes import Grid

PositionKind = Literal["learned", "sincos1d", "sincos2d", "none"]
Resampling = Literal["bicubic", "bicubic-plain", "bilinear-plain", "bilinear-corners"]


def resample_table(
    table: Float[Tensor, "one N D"], old: Grid, new: Grid, prefix: int = 0, method: Resampling = "bicubic"
) -> Float[Tensor, "one M D"]:
    """A table of positions at another grid, in float32; prefix rows are left alone.

    "bicubic" is antialiased (timm's ViT); "bicubic-plain" (DeiT and its descendants) and "bilinear-plain" (PVT) are
    not, nor "bilinear-corners", where the corner cells stay in the corners (Trans2Seg).
    """
    if torch.compiler.is_exporting():
        return _resampled_by_products(table, old, new, prefix, method)
    if old == new:
        return table
    head, body = table[:, :prefix], table[:, prefix:]
    image = body.float().transpose(1, 2).unflatten(2, tuple(old))  # [1, D, h, w]
    mode, _, way = method.partition("-")
    image = F.interpolate(
        image, size=tuple(new), mode=mode, antialias=not way, align_corners=way == "corners"
    )
    return torch.cat([head, image.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)  # [1, P + h' * w', D]


def _resampled_by_products(
    table: Float[Tensor, "one N D"], old: Grid, new: Grid, prefix: int, method: Resampling
) -> Float[Tensor, "one M D"]:
    """The same as two matrix products, for exported graphs: their size stays free, and engines that know no
    antialiased resizing, or another one at the borders, compute it as torch does."""
    head, body = table[:, :prefix], table[0, prefix:]
    down = resampling_matrix(old.rows, new.rows, method, table.device)  # [h', h]
    right = resampling_matrix(old.columns, new.columns, method, table.device)  # [w', w]
    map = (down @ body.float().view(old.rows, -1)).unflatten(1, (old.columns, -1))  # [h', w, D]
    rows: Tensor = (right @ map).flatten(0, 1)[None]  # [1, h' * w', D]
    return torch.cat([head, rows.to(table.dtype)], dim=1)  # [1, P + h' * w', D]


def resampling_matrix(
    old: int, new: int, method: Resampling, device: torch.device | None = None
) -> Float[Tensor, "M N"]:
    """How much each of `old` cells in a row counts in each of `new` ones; rows sum to one.

    "bicubic" is Keys' kernel with a = -1/2, widened where cells grow (antialiasing), cut off and normalised at
    the ends; the others are neither widened nor cut off: what lies beyond the last cell is that cell. "bicubic-plain"
    takes a = -3/4; "bilinear-corners" puts the last cells' middles on each other.
    """
    places = torch.arange(new, device=device, dtype=torch.float32)  # [M]
    scale = old / torch.ones_like(places).sum()  # counted, not read: in an exported graph `new` may be free
    middles, cells = (places + 0.5) * scale, torch.arange(old, device=device, dtype=torch.float32) + 0.5
    if method == "bilinear-corners":
        middles = places * (old - 1) / (torch.ones_like(places).sum() - 1).clamp(min=1) + 0.5
    if method.startswith("bilinear"):
        middles = middles.clamp(0.5, old - 0.5)
        return (1 - (cells - middles[:, None]).abs()).clamp(min=0)  # [M, N]
    if method == "bicubic":
        weights = _keys((cells - middles[:, None]).abs() / scale.clamp(min=1), -0.5)  # [M, N]
        return weights / weights.sum(dim=1, keepdim=True)
    cells = torch.arange(-2, old + 2, device=device, dtype=torch.float32) + 0.5  # two beyond each end
    weights = _keys((cells - middles[:, None]).abs(), -0.75)  # [M, N + 4]
    inside = weights[:, 2:-2].clone()
    inside[:, 0] += weights[:, :2].sum(dim=1)
    inside[:, -1] += weights[:, -2:].sum(dim=1)
    return inside


def _keys(away: Float[Tensor, "M N"], a: float) -> Float[Tensor, "M N"]:
    """Keys' cubic kernel (1981) at distances in cells."""
    near = ((a + 2) * away - (a + 3)) * away * away + 1
    far = ((away - 5) * away + 8) * away * a - 4 * a
    return torch.where(away < 1, near, torch.where(away < 2, far, torch.zeros_like(far)))


def sincos_1d(length: int, width: int, device: torch.device | None = None) -> Float[Tensor, "one N D"]:
    """Sines at even channels, cosines at odd ones, wavelengths 2π to 10000·2π (Vaswani et al., section 3.5)."""
    positions = torch.arange(length, dtype=torch.float64, device=device)[:, None]
    channels = torch.arange(width, device=device)
    angles = positions * 10000.0 ** (-2 * (channels // 2).double() / width)  # [N, D]
    table = torch.where(channels % 2 == 0, angles.sin(), angles.cos())
    return table.float()[None]


def sincos_2d(grid: Grid, width: int, device: torch.device | None = None) -> Float[Tensor, "one N D"]:
    """[sin x, cos x, sin y, cos y], a quarter of the width each, x the column (big_vision's order and divisor)."""
    if width % 4:
        raise ModelError(f"Sine/cosine positions in two dimensions need a width that 4 divides; got {width}.")
    quarter = width // 4
    rates = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / max(1, quarter - 1))
    sides = (torch.arange(side, dtype=torch.float64, device=device) for side in grid)
    rows, columns = torch.meshgrid(*sides, indexing="ij")
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
            sincos_1d(self.prefix + grid.size, self.width, map.device)
            if self.kind == "sincos1d"
            else sincos_2d(grid, self.width, map.device)
        )
        return _add(map, prefix, table.to(map), self.prefix, self.dropout)


class MaskedSine(nn.Module):
    """Sines of rows, then of columns, that end at 2π where the picture ends: padding does not count (DETR).

    Cells are counted from 1 to the last real one. The code is computed in float32 whatever the map's type, and
    is as many numbers for a cell as `width`: half for the row, half for the column, sine and cosine in turn.
    """

    def __init__(self, width: int, temperature: float = 10000.0) -> None:
        super().__init__()
        if width % 4:
            raise ModelError(f"A sine code of rows and columns needs a width that 4 divides; got {width}.")
        self.width, self.temperature = width, temperature

    def forward(
        self, map: Float[Tensor, "B D h w"], padding: Bool[Tensor, "B h w"] | None = None
    ) -> Float[Tensor, "_ N _"]:
        """The code of every cell in the map's type; `[1, N, width]` where nothing is padded."""
        rows, columns = map.shape[2:]
        if padding is None:
            real = torch.ones(1, rows, columns, dtype=torch.float32, device=map.device)
        else:
            real = (~padding).float()
        codes = []
        for axis in (1, 2):
            place = real.cumsum(axis)
            place = place / (place.narrow(axis, place.shape[axis] - 1, 1) + 1e-6) * (2 * math.pi)
            codes.append(sine_code(place, self.width // 2, self.temperature))
        return torch.cat(codes, dim=-1).flatten(1, 2).to(map.dtype)  # [B, h * w, width]


def sine_code(angles: Float[Tensor, "*B"], width: int, temperature: float) -> Float[Tensor, "*B D"]:
    """Sine and cosine in turn of angles at wavelengths 2π to `temperature` times that."""
    order = torch.arange(width, dtype=torch.float32, device=angles.device)
    phases = angles[..., None] / temperature ** (2 * torch.div(order, 2, rounding_mode="floor") / width)
    return torch.stack([phases[..., 0::2].sin(), phases[..., 1::2].cos()], dim=-1).flatten(-2)  # [..., width]


class LearnedAxes(nn.Module):
    """A learned code for each column, then one for each row, up to `cells` of either; padding counts (DETR)."""

    def __init__(self, width: int, cells: int = 50) -> None:
        super().__init__()
        if width % 2:
            raise ModelError(f"Learned codes of rows and columns need an even width; got {width}.")
        self.cells = cells
        self.rows, self.columns = nn.Embedding(cells, width // 2), nn.Embedding(cells, width // 2)

    def forward(
        self, map: Float[Tensor, "B D h w"], padding: Bool[Tensor, "B h w"] | None = None
    ) -> Float[Tensor, "one N _"]:
        rows, columns = map.shape[2:]
        if max(rows, columns) > self.cells:
            raise ModelError(
                f"The learned positions are made for maps of up to {self.cells} x {self.cells} cells; got"
                f" {rows} x {columns}. Take smaller pictures, or position='sine'."
            )
        across = self.columns.weight[None, :columns].expand(rows, -1, -1)  # [h, w, D / 2]
        down = self.rows.weight[:rows, None].expand(-1, columns, -1)  # [h, w, D / 2]
        return torch.cat([across, down], dim=-1).flatten(0, 1)[None].to(map.dtype)  # [1, h * w, D]


def _add(
    map: Tensor, prefix: Tensor | None, table: Tensor, rows: int, dropout: nn.Module
) -> tuple[Tensor, Tensor | None]:
    """Add a table `[1, rows + h * w, D]`, whose first rows belong to the first prefix tokens."""
    height, width = map.shape[2:]
    map = dropout(map + table[:, rows:].transpose(1, 2).unflatten(2, (height, width)))
    if prefix is not None and rows:
        prefix = dropout(torch.cat([prefix[:, :rows] + table[:, :rows], prefix[:, rows:]], dim=1))
    return map, prefix
