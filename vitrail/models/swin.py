"""Swin Transformer (Liu et al. 2021, 2103.14030) and Swin Transformer v2 (2111.09883).

Four stages at strides 4, 8, 16, 32: 4 x 4 patches, then merging of 2 x 2 neighbours before each later stage,
which doubles the width. Blocks attend inside windows of w x w tokens; every second block shifts the windows by
half their side. The mean of the normed tokens goes to the head.

    v1        norm before each branch; scores q k / sqrt(d) with a learned table of relative biases.
    v2        norm at the end of each branch (res-post); scores are cosines times a temperature; the bias is a
              small network of the offset in logarithmic coordinates, divided by the window of the first
              training (`trained_windows`), so that weights go over to larger windows; the merging's norm
              comes after its projection.
    S3        v1 with windows found by search (2111.14725), 14 in one stage or three.

Layer norm eps is 1e-5. A window never exceeds its stage's map at the configured image size; any other image
size runs too (see nn.window).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from vitrail.errors import ModelError
from vitrail.models.checks import check_config, check_heads, check_stages
from vitrail.models.classifier import Classifier
from vitrail.models.swin_layouts import RENAMES as RENAMES
from vitrail.models.swin_layouts import context as context
from vitrail.nn.block import Block, drop_path_rates
from vitrail.nn.downsample import Merge
from vitrail.nn.entry import Chain, DropTokens, Patchify
from vitrail.nn.heads import ClassHead
from vitrail.nn.init import init_swin, skip_on_meta
from vitrail.nn.shapes import Grid, Level
from vitrail.nn.trunk import Stage, Trunk
from vitrail.nn.window import CosineWindowAttention, RelativeNetwork, RelativeTable, WindowAttention
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a Swin's parameters and what it computes."""

    img_size: tuple[int, int] = (224, 224)
    """Rows and columns of the image that windows are made for; other sizes run too."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 1000
    """Logits; 0 leaves the last layer out."""
    version: Literal[1, 2] = 1
    """Swin or Swin v2."""
    patch_size: int = 4
    """Side of a patch in image pixels; each later stage doubles it."""
    width: int = 96
    """C, the first stage's width; each later stage doubles it."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    """Blocks of each stage."""
    heads: tuple[int, ...] = (3, 6, 12, 24)
    """Heads of each stage."""
    windows: tuple[int, ...] = (7, 7, 7, 7)
    """Side of the windows of each stage, in tokens."""
    trained_windows: tuple[int, ...] = (0, 0, 0, 0)
    """v2: the windows of the weights' first training, which offsets are divided by; 0 is the stage's own."""
    mlp_ratio: int = 4
    """Width of the MLP's inner layer over the stage's width."""
    drop_path_rate: float = 0.0
    """Share of samples that skip the last block's branches in training; falls evenly to 0 at the first block."""
    drop_rate: float = 0.0
    """Dropout after the patches and in every block's MLP and output projection."""
    attn_drop_rate: float = 0.0
    """Dropout on attention weights."""
    eps: float = 1e-5
    """Added to the variance in every layer norm."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def stage_windows(self) -> tuple[Grid, ...]:
        """The window of every stage, never larger than its map at the configured image size."""
        found = []
        rows, columns = (-(-size // self.patch_size) for size in self.img_size)
        for window in self.windows:
            found.append(Grid(min(window, rows), min(window, columns)))
            rows, columns = -(-rows // 2), -(-columns // 2)
        return tuple(found)


def _check(config: Config) -> None:
    """Refuse combinations that mean nothing, saying what is legal."""
    stages = len(config.depths)
    check_config(config, ("width", "mlp_ratio"))
    check_stages(config, stages, {"depths": 1, "heads": 1, "windows": 1, "trained_windows": 0})
    check_heads([config.width * 2**number for number in range(stages)], config.heads)
    if config.version == 1 and any(config.trained_windows):
        raise ModelError(
            "trained_windows belongs to version=2; a v1 table is resampled when its file is loaded."
        )


def build(config: Config) -> Classifier:
    """The network of a configuration, initialised from torch's default generator."""
    rates = iter(drop_path_rates(config.drop_path_rate, sum(config.depths)))
    stages, levels = [], []
    for number, depth in enumerate(config.depths):
        width = config.width * 2**number
        blocks = [
            _block(config, number, shifted=block % 2 == 1, drop_path=next(rates)) for block in range(depth)
        ]
        last = number == len(config.depths) - 1
        norm = nn.LayerNorm(width, eps=config.eps) if last else None
        # the last norm belongs to the classifier: as a feature map, the last stage stands before it
        stages.append(Stage(_entry(config, number), blocks, norm, taps=[depth - 1] if last else []))
        levels.append(Level(width, config.patch_size * 2**number))
    model = Classifier(Trunk(stages, levels), ClassHead(levels[-1].channels, config.num_classes, pool="mean"))
    if not skip_on_meta(model):
        init_swin(model)
    return model


