"""Vision Transformer: "An Image is Worth 16x16 Words" (Dosovitskiy et al. 2021, arXiv 2010.11929).

An image of I x J pixels is cut into N = I·J / P² patches of P x P x 3 numbers. Each patch is flattened and
projected to width D; [CLS] goes in front; every token is given a position. A stack of encoder blocks
(attention and MLP, each with a norm before and a residual around) reads the sequence; after a last norm the
[CLS] vector, or the mean of the patches, goes to the head, which gives class logits.

Sizes from google-research/vision_transformer `configs/models.py` and big_vision `models/vit.py`. F, the MLP's
width, is 4 D up to H only. Original numerics: layer norm eps 1e-6; the JAX code's GELU is the tanh form, the
ports' the exact one (`gelu`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from vitrail.errors import ModelError
from vitrail.models.checks import check_config
from vitrail.models.classifier import Classifier
from vitrail.models.vit_layouts import RENAMES as RENAMES
from vitrail.models.vit_layouts import context as context
from vitrail.nn.attention import Attention
from vitrail.nn.bit import BitStem
from vitrail.nn.block import Block, drop_path_rates
from vitrail.nn.entry import Chain, ConvStem, DropTokens, Patchify, PoolStem, PrefixTokens, check_divides
from vitrail.nn.heads import ClassHead, Pool
from vitrail.nn.init import init_jax, init_trunc_normal, skip_on_meta
from vitrail.nn.position import LearnedPosition, PositionKind, SinCosPosition
from vitrail.nn.shapes import Grid, Level
from vitrail.nn.trunk import Stage, Trunk
from vitrail.weights.card import Card, Preprocessing


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a ViT's parameters and what it computes."""

    img_size: tuple[int, int] = (224, 224)
    """Rows and columns of the image that positions are made for; other sizes run too."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 1000
    """Logits; 0 leaves the last layer out."""
    patch_size: tuple[int, int] = (16, 16)
    """Rows and columns of a patch, in image pixels."""
    width: int = 768
    """D, numbers a token."""
    depth: int = 12
    """L, blocks."""
    heads: int = 12
    """H, heads of attention; they share the width."""
    hidden: int = 3072
    """F, width of the MLP's inner layer."""
    stem: Literal["patch", "conv", "pool", "residual", "resnet"] = "patch"
    """What projects patches: one linear map, strided convolutions, convolutions and pooling, the same with skips, or
    the hybrids' ResNet."""
    stem_layers: tuple[int, ...] = ()
    """Units in each stage of the ResNet stem."""
    position: PositionKind = "learned"
    """Learned table, sine/cosine over the sequence or over rows and columns, or none."""
    class_token: bool = True
    """Whether [CLS] stands in front."""
    position_on_prefix: bool = True
    """Whether [CLS] has a position (ViT); if not, positions are added to the patches before [CLS] is prepended."""
    registers: int = 0
    """Extra learned tokens after [CLS] that nothing reads (Darcet et al. 2024, 2309.16588)."""
    norm_order: Literal["pre", "post"] = "pre"
    """Norm before each branch (ViT) or after each sum (the original Transformer; then there is no last norm)."""
    pool: Pool = "token"
    """What the head sees: [CLS], the mean of the patches, or all tokens end to end."""
    pool_norm: Literal["before", "after"] = "before"
    """Whether the last norm stands before the pooling (Google) or after it (timm's averaging models)."""
    representation: int = 0
    """Width of the tanh layer before the classes (21k checkpoints); 0 leaves it out."""
    head_hidden: tuple[int, ...] = ()
    """Widths of an MLP head's hidden layers."""
    head_dropout: float = 0.0
    """Dropout before the last layer, and in the MLP head."""
    qkv_bias: bool = True
    """Whether queries, keys and values have biases."""
    qk_norm: bool = False
    """Layer norm on queries and keys (ViT-22B, 2302.05442)."""
    layer_scale: float | None = None
    """Start value of a learned factor on each branch; none leaves it out."""
    drop_path_rate: float = 0.0
    """Share of samples that skip the last block's branches in training; falls evenly to 0 at the first block."""
    drop_rate: float = 0.0
    """Dropout after positions and in every block's MLP and output projection."""
    attn_drop_rate: float = 0.0
    """Dropout on attention weights."""
    gelu: Literal["exact", "tanh"] = "exact"
    """Form of the GELU."""
    eps: float = 1e-6
    """Added to the variance in every layer norm."""
    init: Literal["jax", "timm"] = "jax"
    """Initial distributions: the original JAX code's, or timm's truncated normal."""

    def __post_init__(self) -> None:
        _check(self)


