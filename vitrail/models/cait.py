"""CaiT: "Going deeper with Image Transformers" (Touvron et al. 2021, arXiv 2103.17239).

Two stages. In the first, L blocks of talking-heads attention work on the patches alone. In the second, [CLS] comes
in, and two blocks of class attention let it read the patches, which no longer change. A learned factor on every
branch, small at first (layer scale, epsilon), is what lets L grow to 48. Every head is 48 wide, F = 4 D.

Sizes from facebookresearch/deit `cait_models.py`. Numerics: layer norm eps 1e-6, exact GELU. Drop path has the same
rate in every block of the first stage, and none in the second.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vitrail.models.cait_layouts import RENAMES as RENAMES
from vitrail.models.cait_layouts import context as context
from vitrail.models.checks import check_config
from vitrail.models.classifier import Classifier
from vitrail.nn.block import Block
from vitrail.nn.class_attention import ClassAttention, ClassBlock, TalkingHeads
from vitrail.nn.entry import Chain, Patchify, PrefixTokens, patch_grid
from vitrail.nn.heads import ClassHead
from vitrail.nn.init import init_trunc_normal, skip_on_meta
from vitrail.nn.position import LearnedPosition
from vitrail.nn.shapes import Grid, Level
from vitrail.nn.trunk import Stage, Trunk
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing

EPS = 1e-6
"""Added to the variance in every layer norm."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a CaiT's parameters and what it computes."""

    img_size: tuple[int, int] = (224, 224)
    """Rows and columns of the image that positions are made for; other sizes run too."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 1000
    """Logits; 0 leaves the last layer out."""
    patch_size: tuple[int, int] = (16, 16)
    """Rows and columns of a patch, in image pixels."""
    width: int = 192
    """D, numbers a token."""
    depth: int = 24
    """L, blocks of self-attention among the patches."""
    class_depth: int = 2
    """Blocks of class attention."""
    heads: int = 4
    """H, heads of attention; they share the width."""
    hidden: int = 768
    """F, width of the MLPs' inner layer, in both stages."""
    layer_scale: float = 1e-5
    """Epsilon, start value of the factor on each branch: 1e-5 up to 24 blocks, 1e-6 beyond."""
    drop_path_rate: float = 0.0
    """Share of samples that skip a branch of the first stage in training."""
    drop_rate: float = 0.0
    """Dropout after positions, and in MLP and output projection of the first stage's blocks."""
    attn_drop_rate: float = 0.0
    """Dropout on the first stage's attention weights."""

    def __post_init__(self) -> None:
        check_config(self, counts=("width", "depth", "class_depth", "heads", "hidden"))
        patch_grid(self.img_size, self.patch_size)


def build(config: Config) -> Classifier:
    """The network of a configuration, initialised from torch's default generator."""
    width, heads, hidden = config.width, config.heads, config.hidden
    patches = Chain(
        patches=Patchify(config.in_chans, width, config.patch_size),
        positions=LearnedPosition(
            width,
            Grid(*patch_grid(config.img_size, config.patch_size)),
            dropout=config.drop_rate,
            resampling="bicubic-plain",
        ),
    )
    blocks = [
        Block(
            width,
            TalkingHeads(width, heads, attention_dropout=config.attn_drop_rate, dropout=config.drop_rate),
            hidden,
            eps=EPS,
            layer_scale=config.layer_scale,
            drop_path=config.drop_path_rate,
            dropout=config.drop_rate,
        )
        for _ in range(config.depth)
    ]
    class_blocks = [
        ClassBlock(width, ClassAttention(width, heads), hidden, eps=EPS, layer_scale=config.layer_scale)
        for _ in range(config.class_depth)
    ]
    stages = [
        Stage(patches, blocks, shown=False),
        Stage(Chain(prefix=PrefixTokens(width, cls=1)), class_blocks, nn.LayerNorm(width, eps=EPS)),
    ]
    model = Classifier(
        Trunk(stages, [Level(width, config.patch_size[0])]), ClassHead(width, config.num_classes)
    )
    if not skip_on_meta(model):
        init_trunc_normal(model)
    return model


def _cait(width: int, depth: int, epsilon: float, image: int) -> Config:
    return Config(
        img_size=(image, image),
        width=width,
        depth=depth,
        heads=width // 48,
        hidden=4 * width,
        layer_scale=epsilon,
    )


VARIANTS: dict[str, Config] = {
    #                        D    L  epsilon image
    "cait_xxs24_224":  _cait(192, 24, 1e-5, 224),
    "cait_xxs24_384":  _cait(192, 24, 1e-5, 384),
    "cait_xxs36_224":  _cait(192, 36, 1e-5, 224),
    "cait_xxs36_384":  _cait(192, 36, 1e-5, 384),
    "cait_xs24_224":   _cait(288, 24, 1e-5, 224),
    "cait_xs24_384":   _cait(288, 24, 1e-5, 384),
    "cait_xs36_224":   _cait(288, 36, 1e-6, 224),
    "cait_xs36_384":   _cait(288, 36, 1e-6, 384),
    "cait_s24_224":    _cait(384, 24, 1e-5, 224),
    "cait_s24_384":    _cait(384, 24, 1e-5, 384),
    "cait_s36_224":    _cait(384, 36, 1e-6, 224),
    "cait_s36_384":    _cait(384, 36, 1e-6, 384),
    "cait_s48_224":    _cait(384, 48, 1e-6, 224),
    "cait_s48_384":    _cait(384, 48, 1e-6, 384),
    "cait_m24_224":    _cait(768, 24, 1e-5, 224),
    "cait_m24_384":    _cait(768, 24, 1e-5, 384),
    "cait_m36_224":    _cait(768, 36, 1e-6, 224),
    "cait_m36_384":    _cait(768, 36, 1e-6, 384),
    "cait_m48_448":    _cait(768, 48, 1e-6, 448),
    # Ours, for pictures of 32 pixels
    "cait_nano_patch4_32": Config(img_size=(32, 32), patch_size=(4, 4), width=144, depth=6, heads=3, hidden=576,
                                  layer_scale=0.1, num_classes=10),
}  # fmt: skip

TINY = Config(
    img_size=(32, 32), patch_size=(8, 8), width=32, depth=2, class_depth=1, heads=2, hidden=64, layer_scale=0.1,
    num_classes=5,
)  # fmt: skip

CARDS: dict[str, Card] = {
    name: Card(
        architecture=name,
        preprocessing=Preprocessing(
            input_size=config.img_size, mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_pct=1.0
        ),
        notes="Ours, for small pictures; no paper has it." if config.img_size == (32, 32) else "",
    )
    for name, config in VARIANTS.items()
}
