"""Detectors that answer at every cell: which cell answers for what, their loss by hand, suppression."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitrail.nn.cells import cells_of
from vitrail.nn.shapes import DenseBoxOutput, Level
from vitrail.tasks.boxes import to_corners
from vitrail.tasks.dense_loss import owners
from vitrail.tasks.detect import BoxTarget, Detect

LEVELS = (Level(1, 8), Level(1, 16), Level(1, 32))
SIZE = (64, 96)


def cells(padding: Tensor | None = None) -> Tensor:
    maps = [torch.zeros(1, 1, SIZE[0] // level.stride, SIZE[1] // level.stride) for level in LEVELS]
    return cells_of(maps, LEVELS, SIZE, padding)


def pixels(*boxes: tuple[float, float, float, float]) -> Tensor:
    """Corners in pixels to centres in 0..1."""
    corners = torch.tensor(boxes) / torch.tensor([96.0, 64.0, 96.0, 64.0])
    return torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)


def owners_by_hand(wanted: list[tuple[float, float, float, float]]) -> tuple[list[int], list[float]]:
    """FCOS's rules in pixels, cell by cell."""
    found, centred = [], []
    for number, level in enumerate(LEVELS):
        step = level.stride
        low = 4 * step if number else 0
        high = math.inf if number == len(LEVELS) - 1 else 8 * step
        for row in range(SIZE[0] // step):
            for column in range(SIZE[1] // step):
                x, y = (column + 0.5) * step, (row + 0.5) * step
                best, area, centre = -1, math.inf, 0.0
                for place, (x1, y1, x2, y2) in enumerate(wanted):
                    sides = (x - x1, y - y1, x2 - x, y2 - y)
                    near = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) <= 1.5 * step
                    if min(sides) <= 0 or not near or not low < max(sides) <= high:
                        continue
                    if (x2 - x1) * (y2 - y1) < area:
                        best, area = place, (x2 - x1) * (y2 - y1)
                        across = min(sides[0], sides[2]) / max(sides[0], sides[2])
                        centre = math.sqrt(across * min(sides[1], sides[3]) / max(sides[1], sides[3]))
                found.append(best)
                centred.append(centre)
    return found, centred


def test_cells_answer_for_objects_as_the_paper_says() -> None:
    wanted = [
        (10.0, 6.0, 34.0, 30.0),
        (12.0, 8.0, 28.0, 22.0),
        (2.0, 1.0, 90.0, 62.0),
        (60.0, 20.0, 95.0, 60.0),
    ]
    owner, centred = owners(cells()[0], to_corners(pixels(*wanted)))
    by_hand, centre_by_hand = owners_by_hand(wanted)
    assert owner.tolist() == by_hand
    assert set(by_hand) == {-1, 0, 1, 2, 3}
    assert centred.tolist() == pytest.approx(centre_by_hand, abs=1e-5)


def answer(boxes: Tensor, logits: Tensor, quality: Tensor, padding: Tensor | None = None) -> DenseBoxOutput:
    return DenseBoxOutput(logits, boxes, quality, cells(padding).expand(len(logits), -1, -1))


def test_the_right_answer_costs_nearly_nothing_and_a_wrong_one_much() -> None:
    target = BoxTarget(pixels((10, 6, 34, 30), (2, 1, 90, 62)), torch.tensor([0, 1]))
    owner, centred = owners(cells()[0], to_corners(target.boxes))
    logits = torch.full((1, len(owner), 2), -12.0)
    boxes = torch.full((1, len(owner), 4), 0.5)
    for cell, place in enumerate(owner.tolist()):
        if place >= 0:
            logits[0, cell, int(target.labels[place])] = 12.0
            boxes[0, cell] = target.boxes[place]
    chance = centred.clamp(1e-6, 1 - 1e-6)
    quality = torch.log(chance / (1 - chance))[None]
    task = Detect(["a", "b"])
    right = task.loss(answer(boxes, logits, quality), [target])
    assert float(right["class"]) < 1e-4 and float(right["giou"]) < 1e-5
    assert float(right["loss"]) == pytest.approx(float(right["class"] + right["giou"] + right["centre"]))
    wrong = task.loss(answer(boxes, -logits, quality), [target])
    assert float(wrong["class"]) > 10
    (found,) = task.decode(answer(boxes, logits, quality), [SIZE], threshold=0.05)
    assert {(box.label, *(round(corner) for corner in box.corners)) for box in found.boxes} == {
        ("a", 10, 6, 34, 30),
        ("b", 2, 1, 90, 62),
    }


def test_padding_is_neither_learned_from_nor_found_in() -> None:
    padding = torch.zeros(1, *SIZE, dtype=torch.bool)
    padding[:, :, 48:] = True
    count = cells().shape[1]
    logits, boxes = torch.full((1, count, 1), -12.0), torch.full((1, count, 4), 0.5)
    outside = cells(padding)[0, :, 0] > 1
    assert outside.any()
    logits[0, outside] = 12.0
    output = answer(boxes, logits, torch.zeros(1, count), padding)
    empty = BoxTarget(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    task = Detect(["a"])
    assert float(task.loss(output, [empty])["loss"]) < 1e-3
    assert task.decode(output, [SIZE], threshold=0.05)[0].boxes == ()


def test_objects_are_told_in_the_picture_without_its_padding() -> None:
    padding = torch.zeros(1, *SIZE, dtype=torch.bool)
    padding[:, :, 48:] = True
    half = cells(padding)[0]
    inside = half[:, 0] <= 1
    assert torch.allclose(half[inside, 0] * 48, cells()[0][inside, 0] * 96)
    assert torch.allclose(half[:, 1], cells()[0][:, 1])


def test_a_batch_without_objects_has_a_finite_loss_and_gradient() -> None:
    count = cells().shape[1]
    logits = torch.randn(2, count, 2, requires_grad=True)
    output = answer(torch.rand(2, count, 4), logits, torch.zeros(2, count))
    empty = BoxTarget(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    found = Detect(["a", "b"]).loss(output, [empty, empty])
    found["loss"].backward()
    assert torch.isfinite(found["loss"]) and torch.isfinite(logits.grad).all()  # type: ignore[arg-type]
