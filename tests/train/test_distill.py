"""The teacher's term is what the papers write, and reaches the right head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import ConfigError
from vitrail.nn.shapes import ClassOutput
from vitrail.tasks.classify import Classify
from vitrail.train.distill import Distillation

TASK = Classify(["a", "b", "c"])
TARGETS = torch.tensor([0, 1])
ANSWER = torch.tensor([[0.0, 3.0, 1.0], [0.0, 4.0, 1.0]])


def answer(images: Tensor) -> Tensor:
    return ANSWER


def test_hard_distillation_teaches_each_head_its_own_lesson() -> None:
    """Half the cross-entropy on the labels, half on the teacher's decision (DeiT, equation 3)."""
    own, distilled = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    terms = Distillation(TASK, answer)(ClassOutput(own, distilled), TARGETS, torch.zeros(2, 3, 4, 4))
    expected = F.cross_entropy(own, TARGETS) / 2 + F.cross_entropy(distilled, torch.tensor([1, 1])) / 2
    torch.testing.assert_close(terms["loss"], expected)
    terms["teacher"].backward(retain_graph=True)
    assert own.grad is None and distilled.grad is not None


def test_soft_distillation_vanishes_where_both_agree_and_keeps_its_gradient_at_any_temperature() -> None:
    same = Distillation(TASK, answer, "soft", weight=1.0)(ANSWER, TARGETS, torch.zeros(2, 3, 4, 4))
    assert same["loss"].item() == pytest.approx(0, abs=1e-6)
    norms = []
    for temperature in (20.0, 40.0):
        student = torch.zeros(2, 3, requires_grad=True)
        objective = Distillation(TASK, answer, "soft", weight=1.0, temperature=temperature)
        objective(student, TARGETS, torch.zeros(2, 3, 4, 4))["loss"].backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_illegal_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.\.1"):
        Distillation(TASK, answer, weight=2.0)
    with pytest.raises(ConfigError, match="above 0"):
        Distillation(TASK, answer, temperature=0.0)
