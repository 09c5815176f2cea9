"""What all dense models share: a backbone with stages, and what training asks of a network with one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vitrail.models.model import Model, depth_in_backbone
from vitrail.nn.shapes import Features, Level


class Dense(Model):
    """A network whose backbone stands in `.backbone` and whose class layer is `.head.linear`."""

    backbone: Any
    """Called with images it answers Features; `levels` and `stages` as a classifier's."""
    backbone_config: Any
    """The classification Config that the backbone was built from."""
    backbone_context: Mapping[str, Any] = {}
    """What rules must know besides, where a classifier's weights become the backbone's: how positions resample."""

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
        return depth_in_backbone(name, self.backbone.stages)

    def get_classifier(self) -> nn.Module:
        """The class layer."""
        layer: nn.Module = self.head.linear
        return layer

    def set_grad_checkpointing(self, on: bool = True) -> None:
        """Recompute activations in the backward pass, in every part that can."""
        for part in self.modules():
            if hasattr(part, "recompute"):
                part.recompute = on  # type: ignore[assignment]
