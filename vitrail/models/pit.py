"""PiT: "Rethinking Spatial Dimensions of Vision Transformers" (Heo et al. 2021, arXiv 2103.16302).

A ViT in three stages whose map shrinks and whose width grows on the way, as in a convolutional network. The
stem's patches overlap by half and are not padded; positions are added to the map; [CLS] (and a distillation
token) goes in front. Between stages a depth-wise convolution of stride 2 halves the map and doubles the width,
and a linear layer does the same for the tokens in front. Heads keep their width, and their number doubles. The
last norm sees the tokens in front alone; with distillation two heads read one token each, and their logits are
averaged.

Numbers as in naver-ai/pit; layer norm eps 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vitrail.errors import ModelError
from vitrail.models.checks import check_config, check_stages
from vitrail.models.classifier import Classifier
from vitrail.models.pit_layouts import RENAMES as RENAMES
from vitrail.models.pit_layouts import context as context
from vitrail.nn.attention import Attention
from vitrail.nn.block import Block, drop_path_rates
from vitrail.nn.downsample import ConvPool, OverlapPatch, conv_cells
from vitrail.nn.entry import Chain, PrefixTokens
from vitrail.nn.heads import ClassHead, DistilledHead
from vitrail.nn.init import init_pit, skip_on_meta
from vitrail.nn.position import LearnedPosition
from vitrail.nn.shapes import Grid, Level
from vitrail.nn.trunk import Stage, Trunk
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a PiT's parameters and what it computes."""

    img_size: tuple[int, int] = (224, 224)
    """Rows and columns of the image that positions are made for; other sizes run too."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 1000
    """Logits; 0 leaves the last layer out."""
    distilled: bool = False
    """Whether a distillation token and its head stand beside [CLS]."""
    patch_size: int = 16
    """Side of a patch in image pixels."""
    stride: int = 8
    """Image pixels from one patch to the next."""
    head_width: int = 48
    """Width of a head, the same in all stages; a stage's width is this times its heads."""
    heads: tuple[int, ...] = (3, 6, 12)
    """Heads of each stage; each has twice those of the one before."""
    depths: tuple[int, ...] = (2, 6, 4)
    """Blocks of each stage."""
    mlp_ratio: int = 4
    """Width of the MLP's inner layer over the stage's width."""
    drop_path_rate: float = 0.0
    """Share of samples that skip a block's branches in training: this rate times block number over block count."""
    drop_rate: float = 0.0
    """Dropout after positions and in every block's MLP and output projection."""
    attn_drop_rate: float = 0.0
    """Dropout on attention weights."""
    eps: float = 1e-6
    """Added to the variance in every layer norm."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def grid(self) -> Grid:
        """The first stage's grid at the configured image size."""
        rows, columns = (conv_cells(size, self.patch_size, self.stride) for size in self.img_size)
        return Grid(rows, columns)


def _check(config: Config) -> None:
    """Refuse combinations that mean nothing, saying what is legal."""
    check_config(config, ("stride", "head_width", "mlp_ratio"))
    check_stages(config, len(config.depths), {"depths": 1, "heads": 1})
    for before, after in zip(config.heads, config.heads[1:], strict=False):
        if after % before:
            raise ModelError(
                f"A stage's heads must be a multiple of those before it (the pooling); got {config.heads}."
            )
    if min(config.img_size) < config.patch_size:
        raise ModelError(f"img_size must be at least the patch, {config.patch_size}; got {config.img_size}.")


def build(config: Config) -> Classifier:
    """The network of a configuration, initialised from torch's default generator."""
    count = sum(config.depths)
    rates = iter(drop_path_rates(config.drop_path_rate * (count - 1) / count, count))
    widths = [config.head_width * heads for heads in config.heads]
    stages, levels = [], []
    for number, (width, depth) in enumerate(zip(widths, config.depths, strict=True)):
        entry = ConvPool(widths[number - 1], width) if number else _stem(config, width)
        blocks = [_block(config, width, config.heads[number], next(rates)) for _ in range(depth)]
        stages.append(Stage(entry, blocks))
        levels.append(Level(width, config.stride * 2**number))
    norm = nn.LayerNorm(widths[-1], eps=config.eps)
    head: ClassHead | DistilledHead
    if config.distilled:
        head = DistilledHead(widths[-1], config.num_classes, norm=norm, start="torch")
    else:
        head = ClassHead(widths[-1], config.num_classes, norm=norm, start="torch")
    model = Classifier(Trunk(stages, levels), head)
    if not skip_on_meta(model):
        init_pit(model)
    return model


def _stem(config: Config, width: int) -> Chain:
    return Chain(
        patches=OverlapPatch(config.in_chans, width, config.patch_size, config.stride),
        positions=LearnedPosition(width, config.grid, dropout=config.drop_rate, resampling="bicubic-plain"),
        prefix=PrefixTokens(width, tokens=1 + config.distilled),
    )


def _block(config: Config, width: int, heads: int, drop_path: float) -> Block:
    mixer = Attention(width, heads, attention_dropout=config.attn_drop_rate, dropout=config.drop_rate)
    return Block(
        width, mixer, config.mlp_ratio * width, eps=config.eps, drop_path=drop_path, dropout=config.drop_rate
    )


_SIZES = {
    #       patch  stride  d   heads       depths
    "ti": (16,     8,      32, (2, 4, 8),  (2, 6, 4)),
    "xs": (16,     8,      48, (2, 4, 8),  (2, 6, 4)),
    "s":  (16,     8,      48, (3, 6, 12), (2, 6, 4)),
    "b":  (14,     7,      64, (4, 8, 16), (3, 6, 4)),
}  # fmt: skip


def _pit(size: str, distilled: bool = False) -> Config:
    patch, stride, head_width, heads, depths = _SIZES[size]
    return Config(
        patch_size=patch,
        stride=stride,
        head_width=head_width,
        heads=heads,
        depths=depths,
        distilled=distilled,
    )


VARIANTS: dict[str, Config] = {
    "pit_ti_224":           _pit("ti"),
    "pit_xs_224":           _pit("xs"),
    "pit_s_224":            _pit("s"),
    "pit_b_224":            _pit("b"),
    "pit_ti_distilled_224": _pit("ti", distilled=True),
    "pit_xs_distilled_224": _pit("xs", distilled=True),
    "pit_s_distilled_224":  _pit("s",  distilled=True),
    "pit_b_distilled_224":  _pit("b",  distilled=True),
    # Ours, for pictures of 32 pixels: maps of 15 x 15, 8 x 8 and 4 x 4 tokens.
    "pit_nano_32":          Config(img_size=(32, 32), num_classes=10, patch_size=4, stride=2, head_width=32,
                                   heads=(2, 4, 8), depths=(2, 4, 2), mlp_ratio=2),
}  # fmt: skip

TINY = Config(
    img_size=(32, 32), num_classes=5, distilled=True, patch_size=8, stride=4, head_width=8, heads=(1, 2),
    depths=(1, 2), mlp_ratio=2,
)  # fmt: skip

CARDS: dict[str, Card] = {
    name: Card(
        architecture=name,
        preprocessing=Preprocessing(
            input_size=config.img_size,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            crop_pct=1.0 if config.img_size[0] == 32 else 0.9,
        ),
    )
    for name, config in VARIANTS.items()
}
