"""DETR (Carion et al. 2020, 2005.12872): detection as one set, predicted at once.

A backbone's last map is projected to D channels and becomes tokens; an encoder attends over them; a decoder holds
learned queries, each of which looks at the other queries and at the tokens, and ends as one class (or "no object")
and one box. Positions are sines of row and column, added to queries and keys in every layer. All heads are shared
over the decoder's layers, and while training every layer's answer is given (`BoxOutput.auxiliary`).

    DC5         the backbone's last stage dilates instead of striding: a map four times as large
    panoptic    a mask for every query, from its attention and finer maps (nn.query_masks)
    nano        ours, to be trained on few pictures: a small residual network, three layers and three

The published networks keep the backbone's batch norms, stem and first stage as they were (frozen); a network that
starts from nothing must not (`frozen_norm=False, frozen_stages=0`). Any classification variant can be the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.models.backbones import Chosen, backbone
from vitrail.models.checks import check_config
from vitrail.models.detector import Detector
from vitrail.models.detr_layouts import RENAMES as RENAMES
from vitrail.models.detr_layouts import context as context
from vitrail.nn.decoder import Decoder, Encoder, padding_at, padding_bias
from vitrail.nn.init import init_detr, skip_on_meta
from vitrail.nn.position import LearnedAxes, MaskedSine
from vitrail.nn.query_head import QueryHead
from vitrail.nn.query_masks import QueryMaskHead
from vitrail.nn.shapes import BoxOutput
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing

TASK = "object-detection"
EXTRA_LOGITS = 1
"""Logits besides the classes': no object."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a DETR's parameters and what it computes."""

    img_size: tuple[int, int] = (800, 1333)
    """Rows and columns that pictures are made for: the short side and the most of the long one. Any size runs."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 91
    """Classes; logits have one more, for no object. COCO's numbers go to 90."""
    backbone: str = "resnet50"
    """A classification variant whose last map is read."""
    backbone_changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the backbone's Config that differ from the variant's."""
    dilated: int = 0
    """How many of the backbone's last stages dilate their kernels instead of halving the map (1 is DC5)."""
    frozen_norm: bool = True
    """Whether the backbone's batch norms never change; only where the backbone has batch norms."""
    frozen_stages: int = 1
    """How many of the backbone's first stages are not trained, and its stem with them; 0 trains all."""
    width: int = 256
    """D, the width of the transformer."""
    heads: int = 8
    """Heads of every attention."""
    hidden: int = 2048
    """Width of the MLPs' inner layer."""
    encoder_depth: int = 6
    """Layers over the map."""
    decoder_depth: int = 6
    """Layers over the queries."""
    queries: int = 100
    """Slots: more than there will ever be objects in a picture."""
    position: Literal["sine", "learned"] = "sine"
    """Sines of row and column, or a learned code for each row and column up to 50."""
    norm_order: Literal["post", "pre"] = "post"
    """Norms after each branch (published), or before it."""
    masks: bool = False
    """Whether a panoptic head predicts a mask for every query."""
    things: int = 0
    """Panoptic: the classes below this number are things, whose objects stay apart, the others stuff; 0: all are."""
    drop_rate: float = 0.1
    """Dropout on attention weights, branches and the MLPs' inner layer."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the backbone."""

    def __post_init__(self) -> None:
        check_config(self, ("width", "hidden", "encoder_depth", "decoder_depth", "queries", "num_classes"))
        if self.masks and self.width % 16:
            raise ModelError(f"The panoptic head needs a width that 16 divides; got {self.width}.")
        if self.frozen_stages < 0 or self.dilated < 0:
            raise ModelError(
                f"frozen_stages and dilated must be 0 or more; got {self.frozen_stages} and {self.dilated}."
            )


