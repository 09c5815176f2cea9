"""SETR: "Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective" (Zheng et al. 2021, 2012.15840).

A plain ViT keeps one resolution, a 16th of the image, from the first layer to the last; a decoder of convolutions
brings its tokens back to pixels.

    naive    1 x 1 convolution, class layer, one step of 16
    pup      four 3 x 3 convolutions with steps of 2 between them
    mla      four layers, each normed and narrowed, summed from the deepest up, and set side by side

The encoder has no last norm; each decoder norms what it reads. Naive and PUP keep [CLS] through all layers; MLA
gives it a position and then leaves it out. While training, auxiliary heads on earlier layers give logits too, whose
loss counts 0.4 (`auxiliary_weight`). Numerics of fudan-zvg/SETR: layer norm eps 1e-6, resizing without aligned
corners but inside MLA, positions resampled bilinearly to any image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from vitrail.errors import ModelError
from vitrail.models.backbones import Chosen, backbone
from vitrail.models.checks import check_config
from vitrail.models.segmenter import Segmenter
from vitrail.models.setr_layouts import RENAMES as RENAMES
from vitrail.models.setr_layouts import context as context
from vitrail.nn.entry import DropPrefix
from vitrail.nn.init import init_masks, skip_on_meta
from vitrail.nn.masks import Aggregation, MaskHead, PointHead, StreamHead, UpHead
from vitrail.nn.position import LearnedPosition
from vitrail.nn.trunk import Trunk
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing

TASK = "image-segmentation"

Decoder = Literal["naive", "pup", "mla"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a SETR's parameters and what it computes."""

    img_size: tuple[int, int] = (512, 512)
    """Rows and columns of the image that positions are made for, and of a sliding window; other sizes run too."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 150
    """Classes of a pixel."""
    backbone: str = "vit_large_patch16_384"
    """The encoder: a ViT or DeiT by name."""
    backbone_changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the encoder's Config that differ from the variant's."""
    decoder: Decoder = "pup"
    """Which of the three decoders."""
    taps: tuple[int, ...] = (9, 14, 19, 23)
    """Blocks (from 0) whose output heads read, rising; naive and PUP read the last of them, MLA all."""
    auxiliary: tuple[int, ...] = (0, 1, 2, 3)
    """Places in `taps` (of MLA: streams) that have an auxiliary head; none leaves the heads out."""
    auxiliary_weight: float = 0.4
    """What an auxiliary head's loss counts; the task reads it."""
    width: int = 256
    """Channels of the decoder."""
    stream_width: int = 128
    """MLA: channels of each stream in the head."""
    growth: tuple[int, ...] = (2, 2, 2, 1)
    """Naive and PUP: a convolution for each number, after which the map grows so many times."""
    auxiliary_growth: tuple[int, ...] = (4,)
    """The growth of auxiliary heads' convolutions."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the encoder."""
    drop_rate: float = 0.0
    """Dropout of the encoder."""
    attn_drop_rate: float = 0.0
    """Dropout on the encoder's attention weights."""

    def __post_init__(self) -> None:
        check_config(self, ("num_classes", "width", "stream_width"))
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or self.taps[0] < 0:
            raise ModelError(f"taps must be numbers of blocks from 0, rising; got {self.taps}.")
        if any(not 0 <= place < len(self.taps) for place in self.auxiliary):
            raise ModelError(
                f"auxiliary must hold places in taps (0 to {len(self.taps) - 1}); got {self.auxiliary}."
            )
        for name in ("growth", "auxiliary_growth"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ModelError(f"{name} must hold factors of at least 1; got {getattr(self, name)}.")


def build(config: Config) -> Segmenter:
    """The network of a configuration, initialised from torch's default generator."""
    chosen = _encoder(config)
    channels = chosen.levels[-1].channels
    heads: list[MaskHead]
    neck: nn.Module | None = None
    if config.decoder == "mla":
        streams, width = len(config.taps), config.width
        neck = Aggregation(channels, streams, width)
        heads = [StreamHead(width, streams, config.num_classes, config.stream_width)]
        heads += [PointHead(width, config.num_classes, level=place) for place in config.auxiliary]
    else:
        kernel = 1 if config.decoder == "naive" else 3
        asked = [(-1, config.growth), *((place, config.auxiliary_growth) for place in config.auxiliary)]
        heads = [
            UpHead(
                channels, config.num_classes, level=level, width=config.width, kernel=kernel, growth=growth
            )
            for level, growth in asked
        ]
    model = Segmenter(chosen, heads[0], neck=neck, auxiliary=heads[1:])
    model.backbone_context = {"resample": "bilinear-plain"}
    if not skip_on_meta(model):
        init_masks(model)
    return model


def _encoder(config: Config) -> Chosen:
    """The encoder with its taps, without its last norm; of MLA, without [CLS] after the positions."""
    changes = {
        "img_size": config.img_size,
        "drop_path_rate": config.drop_path_rate or None,
        "drop_rate": config.drop_rate or None,
        "attn_drop_rate": config.attn_drop_rate or None,
        **config.backbone_changes,
    }
    chosen = backbone(config.backbone, config.in_chans, **changes)
    trunk = chosen.trunk
    if not isinstance(trunk, Trunk) or len(trunk.stages) != 1:
        raise ModelError(
            f"SETR's encoder is a ViT or a DeiT, which keeps one resolution; got backbone={config.backbone!r}."
            " For a pyramid take a model of the family fpn."
        )
    (stage,) = trunk.stages
    if config.taps[-1] >= len(stage.blocks):  # type: ignore[arg-type]
        raise ModelError(
            f"taps must lie below the encoder's {len(stage.blocks)} blocks; got {config.taps}."  # type: ignore[arg-type]
        )
    trunk.tap(config.taps)
    entry: nn.Module = stage.entry  # type: ignore[assignment]
    for part in entry.modules():
        if isinstance(part, LearnedPosition):
            part.resampling = "bilinear-plain"
    if config.decoder == "mla":
        entry.add_module("bare", DropPrefix())
        if hasattr(entry, "prefix"):  # nothing reads it: a trained parameter without a gradient stops DDP
            entry.prefix.requires_grad_(False)
    return chosen._replace(levels=trunk.levels)


_ENCODERS = {
    #             backbone                 naive and PUP       MLA
    "large": ("vit_large_patch16_384",  (9, 14, 19, 23), (5, 11, 17, 23)),
    "base":  ("vit_base_patch16_384",   (2, 5, 8, 11),   (2, 5, 8, 11)),
    "deit":  ("deit_base_patch16_384",  (4, 7, 9, 11),   (2, 5, 8, 11)),
}  # fmt: skip


def _setr(decoder: Decoder, encoder: str, image: int, classes: int) -> Config:
    name, taps, streams = _ENCODERS[encoder]
    if decoder == "mla":
        return Config(
            img_size=(image, image), num_classes=classes, backbone=name, decoder="mla", taps=streams,
        )  # fmt: skip
    naive = decoder == "naive"
    return Config(
        img_size=(image, image), num_classes=classes, backbone=name, decoder=decoder, taps=taps,
        auxiliary=(0, 1, 2) if naive else (0, 1, 2, 3), growth=(1,) if naive else (2, 2, 2, 1),
        auxiliary_growth=(1,) if naive else (4,),
    )  # fmt: skip


VARIANTS: dict[str, Config] = {
    #                                decoder  encoder  image classes: ADE20K 150, Cityscapes 19, Pascal-Context 60
    "setr_naive_large":        _setr("naive", "large", 512, 150),
    "setr_naive_large_768":    _setr("naive", "large", 768,  19),
    "setr_naive_large_480":    _setr("naive", "large", 480,  60),
    "setr_pup_large":          _setr("pup",   "large", 512, 150),
    "setr_pup_large_768":      _setr("pup",   "large", 768,  19),
    "setr_pup_large_480":      _setr("pup",   "large", 480,  60),
    "setr_mla_large":          _setr("mla",   "large", 512, 150),
    "setr_mla_large_768":      _setr("mla",   "large", 768,  19),
    "setr_mla_large_480":      _setr("mla",   "large", 480,  60),
    "setr_naive_base":         _setr("naive", "base",  512, 150),
    "setr_naive_base_768":     _setr("naive", "base",  768,  19),
    "setr_pup_base":           _setr("pup",   "base",  512, 150),
    "setr_pup_base_768":       _setr("pup",   "base",  768,  19),
    "setr_mla_base":           _setr("mla",   "base",  512, 150),
    "setr_mla_base_768":       _setr("mla",   "base",  768,  19),
    "setr_naive_deit_base_768": _setr("naive", "deit", 768,  19),
    "setr_pup_deit_base":      _setr("pup",   "deit",  512, 150),
    "setr_pup_deit_base_768":  _setr("pup",   "deit",  768,  19),
    "setr_mla_deit_base":      _setr("mla",   "deit",  512, 150),
    "setr_mla_deit_base_768":  _setr("mla",   "deit",  768,  19),
    # Ours, for a CPU and few pictures: a ViT-Ti of six blocks on patches of 16, narrow decoders; street scenes of 3:4.
    "setr_naive_nano": Config(
        img_size=(192, 256), num_classes=11, backbone="vit_tiny_patch16_224", backbone_changes={"depth": 6},
        decoder="naive", taps=(3, 5), auxiliary=(0,), growth=(1,), auxiliary_growth=(1,), width=96,
    ),
    "setr_pup_nano": Config(
        img_size=(192, 256), num_classes=11, backbone="vit_tiny_patch16_224", backbone_changes={"depth": 6},
        decoder="pup", taps=(3, 5), auxiliary=(0,), width=64,
    ),
    "setr_mla_nano": Config(
        img_size=(192, 256), num_classes=11, backbone="vit_tiny_patch16_224", backbone_changes={"depth": 6},
        decoder="mla", taps=(1, 3, 5), auxiliary=(0, 1, 2), width=64, stream_width=32,
    ),
}  # fmt: skip

TINY = Config(
    img_size=(32, 32), num_classes=5, backbone="vit_tiny_patch16_224", decoder="pup", taps=(0, 1), auxiliary=(0,),
    backbone_changes={"patch_size": [8, 8], "width": 32, "depth": 2, "heads": 2, "hidden": 64}, width=16, growth=(2, 1),
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
        notes="The authors keep a picture's shape and slide a window of the input's size over it, by two thirds.",
    )
    for name, config in VARIANTS.items()
}