def _check(config: Config) -> None:
    """Refuse combinations that mean nothing, saying what is legal."""
    check_config(config, ("width", "depth", "heads", "hidden"))
    for name in ("registers", "representation"):
        if getattr(config, name) < 0:
            raise ModelError(f"{name} must be 0 or more; got {getattr(config, name)}.")
    if not 0.0 <= config.head_dropout < 1.0:
        raise ModelError(f"head_dropout must lie in [0, 1); got {config.head_dropout}.")
    check_divides(*config.img_size, config.patch_size)
    if config.pool == "token" and not config.class_token:
        raise ModelError("pool='token' reads [CLS]: set class_token=True, or take pool='mean' or 'flatten'.")
    if config.pool_norm == "after" and config.pool != "mean":
        raise ModelError(f"pool_norm='after' goes with pool='mean'; got pool={config.pool!r}.")
    if config.pool_norm == "after" and config.norm_order == "post":
        raise ModelError(
            "norm_order='post' has no last norm to put after the pooling: take pool_norm='before'."
        )
    if config.position == "sincos2d" and config.class_token and config.position_on_prefix:
        raise ModelError(
            "position='sincos2d' has no place for [CLS]: set position_on_prefix=False, or take 'learned' or 'sincos1d'."
        )
    if config.position == "sincos2d" and config.width % 4:
        raise ModelError(f"position='sincos2d' needs a width that 4 divides; got {config.width}.")
    if config.stem == "resnet" and any(size % _stem_stride(config) for size in config.patch_size):
        raise ModelError(
            f"A ResNet stem of layers {config.stem_layers} has stride {_stem_stride(config)}: patch_size must be a"
            f" multiple of it; got {config.patch_size}."
        )
    if config.stem in ("conv", "pool", "residual") and config.patch_size[0] != config.patch_size[1]:
        raise ModelError(f"A convolutional stem needs a square patch; got {config.patch_size}.")


def _stem_stride(config: Config) -> int:
    return 4 * 2 ** max(0, len(config.stem_layers) - 1)