class Detr(Detector):
    """Images `[B, C, I, J]` and padding `[B, I, J]` to a BoxOutput of `queries` slots."""

    def __init__(self, config: Config, chosen: Chosen) -> None:
        super().__init__()
        width, heads, hidden = config.width, config.heads, config.hidden
        order, dropout = config.norm_order, config.drop_rate
        self.backbone, self.backbone_config = chosen.trunk, chosen.config
        self.projection = nn.Conv2d(chosen.levels[-1].channels, width, 1)
        self.positions = MaskedSine(width) if config.position == "sine" else LearnedAxes(width)
        self.encoder = Encoder(width, heads, hidden, config.encoder_depth, order=order, dropout=dropout)
        self.decoder = Decoder(width, heads, hidden, config.decoder_depth, order=order, dropout=dropout)
        self.queries = nn.Embedding(config.queries, width)
        self.head = QueryHead(width, config.num_classes)
        finer = [level.channels for level in chosen.levels[-2::-1]]
        self.mask_head = QueryMaskHead(width, heads, finer) if config.masks else None

    def forward(
        self, images: Float[Tensor, "B C I J"], padding: Bool[Tensor, "B I J"] | None = None
    ) -> BoxOutput:
        """Logits `[B, Q, K + 1]` and boxes `[B, Q, 4]`; every layer's while training, masks where there is a head."""
        maps = self.backbone(images).maps
        map = self.projection(maps[-1])  # [B, D, h, w]
        cells, bias = None, None
        if padding is not None:
            cells = padding_at(padding, map.shape[-2:])
            bias = padding_bias(cells, map)
        positions = self.positions(map, cells)  # [B or 1, h * w, D]
        memory = self.encoder(map.flatten(2).transpose(1, 2), positions, bias)
        contents = self.decoder(self.queries.weight, memory, positions, bias)
        *earlier, (logits, boxes) = (self.head(content) for content in contents)
        masks = None
        if self.mask_head is not None:
            masks = self.mask_head(contents[-1], memory, map, maps[-2::-1], bias)
        return BoxOutput(logits, boxes, tuple(earlier), masks)


def build(config: Config) -> Detr:
    """The network of a configuration, initialised from torch's default generator."""
    changes = {
        "norm": "frozen" if config.frozen_norm else None,
        "dilated": config.dilated or None,
        "drop_path_rate": config.drop_path_rate or None,
        **config.backbone_changes,
    }
    chosen = backbone(config.backbone, config.in_chans, **changes)
    model = Detr(config, chosen)
    if config.frozen_stages:
        parts = [getattr(chosen.trunk, "stem", None), *chosen.trunk.stages[: config.frozen_stages]]
        for part in parts:
            if part is not None:
                part.requires_grad_(False)
    if not skip_on_meta(model):
        init_detr(model)
    return model


VARIANTS: dict[str, Config] = {
    "detr_resnet50":           Config(),
    "detr_resnet101":          Config(backbone="resnet101"),
    "detr_resnet50_dc5":       Config(dilated=1),
    "detr_resnet101_dc5":      Config(backbone="resnet101", dilated=1),
    "detr_resnet50_panoptic":  Config(num_classes=250, masks=True, things=91),
    "detr_resnet101_panoptic": Config(num_classes=250, masks=True, things=91, backbone="resnet101"),
    # Ours, to be measured beside quick_detr_nano.
    "detr_nano":               Config(img_size=(192, 256), num_classes=3, backbone="resnet10_nano", dilated=1,
                                      frozen_norm=False, frozen_stages=0, width=128, hidden=512, encoder_depth=3,
                                      decoder_depth=3, queries=50, heads=4),
}  # fmt: skip

TINY = Config(
    img_size=(64, 64), num_classes=5, backbone="resnet10_nano", frozen_norm=False, frozen_stages=0, width=32, heads=4,
    hidden=64, encoder_depth=1, decoder_depth=2, queries=10, drop_rate=0.0,
)  # fmt: skip

CARDS: dict[str, Card] = {
    name: Card(
        architecture=name,
        task=TASK,
        ids=() if name.endswith("nano") else tuple(range(config.num_classes)),  # COCO's own, gaps included
        preprocessing=Preprocessing(
            input_size=config.img_size,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            interpolation="bilinear",
            crop_pct=1.0,
            crop_mode="squash" if name.endswith("nano") else "fit",
        ),
        notes="DC5 weights were trained with one picture a device: padding from larger batches costs accuracy."
        if config.dilated
        else "",
    )
    for name, config in VARIANTS.items()
}
