"""Entries: what happens before the blocks of a stage.

An entry is called with (map, prefix) and returns (map, prefix). Patch embedding, positions, class tokens,
merging and pooling are all entries, and they chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import ModelError

Map = Float[Tensor, "B _ _ _"]
Prefix = Float[Tensor, "B _ _"] | None


class Chain(nn.Module):
    """Entries one after the other, each under its own name: `Chain(patches=..., positions=...)`."""

    def __init__(self, **entries: nn.Module) -> None:
        super().__init__()
        for name, entry in entries.items():
            self.add_module(name, entry)

    def forward(self, map: Map, prefix: Prefix) -> tuple[Map, Prefix]:
        for entry in self.children():
            map, prefix = entry(map, prefix)
        return map, prefix


class Patchify(nn.Module):
    """Cut the map into patches, flatten each, project it to the width (ViT, equation 1).

    One convolution whose kernel equals its stride is the same as unfold and linear: 16 x 16 x 3 = 768 numbers
    a patch become `width`. Where the patch does not divide the map, `rest` says what happens: "refuse" raises
    ModelError (ViT), "pad" adds zeros below and to the right (Swin), "drop" leaves the last pixels out (PVT).
    """

    def __init__(
        self,
        channels: int,
        width: int,
        patch: tuple[int, int],
        *,
        bias: bool = True,
        norm: nn.Module | None = None,
        rest: Literal["refuse", "pad", "drop"] = "refuse",
    ) -> None:
        super().__init__()
        self.patch, self.rest = patch, rest
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch, bias=bias)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, map: Float[Tensor, "B C I J"], prefix: Prefix) -> tuple[Map, Prefix]:
        if self.rest == "refuse":
            check_divides(map.shape[2], map.shape[3], self.patch)
        elif self.rest == "pad":
            map = pad_to(map, self.patch)
        tokens = self.proj(map).permute(0, 2, 3, 1)  # [B, h, w, D]
        return self.norm(tokens).permute(0, 3, 1, 2), prefix  # [B, D, h, w]


def pad_to(map: Map, step: tuple[int, int]) -> Map:
    """The map with zeros below and to the right, up to multiples of a step."""
    below, right = -map.shape[2] % step[0], -map.shape[3] % step[1]
    return F.pad(map, (0, right, 0, below)) if below or right else map


def check_divides(rows: int, columns: int, patch: tuple[int, int]) -> None:
    """Raise ModelError that names the nearest legal sizes unless the patch divides the image."""
    for name, size, step in (("height", rows, patch[0]), ("width", columns, patch[1])):
        if size % step:
            below, above = size // step * step, (size // step + 1) * step
            near = f"{below} or {above}" if below else f"{above}"
            raise ModelError(
                f"An image {name} must be a multiple of the patch's {step}; got {size}. The nearest legal: {near}."
            )


class ConvStem(nn.Module):
    """Strided 3 x 3 convolutions in place of one patch projection (Xiao et al. 2021, 2106.14881).

    Each halves the map, with batch norm and ReLU, until one cell is a patch; a 1 x 1 convolution ends it.
    """

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = (patch, patch)
        layers: list[nn.Module] = []
        for after in stem_widths(width, patch):
            layers += convolution(channels, after, stride=2)
            channels = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, width, 1))

    def forward(self, map: Float[Tensor, "B C I J"], prefix: Prefix) -> tuple[Map, Prefix]:
        check_divides(map.shape[2], map.shape[3], self.patch)
        return self.layers(map), prefix


class PoolStem(nn.Module):
    """Convolutions that overlap and pool in place of one patch projection (CCT, Hassani et al. 2021, 2104.05704).

    Each layer is a 3 x 3 convolution at full resolution, ReLU, and a 3 x 3 maximum that halves the map, until one
    cell is a patch. Unlike CCT's, each has a batch norm before the ReLU: short runs need it.

    With `residual`, one more convolution comes first, and two with a skip around them follow every pool but the last:
    a small residual network, for which a run of some dozen epochs on pictures of its own learns more.
    """

    def __init__(self, channels: int, width: int, patch: int, residual: bool = False) -> None:
        super().__init__()
        self.patch = (patch, patch)
        widths = [*stem_widths(width, patch)[:-1], width]
        layers: list[nn.Module] = []
        if residual:
            first = max(widths[0] // 2, 24)
            layers += convolution(channels, first)
            channels = first
        for number, after in enumerate(widths):
            layers += [*convolution(channels, after), nn.MaxPool2d(3, stride=2, padding=1)]
            if residual and number < len(widths) - 1:
                layers.append(Skip(after))
            channels = after
        self.layers = nn.Sequential(*layers)

    def forward(self, map: Float[Tensor, "B C I J"], prefix: Prefix) -> tuple[Map, Prefix]:
        check_divides(map.shape[2], map.shape[3], self.patch)
        return self.layers(map), prefix


class Skip(nn.Module):
    """Two 3 x 3 convolutions, whose outcome is added to what went in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*convolution(width, width), *convolution(width, width))

    def forward(self, map: Map) -> Map:
        out: Tensor = map + self.layers(map)
        return out


