"""Semantic FPN on any backbone: the light, standard segmenter that PVT is measured with (2102.12122, section 5.4).

A feature pyramid (Lin et al. 2017, 1612.03144) lends the fine maps what the deep ones know; each level is brought
to the finest one's size by 3 x 3 convolutions and growth of 2, their sum goes to the class layer (Kirillov et al.
2019, 1901.02446). Widths and dropout as in whai362/PVT `segmentation/configs/sem_fpn`: 256 in the pyramid, 128 in
the head, 0.1.

The backbone is any classification variant. Pyramids (PVT, Swin, ResNet) give four maps; a ViT gives one, and then
this is a plain convolutional decoder. Swin's maps get a layer norm each, as its authors do in dense use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vitrail.models.backbones import backbone
from vitrail.models.checks import check_config
from vitrail.models.own_layouts import own_layout
from vitrail.models.segmenter import Segmenter
from vitrail.nn.feature_pyramid import FeaturePyramid
from vitrail.nn.init import init_masks, skip_on_meta
from vitrail.nn.masks import FpnHead, MapNorm
from vitrail.weights.adapter import Layout
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing

TASK = "image-segmentation"

RENAMES: tuple[Layout, ...] = own_layout("head.linear")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a semantic FPN's parameters and what it computes."""

    img_size: tuple[int, int] = (512, 512)
    """Rows and columns of the image that pictures are brought to; other sizes run too."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 150
    """Classes of a pixel."""
    backbone: str = "pvt_v2_b0"
    """A classification variant."""
    backbone_changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the backbone's Config that differ from the variant's."""
    norm_maps: bool = False
    """Whether each of the backbone's maps gets a layer norm (Swin, whose maps are taken before any)."""
    width: int = 256
    """Channels of the pyramid."""
    head_width: int = 128
    """Channels of the head."""
    head_dropout: float = 0.1
    """Share of the head's channels that are left out while training."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the backbone."""

    def __post_init__(self) -> None:
        check_config(self, ("num_classes", "width", "head_width"))


class NormedPyramid(nn.Module):
    """A layer norm for each map where asked for, then the feature pyramid."""

    def __init__(self, pyramid: FeaturePyramid, norms: list[MapNorm]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)
        self.pyramid = pyramid

    def forward(self, maps: tuple[Float[Tensor, "B _ _ _"], ...]) -> tuple[Float[Tensor, "B _ _ _"], ...]:
        if len(self.norms):
            maps = tuple(norm(map) for norm, map in zip(self.norms, maps, strict=True))
        out: tuple[Tensor, ...] = self.pyramid(maps)
        return out


def build(config: Config) -> Segmenter:
    """The network of a configuration, initialised from torch's default generator."""
    changes = {"drop_path_rate": config.drop_path_rate or None, **config.backbone_changes}
    chosen = backbone(config.backbone, config.in_chans, **changes)
    pyramid = FeaturePyramid(chosen.levels, config.width)
    norms = [MapNorm(level.channels, eps=1e-5) for level in chosen.levels] if config.norm_maps else []
    head = FpnHead(pyramid.levels, config.num_classes, config.head_width, config.head_dropout)
    model = Segmenter(chosen, head, neck=NormedPyramid(pyramid, norms))
    if not skip_on_meta(model):
        init_masks(model)
    return model


def _on(name: str, **changes: Any) -> Config:
    return Config(backbone=name, norm_maps=name.startswith("swin"), **changes)


VARIANTS: dict[str, Config] = {
    #                       backbone
    "fpn_pvt_tiny":    _on("pvt_tiny"),
    "fpn_pvt_small":   _on("pvt_small"),
    "fpn_pvt_medium":  _on("pvt_medium"),
    "fpn_pvt_large":   _on("pvt_large"),
    "fpn_pvt_v2_b0":   _on("pvt_v2_b0"),
    "fpn_pvt_v2_b1":   _on("pvt_v2_b1"),
    "fpn_pvt_v2_b2":   _on("pvt_v2_b2"),
    "fpn_pvt_v2_b3":   _on("pvt_v2_b3"),
    "fpn_pvt_v2_b4":   _on("pvt_v2_b4"),
    "fpn_pvt_v2_b5":   _on("pvt_v2_b5"),
    "fpn_swin_tiny":   _on("swin_tiny_patch4_window7_224", drop_path_rate=0.2),
    "fpn_swin_small":  _on("swin_small_patch4_window7_224", drop_path_rate=0.2),
    "fpn_swin_base":   _on("swin_base_patch4_window7_224", drop_path_rate=0.3),
    "fpn_resnet50":    _on("resnet50", drop_path_rate=0.0),
    # Ours, for a CPU and few pictures: street scenes of 3:4, narrow pyramid.
    "fpn_pvt_v2_nano": _on("pvt_v2_b0", img_size=(192, 256), num_classes=11, width=64, head_width=64,
                           drop_path_rate=0.0),
    "fpn_swin_nano":   _on("swin_tiny_patch4_window7_224", img_size=(192, 256), num_classes=11, width=64, head_width=64,
                           drop_path_rate=0.0,
                           backbone_changes={"width": 32, "depths": [2, 2, 2, 2], "heads": [1, 2, 4, 8]}),
}  # fmt: skip

TINY = Config(
    img_size=(64, 64), num_classes=5, backbone="pvt_v2_b0", width=16, head_width=8, head_dropout=0.0,
    drop_path_rate=0.0, backbone_changes={"widths": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "heads": [1, 2, 3, 4]},
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
