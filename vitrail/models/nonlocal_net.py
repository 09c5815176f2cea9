"""Non-local neural networks (Wang et al. 2018, arXiv 1711.07971): ResNets whose places see all other places.

A non-local block (nn.gates.NonLocal) stands after some residual blocks of the third and fourth stages (res3 and
res4): one block right before the last residual block of res4; five after every second block of both stages; ten
after every block of both. In ResNet-101, whose res4 has 23 blocks, five stand after blocks 1, 3 of res3 and 6,
13, 20 of res4 as in the authors' code; of ten the paper says "the corresponding blocks": here after all of res3
and six evenly spread in res4. A fresh non-local block changes nothing, so that weights of a plain ResNet load
into these networks and give the same logits.

The paper and its code differ, and the tensors do not tell: the code scales the scores of the softmax form
(`scaled`), takes maxima before the projections (`subsample="before"`) and does not pad the stem's max-pool
(`pool="floor"`). The variants are the paper's, on torchvision's ResNets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from vitrail.errors import ModelError
from vitrail.models.checks import check_config, check_stages
from vitrail.models.classifier import Classifier
from vitrail.models.nonlocal_layouts import RENAMES as RENAMES
from vitrail.models.nonlocal_layouts import context as context
from vitrail.nn.gates import NonLocal, Pairwise
from vitrail.nn.heads import ClassHead
from vitrail.nn.init import init_resnet, skip_on_meta
from vitrail.nn.resnet import Design, PoolKind, ResidualTrunk, Stem
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing

MEANING = ("form", "subsample", "scaled", "pool")
"""Fields that change what the same tensors compute."""

ACCEPTS = {"resnet"}
"""Families whose folders load into these networks; the non-local blocks then stay as initialised."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a non-local ResNet's parameters and what it computes."""

    img_size: tuple[int, int] = (224, 224)
    """Rows and columns of the image that the model is meant for; other sizes run too."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 1000
    """Logits; 0 leaves the last layer out."""
    block: Literal["basic", "bottleneck"] = "bottleneck"
    """Two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1."""
    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Residual blocks of each stage."""
    width: int = 64
    """Channels of the stem and of the first stage, before the bottleneck's factor of four."""
    places: tuple[tuple[int, ...], ...] = ((), (), (4,), ())
    """For each stage, the residual blocks (from 0) that a non-local block follows."""
    form: Pairwise = "embedded"
    """The pairwise function f: gaussian, embedded (Gaussian), dot (product) or concatenation."""
    subsample: Literal["none", "after", "before"] = "after"
    """Maximum over 2 x 2 places j: after the projections (the paper), before them (the authors' code), or not."""
    scaled: bool = False
    """Whether the embedded form's scores are multiplied by the inner width to the power -1/2 (the authors' code)."""
    block_norm: bool = True
    """Whether a batch norm, zero at the start, ends a non-local block; without it its last convolution is zero."""
    stem: Literal["7x7", "small"] = "7x7"
    """7 x 7 of stride 2 and a max-pool, or 3 x 3 of stride 1 for pictures of 32 pixels."""
    pool: PoolKind = "pad"
    """Max-pool after the stem: padded by one, or not and rounded down ("floor", the authors' code)."""
    drop_path_rate: float = 0.0
    """Share of samples that skip the last block's branch in training; falls evenly to 0 at the first block."""
    drop_rate: float = 0.0
    """Dropout before the last layer."""

    def __post_init__(self) -> None:
        check_config(self, ("width",))
        check_stages(self, len(self.depths), {"depths": 1})
        legal = len(self.places) == len(self.depths) and all(
            0 <= block < depth
            for blocks, depth in zip(self.places, self.depths, strict=True)
            for block in blocks
        )
        if not legal:
            raise ModelError(
                f"places must name, for each of {len(self.depths)} stages, residual blocks from 0 of {self.depths};"
                f" got {self.places}."
            )
        if self.scaled and self.form != "embedded":
            raise ModelError(f"scaled=True goes with form='embedded'; got form={self.form!r}.")


def build(config: Config) -> Classifier:
    """The network of a configuration, initialised from torch's default generator."""
    design = Design(block=config.block, width=config.width)

    def after(stage: int, block: int) -> nn.Module | None:
        if block not in config.places[stage]:
            return None
        channels = design.stage_width(stage)
        norm = nn.BatchNorm2d(channels) if config.block_norm else None
        return NonLocal(
            channels, form=config.form, subsample=config.subsample, scaled=config.scaled, norm=norm
        )

    backbone = ResidualTrunk(
        Stem(config.in_chans, config.width, config.stem, config.pool),
        config.depths,
        design,
        drop_path_rate=config.drop_path_rate,
        after=after,
    )
    head = ClassHead(
        backbone.levels[-1].channels, config.num_classes, pool="mean", dropout=config.drop_rate, start="torch"
    )
    model = Classifier(backbone, head)
    if not skip_on_meta(model):
        init_resnet(model)
    return model


_50, _101 = (3, 4, 6, 3), (3, 4, 23, 3)
_ALL3 = (0, 1, 2, 3)

VARIANTS: dict[str, Config] = {
    #                                               after these blocks of res3 and res4
    "nonlocal_resnet50_1":   Config(depths=_50,  places=((), (),     (4,),                     ())),
    "nonlocal_resnet50_5":   Config(depths=_50,  places=((), (1, 3), (1, 3, 5),                ())),
    "nonlocal_resnet50_10":  Config(depths=_50,  places=((), _ALL3,  (0, 1, 2, 3, 4, 5),       ())),
    "nonlocal_resnet101_1":  Config(depths=_101, places=((), (),     (21,),                    ())),
    "nonlocal_resnet101_5":  Config(depths=_101, places=((), (1, 3), (6, 13, 20),              ())),
    "nonlocal_resnet101_10": Config(depths=_101, places=((), _ALL3,  (2, 6, 10, 14, 18, 22),   ())),
    # Ours, for pictures of 32 pixels: 20 layers, and a non-local block inside the second and third stages.
    "nonlocal_resnet20_32":  Config(depths=(3, 3, 3), block="basic", width=32, places=((), (1,), (1,)), stem="small",
                                    img_size=(32, 32), num_classes=10),
}  # fmt: skip

TINY = Config(img_size=(32, 32), num_classes=5, depths=(1, 2), width=8, places=((), (0,)))

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