def convolution(channels: int, width: int, stride: int = 1) -> list[nn.Module]:
    """A 3 x 3 convolution, batch norm and ReLU."""
    return [
        nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]


def stem_widths(width: int, patch: int) -> list[int]:
    """Channels after each halving of a convolutional stem: they double up to the width, from 24 at least."""
    steps = halvings(patch)
    return [max(width // 2 ** (steps - 1 - step), 24) for step in range(steps)]


def halvings(patch: int) -> int:
    """How often a map is halved until one cell is a patch. Raises ModelError unless the patch is a power of two."""
    steps = patch.bit_length() - 1
    if 2**steps != patch or steps < 1:
        raise ModelError(f"A convolutional stem needs a patch of 2, 4, 8, 16 or 32; got {patch}.")
    return steps


class SoftSplit(nn.Module):
    """Cut the map into windows that overlap and lay each window's numbers side by side (T2T-ViT, section 3.1).

    A cell becomes channels · kernel² numbers, channel by channel, each row by row; `width` projects them.
    Zeros stand beyond the border.
    """

    def __init__(
        self, channels: int, kernel: int, stride: int, padding: int, width: int | None = None
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        features = channels * kernel * kernel
        self.width = features if width is None else width
        self.proj = nn.Identity() if width is None else nn.Linear(features, width)

    def forward(self, map: Float[Tensor, "B C I J"], prefix: Prefix) -> tuple[Map, Prefix]:
        grid = [self.cells(size) for size in map.shape[2:]]
        cells = F.unfold(map, self.kernel, padding=self.padding, stride=self.stride)  # [B, C * k * k, h * w]
        tokens = self.proj(cells.transpose(1, 2))  # [B, h * w, D]
        return tokens.transpose(1, 2).unflatten(2, grid), prefix  # [B, D, h, w]

    def cells(self, size: int) -> int:
        """Rows (or columns) of the grid that so many rows (or columns) of a map become."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1


class MlpStem(nn.Module):
    """Patches of 16 by linear maps of 4, 2 and 2, with batch norm and GELU (hMLP, Touvron et al. 2203.09795).

    Nothing crosses a patch's border, so masking patches before or after is the same.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.patch, inner = (16, 16), width // 4
        self.layers = nn.Sequential(
            nn.Conv2d(channels, inner, 4, stride=4), nn.BatchNorm2d(inner), nn.GELU(),
            nn.Conv2d(inner, inner, 2, stride=2), nn.BatchNorm2d(inner), nn.GELU(),
            nn.Conv2d(inner, width, 2, stride=2), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, map: Float[Tensor, "B C I J"], prefix: Prefix) -> tuple[Map, Prefix]:
        check_divides(map.shape[2], map.shape[3], self.patch)
        return self.layers(map), prefix


class PrefixTokens(nn.Module):
    """Put learned tokens in front of the sequence: [CLS], a distillation token, registers.

    The tokens are handed over by name and stand in that order; a name with several rows is several tokens.
    """

    def __init__(self, width: int, **counts: int) -> None:
        super().__init__()
        self.names = tuple(counts)
        for name, count in counts.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(1, count, width)))

    def forward(self, map: Map, prefix: Prefix) -> tuple[Map, Prefix]:
        tokens = torch.cat([getattr(self, name) for name in self.names], dim=1)  # [1, P, D]
        tokens = tokens.expand(map.shape[0], -1, -1)  # [B, P, D]
        return map, tokens if prefix is None else torch.cat([prefix, tokens], dim=1)


class DropPrefix(nn.Module):
    """Leave the prefix tokens out from here on (SETR-MLA: [CLS] gets a position, and no block sees it)."""

    def forward(self, map: Map, prefix: Prefix) -> tuple[Map, Prefix]:
        return map, None


class DropTokens(nn.Module):
    """Dropout on map and prefix (after the positions, in the original ViT), where no position entry does it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(rate)

    def forward(self, map: Map, prefix: Prefix) -> tuple[Map, Prefix]:
        return self.dropout(map), None if prefix is None else self.dropout(prefix)


def patch_grid(img_size: Sequence[int], patch: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the patch grid. Raises ModelError where the patch does not divide the image."""
    check_divides(img_size[0], img_size[1], (patch[0], patch[1]))
    return img_size[0] // patch[0], img_size[1] // patch[1]
