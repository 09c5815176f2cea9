"""What graphs outside of torch are fed with, and what becomes of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitrail.errors import ConfigError, WeightsError
from vitrail.export.manifest import Manifest
from vitrail.export.wrap import CLASSES, answer_of


def needed(outputs: Sequence[str]) -> tuple[str, ...]:
    """The outputs that `record` reads: what a graph decodes besides is for other programs."""
    return tuple(name for name in outputs if name not in ("probabilities", "scores", "classes"))


def classes_of(manifest: Manifest, logits: Sequence[Any], where: object) -> int:
    """How many classes a graph knows, by its card, else by the shape of its logits `[B, K]`.

    Raises WeightsError where neither tells, or a classifier's card and logits tell two numbers.
    """
    told = manifest.card.num_classes
    found = logits[-1] if manifest.card.task == CLASSES and isinstance(logits[-1], int) else None
    if None not in (told, found) and told != found:
        raise WeightsError(
            f"{where} gives {found} logits and its card tells {told} classes: the card is another model's. Export the"
            " model again."
        )
    classes = told or found
    if not classes:
        raise WeightsError(f"{where} does not tell how many classes it knows: export the model again.")
    return classes


def feed(images: Tensor, padding: Tensor | None, names: Sequence[str], manifest: Manifest) -> list[Tensor]:
    """A graph's inputs, on the CPU: uint8 images `[B, C, h, w]`, and padding Bool `[B, h, w]` where it takes one.

    Raises ConfigError for images of another size than a graph of one size takes, or than one holds for.
    """
    rows, columns = manifest.card.preprocessing.input_size
    size = (int(images.shape[2]), int(images.shape[3]))
    if not manifest.free_size and size != (rows, columns):
        raise ConfigError(
            f"The exported file takes pictures of {rows}×{columns} pixels alone; got {size[0]}×{size[1]}. A sliding"
            " window needs pictures at least as large as the file's; or use the model's own folder."
        )
    if manifest.free_size and not (manifest.rows.take(size[0]) and manifest.columns.take(size[1])):
        raise ConfigError(
            f"The exported file takes pictures with a height of {manifest.rows} and a width of {manifest.columns}"
            f" pixels; got {size[0]}×{size[1]}. Resize them, or use the model's own folder."
        )
    inputs = [images.cpu().contiguous()]
    if len(names) > 1:
        inputs.append(torch.zeros(len(images), *size, dtype=torch.bool) if padding is None else padding.cpu())
    return inputs


def record(names: Sequence[str], values: Sequence[Any], task: str) -> Any:
    """The record of nn.shapes, or logits, from outputs by name; float32 on the CPU."""
    found = {name: torch.as_tensor(value) for name, value in zip(names, values, strict=True)}
    return answer_of({name: value.float() for name, value in found.items()}, task)
