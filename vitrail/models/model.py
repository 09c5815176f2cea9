"""What every network of vitrail carries besides its parameters: a name, its configuration and its card."""

from __future__ import annotations

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

    @property
    def num_classes(self) -> int:
        return int(self.config.num_classes)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone besides those of rank 1: those of UNDECAYED."""
        return {name for name, _ in self.named_parameters() if any(part in f".{name}" for part in UNDECAYED)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model folder: config.json, model.safetensors, preprocessor_config.json and README.md."""
        from vitrail.models.loading import save_model

        save_model(self, folder)
