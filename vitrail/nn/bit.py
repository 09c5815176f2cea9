"""The convolutional stem of the hybrid ViTs: a weight-standardised ResNet (BiT, 1912.11370; ViT section 3.1).

Group norm with 32 groups after every convolution, the activation after the residual sum, TensorFlow's SAME
padding. Numerics follow timm's port (group norm eps 1e-5, weight variance eps 1e-8); the JAX original differs
in those two small numbers alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Map = Float[Tensor, "B _ _ _"]


def pad_same(map: Map, kernel: int, stride: int, value: float = 0.0) -> Map:
    """Pad so that the output has ceil(size / stride) cells, the odd pixel at the bottom and right."""
    extra = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in map.shape[2:]]
    rows, columns = extra
    if rows == columns == 0:
        return map
    return F.pad(map, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), value=value)


class StandardConv(nn.Conv2d):
    """A convolution whose kernels are brought to mean 0 and variance 1 each time (1903.10520), SAME padding."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, out, kernel, stride=stride, bias=False)

    def forward(self, input: Map) -> Map:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-8)
        padded = pad_same(input, self.kernel_size[0], self.stride[0])
        return F.conv2d(padded, weight, stride=self.stride)


class Unit(nn.Module):
    """A bottleneck: 1 x 1, 3 x 3 (with the stride), 1 x 1, each with a group norm; ReLU after the sum."""

    def __init__(self, channels: int, out: int, stride: int, project: bool) -> None:
        super().__init__()
        middle = out // 4
        self.conv1, self.norm1 = StandardConv(channels, middle, 1), nn.GroupNorm(32, middle)
        self.conv2, self.norm2 = StandardConv(middle, middle, 3, stride), nn.GroupNorm(32, middle)
        self.conv3, self.norm3 = StandardConv(middle, out, 1), nn.GroupNorm(32, out)
        self.shortcut: nn.Module = nn.Identity()
        if project:
            self.shortcut = nn.Sequential(StandardConv(channels, out, 1, stride), nn.GroupNorm(32, out))

    def forward(self, map: Map) -> Map:
        branch = F.relu(self.norm1(self.conv1(map)))
        branch = F.relu(self.norm2(self.conv2(branch)))
        return F.relu(self.norm3(self.conv3(branch)) + self.shortcut(map))


class BitStem(nn.Module):
    """An entry: root (7 x 7 stride 2, then max-pool stride 2) and stages of units; stage s has 256 · 2^s channels.

    `layers` counts the units of each stage: (3, 4, 9) ends at stride 16, (2, 2, 2, 2) and (3, 4, 6, 3) at
    stride 32, () is the root alone at stride 4.
    """

    def __init__(self, channels: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.conv, self.norm = StandardConv(channels, 64, 7, 2), nn.GroupNorm(32, 64)
        self.stages = nn.ModuleList()
        before = 64
        for number, count in enumerate(layers):
            out = 256 * 2**number
            units = [
                Unit(before if unit == 0 else out, out, 2 if number and unit == 0 else 1, project=unit == 0)
                for unit in range(count)
            ]
            self.stages.append(nn.Sequential(*units))
            before = out
        self.channels = before
        self.stride = 4 * 2 ** max(0, len(layers) - 1)

    def forward(self, map: Map, prefix: Tensor | None) -> tuple[Map, Tensor | None]:
        map = F.relu(self.norm(self.conv(map)))
        map = F.max_pool2d(pad_same(map, 3, 2, value=float("-inf")), 3, 2)
        for stage in self.stages:
            map = stage(map)
        return map, prefix
