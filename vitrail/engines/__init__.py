"""Engines: what computes a model's output. One protocol, chosen when a model is opened.

An engine is called with uint8 images `[B, C, h, w]`, already at the model's size, and answers float32 logits
on the CPU or on its device. Normalising belongs to the engine, so that every engine sees the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vitrail.errors import ConfigError, suggestion

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitrail.weights.card import Card

ENGINES = ("auto", "torch")
"""Names of the engines; auto takes the one that suits the model's files and the device."""


class Engine(Protocol):
    """What every engine offers."""

    card: Card
    """Class names and preprocessing travel with the model."""

    classes: int
    """Number of logits."""

    def __call__(self, images: Tensor) -> Tensor:
        """Logits `[B, K]`, float32, of uint8 images `[B, C, h, w]` at the model's size."""
        ...


def open_engine(
    model: str | Path | nn.Module, engine: str = "auto", *, device: str = "auto", precision: str = "auto"
) -> Engine:
    """The engine of a model folder, a run folder, or a network.

    Raises:
        ConfigError: an unknown engine, device or precision.
        WeightsError: a folder that holds no model, or a damaged one.
    """
    if engine not in ENGINES:
        raise ConfigError(
            f"engine must be one of {', '.join(ENGINES)}; got {engine!r}.{suggestion(engine, ENGINES)}"
        )
    from vitrail.engines.pytorch import TorchEngine

    return TorchEngine(model, device=device, precision=precision)
