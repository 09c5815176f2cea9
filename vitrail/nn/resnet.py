"""Residual networks (He et al. 2016, 1512.03385) with a place for a gate in each block.

A block is relu(shortcut + gate(branch)), then whatever may follow it: the gate is squeeze-and-excitation, what
follows is a non-local block, and both are nothing in a plain ResNet. ResNeXt (1611.05431) divides the 3 x 3
convolutions into groups. SENet-154 has three 3 x 3 convolutions for a stem, narrows each block's first
convolution, and projects its shortcuts by 3 x 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.nn.block import DropPath, drop_path_rates
from vitrail.nn.recompute import recomputed
from vitrail.nn.shapes import Features, Grid, Level
from vitrail.nn.trunk import join

Map = Float[Tensor, "B _ _ _"]
NormKind = Literal["batch", "frozen"]
StemKind = Literal["7x7", "deep", "small"]
PoolKind = Literal["pad", "ceil", "floor"]


LARGE = 200_000
"""Pixels of a picture from which a CPU's convolutions are quicker with channels last: a map is then not brought into
that order and back by each of them. docs/log.md has the measurements."""


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics, scale and shift are given and never change (detection, DETR)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, map: Map) -> Map:
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(map, *statistics, training=False, eps=self.eps)  # one pass, half the time of two

    def line(self) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
        """Factor and shift: all that a norm is that never changes."""
        factor = self.weight * (self.running_var + self.eps).rsqrt()
        return factor, self.bias - self.running_mean * factor


class ConvNorm(nn.Module):
    """A convolution, without bias unless asked for, and its norm. Padding keeps the size at stride 1."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int,
        stride: int = 1,
        *,
        groups: int = 1,
        dilation: int = 1,
        norm: NormKind = "batch",
        bias: bool = False,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(
            channels, out, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(out) if norm == "batch" else FrozenBatchNorm(out)

    def forward(self, map: Map) -> Map:
        out: Tensor = self._at_once(map) if self._pays(map) else self.norm(self.conv(map))
        return out

    def _pays(self, map: Map) -> bool:
        """Whether a frozen norm is better laid into the kernel: it then costs no pass over the map and no memory,
        but one over the kernel. Exported graphs leave that to their engines."""
        if not isinstance(self.norm, FrozenBatchNorm) or torch.compiler.is_exporting():
            return False
        kernel, (down, right) = self.conv.weight, self.conv.stride
        return (map.shape[2] // down) * (map.shape[3] // right) > kernel[0].numel()  # whatever the batch is

    def _at_once(self, map: Map) -> Map:
        conv, (factor, shift) = self.conv, self.norm.line()  # type: ignore[operator]
        kernel = conv.weight * factor[:, None, None, None]  # [C', C / groups, k, k]
        bias = shift if conv.bias is None else shift + conv.bias * factor
        return F.conv2d(map, kernel, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class Stem(nn.Module):
    """The first convolutions, each with a norm and a ReLU, and a max-pool of stride 2.

    "7x7" is one of stride 2, "deep" three 3 x 3 with the stride in the first, "small" one 3 x 3 of stride 1
    without a pool, for pictures of 32 pixels. The 3 x 3 pool is padded by one ("pad", torchvision), or not, and
    then takes what remains at the bottom and right ("ceil", Caffe) or leaves it ("floor", video-nonlocal-net).
    """

    def __init__(
        self,
        channels: int,
        width: int,
        kind: StemKind = "7x7",
        pool: PoolKind = "pad",
        norm: NormKind = "batch",
    ) -> None:
        super().__init__()
        if kind == "deep":
            layers = [ConvNorm(channels, width, 3, 2, norm=norm), ConvNorm(width, width, 3, norm=norm)]
            layers.append(ConvNorm(width, 2 * width, 3, norm=norm))
        else:
            layers = [ConvNorm(channels, width, *((7, 2) if kind == "7x7" else (3, 1)), norm=norm)]
        self.layers = nn.ModuleList(layers)
        self.channels = 2 * width if kind == "deep" else width
        self.pool = None if kind == "small" else pool
        self.stride = 1 if kind == "small" else 4

    def forward(self, map: Map) -> Map:
        for layer in self.layers:
            map = F.relu_(layer(map))
        if self.pool is None:
            return map
        return F.max_pool2d(map, 3, 2, padding=int(self.pool == "pad"), ceil_mode=self.pool == "ceil")


@dataclass(frozen=True, kw_only=True)
class Design:
    """How the blocks of a residual network are made."""

    block: Literal["basic", "bottleneck"] = "bottleneck"
    """Two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 with four times the channels at the end."""
    width: int = 64
    """Channels of the first stage, before the bottleneck's factor of four; each later stage doubles them."""
    groups: int = 1
    """Groups of the 3 x 3 convolutions in bottlenecks."""
    group_width: int = 64
    """Channels of a group at width 64."""
    stride_in: Literal["first", "middle"] = "middle"
    """The convolution of a bottleneck that has the stride: the first 1 x 1, or the 3 x 3."""
    narrow_first: bool = False
    """Whether a bottleneck's first convolution has half as many outputs (SENet-154)."""
    shortcut_kernel: int = 1
    """Kernel of the shortcuts of later stages (3 in SENet-154)."""
    norm: NormKind = "batch"
    """Batch norms that learn, or that never change."""

    def stage_width(self, stage: int) -> int:
        """Channels of a stage's map."""
        return (self.width << stage) * (4 if self.block == "bottleneck" else 1)

    def layers(self, channels: int, stage: int, stride: int, dilation: int) -> list[ConvNorm]:
        """The convolutions of one block."""
        out, norm = self.stage_width(stage), self.norm
        if self.block == "basic":
            first = ConvNorm(channels, out, 3, stride, dilation=dilation, norm=norm)
            return [first, ConvNorm(out, out, 3, dilation=dilation, norm=norm)]
        middle = (self.width << stage) * self.group_width // 64 * self.groups
        narrow = middle // 2 if self.narrow_first else middle
        one, three = (stride, 1) if self.stride_in == "first" else (1, stride)
        return [
            ConvNorm(channels, narrow, 1, one, norm=norm),
            ConvNorm(narrow, middle, 3, three, groups=self.groups, dilation=dilation, norm=norm),
            ConvNorm(middle, out, 1, norm=norm),
        ]

    def shortcut(self, channels: int, stage: int, stride: int) -> ConvNorm | None:
        """A projection where the block changes the map's size or channels."""
        out = self.stage_width(stage)
        if stride == 1 and channels == out:
            return None
        return ConvNorm(channels, out, self.shortcut_kernel if stage else 1, stride, norm=self.norm)


class ResidualBlock(nn.Module):
    """relu(shortcut + gate(layers)), then `after`. `layers` are convolutions with a ReLU between them."""

    def __init__(
        self,
        layers: Sequence[ConvNorm],
        shortcut: ConvNorm | None = None,
        gate: nn.Module | None = None,
        after: nn.Module | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.gate = nn.Identity() if gate is None else gate
        self.plain = gate is None
        self.drop_path = DropPath(drop_path)
        self.after = nn.Identity() if after is None else after

    def forward(self, map: Map) -> Map:
        branch = map
        for number, layer in enumerate(self.layers):
            branch = layer(F.relu_(branch) if number else branch)
        branch = self.drop_path(self.gate(branch))
        # In place where nobody else needs what was there: on a CPU, new memory costs more than the sums.
        total = branch.add_(self.shortcut(map)) if self.plain else self.shortcut(map) + branch
        out: Tensor = self.after(F.relu_(total))
        return out


class ResidualStage(nn.Module):
    """Blocks one after the other."""

    def __init__(self, blocks: Sequence[ResidualBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.recompute = False  # activation checkpointing, switched by set_grad_checkpointing

    def forward(self, map: Map) -> Map:
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                map = recomputed(block, map)
            else:
                map = block(map)
        return map


class ResidualTrunk(nn.Module):
    """Stem and stages; answers the map of every stage (C2 to C5 of detection)."""

    def __init__(
        self,
        stem: Stem,
        depths: Sequence[int],
        design: Design,
        *,
        dilated: int = 0,
        drop_path_rate: float = 0.0,
        gate: Callable[[int], nn.Module] | None = None,
        after: Callable[[int, int], nn.Module | None] | None = None,
    ) -> None:
        """
        Args:
            depths: blocks of each stage.
            dilated: how many of the last stages keep their map's size and dilate their kernels instead (1 is
                DC5, 2 is an output stride of 8). A dilated stage's first block has its predecessor's dilation.
            gate: makes the gate of a block with this many channels.
            after: makes what follows a block, from its stage and number; None where nothing does.
        """
        super().__init__()
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.stem = stem
        stages, levels = [], []
        channels, stride, dilation = stem.channels, stem.stride, 1
        for stage, depth in enumerate(depths):
            step, spread, out = 2 if stage else 1, dilation, design.stage_width(stage)
            if stage >= max(1, len(depths) - dilated):
                step, dilation = 1, 2 * dilation
            stride *= step
            blocks = []
            for number in range(depth):
                layers = design.layers(channels, stage, step, spread)
                shortcut = design.shortcut(channels, stage, step)
                blocks.append(
                    ResidualBlock(
                        layers,
                        shortcut,
                        gate(out) if gate is not None else None,
                        after(stage, number) if after is not None else None,
                        next(rates),
                    )
                )
                channels, step, spread = out, 1, dilation
            stages.append(ResidualStage(blocks))
            levels.append(Level(channels, stride))
        self.stages = nn.ModuleList(stages)
        self.levels = tuple(levels)

    def forward(self, images: Float[Tensor, "B C I J"]) -> Features:
        """Every stage's map, fine to coarse."""
        on_cpu = images.device.type == "cpu" and not torch.compiler.is_exporting()
        if on_cpu and images.shape[2] * images.shape[3] >= LARGE:
            images = images.contiguous(memory_format=torch.channels_last)
        map, maps = self.stem(images), []
        for stage in self.stages:
            map = stage(map)
            maps.append(map)
        return Features(tuple(maps), None)

    def tokens(self, images: Float[Tensor, "B C I J"]) -> tuple[Float[Tensor, "B N D"], Grid]:
        """The last map's cells row by row, and their grid."""
        map = self(images).maps[-1]
        return join(map, None), Grid(map.shape[2], map.shape[3])
