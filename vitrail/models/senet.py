"""Squeeze-and-excitation networks (Hu et al. 2018, arXiv 1709.01507): residual networks with a gate in each block.

After a block's last norm and before the sum, every channel is multiplied by a factor that follows from the mean
of all channels through two small layers (nn.gates.SqueezeExcite), whose inner width is the channels over 16.

    legacy_*     the released Caffe networks, as timm ported them: the max-pool is not padded but rounds up, and
                 SE-ResNets have the stride in the first 1 x 1 convolution (SE-ResNeXts in the 3 x 3).
    seresnet*    timm's own: padded max-pool, stride in the 3 x 3. Same names and shapes of tensors in a block,
                 another function: a file of one kind is refused by the other.
    senet154     a ResNeXt-152 of 64 groups of 4, with three 3 x 3 convolutions for a stem, narrower first
                 convolutions, 3 x 3 shortcuts, and dropout before the last layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from vitrail.models.checks import check_config, check_stages
from vitrail.models.classifier import Classifier
from vitrail.models.senet_layouts import RENAMES as RENAMES
from vitrail.models.senet_layouts import context as context
from vitrail.nn.gates import SqueezeExcite
from vitrail.nn.heads import ClassHead
from vitrail.nn.init import init_resnet, skip_on_meta
from vitrail.nn.resnet import Design, NormKind, ResidualTrunk, Stem, StemKind
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing

MEANING = ("pool", "stride_in")
"""Fields that change what the same tensors compute."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides an SE network's parameters and what it computes."""

    img_size: tuple[int, int] = (224, 224)
    """Rows and columns of the image that the model is meant for; other sizes run too."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 1000
    """Logits; 0 leaves the last layer out."""
    block: Literal["basic", "bottleneck"] = "bottleneck"
    """Two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1."""
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks of each stage."""
    width: int = 64
    """Channels of the stem and of the first stage, before the bottleneck's factor of four."""
    groups: int = 1
    """Groups of the 3 x 3 convolutions (ResNeXt's cardinality)."""
    group_width: int = 64
    """Channels of a group in the first stage, at width 64."""
    reduction: int = 16
    """Channels over the gate's inner width."""
    gate_bias: bool = True
    """Whether the gate's layers have biases (released networks), or not (the paper's ablations)."""
    stem: StemKind = "7x7"
    """7 x 7 of stride 2, three 3 x 3, or one 3 x 3 of stride 1 for pictures of 32 pixels."""
    pool: Literal["pad", "ceil"] = "pad"
    """Max-pool after the stem: padded by one, or not and rounded up (Caffe)."""
    stride_in: Literal["first", "middle"] = "middle"
    """The convolution of a bottleneck that has the stride: the first 1 x 1 (Caffe's SE-ResNets), or the 3 x 3."""
    narrow_first: bool = False
    """Whether a bottleneck's first convolution has half as many outputs (SENet-154)."""
    shortcut_kernel: int = 1
    """Kernel of the shortcuts of later stages (3 in SENet-154)."""
    norm: NormKind = "batch"
    """Batch norms that learn, or "frozen" ones."""
    dilated: int = 0
    """How many of the last stages dilate their kernels instead of halving the map."""
    drop_path_rate: float = 0.0
    """Share of samples that skip the last block's branch in training; falls evenly to 0 at the first block."""
    drop_rate: float = 0.0
    """Dropout before the last layer."""

    def __post_init__(self) -> None:
        check_config(self, ("width", "groups", "group_width", "reduction", "shortcut_kernel"))
        check_stages(self, len(self.depths), {"depths": 1})


def build(config: Config) -> Classifier:
    """The network of a configuration, initialised from torch's default generator."""
    design = Design(
        block=config.block,
        width=config.width,
        groups=config.groups,
        group_width=config.group_width,
        stride_in=config.stride_in,
        narrow_first=config.narrow_first,
        shortcut_kernel=config.shortcut_kernel,
        norm=config.norm,
    )
    backbone = ResidualTrunk(
        Stem(config.in_chans, config.width, config.stem, config.pool, config.norm),
        config.depths,
        design,
        dilated=config.dilated,
        drop_path_rate=config.drop_path_rate,
        gate=partial(_gate, config),
    )
    head = ClassHead(
        backbone.levels[-1].channels, config.num_classes, pool="mean", dropout=config.drop_rate, start="torch"
    )
    model = Classifier(backbone, head)
    if not skip_on_meta(model):
        init_resnet(model)
    return model


def _gate(config: Config, channels: int) -> nn.Module:
    return SqueezeExcite(channels, max(1, channels // config.reduction), config.gate_bias)


_50, _101, _152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)


def _caffe(depths: tuple[int, ...], groups: int = 1) -> Config:
    return Config(
        depths=depths, groups=groups, group_width=64 if groups == 1 else 4, pool="ceil",
        stride_in="first" if groups == 1 else "middle",
    )  # fmt: skip


def _154(pool: Literal["pad", "ceil"]) -> Config:
    return Config(
        depths=_152, groups=64, group_width=4, stem="deep", pool=pool, narrow_first=True, shortcut_kernel=3,
        drop_rate=0.2 if pool == "ceil" else 0.0,
    )  # fmt: skip


VARIANTS: dict[str, Config] = {
    #                                 blocks
    "legacy_seresnet50":       _caffe(_50),
    "legacy_seresnet101":      _caffe(_101),
    "legacy_seresnet152":      _caffe(_152),
    "legacy_seresnext50_32x4d":  _caffe(_50,  groups=32),
    "legacy_seresnext101_32x4d": _caffe(_101, groups=32),
    "legacy_senet154":         _154("ceil"),
    "seresnet50":        Config(depths=_50),
    "seresnet101":       Config(depths=_101),
    "seresnet152":       Config(depths=_152),
    "seresnext50_32x4d":  Config(depths=_50,  groups=32, group_width=4),
    "seresnext101_32x4d": Config(depths=_101, groups=32, group_width=4),
    "senet154":                _154("pad"),
    # Ours, for pictures of 32 pixels: 20 layers, twice as wide as the first CIFAR ResNets.
    "se_resnet20_32":    Config(depths=(3, 3, 3), block="basic", width=32, reduction=4, stem="small",
                                img_size=(32, 32), num_classes=10),
}  # fmt: skip

TINY = Config(img_size=(32, 32), num_classes=5, depths=(1, 2), width=8, reduction=4)

CARDS: dict[str, Card] = {
    name: Card(
        architecture=name,
        preprocessing=Preprocessing(
            input_size=config.img_size,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            interpolation="bilinear",
            crop_pct=1.0 if config.img_size[0] == 32 else 0.875,
        ),
    )
    for name, config in VARIANTS.items()
}
