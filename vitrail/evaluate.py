"""Evaluation: a task's metrics over batches, as (name, value). Training and `vitrail evaluate` call this."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Batch(Protocol):
    """What evaluation reads of a loader's batch."""

    @property
    def images(self) -> Tensor:
        """uint8 `[B, C, h, w]`."""

    @property
    def targets(self) -> Any:
        """What the task compares with: classes `[B]`, masks `[B, h, w]`, or boxes of each picture."""


class Accumulator(Protocol):
    """Metrics as sums over batches."""

    def add(self, output: Any, targets: Any) -> None:
        """Count a batch: the network's output and the loader's targets."""

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by those over all processes; `total` sums one tensor."""

    def result(self) -> dict[str, float]:
        """The metrics by name. Raises DataError where not one picture was counted."""


def evaluate(
    forward: Callable[..., Any],
    batches: Iterable[Batch],
    metrics: Accumulator,
    *,
    total: Callable[[Tensor], Tensor] | None = None,
    watch: Callable[[Any, Any], None] | None = None,
) -> Iterator[tuple[str, float]]:
    """Run every batch and yield the metrics.

    Args:
        forward: from a loader's images (uint8 `[B, C, h, w]`) to the network's output, in evaluation mode: an
            engine, or training's own call. It moves the images to its device and normalises them. Where a
            batch has `.padding` (Bool `[B, h, w]`, True where there is no picture), it gets that too.
        batches: anything with `.images` and `.targets`, such as a Loader over preprocessed pictures.
        metrics: a fresh accumulator (`task.metrics()`); it stays with the caller, who may ask it for more.
        total: sums a tensor over processes; None in a single one. Called after the last batch only, by every
            process alike, so that processes may hold different numbers of batches.
        watch: called after each batch with (output, batch): progress, mistakes, predictions.
    """
    with torch.no_grad():  # left before the first yield, or the caller would be in it
        for batch in batches:
            padding = getattr(batch, "padding", None)
            output = forward(batch.images) if padding is None else forward(batch.images, padding)
            metrics.add(output, batch.targets)
            if watch is not None:
                watch(output, batch)
        if total is not None:
            metrics.reduce(total)
    yield from metrics.result().items()
