"""Pyramid Vision Transformer: PVT (Wang et al. 2021, 2102.12122) and PVT v2 (2106.13797).

Four stages at strides 4, 8, 16, 32. A stage embeds the patches of the map before it (4 x 4, then 2 x 2) and
runs encoder blocks, whose attention lets every token look at a reduced map: keys and values come from R x R
cells put together, R = 8, 4, 2, 1, so that there are 49 of them in every stage of a 224-pixel image.

    v1        patches side by side; a learned position table in each stage, resampled bilinearly to other
              grids; [CLS] joins in the last stage and is what the head reads.
    v2        patches overlap; no positions and no [CLS], but a depth-wise convolution inside the MLP; a norm
              ends every stage; the head reads the mean.
    v2 li     "linear": keys and values from a map pooled to 7 x 7 in all stages; a ReLU in the MLP.

Numbers as in whai362/PVT: two epsilons, 1e-6 in blocks and last norms, 1e-5 in patch embeddings and reductions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from vitrail.errors import ModelError
from vitrail.models.checks import check_config, check_heads, check_stages
from vitrail.models.classifier import Classifier
from vitrail.models.pvt_layouts import RENAMES as RENAMES
from vitrail.models.pvt_layouts import context as context
from vitrail.nn.block import Block, drop_path_rates
from vitrail.nn.downsample import OverlapPatch
from vitrail.nn.entry import Chain, Patchify, PrefixTokens
from vitrail.nn.heads import ClassHead
from vitrail.nn.init import init_pvt_v2, init_trunc_normal, skip_on_meta
from vitrail.nn.position import LearnedPosition
from vitrail.nn.reduction import ConvMlp, SpatialReduction
from vitrail.nn.shapes import Grid, Level
from vitrail.nn.trunk import Stage, Trunk
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a PVT's parameters and what it computes."""

    img_size: tuple[int, int] = (224, 224)
    """Rows and columns of the image that v1's positions are made for; other sizes run too."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 1000
    """Logits; 0 leaves the last layer out."""
    version: Literal[1, 2] = 2
    """PVT or PVT v2."""
    linear: bool = False
    """Attention to a map pooled to 7 x 7 (v2 only)."""
    patch_size: int = 4
    """Stride of the first stage in image pixels; each later stage halves the map."""
    widths: tuple[int, ...] = (64, 128, 320, 512)
    """D of each stage."""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of each stage."""
    heads: tuple[int, ...] = (1, 2, 5, 8)
    """Heads of each stage."""
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    """Width of the MLP's inner layer over D, in each stage."""
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    """R of each stage: keys and values come from a map R times smaller a side."""
    drop_path_rate: float = 0.0
    """Share of samples that skip the last block's branches in training; falls evenly to 0 at the first block."""
    drop_rate: float = 0.0
    """Dropout after positions and in every block's MLP and output projection."""
    attn_drop_rate: float = 0.0
    """Dropout on attention weights."""
    eps: float = 1e-6
    """Added to the variance in the norms of blocks and at the end of stages."""
    entry_eps: float = 1e-5
    """The same in patch embeddings and reductions (transformers' PVT has 1e-6 there)."""

    def __post_init__(self) -> None:
        _check(self)


def _check(config: Config) -> None:
    """Refuse combinations that mean nothing, saying what is legal."""
    stages = len(config.widths)
    check_config(config, ())
    check_stages(config, stages, dict.fromkeys(("widths", "depths", "heads", "mlp_ratios", "reductions"), 1))
    check_heads(config.widths, config.heads)
    if config.version == 1 and config.linear:
        raise ModelError("linear=True belongs to version=2; PVT v1 has no such attention.")
    if config.version == 1 and config.reductions[-1] != 1:
        raise ModelError(
            f"PVT v1 has [CLS] in its last stage, whose reduction must be 1; got {config.reductions}."
        )
    if config.version == 1 and min(position_grid(config, stages - 1)) < 1:
        smallest = config.patch_size * 2 ** (stages - 1)
        raise ModelError(
            f"img_size must be at least {smallest} a side for {stages} stages; got {config.img_size}."
        )


