"""A network from what a person names: a folder, or an architecture with random weights, of which that is said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from vitrail.errors import ModelError
from vitrail.models.registry import create_model, from_pretrained, is_model
from vitrail.weights.folder import model_folder

logger = logging.getLogger(__name__)


def open_network(model: str) -> tuple[Any, str]:
    """The network, and what must be said of it aloud. Raises ModelError where the name means nothing."""
    if Path(model).exists():
        return from_pretrained(model_folder(model)), ""
    if not is_model(model):
        raise ModelError(
            f"{model} is neither a folder nor the name of a network; `vitrail models` lists the names."
        )
    logger.warning("%s has no weights here: its weights are random.", model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_model(model), "random weights: what is shown means nothing"
