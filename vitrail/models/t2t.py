"""T2T-ViT: "Tokens-to-Token ViT" (Yuan et al. 2021, arXiv 2101.11986).

Tokens are made in steps. A soft split cuts the map into windows that overlap, each window becoming one long token; a
narrow attention (64 wide, one head, without positions) mixes them; the tokens are a map again, four times smaller,
and the next soft split follows. Three splits (7/4, 3/2, 3/2) with two attentions between them give 14 x 14 tokens
that know their neighbourhood. [CLS] and a sinusoid over the sequence join, and a deep, narrow ViT reads them.

The narrow attention is a Performer (`t2t_vit_*`) or softmax attention (`t2t_vit_t_*`). Its width changes from 147 or
576 to 64, so the residual around it is the values. Sizes and quirks from yitu-opensource/T2T-ViT `models/*.py`: layer
norm eps 1e-5, no bias on q, k, v in the backbone, softmax scaled by the width of the *input* token in the narrow
attention, dropout 0.1 fixed in the Performer. The sinusoid and the random features are stored, not trained; the
paper's counts include them. `resnext`, `wide`, `se`, `ghost` and `dense` are the paper's comparisons (section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from vitrail.errors import ModelError
from vitrail.models.checks import check_config
from vitrail.models.classifier import Classifier
from vitrail.models.t2t_layouts import RENAMES as RENAMES
from vitrail.models.t2t_layouts import context as context
from vitrail.models.t2t_layouts import token_grid
from vitrail.nn.attention import Attention
from vitrail.nn.block import Block, Mlp, drop_path_rates
from vitrail.nn.entry import Chain, PrefixTokens, SoftSplit
from vitrail.nn.heads import ClassHead
from vitrail.nn.init import init_trunc_normal, skip_on_meta
from vitrail.nn.performer import T2T_KERNEL, RandomFeatures
from vitrail.nn.position import LearnedPosition, sincos_1d
from vitrail.nn.shapes import Level
from vitrail.nn.t2t_blocks import DenseBlock, GatedAttention, GhostAttention, GhostMlp, Transition
from vitrail.nn.trunk import Stage, Trunk
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing

AVERAGED = True
"""The published files hold the last weights and their average; the scores are those of the average."""

EPS = 1e-5
"""Added to the variance in every layer norm."""

Split = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a T2T-ViT's parameters and what it computes."""

    img_size: tuple[int, int] = (224, 224)
    """Rows and columns of the image that positions are made for; other sizes run too."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 1000
    """Logits; 0 leaves the last layer out."""
    splits: tuple[Split, Split, Split] = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
    """Kernel, stride and padding of each soft split."""
    tokens: Literal["performer", "transformer"] = "performer"
    """The attention between the splits."""
    token_width: int = 64
    """Width of that attention and of its MLP."""
    token_features: int = 32
    """Random features of the Performer."""
    token_drop_rate: float = 0.1
    """Dropout in the Performer, after its projection and its MLP; the paper's code fixes 0.1."""
    width: int = 384
    """D, numbers a token of the backbone (where a dense backbone begins)."""
    depth: int = 14
    """L, blocks of the backbone."""
    heads: int = 6
    """H, heads of attention; they share the width."""
    hidden: int = 1152
    """F, width of the MLP's inner layer."""
    scale: float | None = None
    """Factor on q·k; none is the head's width to the power -1/2."""
    block: Literal["plain", "se", "ghost", "dense"] = "plain"
    """What the backbone borrows from convolutional networks."""
    growth: int = 0
    """Channels that a dense block adds."""
    dense_depths: tuple[int, ...] = ()
    """Blocks between the transitions of a dense backbone; together they are the depth."""
    drop_path_rate: float = 0.0
    """Share of samples that skip the last block's branches in training; falls evenly to 0 at the first block."""
    drop_rate: float = 0.0
    """Dropout after positions and in the backbone's MLPs and output projections."""
    attn_drop_rate: float = 0.0
    """Dropout on the backbone's attention weights."""

    def __post_init__(self) -> None:
        check_config(self, counts=("width", "depth", "heads", "hidden", "token_width", "token_features"))
        if any(kernel < 1 or stride < 1 or padding < 0 for kernel, stride, padding in self.splits):
            raise ModelError(
                f"A split is (kernel from 1, stride from 1, padding from 0); got splits {self.splits}."
            )
        if min(token_grid(self)) < 1:
            raise ModelError(f"An image of {self.img_size} is too small for the splits {self.splits}.")
        dense = self.block == "dense"
        if (
            dense != bool(self.dense_depths)
            or dense != (self.growth > 0)
            or (dense and sum(self.dense_depths) != self.depth)
        ):
            raise ModelError(
                "block='dense' goes with growth from 1 and dense_depths that sum to the depth, other blocks with"
                f" neither; got block={self.block!r}, growth {self.growth}, dense_depths {self.dense_depths}."
            )
        if self.block == "ghost" and (self.hidden != 3 * self.width or self.width % 2):
            raise ModelError(
                "block='ghost' needs an even width and hidden = 3 x width;"
                f" got width {self.width}, hidden {self.hidden}."
            )


