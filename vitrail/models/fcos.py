"""FCOS (Tian et al. 2019, 1904.01355) on any pyramid: a light, standard detector behind PVT, Swin or a ResNet.

The backbone's maps become a feature pyramid (1612.03144) of one width, with coarser maps behind it. One head of two
towers of 3 x 3 convolutions runs over every level: each cell says its class, the distances to the four sides of its
box, and how well centred it is in it. Group norms in the towers, centre sampling, GIoU and centredness beside the box
branch, as in the authors' improved version. Ours in sizes and backbones; there is no published file for them.

A backbone of one stride alone, such as a ViT, answers one map; the head runs over that and the maps behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.models.backbones import Chosen, backbone
from vitrail.models.checks import check_config
from vitrail.models.detector import Detector
from vitrail.models.own_layouts import own_layout
from vitrail.nn.cells import cells_of
from vitrail.nn.fcos_head import CellHead, FartherMaps
from vitrail.nn.feature_pyramid import FeaturePyramid
from vitrail.nn.init import skip_on_meta
from vitrail.nn.shapes import DenseBoxOutput
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing

TASK = "object-detection"

RENAMES = own_layout("head.linear")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a detector's parameters and what it computes."""

    img_size: tuple[int, int] = (800, 1333)
    """Rows and columns that pictures are made for: the short side and the most of the long one. Any size runs."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 80
    """Classes; as many logits."""
    backbone: str = "resnet50"
    """A classification variant whose last maps are read."""
    backbone_changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the backbone's Config that differ from the variant's."""
    maps: int = 3
    """How many of the backbone's last maps go into the pyramid (C3 to C5 are three)."""
    farther: int = 2
    """How many coarser maps stand behind the pyramid (P6, P7)."""
    width: int = 256
    """Channels of pyramid and towers."""
    tower_depth: int = 4
    """Convolutions of each tower."""
    frozen_norm: bool = False
    """Whether the backbone's batch norms never change; for residual backbones with published weights."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the backbone."""

    def __post_init__(self) -> None:
        check_config(self, ("maps", "width", "tower_depth", "num_classes"))
        if self.farther < 0:
            raise ModelError(f"farther must be 0 or more; got {self.farther}.")


class Fcos(Detector):
    """Images `[B, C, I, J]` and padding `[B, I, J]` to a DenseBoxOutput over all cells."""

    def __init__(self, config: Config, chosen: Chosen) -> None:
        super().__init__()
        self.backbone, self.backbone_config = chosen.trunk, chosen.config
        self.maps = config.maps
        self.pyramid = FeaturePyramid(chosen.coarsest(config.maps), config.width)
        self.farther = FartherMaps(self.pyramid.levels[-1], config.farther)
        self.head = CellHead(
            config.width, config.num_classes, config.maps + config.farther, config.tower_depth
        )

    def forward(
        self, images: Float[Tensor, "B C I J"], padding: Bool[Tensor, "B I J"] | None = None
    ) -> DenseBoxOutput:
        """One row a cell, fine to coarse."""
        maps = self.farther(self.pyramid(self.backbone(images).maps[-self.maps :]))
        levels = (*self.pyramid.levels, *self.farther.levels)
        cells = cells_of(maps, levels, (images.shape[2], images.shape[3]), padding)
        logits, boxes, centre = self.head(maps, cells)
        return DenseBoxOutput(logits, boxes, centre, cells.expand(images.shape[0], -1, -1))


def build(config: Config) -> Fcos:
    """The network of a configuration, initialised from torch's default generator."""
    changes = {
        "norm": "frozen" if config.frozen_norm else None,
        "drop_path_rate": config.drop_path_rate or None,
        **config.backbone_changes,
    }
    model = Fcos(config, backbone(config.backbone, config.in_chans, **changes))
    if not skip_on_meta(model):
        for part in (model.pyramid, model.farther):
            for layer in part.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_uniform_(layer.weight, a=1)
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        model.head.init_weights()
    return model


VARIANTS: dict[str, Config] = {
    "fcos_resnet50":   Config(frozen_norm=True),
    "fcos_pvt_v2_b2":  Config(backbone="pvt_v2_b2"),
    "fcos_swin_tiny":  Config(backbone="swin_tiny_patch4_window7_224"),
    # Ours, for small pictures and few of them.
    "fcos_nano":       Config(img_size=(192, 256), num_classes=3, backbone="resnet10_nano", farther=1, width=64,
                              tower_depth=2),
    "fcos_pvt_nano":   Config(img_size=(192, 256), num_classes=3, backbone="pvt_v2_b0", farther=1, width=64,
                              tower_depth=2),
}  # fmt: skip

TINY = Config(img_size=(64, 64), num_classes=5, backbone="resnet10_nano", farther=1, width=32, tower_depth=1)

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
            crop_mode="squash" if name.endswith("nano") else "fit",
        ),
    )
    for name, config in VARIANTS.items()
}
