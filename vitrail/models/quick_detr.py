"""A DETR for few pictures: the later remedies for its slow start, behind the same answer. Ours, not one paper's.

Plain DETR needs ten thousand pictures and hundreds of epochs, because a query must learn from nothing where to look.
Here

    maps        of strides 8, 16 and 32, joined by a feature pyramid; the encoder attends over the coarse ones
    selection   every cell says what it shows and where; the best of them are where queries start (two-stage
                Deformable DETR, 2010.04159)
    anchors     queries are boxes, attention is centred on them, each layer corrects them (DAB-DETR, 2201.12329)
    groups      while training, several groups of queries look for all objects, blind to each other: every object
                teaches one query of each (Group DETR, 2207.13085); prediction uses the first group
    sigmoids    one for each class, learned by focal loss; no "no object"

`BoxOutput.auxiliary` holds the answers of all cells, of all groups and of all layers but the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrail.errors import ModelError
from vitrail.models.backbones import Chosen, backbone
from vitrail.models.checks import check_config
from vitrail.models.detector import Detector
from vitrail.models.own_layouts import own_layout
from vitrail.nn.anchor_decoder import AnchorDecoder, AnchorHead, group_bias, place_code
from vitrail.nn.cells import cells_of, outside
from vitrail.nn.decoder import Encoder, padding_bias
from vitrail.nn.feature_pyramid import FeaturePyramid
from vitrail.nn.init import init_detr, skip_on_meta
from vitrail.nn.shapes import BoxOutput
from vitrail.weights.card import IMAGENET_MEAN, IMAGENET_STD, Card, Preprocessing

TASK = "object-detection"

RENAMES = own_layout("head.linear", "selector.linear")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a quick DETR's parameters and what it computes."""

    img_size: tuple[int, int] = (192, 256)
    """Rows and columns that pictures are made for. Any size runs."""
    in_chans: int = 3
    """Channels of the image."""
    num_classes: int = 3
    """Classes; as many logits."""
    backbone: str = "resnet10_nano"
    """A classification variant whose last maps are read."""
    backbone_changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the backbone's Config that differ from the variant's."""
    maps: int = 3
    """How many of the backbone's last maps queries read."""
    encoded: int = 2
    """How many of those, the coarsest, the encoder attends over."""
    width: int = 128
    """D, the width of pyramid and transformer."""
    heads: int = 4
    """Heads of every attention."""
    hidden: int = 512
    """Width of the MLPs' inner layer."""
    encoder_depth: int = 1
    """Layers over the coarse maps."""
    decoder_depth: int = 3
    """Layers over the queries."""
    queries: int = 50
    """Slots: more than there will ever be objects in a picture."""
    groups: int = 3
    """Groups of queries while training."""
    frozen_norm: bool = False
    """Whether the backbone's batch norms never change; for backbones with published weights."""
    drop_rate: float = 0.0
    """Dropout on attention weights, branches and the MLPs' inner layer."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the backbone."""

    def __post_init__(self) -> None:
        counts = ("maps", "width", "hidden", "decoder_depth", "queries", "groups", "num_classes")
        check_config(self, counts)
        if not 0 <= self.encoded <= self.maps:
            raise ModelError(f"encoded must lie in 0..maps ({self.maps}); got {self.encoded}.")