def build(config: Config) -> Classifier:
    """The network of a configuration, initialised from torch's default generator."""
    stages, levels = [], []
    channels, stride = config.in_chans, 1
    for split in config.splits[:-1]:
        entry = SoftSplit(channels, *split)
        stages.append(Stage(entry, [_token_block(config, entry.width)]))
        channels, stride = config.token_width, stride * split[1]
        levels.append(Level(channels, stride))
    blocks, last_width = _backbone(config)
    levels.append(Level(last_width, stride * config.splits[-1][1]))
    stages.append(Stage(_last_entry(config, channels), blocks, nn.LayerNorm(last_width, eps=EPS)))
    model = Classifier(Trunk(stages, levels), ClassHead(last_width, config.num_classes))
    if not skip_on_meta(model):
        init_trunc_normal(model)
    return model


def _token_block(config: Config, width: int) -> Block:
    """The narrow attention: from the width of a window to the token width, the values being the skip."""
    inner = config.token_width
    if config.tokens == "transformer":
        attention = Attention(width, 1, inner=inner, scale=width**-0.5, qkv_bias=False, value_skip=True)
        return Block(width, attention, inner, out=inner, eps=EPS)
    performer = RandomFeatures(
        width, 1, features=config.token_features, kernel=T2T_KERNEL, lengths="features", inner=inner,
        value_skip=True, dropout=config.token_drop_rate,
    )  # fmt: skip
    return Block(
        width, performer, Mlp(inner, inner, dropout=(0.0, config.token_drop_rate)), out=inner, eps=EPS
    )


def _last_entry(config: Config, channels: int) -> Chain:
    """The last soft split with its projection, [CLS], and the sinusoid, which counts [CLS] as position 0."""
    grid = token_grid(config)
    return Chain(
        patches=SoftSplit(channels, *config.splits[-1], width=config.width),
        prefix=PrefixTokens(config.width, cls=1),
        positions=LearnedPosition(
            config.width,
            grid,
            prefix=1,
            dropout=config.drop_rate,
            frozen=sincos_1d(1 + grid.size, config.width),
            resampling="bicubic-plain",
        ),
    )


def _backbone(config: Config) -> tuple[list[nn.Module], int]:
    """The blocks, and the width after the last of them."""
    if config.block == "dense":
        return _dense_backbone(config)
    mixers = {"plain": Attention, "se": GatedAttention, "ghost": GhostAttention}
    blocks: list[nn.Module] = [
        Block(
            config.width,
            mixers[config.block](config.width, config.heads, **_attention_options(config)),
            GhostMlp(config.width, config.drop_rate) if config.block == "ghost" else config.hidden,
            eps=EPS,
            drop_path=rate,
            dropout=config.drop_rate,
        )
        for rate in drop_path_rates(config.drop_path_rate, config.depth)
    ]
    return blocks, config.width


