"""Every kind of detector can learn eight pictures by heart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.models import registry
from vitrail.tasks.detect import BoxTarget, Detect

LABELS = ["square", "disc", "cross"]
SIDE = 64


def pictures() -> tuple[Tensor, list[BoxTarget]]:
    """Eight pictures of two or three bright shapes on noise, told by colour, with their boxes."""
    generator = torch.Generator().manual_seed(0)
    images = 0.1 * torch.randn(8, 3, SIDE, SIDE, generator=generator)
    targets = []
    for picture in range(8):
        boxes, labels = [], []
        for place in torch.randperm(4, generator=generator)[: 2 + picture % 2].tolist():
            height, width = torch.randint(14, 27, (2,), generator=generator).tolist()
            top, left = 32 * (place // 2) + (32 - height) // 2, 32 * (place % 2) + (32 - width) // 2
            label = int(torch.randint(0, 3, (), generator=generator))
            images[picture, label, top : top + height, left : left + width] += 2.0
            boxes.append([(left + width / 2) / SIDE, (top + height / 2) / SIDE, width / SIDE, height / SIDE])
            labels.append(label)
        targets.append(
            BoxTarget(torch.tensor(boxes), torch.tensor(labels), (SIDE, SIDE), None, None, picture)
        )
    return images, targets


def learned(model: Any, steps: int, rate: float) -> tuple[dict[str, float], dict[str, float]]:
    """The last step's losses and the metrics of the pictures it was trained on."""
    images, targets = pictures()
    task = Detect(LABELS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.eval()
    for _ in range(steps):
        terms = task.loss(model(images), targets)
        optimiser.zero_grad()
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    metrics = task.metrics()
    with torch.no_grad():  # norms still by the batch: eight pictures are too few for running statistics
        metrics.add(model(images), targets)
    return {name: float(value.detach()) for name, value in terms.items()}, metrics.result()


def small(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    module = registry.module_of(family)
    config = registry.changed(module.TINY, num_classes=3, **changes)
    return registry.from_config(next(iter(module.VARIANTS)), config)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("family", "changes", "steps"),
    [
        ("detr", {"width": 64, "dilated": 1}, 400),
        ("quick_detr", {"width": 64, "maps": 3}, 200),
        ("fcos", {"width": 64}, 200),
    ],
)
def test_learns_eight_pictures_by_heart(family: str, changes: dict[str, Any], steps: int) -> None:
    pytest.importorskip("faster_coco_eval")
    terms, result = learned(small(family, **changes), steps, 1e-3)
    assert terms["giou"] < 0.15 and terms["class"] < 0.05
    assert result["ap50"] > 0.98 and result["ap"] > 0.7