def build(config: Config) -> Classifier:
    """The network of a configuration, initialised from torch's default generator."""
    grid = Grid(config.img_size[0] // config.patch_size[0], config.img_size[1] // config.patch_size[1])
    rates = drop_path_rates(config.drop_path_rate, config.depth)
    blocks = [
        Block(
            config.width,
            Attention(
                config.width,
                config.heads,
                qkv_bias=config.qkv_bias,
                qk_norm=config.qk_norm,
                eps=config.eps,
                attention_dropout=config.attn_drop_rate,
                dropout=config.drop_rate,
            ),
            config.hidden,
            order=config.norm_order,
            eps=config.eps,
            layer_scale=config.layer_scale,
            drop_path=rate,
            dropout=config.drop_rate,
            gelu=config.gelu,
        )
        for rate in rates
    ]
    last_norm = nn.LayerNorm(config.width, eps=config.eps) if config.norm_order == "pre" else None
    after_pool = config.pool_norm == "after"
    stage = Stage(_entry(config, grid), blocks, None if after_pool else last_norm)
    prefix = int(config.class_token) + config.registers
    head = ClassHead(
        config.width,
        config.num_classes,
        pool=config.pool,
        tokens=prefix + grid.size,
        prefix=prefix,
        norm=last_norm if after_pool else None,
        representation=config.representation,
        hidden=config.head_hidden,
        dropout=config.head_dropout,
        start="zero" if config.init == "jax" else "small",
    )
    model = Classifier(Trunk([stage], [Level(config.width, config.patch_size[0])]), head)
    if not skip_on_meta(model):
        init_jax(model) if config.init == "jax" else init_trunc_normal(model)
    return model


def _entry(config: Config, grid: Grid) -> Chain:
    """Stem, patches, positions and prefix tokens, in the order that the configuration asks for."""
    parts: dict[str, nn.Module] = {}
    if config.stem == "conv":
        parts["patches"] = ConvStem(config.in_chans, config.width, config.patch_size[0])
    elif config.stem in ("pool", "residual"):
        residual = config.stem == "residual"
        parts["patches"] = PoolStem(config.in_chans, config.width, config.patch_size[0], residual)
    elif config.stem == "resnet":
        parts["stem"] = BitStem(config.in_chans, config.stem_layers)
        rest = (config.patch_size[0] // _stem_stride(config), config.patch_size[1] // _stem_stride(config))
        parts["patches"] = Patchify(parts["stem"].channels, config.width, rest)  # type: ignore[arg-type]
    else:
        parts["patches"] = Patchify(config.in_chans, config.width, config.patch_size)

    on_prefix = config.class_token and config.position_on_prefix
    dropout = 0.0 if config.position == "none" else config.drop_rate
    positions: nn.Module | None = None
    if config.position == "learned":
        positions = LearnedPosition(config.width, grid, prefix=int(on_prefix), dropout=dropout)
    elif config.position != "none":
        positions = SinCosPosition(config.width, config.position, prefix=int(on_prefix), dropout=dropout)
    if positions is not None and not on_prefix:
        parts["positions"] = positions
    counts = {"cls": int(config.class_token), "registers": config.registers}
    if any(counts.values()):
        parts["prefix"] = PrefixTokens(
            config.width, **{name: count for name, count in counts.items() if count}
        )
    if positions is not None and on_prefix:
        parts["positions"] = positions
    if config.position == "none" and config.drop_rate:
        parts["dropout"] = DropTokens(config.drop_rate)
    return Chain(**parts)


_SIZES = {
    #               D     L   H    F
    "tiny":       (192,  12,  3,   768),
    "small":      (384,  12,  6,   1536),
    "base":       (768,  12, 12,   3072),
    "large":      (1024, 24, 16,   4096),
    "huge":       (1280, 32, 16,   5120),
    "giant":      (1408, 40, 16,   6144),
    "gigantic":   (1664, 48, 16,   8192),
}  # fmt: skip


def _vit(size: str, patch: int, image: int, layers: tuple[int, ...] | None = None) -> Config:
    width, depth, heads, hidden = _SIZES[size]
    return Config(
        img_size=(image, image), patch_size=(patch, patch), width=width, depth=depth, heads=heads, hidden=hidden,
        stem="patch" if layers is None else "resnet", stem_layers=layers or (),
    )  # fmt: skip


VARIANTS: dict[str, Config] = {
    #                                    size     patch image  ResNet stem
    "vit_tiny_patch16_224":        _vit("tiny",     16, 224),
    "vit_tiny_patch16_384":        _vit("tiny",     16, 384),
    "vit_small_patch32_224":       _vit("small",    32, 224),
    "vit_small_patch32_384":       _vit("small",    32, 384),
    "vit_small_patch16_224":       _vit("small",    16, 224),
    "vit_small_patch16_384":       _vit("small",    16, 384),
    "vit_small_patch8_224":        _vit("small",     8, 224),
    "vit_base_patch32_224":        _vit("base",     32, 224),
    "vit_base_patch32_384":        _vit("base",     32, 384),
    "vit_base_patch16_224":        _vit("base",     16, 224),
    "vit_base_patch16_384":        _vit("base",     16, 384),
    "vit_base_patch8_224":         _vit("base",      8, 224),
    "vit_large_patch32_224":       _vit("large",    32, 224),
    "vit_large_patch32_384":       _vit("large",    32, 384),
    "vit_large_patch16_224":       _vit("large",    16, 224),
    "vit_large_patch16_384":       _vit("large",    16, 384),
    "vit_large_patch14_224":       _vit("large",    14, 224),
    "vit_huge_patch14_224":        _vit("huge",     14, 224),
    "vit_giant_patch14_224":       _vit("giant",    14, 224),
    "vit_gigantic_patch14_224":    _vit("gigantic", 14, 224),
    "vit_tiny_r_s16_p8_224":       _vit("tiny",     32, 224, ()),
    "vit_tiny_r_s16_p8_384":       _vit("tiny",     32, 384, ()),
    "vit_small_r26_s32_224":       _vit("small",    32, 224, (2, 2, 2, 2)),
    "vit_small_r26_s32_384":       _vit("small",    32, 384, (2, 2, 2, 2)),
    "vit_base_r50_s16_224":        _vit("base",     16, 224, (3, 4, 9)),
    "vit_base_r50_s16_384":        _vit("base",     16, 384, (3, 4, 9)),
    "vit_large_r50_s32_224":       _vit("large",    32, 224, (3, 4, 6, 3)),
    "vit_large_r50_s32_384":       _vit("large",    32, 384, (3, 4, 6, 3)),
    # Ours, for pictures of 32 pixels: the patch is 4, positions are fixed, the patches are averaged.
    "vit_nano_patch4_32":  Config(img_size=(32, 32), patch_size=(4, 4), width=128, depth=6, heads=4, hidden=512,
                                  position="sincos2d", class_token=False, pool="mean", num_classes=10),
    "vit_tiny_patch4_32":  Config(img_size=(32, 32), patch_size=(4, 4), width=192, depth=9, heads=3, hidden=768,
                                  position="sincos2d", class_token=False, pool="mean", num_classes=10),
}  # fmt: skip

TINY = Config(img_size=(32, 32), patch_size=(8, 8), width=32, depth=2, heads=2, hidden=64, num_classes=5)

CARDS: dict[str, Card] = {
    name: Card(
        architecture=name,
        preprocessing=Preprocessing(
            input_size=config.img_size,
            crop_pct=1.0 if config.img_size[0] in (32, 384) else 0.9,
        ),
        notes="Google's ViT weights expect pixels scaled to [-1, 1] (mean and std 0.5).",
    )
    for name, config in VARIANTS.items()
}
