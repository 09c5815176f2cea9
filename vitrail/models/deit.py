"""DeiT and DeiT III (Touvron et al. 2021, arXiv 2012.12877; 2022, 2204.07118): ViTs that learn from ImageNet-1k alone.

DeiT is the ViT: patches of 16, [CLS] in front, a position for every token, twelve pre-norm blocks. Its distilled
form has a second token beside [CLS], which learns from a teacher what [CLS] learns from the labels; each has a
linear head, and at the end their logits are averaged. DeiT III adds positions to the patches alone, before [CLS],
puts a learned factor on every branch (layer scale) and drops branches at the same rate in every block. "Three
things everyone should know about ViTs" (2203.09795) adds blocks in parallel and the hMLP stem.

Sizes from facebookresearch/deit `models.py` and `models_v2.py`, whose layer scale starts at 1e-4 (timm: 1e-6).
Numerics: layer norm eps 1e-6, exact GELU, F = 4 D everywhere, also in giant and Giant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from vitrail.errors import ModelError
from vitrail.models.checks import check_config
from vitrail.models.classifier import Classifier
from vitrail.models.deit_layouts import RENAMES as RENAMES
from vitrail.models.deit_layouts import context as context
from vitrail.nn.attention import Attention
from vitrail.nn.block import Block, ParallelBlock, drop_path_rates
from vitrail.nn.entry import Chain, MlpStem, Patchify, PrefixTokens, patch_grid
from vitrail.nn.heads import ClassHead, DistilledHead
from vitrail.nn.init import init_trunc_normal, skip_on_meta
from vitrail.nn.position import LearnedPosition
from vitrail.nn.shapes import Grid, Level
from vitrail.nn.trunk import Stage, Trunk
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing

EPS = 1e-6
"""Added to the variance in every layer norm."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a DeiT's parameters and what it computes."""

    img_size: tuple[int, int] = (224, 224)
    """Rows and columns of the image that positions are made for; other sizes run too."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 1000
    """Logits; 0 leaves the last layers out."""
    patch_size: tuple[int, int] = (16, 16)
    """Rows and columns of a patch, in image pixels."""
    width: int = 384
    """D, numbers a token."""
    depth: int = 12
    """L, blocks."""
    heads: int = 6
    """H, heads of attention; they share the width."""
    hidden: int = 1536
    """F, width of the MLP's inner layer."""
    distilled: bool = False
    """Whether a distillation token stands beside [CLS], with a head of its own."""
    position_on_prefix: bool = True
    """Whether [CLS] has a position (DeiT); if not, positions are added to the patches alone (DeiT III)."""
    layer_scale: float | None = None
    """Start value of a learned factor on each branch (DeiT III); none leaves it out."""
    parallel: int = 1
    """Mixers, and MLPs, side by side in a block ("Three things")."""
    stem: Literal["patch", "hmlp"] = "patch"
    """What projects patches: one linear map, or the hMLP, whose patch is 16."""
    drop_path_rate: float = 0.0
    """Share of samples that skip a branch in training."""
    drop_path_shape: Literal["linear", "constant"] = "linear"
    """Whether the rate rises from 0 to its value with depth (DeiT), or is the same everywhere (DeiT III)."""
    drop_rate: float = 0.0
    """Dropout after positions and in every block's MLP and output projection."""
    attn_drop_rate: float = 0.0
    """Dropout on attention weights."""

    def __post_init__(self) -> None:
        check_config(self, counts=("width", "depth", "heads", "hidden", "parallel"))
        if self.stem == "hmlp" and (self.patch_size != (16, 16) or self.width % 4):
            raise ModelError(
                "The hMLP stem needs patches of 16 x 16 and a width that 4 divides;"
                f" got {self.patch_size} and {self.width}."
            )
        patch_grid(self.img_size, self.patch_size)


def build(config: Config) -> Classifier:
    """The network of a configuration, initialised from torch's default generator."""
    rates = drop_path_rates(config.drop_path_rate, config.depth, config.drop_path_shape)
    stage = Stage(
        _entry(config), [_block(config, rate) for rate in rates], nn.LayerNorm(config.width, eps=EPS)
    )
    head: ClassHead | DistilledHead = (DistilledHead if config.distilled else ClassHead)(
        config.width, config.num_classes
    )
    model = Classifier(Trunk([stage], [Level(config.width, config.patch_size[0])]), head)
    if not skip_on_meta(model):
        init_trunc_normal(model)
    return model


def _entry(config: Config) -> Chain:
    """Patches, then prefix and positions: positions last in DeiT, first in DeiT III."""
    width, grid = config.width, Grid(*patch_grid(config.img_size, config.patch_size))
    hmlp = config.stem == "hmlp"
    patches = MlpStem(config.in_chans, width) if hmlp else Patchify(config.in_chans, width, config.patch_size)
    prefix = PrefixTokens(width, cls=1, distillation=1) if config.distilled else PrefixTokens(width, cls=1)
    if config.position_on_prefix:
        positions = LearnedPosition(
            width, grid, len(prefix.names), config.drop_rate, resampling="bicubic-plain"
        )
        return Chain(patches=patches, prefix=prefix, positions=positions)
    positions = LearnedPosition(width, grid, dropout=config.drop_rate, resampling="bicubic-plain")
    return Chain(patches=patches, positions=positions, prefix=prefix)