def position_grid(config: Config, stage: int) -> Grid:
    """The grid that v1's position table of a stage is made for."""
    rows, columns = (size // config.patch_size >> stage for size in config.img_size)
    return Grid(rows, columns)


def build(config: Config) -> Classifier:
    """The network of a configuration, initialised from torch's default generator."""
    rates = iter(drop_path_rates(config.drop_path_rate, sum(config.depths)))
    stages = []
    for number, depth in enumerate(config.depths):
        blocks = [_block(config, number, next(rates)) for _ in range(depth)]
        last = number == len(config.depths) - 1
        norm = nn.LayerNorm(config.widths[number], eps=config.eps) if last or config.version == 2 else None
        # v1's last norm belongs to the classifier: as a feature map, the last stage stands before it
        taps = [depth - 1] if last and config.version == 1 else []
        stages.append(Stage(_entry(config, number), blocks, norm, taps))
    levels = [Level(width, config.patch_size * 2**number) for number, width in enumerate(config.widths)]
    head = ClassHead(config.widths[-1], config.num_classes, pool="token" if config.version == 1 else "mean")
    model = Classifier(Trunk(stages, levels), head)
    if not skip_on_meta(model):
        init_trunc_normal(model) if config.version == 1 else init_pvt_v2(model)
    return model


def _entry(config: Config, number: int) -> nn.Module:
    """What stands before the blocks of a stage: patches, and v1's [CLS] and positions."""
    channels = config.widths[number - 1] if number else config.in_chans
    width, stride = config.widths[number], 2 if number else config.patch_size
    norm = nn.LayerNorm(width, eps=config.entry_eps)
    if config.version == 2:
        kernel = 2 * stride - 1  # 7 x 7 at stride 4, 3 x 3 at stride 2
        return Chain(patches=OverlapPatch(channels, width, kernel, stride, kernel // 2, norm))
    last = number == len(config.widths) - 1
    parts: dict[str, nn.Module] = {
        "patches": Patchify(channels, width, (stride, stride), norm=norm, rest="drop")
    }
    if last:
        parts["prefix"] = PrefixTokens(width, cls=1)
    parts["positions"] = LearnedPosition(
        width, position_grid(config, number), int(last), config.drop_rate, resampling="bilinear-plain"
    )
    return Chain(**parts)


def _block(config: Config, number: int, drop_path: float) -> Block:
    width, hidden = config.widths[number], config.widths[number] * config.mlp_ratios[number]
    mixer = SpatialReduction(
        width,
        config.heads[number],
        "pool" if config.linear else config.reductions[number],
        norm_eps=config.entry_eps,
        attention_dropout=config.attn_drop_rate,
        dropout=config.drop_rate,
    )
    mlp = (
        ConvMlp(width, hidden, relu=config.linear, dropout=config.drop_rate)
        if config.version == 2
        else hidden
    )
    return Block(width, mixer, mlp, eps=config.eps, drop_path=drop_path, dropout=config.drop_rate)


_WIDE = (64, 128, 320, 512)

VARIANTS: dict[str, Config] = {
    #                                     D                           L
    "pvt_tiny":     Config(version=1, widths=_WIDE,                depths=(2, 2, 2, 2)),
    "pvt_small":    Config(version=1, widths=_WIDE,                depths=(3, 4, 6, 3)),
    "pvt_medium":   Config(version=1, widths=_WIDE,                depths=(3, 4, 18, 3)),
    "pvt_large":    Config(version=1, widths=_WIDE,                depths=(3, 8, 27, 3)),
    "pvt_huge_v2":  Config(version=1, widths=(128, 256, 512, 768), depths=(3, 10, 60, 3), heads=(2, 4, 8, 12)),
    "pvt_v2_b0":    Config(version=2, widths=(32, 64, 160, 256),   depths=(2, 2, 2, 2)),
    "pvt_v2_b1":    Config(version=2, widths=_WIDE,                depths=(2, 2, 2, 2)),
    "pvt_v2_b2":    Config(version=2, widths=_WIDE,                depths=(3, 4, 6, 3)),
    "pvt_v2_b2_li": Config(version=2, widths=_WIDE,                depths=(3, 4, 6, 3), linear=True),
    "pvt_v2_b3":    Config(version=2, widths=_WIDE,                depths=(3, 4, 18, 3)),
    "pvt_v2_b4":    Config(version=2, widths=_WIDE,                depths=(3, 8, 27, 3)),
    "pvt_v2_b5":    Config(version=2, widths=_WIDE,                depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
    # Ours, for pictures of 32 pixels: the first stride is 2, and three stages end at a 4 x 4 map.
    "pvt_v2_nano_32": Config(version=2, img_size=(32, 32), num_classes=10, patch_size=2, widths=(48, 96, 192),
                             depths=(2, 2, 2), heads=(1, 2, 4), mlp_ratios=(4, 4, 4), reductions=(4, 2, 1)),
}  # fmt: skip

TINY = Config(
    version=2, img_size=(32, 32), num_classes=5, widths=(16, 32), depths=(1, 2), heads=(1, 2), mlp_ratios=(2, 2),
    reductions=(4, 2),
)  # fmt: skip

CARDS: dict[str, Card] = {
    name: Card(
        architecture=name,
        preprocessing=Preprocessing(
            input_size=config.img_size,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            crop_pct=1.0 if config.img_size[0] == 32 else 0.875,
        ),
        notes="The authors evaluate with a crop of 0.875, timm with 0.9 (up to 0.2 points of accuracy apart).",
    )
    for name, config in VARIANTS.items()
}