def _entry(config: Config, number: int) -> nn.Module:
    """Patches before the first stage, merging before the others."""
    width = config.width * 2**number
    if number:
        return Merge(width // 2, width, "before" if config.version == 1 else "after", eps=config.eps)
    patch = (config.patch_size, config.patch_size)
    norm = nn.LayerNorm(width, eps=config.eps)
    patches = Patchify(config.in_chans, width, patch, norm=norm, rest="pad")
    parts = {"patches": patches} | ({"dropout": DropTokens(config.drop_rate)} if config.drop_rate else {})
    return Chain(**parts)


def _block(config: Config, number: int, shifted: bool, drop_path: float) -> Block:
    width, heads, window = config.width * 2**number, config.heads[number], config.stage_windows[number]
    mixer: WindowAttention
    if config.version == 1:
        mixer = WindowAttention(
            width, heads, window, RelativeTable(heads, window), shifted=shifted,
            attention_dropout=config.attn_drop_rate, dropout=config.drop_rate,
        )  # fmt: skip
    else:
        first = config.trained_windows[number]
        bias = RelativeNetwork(heads, Grid(first, first) if first else window)
        mixer = CosineWindowAttention(
            width, heads, window, bias, shifted=shifted,
            attention_dropout=config.attn_drop_rate, dropout=config.drop_rate,
        )  # fmt: skip
    return Block(
        width,
        mixer,
        config.mlp_ratio * width,
        order="pre" if config.version == 1 else "res-post",
        eps=config.eps,
        drop_path=drop_path,
        dropout=config.drop_rate,
    )


_SIZES = {
    #          C    depths          heads
    "tiny":  (96,  (2, 2, 6, 2),  (3, 6, 12, 24)),
    "small": (96,  (2, 2, 18, 2), (3, 6, 12, 24)),
    "base":  (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}  # fmt: skip

_TRAINED = (12, 12, 12, 6)  # at 192 pixels the last map has 6 x 6 tokens


def _swin(
    size: str, image: int, window: int, version: Literal[1, 2] = 1, trained: tuple[int, ...] = (0,) * 4
) -> Config:
    width, depths, heads = _SIZES[size]
    return Config(
        img_size=(image, image), version=version, width=width, depths=depths, heads=heads,
        windows=(window,) * 4, trained_windows=trained,
    )  # fmt: skip


VARIANTS: dict[str, Config] = {
    #                                                 size    image window
    "swin_tiny_patch4_window7_224":             _swin("tiny",  224,  7),
    "swin_small_patch4_window7_224":            _swin("small", 224,  7),
    "swin_base_patch4_window7_224":             _swin("base",  224,  7),
    "swin_base_patch4_window12_384":            _swin("base",  384, 12),
    "swin_large_patch4_window7_224":            _swin("large", 224,  7),
    "swin_large_patch4_window12_384":           _swin("large", 384, 12),
    "swin_tiny_c24_patch4_window8_256":   Config(img_size=(256, 256), heads=(4, 8, 16, 32), windows=(8, 8, 8, 8)),
    "swin_s3_tiny_224":                   Config(windows=(7, 7, 14, 7)),
    "swin_s3_small_224":                  Config(windows=(14, 14, 14, 7), depths=(2, 2, 18, 2)),
    "swin_s3_base_224":                   Config(windows=(7, 7, 14, 7), depths=(2, 2, 30, 2)),
    "swinv2_tiny_window8_256":                  _swin("tiny",  256,  8, 2),
    "swinv2_tiny_window16_256":                 _swin("tiny",  256, 16, 2),
    "swinv2_small_window8_256":                 _swin("small", 256,  8, 2),
    "swinv2_small_window16_256":                _swin("small", 256, 16, 2),
    "swinv2_base_window8_256":                  _swin("base",  256,  8, 2),
    "swinv2_base_window16_256":                 _swin("base",  256, 16, 2),
    "swinv2_base_window12_192":                 _swin("base",  192, 12, 2),
    "swinv2_base_window12to16_192to256":        _swin("base",  256, 16, 2, _TRAINED),
    "swinv2_base_window12to24_192to384":        _swin("base",  384, 24, 2, _TRAINED),
    "swinv2_large_window12_192":                _swin("large", 192, 12, 2),
    "swinv2_large_window12to16_192to256":       _swin("large", 256, 16, 2, _TRAINED),
    "swinv2_large_window12to24_192to384":       _swin("large", 384, 24, 2, _TRAINED),
    # Ours, for pictures of 32 pixels: patches of 2, and three stages of 16 x 16, 8 x 8 and 4 x 4 tokens.
    "swin_nano_patch2_32": Config(img_size=(32, 32), num_classes=10, patch_size=2, width=48, depths=(2, 4, 2),
                                  heads=(2, 4, 8), windows=(4, 4, 4), trained_windows=(0, 0, 0)),
}  # fmt: skip

TINY = Config(
    img_size=(32, 32), num_classes=5, width=16, depths=(2, 2), heads=(2, 4), windows=(3, 4), trained_windows=(0, 0),
    mlp_ratio=2,
)  # fmt: skip

CARDS: dict[str, Card] = {
    name: Card(
        architecture=name,
        preprocessing=Preprocessing(
            input_size=config.img_size,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            crop_pct=1.0 if config.img_size[0] in (32, 384) else 0.875,
            crop_mode="squash" if config.img_size[0] == 384 else "center",
        ),
        notes="The authors evaluate at 384 pixels by resizing both sides; timm crops the middle.",
    )
    for name, config in VARIANTS.items()
}
