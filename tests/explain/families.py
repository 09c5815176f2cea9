"""Every family's small model, and pictures for it."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from vitrail.models import registry
from vitrail.models.model import Model

FAMILIES = registry.families()


def tiny(family: str, **changes: Any) -> Model:
    """The family's TINY, with weights that are not zero anywhere."""
    torch.manual_seed(0)
    module = importlib.import_module(registry.FAMILIES[family])
    model = registry.from_config(next(iter(module.VARIANTS)), registry.changed(module.TINY, **changes))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.abs().max() < 1e-3:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def pictures(model: Model, count: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, model.config.in_chans, *model.config.img_size, generator=generator)
