"""Tables and kernels brought to a new size: positions, patch kernels, relative tables, input channels.

All arithmetic is done in float32 (the pseudo-inverse in float64) and handed back in the dtype that came.
Bicubic with antialiasing is the default; it is not the identity when a grid grows (cubic coefficient -0.5
instead of -0.75), so the other ways in which the field has resampled are kept under their names.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vitrail.errors import WeightsError, suggestion

METHODS: dict[str, tuple[str, bool, bool | None]] = {
    # name: (mode of torch's interpolate, antialias, align corners)
    "bicubic": ("bicubic", True, False),  # timm
    "bicubic-plain": ("bicubic", False, False),  # DeiT, transformers, MMPretrain
    "bicubic-corners": ("bicubic", False, True),  # torchvision
    "bilinear": ("bilinear", True, False),
    "bilinear-plain": ("bilinear", False, False),  # timm's reader of .npz files
    "bilinear-corners": ("bilinear", False, True),  # scipy's zoom of order 1, as in the JAX code
}


def resize(maps: Tensor, size: tuple[int, int], method: str = "bicubic") -> Tensor:
    """Maps `[B, C, h, w]` at a new (rows, columns), by one of METHODS."""
    if method not in METHODS:
        near = suggestion(method, METHODS)
        raise WeightsError(f"Resampling method must be one of {', '.join(METHODS)}, got {method!r}.{near}")
    mode, antialias, corners = METHODS[method]
    wide = maps if maps.dtype == torch.float64 else maps.float()
    return functional.interpolate(
        wide, size=list(size), mode=mode, antialias=antialias, align_corners=corners
    ).to(maps.dtype)


def positions(
    table: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix: int = 0,
    method: str = "bicubic",
) -> Tensor:
    """A learned position table `[1, P + N, D]` for another grid; the first `prefix` entries stay as they are.

    Args:
        table: entries of prefix tokens first, then the grid's, row by row.
        old_grid: rows and columns that the table was made for.
        new_grid: rows and columns wanted.
        prefix: number of entries that belong to no grid cell (class, distillation, register tokens).
        method: one of METHODS.

    Raises:
        WeightsError: the table does not hold prefix + rows x columns entries.
    """
    rows, columns = old_grid
    if table.ndim != 3 or table.shape[1] != prefix + rows * columns:
        raise WeightsError(
            f"A position table for {prefix} prefix tokens and a grid of {rows}x{columns} has the shape "
            f"(1, {prefix + rows * columns}, D), got {tuple(table.shape)}."
        )
    if tuple(old_grid) == tuple(new_grid):
        return table
    head, cells = table[:, :prefix], table[:, prefix:]
    maps = cells.reshape(table.shape[0], rows, columns, -1).permute(0, 3, 1, 2)  # [1, D, h, w]
    cells = resize(maps, new_grid, method).permute(0, 2, 3, 1).reshape(table.shape[0], -1, table.shape[2])
    return torch.cat([head, cells], dim=1)  # [1, P + N', D]


def patch_kernel(kernel: Tensor, size: tuple[int, int], method: str = "bicubic") -> Tensor:
    """A patch embedding kernel `[D, C, p, q]` for another patch size (FlexiViT, 2212.08013, section 3.4).

    Resizing an image is a linear map B. The new kernel w' = pinv(B^T) w gives, on a resized patch, the number
    that w gave on the patch itself: exactly when the patch grows, in the least-squares sense when it shrinks.
    """
    old = (kernel.shape[2], kernel.shape[3])
    if old == tuple(size):
        return kernel
    cells = old[0] * old[1]
    basis = torch.eye(cells, dtype=torch.float64).reshape(cells, 1, *old)
    matrix = resize(basis, size, method).reshape(cells, -1)  # B^T: row k is basis image k, resized
    # where one side grows and the other shrinks B has no full rank; what is zero but for rounding stays zero
    inverse: Tensor = torch.linalg.pinv(matrix, rtol=1e-6)  # [new cells, old cells]
    flat = kernel.detach().cpu().double().reshape(-1, cells)  # [D C, p q]
    resized: Tensor = (flat @ inverse.T).reshape(*kernel.shape[:2], *size)  # [D, C, p', q']
    return resized.to(kernel.dtype)


def relative_table(
    table: Tensor, old_window: tuple[int, int], new_window: tuple[int, int], method: str = "bicubic"
) -> Tensor:
    """A table of relative position biases `[(2 h - 1)(2 w - 1), H]` for another window (Swin).

    Raises:
        WeightsError: the table does not belong to the old window.
    """
    rows, columns = 2 * old_window[0] - 1, 2 * old_window[1] - 1
    if table.shape[0] != rows * columns:
        raise WeightsError(
            f"A relative table of a {old_window[0]}x{old_window[1]} window has {rows * columns} rows, "
            f"got {table.shape[0]}."
        )
    if tuple(old_window) == tuple(new_window):
        return table
    maps = table.T.reshape(1, -1, rows, columns)  # [1, H, 2h-1, 2w-1]
    wanted = (2 * new_window[0] - 1, 2 * new_window[1] - 1)
    return resize(maps, wanted, method).reshape(table.shape[1], -1).T.contiguous()


def channels(kernel: Tensor, count: int) -> Tensor:
    """A first kernel `[D, C, ...]` for another number of input channels.

    To one channel: the sum, so that a grey picture gives what its copy in every channel gave. To more: the
    channels repeated and scaled by old / new, so that the size of the sum stays.
    """
    have = kernel.shape[1]
    if have == count:
        return kernel
    if count == 1:
        return kernel.float().sum(dim=1, keepdim=True).to(kernel.dtype)
    order = [index % have for index in range(count)]
    return (kernel[:, order].float() * (have / count)).to(kernel.dtype)
