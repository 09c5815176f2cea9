"""Performer ViT: a plain ViT whose attention is FAVOR+ (Choromanski et al. 2021, arXiv 2009.14794).

Everything but the mixer is DeiT's ViT (patches, [CLS], a position for every token, pre-norm blocks), and so are the
parameters: weights of a softmax ViT or DeiT load into it, and it approximates that network. No official vision
configuration exists; sizes are ViT's, and the set-up is the paper's: positive features with stabiliser, orthogonal
in blocks, m = E ln E of them a head, one W a layer for queries and keys, new features every 1000 training steps.

It starts from DeiT's N(0, 0.02), not from ViT's Xavier: the features estimate softmax only where queries and keys
are short (|x|² E^(-1/2) about 0.6 at that start, 8 with Xavier).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from vitrail.errors import ModelError
from vitrail.models.checks import check_config
from vitrail.models.classifier import Classifier
from vitrail.models.performer_layouts import RENAMES as RENAMES
from vitrail.models.performer_layouts import context as context
from vitrail.nn.block import Block, drop_path_rates
from vitrail.nn.entry import Chain, Patchify, PrefixTokens, patch_grid
from vitrail.nn.heads import ClassHead
from vitrail.nn.init import init_trunc_normal, skip_on_meta
from vitrail.nn.performer import Form, Kernel, RandomFeatures, Redraw
from vitrail.nn.position import LearnedPosition
from vitrail.nn.shapes import Grid, Level
from vitrail.nn.trunk import Stage, Trunk
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing

ACCEPTS = {"vit", "deit"}
"""Families whose saved folders load into a Performer."""

EPS = 1e-6
"""Added to the variance in every layer norm."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a Performer ViT's parameters and what it computes."""

    img_size: tuple[int, int] = (224, 224)
    """Rows and columns of the image that positions are made for; other sizes run too."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 1000
    """Logits; 0 leaves the last layer out."""
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
    kernel: Form = "softmax"
    """Features that estimate softmax, those of the generalised ReLU kernel, or none random at all."""
    features: int | None = None
    """m, random features a head; none is the whole part of E ln E."""
    feature_epsilon: float | None = None
    """Added to every feature; none is 1e-6 for softmax and 1e-3 for relu."""
    lengths: Literal["chi", "width"] = "chi"
    """Lengths of the random rows: of Gaussian vectors (unbiased), or all sqrt(E) (biased, less scattered)."""
    redraw_every: int = 1000
    """Training forwards after which all layers draw new features; 0 keeps the first ones. Never in evaluation."""
    drop_path_rate: float = 0.0
    """Share of samples that skip the last block's branches in training; falls evenly to 0 at the first block."""
    drop_rate: float = 0.0
    """Dropout after positions and in every block's MLP and output projection."""

    def __post_init__(self) -> None:
        check_config(self, counts=("width", "depth", "heads", "hidden"))
        patch_grid(self.img_size, self.patch_size)
        if self.features is not None and self.features < 1:
            raise ModelError(f"features must be at least 1; got {self.features}.")
        if self.redraw_every < 0:
            raise ModelError(f"redraw_every must be 0 (never) or more; got {self.redraw_every}.")
        if self.feature_epsilon is not None and self.feature_epsilon < 0:
            raise ModelError(f"feature_epsilon must be 0 or more; got {self.feature_epsilon}.")


def build(config: Config) -> Classifier:
    """The network of a configuration, initialised from torch's default generator."""
    width, grid = config.width, Grid(*patch_grid(config.img_size, config.patch_size))
    epsilon = {"softmax": 1e-6, "relu": 1e-3, "none": 0.0}[config.kernel]
    kernel = Kernel(config.kernel, epsilon if config.feature_epsilon is None else config.feature_epsilon)
    mixers = [
        RandomFeatures(
            width,
            config.heads,
            features=config.features,
            kernel=kernel,
            lengths=config.lengths,
            dropout=config.drop_rate,
        )
        for _ in range(config.depth)
    ]
    rates = drop_path_rates(config.drop_path_rate, config.depth)
    blocks = [
        Block(width, mixer, config.hidden, eps=EPS, drop_path=rate, dropout=config.drop_rate)
        for mixer, rate in zip(mixers, rates, strict=True)
    ]
    entry = Chain(
        redraw=Redraw(mixers, config.redraw_every),
        patches=Patchify(config.in_chans, width, config.patch_size),
        prefix=PrefixTokens(width, cls=1),
        positions=LearnedPosition(width, grid, prefix=1, dropout=config.drop_rate),
    )
    stage = Stage(entry, blocks, nn.LayerNorm(width, eps=EPS))
    model = Classifier(
        Trunk([stage], [Level(width, config.patch_size[0])]), ClassHead(width, config.num_classes)
    )
    if not skip_on_meta(model):
        init_trunc_normal(model)
    return model


def _performer(width: int, heads: int) -> Config:
    return Config(width=width, heads=heads, hidden=4 * width)


VARIANTS: dict[str, Config] = {
    #                                            D    H
    "performer_tiny_patch16_224":    _performer(192,  3),
    "performer_small_patch16_224":   _performer(384,  6),
    "performer_base_patch16_224":    _performer(768, 12),
    # Ours, for pictures of 32 pixels
    "performer_nano_patch4_32":      Config(img_size=(32, 32), patch_size=(4, 4), width=128, depth=6, heads=4,
                                            hidden=512, features=64, num_classes=10),
}  # fmt: skip

TINY = Config(
    img_size=(32, 32), patch_size=(8, 8), width=32, depth=2, heads=2, hidden=64, features=32, num_classes=5
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
        notes="No official configuration exists: ViT's size with FAVOR+ attention.",
    )
    for name, config in VARIANTS.items()
}
