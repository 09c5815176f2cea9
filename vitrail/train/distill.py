"""Learning from a teacher: DeiT's hard distillation, and Hinton's soft one (2012.12877, section 4; 1503.02531)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.errors import ConfigError
from vitrail.nn.shapes import ClassOutput


class Task(Protocol):
    """The loss on the true labels."""

    def loss(self, output: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Terms by name; their total is called `loss`."""


class Distillation:
    """An objective: (1 - weight) · loss on the labels + weight · loss on the teacher's answer to the same images.

    A student with a distillation token learns the labels with its class token and the teacher with the other
    one; any other student learns both with its only head.

    Args:
        task: the loss on the labels, which may be soft (mixed images).
        teacher: images, normalised for the student `[B, C, h, w]`, to the teacher's logits `[B, K]`.
        kind: "hard" is cross-entropy with the teacher's decision; "soft" is the Kullback-Leibler divergence
            between both at a temperature, times its square, averaged over the batch. (DeiT's code divides by
            the classes too, which makes its soft term K times smaller.)
        weight: share of the teacher's term, 0..1.
        temperature: of the soft term, above 0.
    """

    def __init__(
        self,
        task: Task,
        teacher: Callable[[Tensor], Tensor],
        kind: Literal["hard", "soft"] = "hard",
        weight: float = 0.5,
        temperature: float = 3.0,
    ) -> None:
        if kind not in ("hard", "soft"):
            raise ConfigError(f"distillation is hard or soft, not {kind!r}.")
        if not 0 <= weight <= 1:
            raise ConfigError(f"The teacher's weight must lie in 0..1, not {weight}.")
        if not temperature > 0:
            raise ConfigError(f"The temperature must be above 0, not {temperature}.")
        self.task, self.teacher, self.kind = task, teacher, kind
        self.weight, self.temperature = weight, temperature

    def __call__(self, output: Tensor | ClassOutput, targets: Tensor, images: Tensor) -> Mapping[str, Tensor]:
        """Terms `loss` (the total), `labels` and `teacher`."""
        logits, distilled = output if isinstance(output, ClassOutput) else (output, output)
        labels = self.task.loss(logits, targets)["loss"]
        with torch.no_grad():
            answer = self.teacher(images).float()
        teacher = self._term(distilled.float(), answer)
        return {
            "loss": (1 - self.weight) * labels + self.weight * teacher,
            "labels": labels,
            "teacher": teacher,
        }

    def _term(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(dim=1))
        warm = self.temperature
        ours, theirs = (student / warm).log_softmax(dim=1), (teacher / warm).log_softmax(dim=1)
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * warm**2
