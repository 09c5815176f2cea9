"""A running average of the weights, which often scores better than the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from vitrail.errors import ConfigError, WeightsError
from vitrail.runtime import Runtime


class Average:
    """Exponential moving average of a network's parameters.

    Buffers are the network's own at every time: running statistics are averages already, and a mean of two draws
    of random features is neither.

    The decay starts low and rises to its value, (1 + step) / (10 + step) at first, so that the random start
    is forgotten at once and short runs profit too.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ConfigError(f"The decay of averaged weights must be between 0 and 1, not {decay}.")
        self.decay = decay
        self._live = {name: parameter.detach() for name, parameter in network.named_parameters()}
        self.weights = {name: value.clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the network's weights after step 0, 1, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), list(self._live.values()), 1 - decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside, the network holds the averaged weights."""
        kept = {name: value.clone() for name, value in self._live.items()}
        for name, value in self._live.items():
            value.copy_(self.weights[name])
        try:
            yield
        finally:
            for name, value in self._live.items():
                value.copy_(kept[name])

    def load(self, weights: Mapping[str, Tensor], runtime: Runtime) -> None:
        """Takes the average that a checkpoint holds."""
        if set(weights) != set(self.weights):
            raise WeightsError("The averaged weights in the checkpoint belong to another network.")
        for name, value in self.weights.items():
            value.copy_(runtime.place_like(weights[name], value))
