"""Frozen features, computed once: a linear probe then costs one pass over the images and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrail.runtime import Runtime


class FeatureBatch(NamedTuple):
    """What a frozen network says of a batch: `images` are its vectors `[B, F]`, `targets` class numbers `[B]`."""

    images: Tensor
    targets: Tensor


class FeatureBatches:
    """Vectors in memory as batches, in an order that follows from (seed, epoch); the last few are left out."""

    def __init__(self, features: Tensor, targets: Tensor, *, batch_size: int, seed: int) -> None:
        self.features, self.targets = features, targets
        self.batch_size, self.seed = min(batch_size, len(targets)), seed
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return len(self.targets) // self.batch_size

    def resume(self, epoch: int, position: int) -> None:
        """The next iteration begins at this image of this epoch."""
        self.epoch, self.position = epoch, position

    def __iter__(self) -> Iterator[FeatureBatch]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(len(self.targets), generator=generator)
        for start in range(self.position, len(self) * self.batch_size, self.batch_size):
            index = order[start : start + self.batch_size]
            yield FeatureBatch(self.features[index], self.targets[index])


@torch.no_grad()
def compute_features(
    network: nn.Module,
    last: nn.Module,
    batches: Iterable[Any],
    inputs: Callable[[Tensor], Tensor],
    runtime: Runtime,
) -> tuple[Tensor, Tensor]:
    """What the last layer is given for every image `[N, F]` in float32, and the class numbers `[N]`; on the CPU."""
    network.eval()
    features: list[Tensor] = []
    targets: list[Tensor] = []

    def catch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        features.append(arguments[0].detach().float().cpu())

    hook = last.register_forward_pre_hook(catch)
    try:
        for batch in batches:
            with runtime.autocast():
                network(inputs(batch.images))
            targets.append(batch.targets)
    finally:
        hook.remove()
    return torch.cat(features), torch.cat(targets)