class QuickDetr(Detector):
    """Images `[B, C, I, J]` and padding `[B, I, J]` to a BoxOutput of `queries` slots with one logit a class."""

    def __init__(self, config: Config, chosen: Chosen) -> None:
        super().__init__()
        width, heads, hidden, dropout = config.width, config.heads, config.hidden, config.drop_rate
        self.backbone, self.backbone_config = chosen.trunk, chosen.config
        self.pyramid = FeaturePyramid(chosen.coarsest(config.maps), width)
        self.encoded = config.encoded
        self.encoder = Encoder(width, heads, hidden, config.encoder_depth, dropout=dropout)
        self.norm = nn.LayerNorm(width)
        self.selector = AnchorHead(width, config.num_classes)
        self.queries = nn.Embedding(config.groups * config.queries, width)
        self.count, self.groups = config.queries, config.groups
        self.decoder = AnchorDecoder(width, heads, hidden, config.decoder_depth, dropout)
        self.head = AnchorHead(width, config.num_classes)

    def forward(
        self, images: Float[Tensor, "B C I J"], padding: Bool[Tensor, "B I J"] | None = None
    ) -> BoxOutput:
        """Logits `[B, Q, K]` and boxes `[B, Q, 4]`; those of all cells, groups and layers while training."""
        levels = self.pyramid.levels
        maps = self.pyramid(self.backbone(images).maps[-len(levels) :])
        cells = cells_of(maps, levels, (images.shape[2], images.shape[3]), padding)  # [B or 1, N, 4]
        tokens = torch.cat([map.flatten(2).transpose(1, 2) for map in maps], dim=1)  # [B, N, D]
        codes = place_code(cells[..., :2].flip(-1), tokens.shape[2] // 2).to(tokens.dtype)  # of (y, x)
        hidden = outside(cells) if padding is not None else None
        bias = None if hidden is None else padding_bias(hidden, tokens)
        memory = self._encode(tokens, codes, bias, [map.shape[2] * map.shape[3] for map in maps])
        logits, boxes = self.selector(memory, self._anchors(cells))
        boxes = boxes.expand(tokens.shape[0], -1, -1)
        start = self._start(logits, boxes, hidden)
        groups = self.groups if self.training else 1
        content = self.queries.weight[: groups * self.count] + tokens.new_zeros(tokens.shape[0], 1, 1)
        apart = group_bias(groups, self.count, tokens) if groups > 1 else None
        answers = self.decoder(content, start.repeat(1, groups, 1), memory, codes, self.head, bias, apart)
        if not self.training:
            return BoxOutput(*answers[-1])
        split = [pair for answer in answers for pair in self._by_group(answer)]
        last = split[-groups]
        others = [pair for pair in split if pair is not last]
        return BoxOutput(*last, ((logits, boxes), *others))

    @property
    def class_heads(self) -> tuple[Any, ...]:
        return (self.selector, self.head)  # of the cells, and of the queries

    def _encode(self, tokens: Tensor, codes: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
        """The coarse maps' tokens go through the encoder; all are normed."""
        if self.encoded:
            fine = sum(sizes[: len(sizes) - self.encoded])
            coarse = self.encoder(
                tokens[:, fine:], codes[:, fine:], None if bias is None else bias[..., fine:]
            )
            tokens = torch.cat([tokens[:, :fine], coarse], dim=1)
        out: Tensor = self.norm(tokens)
        return out

    def _anchors(self, cells: Tensor) -> Tensor:
        """A cell's first guess of a box: around its centre, four cells wide and high."""
        return torch.cat([cells[..., :2], 4 * cells[..., 2:]], dim=-1)

    def _start(self, logits: Tensor, boxes: Tensor, hidden: Tensor | None) -> Tensor:
        """The boxes of the cells that are surest of any class, `[B, Q, 4]`; what is learned there stays there."""
        scores = logits.detach().amax(dim=-1)  # [B, N]
        if not torch.compiler.is_exporting() and scores.shape[1] < self.count:
            raise ModelError(
                f"{self.count} queries start from as many cells, and such a picture has {scores.shape[1]}: take larger"
                " pictures (img_size), or fewer queries (queries)."
            )
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        places = scores.topk(self.count, dim=1).indices
        return boxes.detach().gather(1, places[..., None].expand(-1, -1, 4))

    def _by_group(self, answer: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """A layer's answer, one pair a group."""
        logits, boxes = (part.split(self.count, dim=1) for part in answer)
        return list(zip(logits, boxes, strict=True))


def build(config: Config) -> QuickDetr:
    """The network of a configuration, initialised from torch's default generator."""
    changes = {
        "norm": "frozen" if config.frozen_norm else None,
        "drop_path_rate": config.drop_path_rate or None,
        **config.backbone_changes,
    }
    model = QuickDetr(config, backbone(config.backbone, config.in_chans, **changes))
    if not skip_on_meta(model):
        init_detr(model)
        model.head.init_weights()
        model.selector.init_weights()
    return model


VARIANTS: dict[str, Config] = {
    "quick_detr_nano":     Config(),
    "quick_detr_resnet50": Config(img_size=(800, 1333), num_classes=91, backbone="resnet50", width=256, hidden=1024,
                                  decoder_depth=6, queries=300, heads=8, frozen_norm=True),
}  # fmt: skip

TINY = Config(
    img_size=(64, 64), num_classes=5, backbone="resnet10_nano", maps=2, encoded=1, width=32, heads=4, hidden=64,
    decoder_depth=2, queries=10, groups=2,
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
            crop_mode="squash" if name.endswith("nano") else "fit",
        ),
    )
    for name, config in VARIANTS.items()
}