def _block(config: Config, drop_path: float) -> Block | ParallelBlock:
    mixers = [
        Attention(
            config.width, config.heads, attention_dropout=config.attn_drop_rate, dropout=config.drop_rate
        )
        for _ in range(config.parallel)
    ]
    common: dict[str, Any] = {
        "eps": EPS,
        "layer_scale": config.layer_scale,
        "drop_path": drop_path,
        "dropout": config.drop_rate,
    }
    if config.parallel == 1:
        return Block(config.width, mixers[0], config.hidden, **common)
    return ParallelBlock(config.width, mixers, config.hidden, **common)


_SIZES = {
    #            D    L   H
    "tiny":   (192,  12,  3),
    "small":  (384,  12,  6),
    "medium": (512,  12,  8),
    "base":   (768,  12, 12),
    "large":  (1024, 24, 16),
    "huge":   (1280, 32, 16),
    "giant":  (1408, 40, 16),
    "Giant":  (1664, 48, 16),
}  # fmt: skip


def _deit(size: str, image: int, distilled: bool = False) -> Config:
    width, depth, heads = _SIZES[size]
    return Config(
        img_size=(image, image), width=width, depth=depth, heads=heads, hidden=4 * width, distilled=distilled
    )


def _deit3(
    size: str,
    image: int = 224,
    patch: int = 16,
    depth: int | None = None,
    parallel: int = 1,
    layer_scale: float | None = 1e-4,
    stem: Literal["patch", "hmlp"] = "patch",
) -> Config:
    width, usual, heads = _SIZES[size]
    return Config(
        img_size=(image, image), patch_size=(patch, patch), width=width, depth=depth or usual, heads=heads,
        hidden=4 * width, position_on_prefix=False, layer_scale=layer_scale, parallel=parallel, stem=stem,
        drop_path_shape="constant",
    )  # fmt: skip


def _nano(distilled: bool) -> Config:
    return Config(
        img_size=(32, 32), patch_size=(4, 4), width=128, depth=6, heads=4, hidden=512, num_classes=10,
        distilled=distilled,
    )  # fmt: skip


VARIANTS: dict[str, Config] = {
    #                                          size    image
    "deit_tiny_patch16_224":             _deit("tiny",  224),
    "deit_small_patch16_224":            _deit("small", 224),
    "deit_base_patch16_224":             _deit("base",  224),
    "deit_base_patch16_384":             _deit("base",  384),
    "deit_tiny_distilled_patch16_224":   _deit("tiny",  224, distilled=True),
    "deit_small_distilled_patch16_224":  _deit("small", 224, distilled=True),
    "deit_base_distilled_patch16_224":   _deit("base",  224, distilled=True),
    "deit_base_distilled_patch16_384":   _deit("base",  384, distilled=True),
    # DeiT III                                  size   image patch
    "deit3_small_patch16_224":           _deit3("small",  224),
    "deit3_small_patch16_384":           _deit3("small",  384),
    "deit3_medium_patch16_224":          _deit3("medium", 224),
    "deit3_base_patch16_224":            _deit3("base",   224),
    "deit3_base_patch16_384":            _deit3("base",   384),
    "deit3_large_patch16_224":           _deit3("large",  224),
    "deit3_large_patch16_384":           _deit3("large",  384),
    "deit3_huge_patch14_224":            _deit3("huge",   224, 14),
    # Architectures of models_v2.py without published weights, under its names
    "deit_tiny_patch16_LS":              _deit3("tiny"),
    "deit_huge_patch14_52_LS":           _deit3("huge",  patch=14, depth=52),
    "deit_huge_patch14_26x2_LS":         _deit3("huge",  patch=14, depth=26, parallel=2),
    "deit_giant_40_patch14_LS":          _deit3("giant", patch=14),
    "deit_Giant_48_patch14_LS":          _deit3("Giant", patch=14),
    "deit_small_patch16_36_LS":          _deit3("small", depth=36),
    "deit_small_patch16_36":             _deit3("small", depth=36, layer_scale=None),
    "deit_small_patch16_18x2_LS":        _deit3("small", depth=18, parallel=2),
    "deit_small_patch16_18x2":           _deit3("small", depth=18, parallel=2, layer_scale=None),
    "deit_base_patch16_36x1_LS":         _deit3("base",  depth=36),
    "deit_base_patch16_36x1":            _deit3("base",  depth=36, layer_scale=None),
    "deit_base_patch16_18x2_LS":         _deit3("base",  depth=18, parallel=2),
    "deit_base_patch16_18x2":            _deit3("base",  depth=18, parallel=2, layer_scale=None),
    "deit_small_patch16_hmlp":           _deit3("small", layer_scale=None, stem="hmlp"),
    # Ours, for pictures of 32 pixels
    "deit_nano_patch4_32":               _nano(distilled=False),
    "deit_nano_distilled_patch4_32":     _nano(distilled=True),
}  # fmt: skip

TINY = Config(
    img_size=(32, 32), patch_size=(8, 8), width=32, depth=2, heads=2, hidden=64, num_classes=5, distilled=True
)

CARDS: dict[str, Card] = {
    name: Card(
        architecture=name,
        preprocessing=Preprocessing(
            input_size=config.img_size,
            crop_pct=0.9 if config.position_on_prefix and config.img_size == (224, 224) else 1.0,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        ),
        notes="Ours, for small pictures; no paper has it." if config.img_size == (32, 32) else "",
    )
    for name, config in VARIANTS.items()
}
