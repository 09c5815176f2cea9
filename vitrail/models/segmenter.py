"""A segmenter: a backbone that turns images into maps, and heads that give every pixel a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vitrail.models.backbones import Chosen
from vitrail.models.dense import Dense
from vitrail.nn.entry import pad_to
from vitrail.nn.masks import MaskHead
from vitrail.nn.shapes import MaskOutput


class Segmenter(Dense):
    """Images `[B, C, I, J]`, normalised as `card.preprocessing` says, to class logits `[B, K, I, J]`.

    Any size runs: images are padded below and to the right to a multiple of the coarsest stride, with zeros, which
    is the mean of training, and the logits are cut back.
    """

    def __init__(
        self,
        chosen: Chosen,
        head: MaskHead,
        *,
        neck: nn.Module | None = None,
        auxiliary: Sequence[MaskHead] = (),
    ) -> None:
        """
        Args:
            head: called with the neck's maps and a size, answers logits of that size.
            neck: maps to maps; none hands on the backbone's.
            auxiliary: heads like `head` whose logits are given while training.
        """
        super().__init__()
        self.backbone, self.backbone_config = chosen.trunk, chosen.config
        self.neck = nn.Identity() if neck is None else neck
        self.head = head
        self.auxiliary = nn.ModuleList(auxiliary)
        self.step = max(level.stride for level in self.backbone.levels)

    def forward(self, images: Float[Tensor, "B C I J"]) -> MaskOutput:
        """Logits at the images' size; those of the auxiliary heads too while training."""
        rows, columns = images.shape[2:]
        padded = pad_to(images, (self.step, self.step))
        size = (padded.shape[2], padded.shape[3])
        maps = self.neck(self.backbone(padded).maps)
        heads = [self.head, *self.auxiliary] if self.training else [self.head]
        logits, *others = (head(maps, size)[:, :, :rows, :columns] for head in heads)
        return MaskOutput(logits, tuple(others))

    @property
    def class_heads(self) -> tuple[Any, ...]:
        return (*self.auxiliary, self.head)
