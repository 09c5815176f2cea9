"""Heads that give every pixel a class, from feature maps. Each is called with (maps, size): logits `[B, K, *size]`.

SETR (2012.15840): UpHead is its naive and its progressive decoder, Aggregation and StreamHead its multi-level one.
FpnHead is Semantic FPN's (Kirillov et al. 2019, 1901.02446), which PVT is measured with. All keep the class layer
in `linear` and give it new classes by `reset`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.resnet import ConvNorm
from vitrail.nn.shapes import Level

Map = Float[Tensor, "B _ _ _"]
Maps = tuple[Map, ...]


def resize(map: Map, size: tuple[int, int], aligned: bool = False) -> Map:
    """Bilinear, without antialiasing; `aligned` puts the corner cells' centres on the corners."""
    return F.interpolate(map, size=size, mode="bilinear", align_corners=aligned)


def grow(map: Map, factor: int) -> Map:
    """The map so many times as large."""
    return resize(map, (map.shape[2] * factor, map.shape[3] * factor)) if factor > 1 else map


class MapNorm(nn.Module):
    """Layer norm over the channels of every cell."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=eps)

    def forward(self, map: Map) -> Map:
        out: Tensor = self.norm(map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [B, C, h, w]
        return out


class MaskHead(nn.Module):
    """What mask heads share: `linear`, a convolution to as many channels as there are classes."""

    linear: nn.Conv2d

    @property
    def classifier(self) -> nn.Module:
        return self.linear

    def reset(self, num_classes: int) -> None:
        """A new class layer on the old one's device and in its type: N(0, 0.01), biases 0."""
        old, kernel = self.linear, self.linear.kernel_size[0]
        self.linear = nn.Conv2d(
            old.in_channels, num_classes, kernel, padding=kernel // 2, bias=old.bias is not None,
            device=old.weight.device, dtype=old.weight.dtype,
        )  # fmt: skip
        init_class_layer(self.linear)


def init_class_layer(layer: nn.Conv2d) -> None:
    """N(0, 0.01), biases 0: every class about equally likely everywhere."""
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class UpHead(MaskHead):
    """Norm, then convolutions with batch norm and ReLU, each followed by so much growth; class layer; resize.

    Naive (section 3.2): one 1 x 1 convolution, growth 1. Progressive: four 3 x 3, growth 2, 2, 2, 1 (the rest
    is the last resizing, which commutes with the class layer). Convolutions have a bias though a norm follows,
    as published.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        level: int = -1,
        width: int = 256,
        kernel: int = 3,
        growth: Sequence[int] = (1,),
    ) -> None:
        """
        Args:
            channels: of the map that is read.
            level: number of that map.
            growth: a factor for each convolution, by which its output is enlarged.
        """
        super().__init__()
        self.level, self.growth = level, tuple(growth)
        self.norm = MapNorm(channels)
        inputs = [channels, *[width] * (len(self.growth) - 1)]
        self.convs = nn.ModuleList(ConvNorm(before, width, kernel, bias=True) for before in inputs)
        self.linear = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Maps, size: tuple[int, int]) -> Float[Tensor, "B K I J"]:
        map = self.norm(maps[self.level])
        for conv, factor in zip(self.convs, self.growth, strict=True):
            map = grow(F.relu(conv(map)), factor)
        return resize(self.linear(map), size)


class Aggregation(nn.Module):
    """Maps of one size, shallow to deep, each normed and narrowed; every one gets the sum of those below it.

    SETR-MLA (section 3.2): 1 x 1 convolution, sums from the deepest up, 3 x 3 convolution. Maps to maps.
    """

    def __init__(self, channels: int, streams: int, width: int = 256) -> None:
        super().__init__()
        self.norms = nn.ModuleList(MapNorm(channels) for _ in range(streams))
        self.reduce = nn.ModuleList(ConvNorm(channels, width, 1) for _ in range(streams))
        self.smooth = nn.ModuleList(ConvNorm(width, width, 3) for _ in range(streams))

    def forward(self, maps: Maps) -> Maps:
        out: list[Tensor] = []
        total: Tensor | None = None
        for place in reversed(range(len(self.norms))):
            narrow = F.relu(self.reduce[place](self.norms[place](maps[place])))
            total = narrow if total is None else total + narrow
            out.append(F.relu(self.smooth[place](total)))
        return tuple(reversed(out))


class StreamHead(MaskHead):
    """Two 3 x 3 convolutions for each map, growth 4 with aligned corners, all side by side to a 3 x 3 class layer."""

    def __init__(self, channels: int, streams: int, num_classes: int, width: int = 128) -> None:
        super().__init__()
        self.streams = nn.ModuleList(
            nn.ModuleList([ConvNorm(channels, width, 3), ConvNorm(width, width, 3)]) for _ in range(streams)
        )
        self.linear = nn.Conv2d(streams * width, num_classes, 3, padding=1)

    def forward(self, maps: Maps, size: tuple[int, int]) -> Float[Tensor, "B K I J"]:
        out = []
        for stream, map in zip(self.streams, maps, strict=True):
            for conv in stream:  # type: ignore[attr-defined]
                map = F.relu(conv(map))
            out.append(resize(map, (4 * map.shape[2], 4 * map.shape[3]), aligned=True))
        return resize(self.linear(torch.cat(out, dim=1)), size)


class PointHead(MaskHead):
    """A class layer of 1 x 1 without bias on one map: SETR-MLA's auxiliary heads."""

    def __init__(self, channels: int, num_classes: int, *, level: int) -> None:
        super().__init__()
        self.level = level
        self.linear = nn.Conv2d(channels, num_classes, 1, bias=False)

    def forward(self, maps: Maps, size: tuple[int, int]) -> Float[Tensor, "B K I J"]:
        return resize(self.linear(maps[self.level]), size)


class FpnHead(MaskHead):
    """Every map to the finest one's size by 3 x 3 convolutions and growth of 2 in turn; their sum; class layer.

    A map whose stride is 2^n times the finest has n convolutions (one where n is 0), each with batch norm and ReLU.
    """

    def __init__(
        self, levels: Sequence[Level], num_classes: int, width: int = 128, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        self.growth = []
        for level in levels:
            steps = (level.stride // levels[0].stride).bit_length() - 1
            inputs = [level.channels, *[width] * (max(1, steps) - 1)]
            self.branches.append(nn.ModuleList(ConvNorm(before, width, 3) for before in inputs))
            self.growth.append(2 if steps else 1)
        self.dropout = nn.Dropout2d(dropout)
        self.linear = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Maps, size: tuple[int, int]) -> Float[Tensor, "B K I J"]:
        finest = (maps[0].shape[2], maps[0].shape[3])
        total: Tensor | None = None
        for branch, factor, map in zip(self.branches, self.growth, maps, strict=True):
            for conv in branch:  # type: ignore[attr-defined]
                map = grow(F.relu(conv(map)), factor)
            map = map if tuple(map.shape[2:]) == finest else resize(map, finest)
            total = map if total is None else total + map
        return resize(self.linear(self.dropout(total)), size)
