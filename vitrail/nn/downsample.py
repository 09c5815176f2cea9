"""Entries of the stages of a pyramid: from one map to the next, coarser one."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.nn.entry import Map, Prefix, pad_to


class OverlapPatch(nn.Module):
    """Patches that overlap: one convolution whose kernel is larger than its stride, perhaps with a norm.

    PVT v2 (2106.13797, section 3.1) pads by half a kernel; PiT's stem does not pad, and leaves what remains of
    the image at the bottom and right unseen.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        kernel: int,
        stride: int,
        padding: int = 0,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=kernel, stride=stride, padding=padding)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, map: Float[Tensor, "B C _ _"], prefix: Prefix) -> tuple[Map, Prefix]:
        least = self.proj.kernel_size[0] - 2 * self.proj.padding[0]  # type: ignore[operator]
        if not torch.compiler.is_exporting() and min(map.shape[2:]) < least:
            raise ModelError(
                f"A patch of {self.proj.kernel_size[0]} pixels needs a map of {least} x {least} at least; got"
                f" {map.shape[2]} x {map.shape[3]}: give larger pictures."
            )
        tokens = self.proj(map).permute(0, 2, 3, 1)  # [B, h, w, D]
        return self.norm(tokens).permute(0, 3, 1, 2), prefix  # [B, D, h, w]


class Merge(nn.Module):
    """Four neighbours become one token: laid end to end (4 C numbers) and projected (Swin, section 3.1).

    The neighbours stand in the order (row, column) = (0, 0), (1, 0), (0, 1), (1, 1). The norm is before the
    projection in Swin and after it in Swin v2. Maps with an odd side are padded by one row or column of zeros.
    """

    def __init__(
        self, channels: int, width: int, norm: Literal["before", "after"] = "before", eps: float = 1e-5
    ):
        super().__init__()
        self.order = norm
        self.reduction = nn.Linear(4 * channels, width, bias=False)
        self.norm = nn.LayerNorm(4 * channels if norm == "before" else width, eps=eps)

    def forward(self, map: Float[Tensor, "B C _ _"], prefix: Prefix) -> tuple[Map, Prefix]:
        cells = pad_to(map, (2, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, h, 2, w, 2]
        tokens = cells.permute(0, 2, 4, 5, 3, 1).flatten(3)  # [B, h, w, 4 * C]
        if self.order == "before":
            tokens = self.reduction(self.norm(tokens))
        else:
            tokens = self.norm(self.reduction(tokens))
        return tokens.permute(0, 3, 1, 2), prefix  # [B, D, h, w]


class ConvPool(nn.Module):
    """Halve the map and double its width by a depth-wise 3 x 3 convolution; prefix tokens take a linear layer.

    Outputs 2 c and 2 c + 1 see the input channel c alone (PiT, 2103.16302, section 3.2).
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel_size=3, stride=2, padding=1, groups=channels)
        self.linear = nn.Linear(channels, width)

    def forward(self, map: Float[Tensor, "B C _ _"], prefix: Prefix) -> tuple[Map, Prefix]:
        return self.conv(map), None if prefix is None else self.linear(prefix)


def conv_cells(size: int, kernel: int, stride: int, padding: int = 0) -> int:
    """Cells along one side of a convolution's output."""
    return (size + 2 * padding - kernel) // stride + 1
