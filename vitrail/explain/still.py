"""A network held still while it is looked into: what was switched for the look is switched back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from vitrail.explain.capture import evaluation


@contextmanager
def held_still(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, parameters without gradient, no recomputation of blocks; all as before afterwards.

    Parameters whose gradient is not asked for need not remember their inputs, and `.grad` stays as it was.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    recomputing = [module for module in network.modules() if getattr(module, "recompute", False) is True]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for module in recomputing:
            module.recompute = False  # type: ignore[assignment]
        with evaluation(network):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module in recomputing:
            module.recompute = True  # type: ignore[assignment]
