"""A classifier: a backbone that turns images into tokens, and a head that turns tokens into logits.

Every classification family is built into this one class; what differs between papers is the parts handed in.
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import UnsupportedError
from vitrail.models.model import Model, depth_in_backbone
from vitrail.nn.heads import ClassHead, DistilledHead
from vitrail.nn.shapes import ClassOutput, Features, Grid, Level
from vitrail.nn.trunk import Stage


class Backbone(Protocol):
    """What a classifier holds: a Trunk of transformer stages, or a residual network."""

    levels: tuple[Level, ...]
    """Channels and stride of each map that a call answers."""
    stages: nn.ModuleList
    """Each with its `blocks` and the switch `recompute`."""

    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        """The last stage's tokens and their grid."""

    def __call__(self, images: Tensor) -> Features:
        """Maps from fine to coarse, and the prefix tokens."""


class Classifier(Model):
    """Images `[B, C, I, J]`, normalised as `card.preprocessing` says, to class logits `[B, K]`."""

    def __init__(self, backbone: Backbone, head: ClassHead | DistilledHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Float[Tensor, "B C I J"]) -> Tensor | ClassOutput:
        """Logits `[B, K]`; a distilled model that trains against a teacher gives both heads' (ClassOutput)."""
        out: Tensor | ClassOutput = self.head(self.forward_features(images))
        return out

    def forward_features(self, images: Float[Tensor, "B C I J"]) -> Float[Tensor, "B N D"]:
        """The last stage's tokens after its norm, prefix first."""
        return self.backbone.tokens(images)[0]

    def forward_head(self, tokens: Float[Tensor, "B N D"], pre_logits: bool = False) -> Tensor | ClassOutput:
        """Logits from `forward_features`' tokens, or the pooled vector `[B, D]`."""
        out: Tensor | ClassOutput = self.head.pool(tokens) if pre_logits else self.head(tokens)
        return out

    def features(self, images: Float[Tensor, "B C I J"]) -> Features:
        """Maps from fine to coarse and the prefix tokens, for dense use; `levels` says channels and strides."""
        out: Features = self.backbone(images)
        return out

    @property
    def levels(self) -> tuple[Level, ...]:
        return self.backbone.levels

    @property
    def grid(self) -> Grid:
        """The last stage's grid at the image size that the model was built for."""
        rows, columns = self.config.img_size
        stride = self.levels[-1].stride
        return Grid(-(-rows // stride), -(-columns // stride))

    @property
    def depth(self) -> int:
        """Blocks in all stages together."""
        return sum(len(stage.blocks) for stage in self._stages())

    def depth_of(self, name: str) -> int:
        """How deep a parameter lies: 0 for what stands before the first block, 1 to `depth` for blocks (and for
        what stands before them in later stages), `depth` + 1 for the head. For layer-wise learning rates."""
        return self.depth + 1 if name.startswith("head.") else depth_in_backbone(name, self._stages())

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.classifier

    def set_grad_checkpointing(self, on: bool = True) -> None:
        """Recompute each block's activations in the backward pass: less memory for a third more time."""
        for stage in self._stages():
            stage.recompute = on

    def set_patch_drop(self, share: float) -> None:
        """Leave out a share of each picture's patches in the last stage while training, 0 for none (FLIP, 2212.00794;
        PatchDropout, 2208.07220): positions are added before, so what stays knows where it was.

        Raises UnsupportedError where its blocks or the head need all patches (windows, reductions, convolutions).
        """
        last = self._stages()[-1]
        able = isinstance(last, Stage) and last.blind and getattr(self.head, "pooling", "token") != "flatten"
        if able:
            last.left_out = share
        elif share:
            raise UnsupportedError(
                "Patches can be left out where the last stage's blocks look at all tokens alike (ViT, DeiT, T2T-ViT,"
                f" PiT, Performer); those of {self.name} do not: take one of those, or leave no patches out."
            )

    def set_distilled_training(self, on: bool = True) -> None:
        """Whether a model with a distillation head gives both heads' logits while it trains."""
        if isinstance(self.head, DistilledHead):
            self.head.separate = on

    def _stages(self) -> list[Stage]:
        return list(self.backbone.stages)  # type: ignore[arg-type]
