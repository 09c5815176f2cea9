"""What every network of vitrail carries besides its parameters: a name, its configuration and its card."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from vitrail.weights.card import Card

if TYPE_CHECKING:
    from pathlib import Path

    from vitrail.weights.adapter import Receipt

UNDECAYED = (".positions.", ".prefix.", "relative_", ".logit_scale")
"""Parts of the names of parameters that weight decay leaves alone whatever their rank: places, tokens and Swin v2's
temperatures."""


class Model(nn.Module):
    """A network with its papers. `registry.from_config` fills in the fields."""

    name: str = ""
    """The variant's name."""
    family: str = ""
    """The family's key in `registry.FAMILIES`."""
    config: Any = None
    """The family's Config that the network was built from."""
    card: Card
    """Preprocessing, class names, origin, scores."""
    receipt: Receipt | None = None
    """What became of every tensor of the file that was loaded, if one was."""
    head: Any
    """Holds the class layer, and gives it new classes in `reset`."""

    @property
    def num_classes(self) -> int:
        """Classes of the head; 0 where it has none."""
        return int(self.config.num_classes)

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

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone besides those of rank 1: those of UNDECAYED."""
        return {name for name, _ in self.named_parameters() if any(part in f".{name}" for part in UNDECAYED)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model folder: config.json, model.safetensors, preprocessor_config.json and README.md."""
        from vitrail.models.loading import save_model

        save_model(self, folder)


def depth_in_backbone(name: str, stages: Sequence[Any]) -> int:
    """How deep a parameter of the backbone lies, for layer-wise learning rates (BEiT, 2106.08254).

    0 for what stands before the first block, then the blocks of all stages from 1; what stands before the blocks of a
    later stage counts with its first block, a norm after them with its last.
    """
    found = re.match(r"backbone\.stages\.(\d+)\.(entry|blocks\.(\d+)|norm)", name)
    if found is None:
        return 0
    stage = int(found[1])
    before = sum(len(earlier.blocks) for earlier in stages[:stage])
    if found[3] is not None:
        return before + int(found[3]) + 1
    if found[2] == "entry":
        return before + 1 if stage else 0
    return before + len(stages[stage].blocks)
