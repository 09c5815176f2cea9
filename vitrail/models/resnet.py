"""ResNet (He et al. 2016, arXiv 1512.03385) and ResNeXt (Xie et al. 2017, 1611.05431).

A 7 x 7 convolution and a max-pool bring the image to stride 4; four stages of residual blocks follow at strides
4, 8, 16 and 32, and the mean of the last map goes to a linear layer. A basic block has two 3 x 3 convolutions, a
bottleneck 1 x 1, 3 x 3 and 1 x 1 with four times the channels at the end; ResNeXt's 3 x 3 works in groups. The
stride stands in the 3 x 3, as in torchvision ("v1.5").

As a backbone it answers the maps C2 to C5; `dilated=1` keeps the last at stride 16 (DC5), and `norm="frozen"`
has batch norms that never change, both for detection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vitrail.models.checks import check_config, check_stages
from vitrail.models.classifier import Classifier
from vitrail.models.resnet_layouts import RENAMES as RENAMES
from vitrail.models.resnet_layouts import context as context
from vitrail.nn.heads import ClassHead
from vitrail.nn.init import init_resnet, skip_on_meta
from vitrail.nn.resnet import Design, NormKind, ResidualTrunk, Stem, StemKind
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a ResNet's parameters and what it computes."""

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
    stem: StemKind = "7x7"
    """7 x 7 of stride 2 or three 3 x 3 ("deep"), and a max-pool; or 3 x 3 of stride 1 for pictures of 32 pixels."""
    norm: NormKind = "batch"
    """Batch norms that learn, or "frozen" ones."""
    dilated: int = 0
    """How many of the last stages dilate their kernels instead of halving the map."""
    drop_path_rate: float = 0.0
    """Share of samples that skip the last block's branch in training; falls evenly to 0 at the first block."""
    drop_rate: float = 0.0
    """Dropout before the last layer."""

    def __post_init__(self) -> None:
        check_config(self, ("width", "groups", "group_width"))
        check_stages(self, len(self.depths), {"depths": 1})


def build(config: Config) -> Classifier:
    """The network of a configuration, initialised from torch's default generator."""
    design = Design(
        block=config.block,
        width=config.width,
        groups=config.groups,
        group_width=config.group_width,
        norm=config.norm,
    )
    backbone = ResidualTrunk(
        Stem(config.in_chans, config.width, config.stem, norm=config.norm),
        config.depths,
        design,
        dilated=config.dilated,
        drop_path_rate=config.drop_path_rate,
    )
    head = ClassHead(
        backbone.levels[-1].channels, config.num_classes, pool="mean", dropout=config.drop_rate, start="torch"
    )
    model = Classifier(backbone, head)
    if not skip_on_meta(model):
        init_resnet(model)
    return model


_18, _34, _50, _101, _152 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)

VARIANTS: dict[str, Config] = {
    #                            blocks
    "resnet18":          Config(depths=_18, block="basic"),
    "resnet34":          Config(depths=_34, block="basic"),
    "resnet50":          Config(depths=_50),
    "resnet101":         Config(depths=_101),
    "resnet152":         Config(depths=_152),
    "resnext50_32x4d":   Config(depths=_50,  groups=32, group_width=4),
    "resnext101_32x4d":  Config(depths=_101, groups=32, group_width=4),
    "resnext101_32x8d":  Config(depths=_101, groups=32, group_width=8),
    "resnext101_64x4d":  Config(depths=_101, groups=64, group_width=4),
    # Ours, for pictures of 32 pixels: He et al.'s 20 layers of section 4.2, twice as wide, with projections.
    "resnet20_32":       Config(depths=(3, 3, 3), block="basic", width=32, stem="small", img_size=(32, 32),
                                num_classes=10),
    # Ours, for small dense models: ResNet-10, half as wide.
    "resnet10_nano":     Config(depths=(1, 1, 1, 1), block="basic", width=32),
}  # fmt: skip

TINY = Config(img_size=(32, 32), num_classes=5, depths=(1, 2), width=8, stem="7x7")

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
