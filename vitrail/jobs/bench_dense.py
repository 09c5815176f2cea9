"""The loss that a benchmark trains on: random targets of the kind that a network of boxes or masks learns from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitrail.data.dense_loader import Several
from vitrail.data.joint import BoxLabels
from vitrail.tasks.registry import make_task

OBJECTS = 8
"""Boxes in each picture."""


def dense_loss(model: Any, images: Tensor) -> Callable[[Any], Tensor]:
    """From the network's answer to these images `[B, C, I, J]` to the loss against targets drawn once."""
    labels = [f"class {index}" for index in range(model.num_classes)]
    task = make_task(model.card.task, labels, auxiliary=getattr(model.config, "auxiliary_weight", 0.4))
    rows, columns = (int(side) for side in images.shape[2:])
    if model.card.task == "image-segmentation":
        targets: Any = torch.randint(len(labels), (len(images), rows, columns), device=images.device)
    else:
        targets = Several([_boxes(len(labels), (rows, columns)) for _ in range(len(images))]).to(
            images.device
        )

    def loss(output: Any) -> Tensor:
        total: Tensor = task.loss(output, targets)["loss"]
        return total

    return loss


def _boxes(classes: int, size: tuple[int, int]) -> BoxLabels:
    sides = torch.rand(OBJECTS, 2) * 0.3 + 0.05
    return BoxLabels(
        boxes=torch.cat([torch.rand(OBJECTS, 2) * (1 - sides) + sides / 2, sides], dim=1),
        labels=torch.randint(classes, (OBJECTS,)),
        size=size,
        crowd=torch.zeros(OBJECTS, dtype=torch.bool),
        area=sides.prod(dim=1),
        index=0,
    )
