"""Boxes: known answers of IoU and GIoU, and that they agree with torchvision on random boxes."""

from __future__ import annotations

import pytest
import torch

from vitrail.tasks.boxes import area, generalized_iou, iou, to_corners, to_pixels


def random_corners(count: int) -> torch.Tensor:
    torch.manual_seed(count)
    return to_corners(torch.rand(count, 4, dtype=torch.float64) * 0.5 + 0.1)


def test_centres_become_corners() -> None:
    corners = to_corners(torch.tensor([[3.0, 3.0, 4.0, 2.0]]))
    assert corners.tolist() == [[1.0, 2.0, 5.0, 4.0]] and area(corners).tolist() == [8.0]


def test_known_answers_of_generalized_iou() -> None:
    one = torch.tensor([0.0, 0.0, 2.0, 2.0])
    others = torch.tensor([[1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 3.0, 3.0], [0.0, 0.0, 2.0, 2.0]])
    assert generalized_iou(one, others).tolist() == pytest.approx([-0.0794, -0.4444, 1.0], abs=1e-4)


def test_agrees_with_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops")
    one, other = random_corners(7), random_corners(5)
    assert torch.allclose(iou(one[:, None], other)[0], ops.box_iou(one, other))
    assert torch.allclose(generalized_iou(one[:, None], other), ops.generalized_box_iou(one, other))


def test_boxes_without_area_share_nothing_and_have_a_gradient() -> None:
    point = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True)
    value = generalized_iou(point, torch.tensor([0.5, 0.5, 0.5, 0.5]))
    assert float(value.detach()) == 0.0
    value.backward()
    assert torch.isfinite(point.grad).all()  # type: ignore[arg-type]


def test_pixels_are_counted_to_the_right_and_down() -> None:
    boxes = torch.tensor([[0.5, 0.25, 0.5, 0.5]])
    assert to_pixels(boxes, (100, 200)).tolist() == [[50.0, 0.0, 150.0, 50.0]]