def _dense_backbone(config: Config) -> tuple[list[nn.Module], int]:
    """Blocks that grow by `growth` each, with a transition to half the width between the stages."""
    blocks: list[nn.Module] = []
    width, ratio = config.width, config.hidden / config.width
    # The original code's slip, kept: twelve rates, read by the number of the stage.
    rates = drop_path_rates(config.drop_path_rate, 12)
    for number, count in enumerate(config.dense_depths):
        if number:
            blocks.append(Transition(width))
            width //= 2
        for _ in range(count):
            mixer = Attention(width, config.heads, **_attention_options(config))
            options = {"eps": EPS, "drop_path": rates[number], "dropout": config.drop_rate}
            blocks.append(DenseBlock(width, config.growth, mixer, int(width * ratio), **options))
            width += config.growth
    return blocks, width


def _attention_options(config: Config) -> dict[str, Any]:
    return {
        "qkv_bias": False,
        "scale": config.scale,
        "attention_dropout": config.attn_drop_rate,
        "dropout": config.drop_rate,
    }


def _t2t(
    width: int,
    depth: int,
    heads: int,
    ratio: int,
    tokens: Literal["performer", "transformer"] = "performer",
    image: int = 224,
    **changes: Any,
) -> Config:
    return Config(
        img_size=(image, image),
        width=width,
        depth=depth,
        heads=heads,
        hidden=ratio * width,
        tokens=tokens,
        **changes,
    )


VARIANTS: dict[str, Config] = {
    #                           D    L   H F/D
    "t2t_vit_7":          _t2t(256,  7,  4, 2),
    "t2t_vit_10":         _t2t(256, 10,  4, 2),
    "t2t_vit_12":         _t2t(256, 12,  4, 2),
    "t2t_vit_14":         _t2t(384, 14,  6, 3),
    "t2t_vit_14_384":     _t2t(384, 14,  6, 3, image=384),
    "t2t_vit_19":         _t2t(448, 19,  7, 3),
    "t2t_vit_24":         _t2t(512, 24,  8, 3),
    "t2t_vit_t_14":       _t2t(384, 14,  6, 3, "transformer"),
    "t2t_vit_t_19":       _t2t(448, 19,  7, 3, "transformer"),
    "t2t_vit_t_24":       _t2t(512, 24,  8, 3, "transformer"),
    "t2t_vit_14_resnext": _t2t(384, 14, 32, 3),
    "t2t_vit_14_wide":    _t2t(768,  4, 12, 3),
    "t2t_vit_14_se":      _t2t(384, 14,  6, 3, block="se"),
    "t2t_vit_16_ghost":   _t2t(384, 16,  6, 3, block="ghost"),
    "t2t_vit_dense":      _t2t(128, 19,  8, 2, block="dense", growth=64, dense_depths=(3, 6, 6, 4)),
    # Ours, for pictures of 32 pixels: the first split keeps every pixel a token
    "t2t_nano_32":        _t2t(128,  6,  4, 2, image=32, splits=((3, 1, 1), (3, 2, 1), (3, 2, 1)), num_classes=10),
}  # fmt: skip

TINY = Config(
    img_size=(32, 32), width=32, depth=2, heads=2, hidden=64, token_width=16, token_features=8, num_classes=5
)

CARDS: dict[str, Card] = {
    name: Card(
        architecture=name,
        preprocessing=Preprocessing(
            input_size=config.img_size,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            crop_pct=1.0 if config.img_size == (32, 32) else 0.9,
        ),
        notes="Ours, for small pictures; no paper has it." if config.img_size == (32, 32) else "",
    )
    for name, config in VARIANTS.items()
}
