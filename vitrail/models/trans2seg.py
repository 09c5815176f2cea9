"""Trans2Seg: "Segmenting Transparent Object in the Wild with Transformer" (Xie et al. 2021, arXiv 2101.08461).

A ResNet whose last stage dilates gives maps at strides 4 and 16. The coarse one becomes tokens, with a class token
that nothing reads; an encoder attends over them; a decoder holds one learned query for each class, and its attention
scores are that class's maps. A small convolutional head reads the encoder's map beside one class's maps, with the
fine map for detail, and gives the logits of that class (nn.class_queries).

The published networks are made for 512 x 512: their last MLP works along the 32 x 32 places of the map. At another
size ours brings the maps to that grid and back. Parts that never get a gradient in the released code (the MLPs of
all decoder layers' maps but the last's, and what the last layer does to queries and tokens) are left out. `clean`
networks are for any size alike and load no published file. Numerics: layer norm eps 1e-5, no bias in queries, keys
and values, corners aligned in every resizing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vitrail.models.backbones import backbone
from vitrail.models.checks import check_config
from vitrail.models.segmenter import Segmenter
from vitrail.models.trans2seg_layouts import RENAMES as RENAMES
from vitrail.models.trans2seg_layouts import context as context
from vitrail.nn.attention import Attention
from vitrail.nn.block import Block, drop_path_rates
from vitrail.nn.class_queries import ClassQueryHead, Numerics
from vitrail.nn.entry import Chain, Patchify, PrefixTokens
from vitrail.nn.init import init_trans2seg, skip_on_meta
from vitrail.nn.position import LearnedPosition
from vitrail.nn.shapes import Grid
from vitrail.nn.trunk import Stage
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing

TASK = "image-segmentation"

EPS = 1e-5
"""Added to the variance in every layer norm."""

MEANING = ("numerics",)
"""Fields that change what the same tensors compute."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a Trans2Seg's parameters and what it computes."""

    img_size: tuple[int, int] = (512, 512)
    """Rows and columns of the image that positions are made for; other sizes run too."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 12
    """Classes of a pixel: the decoder's queries."""
    backbone: str = "resnet50"
    """A classification variant whose first and last maps are read."""
    backbone_changes: Mapping[str, Any] = field(default_factory=lambda: {"stem": "deep", "dilated": 1})
    """Fields of the backbone's Config that differ from the variant's: three 3 x 3 for a stem, stride 16."""
    width: int = 256
    """E, width of the transformer."""
    depth: int = 4
    """Layers of the encoder, and of the decoder."""
    heads: int = 8
    """Heads of attention; as many maps has each class."""
    mlp_ratio: int = 3
    """Inner width of every MLP over its outer width."""
    head_width: int = 64
    """Channels of the convolutional head."""
    numerics: Numerics = "published"
    """What the released code computes, or "clean": residuals and heads as drawn, no MLP along a fixed grid."""
    auxiliary_weight: float = 0.0
    """There are no auxiliary heads."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the encoder."""
    drop_rate: float = 0.0
    """Dropout in the encoder."""
    attn_drop_rate: float = 0.0
    """Dropout on the encoder's attention weights."""

    def __post_init__(self) -> None:
        check_config(self, ("num_classes", "width", "depth", "heads", "mlp_ratio", "head_width"))


def build(config: Config) -> Segmenter:
    """The network of a configuration, initialised from torch's default generator."""
    chosen = backbone(config.backbone, config.in_chans, **config.backbone_changes)
    last = chosen.levels[-1]
    grid = Grid(-(-config.img_size[0] // last.stride), -(-config.img_size[1] // last.stride))
    head = ClassQueryHead(
        chosen.levels, config.num_classes, _encoder(config, last.channels, grid), config.width, config.depth,
        config.heads, config.mlp_ratio, inner=config.head_width, numerics=config.numerics, grid=grid, eps=EPS,
    )  # fmt: skip
    model = Segmenter(chosen, head)
    if not skip_on_meta(model):
        init_trans2seg(model)
    return model


def _encoder(config: Config, channels: int, grid: Grid) -> Stage:
    width = config.width
    blocks = [
        Block(
            width,
            Attention(
                width,
                config.heads,
                qkv_bias=False,
                attention_dropout=config.attn_drop_rate,
                dropout=config.drop_rate,
            ),
            config.mlp_ratio * width,
            eps=EPS,
            drop_path=rate,
            dropout=config.drop_rate,
        )
        for rate in drop_path_rates(config.drop_path_rate, config.depth)
    ]
    entry = Chain(
        patches=Patchify(channels, width, (1, 1)),
        prefix=PrefixTokens(width, cls=1),
        positions=LearnedPosition(
            width, grid, prefix=1, dropout=config.drop_rate, resampling="bilinear-corners"
        ),
    )
    return Stage(entry, blocks, nn.LayerNorm(width, eps=EPS))


VARIANTS: dict[str, Config] = {
    #                                  E    layers    heads     MLP          head
    "trans2seg_small":  Config(width=128, depth=1,  heads=4,  mlp_ratio=2, head_width=32),
    "trans2seg_medium": Config(width=256, depth=4,  heads=8,  mlp_ratio=3, head_width=64),
    "trans2seg_large":  Config(width=768, depth=12, heads=16, mlp_ratio=4, head_width=128),
    "trans2seg_medium_clean": Config(width=256, depth=4, heads=8, mlp_ratio=3, head_width=64, numerics="clean"),
    # Ours, for a CPU and few pictures: ResNet-18 half as wide, two layers, 3:4 street scenes.
    "trans2seg_nano": Config(
        img_size=(192, 256), num_classes=11, backbone="resnet18", backbone_changes={"width": 32, "dilated": 1},
        width=96, depth=2, heads=4, mlp_ratio=2, head_width=32, numerics="clean",
    ),
}  # fmt: skip

TINY = Config(
    img_size=(64, 64), num_classes=5, backbone="resnet18", width=16, depth=2, heads=2, mlp_ratio=2, head_width=8,
    backbone_changes={"width": 8, "depths": [1, 1, 1, 1], "dilated": 1},
)  # fmt: skip

CARDS: dict[str, Card] = {
    name: Card(
        architecture=name,
        task=TASK,
        preprocessing=Preprocessing(
            input_size=config.img_size,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            interpolation="bilinear",
            crop_pct=1.0,
            crop_mode="squash",
        ),
    )
    for name, config in VARIANTS.items()
}
