"""From a module to a program that stands alone: torch.export with as much left free as the family allows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from vitrail.export.wrap import Deployed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Program:
    """An exported program, and what it leaves free."""

    exported: Any
    """The torch.export.ExportedProgram."""
    example: torch.Tensor
    """Images that it was traced with, uint8 `[2, C, I, J]`."""
    free_size: bool
    """Whether height and width are free beside the batch."""


def capture(deployed: Deployed, *, free_size: bool = True) -> Program:
    """The program of a deployed network: the batch is free, height and width where tracing finds no objection.

    free_size: False fixes height and width to the model's input size, which lets engines compute ahead what
        depends on them.
    """
    config = deployed.network.config
    torch.manual_seed(0)
    example = torch.randint(0, 256, (2, config.in_chans, *config.img_size), dtype=torch.uint8)
    free = torch.export.Dim.DYNAMIC
    # Windows are counted from the size, and shapes inside follow the count: tracing that takes minutes and fails.
    if free_size and not any(hasattr(part, "window") for part in deployed.network.modules()):
        try:
            exported = _export(deployed, example, {0: free, 2: free, 3: free})
            return Program(exported=exported, example=example, free_size=True)
        except Exception as error:  # tracing objects in many kinds; what matters is that it does
            logger.debug("the size cannot be left free: %s", error)
    exported = _export(deployed, example, {0: free})
    return Program(exported=exported, example=example, free_size=False)


def _export(deployed: Deployed, example: torch.Tensor, free: dict[int, Any]) -> Any:
    with torch.no_grad():
        return torch.export.export(deployed, (example,), dynamic_shapes=(free,), strict=False)
