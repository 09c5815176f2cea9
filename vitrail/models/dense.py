"""What all dense models share: a backbone with stages, and what training asks of a network with one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vitrail.models.model import Model
from vitrail.nn.shapes import Features, Level


class Dense(Model):
    """A network whose backbone stands in `.backbone` and whose class layer is `.head.linear`."""

    backbone: Any
    """Called with images it answers Features; `levels` and `stages` as a classifier's."""
    backbone_config: Any
    """The classification Config that the backbone was built from."""
    backbone_context: Mapping[str, Any] = {}
    """What rules must know besides, where a classifier's weights become the backbone's: how positions resample."""
    head: Any
    """Holds the class layer as `linear`, and gives it new classes in `reset`."""

    def features(self, images: Float[Tensor, "B C I J"]) -> Features:
        """The backbone's maps, fine to coarse."""
        out: Features = self.backbone(images)
        return out

    @property
    def levels(self) -> tuple[Level, ...]:
        """Channels and stride of each of the backbone's maps."""
        levels: tuple[Level, ...] = self.backbone.levels
        return levels

    @property
    def depth(self) -> int:
        """Blocks of the backbone; what stands behind it trains at the head's rate."""
        return sum(len(stage.blocks) for stage in self.backbone.stages)

    def depth_of(self, name: str) -> int:
        """How deep a parameter lies: 0 for the backbone's stem, its blocks in order, `depth` + 1 for the rest."""
        if not name.startswith("backbone."):
            return self.depth + 1
        found = re.match(r"backbone\.stages\.(\d+)\.(entry|blocks\.(\d+)|norm)", name)
        if found is None:
            return 0
        stage = int(found[1])
        before = sum(len(earlier.blocks) for earlier in self.backbone.stages[:stage])
        if found[3] is not None:
            return before + int(found[3]) + 1
        if found[2] == "entry":
            return before + 1 if stage else 0
        return before + len(self.backbone.stages[stage].blocks)

    def get_classifier(self) -> nn.Module:
        """The class layer."""
        layer: nn.Module = self.head.linear
        return layer

    @property
    def class_heads(self) -> tuple[Any, ...]:
        """The heads with a class layer, each of which gives it new classes in `reset`."""
        return (self.head,)

    def reset_classifier(self, num_classes: int) -> None:
        """New class layers for other classes; everything else keeps its weights.

        Raises ModelError where the network cannot have so many; it is then as it was.
        """
        config = dataclasses.replace(self.config, num_classes=num_classes)
        for head in self.class_heads:
            head.reset(num_classes)
        self.config = config
        self.card = self.card.with_classes(num_classes)

    def set_grad_checkpointing(self, on: bool = True) -> None:
        """Recompute activations in the backward pass, in every part that can."""
        for part in self.modules():
            if hasattr(part, "recompute"):
                part.recompute = on  # type: ignore[assignment]
