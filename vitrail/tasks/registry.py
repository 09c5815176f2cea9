"""The tasks by the word on a model's card, and the object that knows a task's loss, decoding and metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from vitrail.errors import ConfigError


class TaskFacts(NamedTuple):
    """What the verbs must know of a task."""

    words: str
    """What a model of this task does, for messages."""
    score: str
    """The metric that chooses weights; it grows with quality."""
    score_words: str
    shown: tuple[str, ...]
    """Metrics that are written on a model's card and shown in tables, the most important first."""


TASKS: dict[str, TaskFacts] = {
    "image-classification": TaskFacts(
        "classifies whole pictures", "acc1", "top-1, %", ("acc1", "acc5", "loss")
    ),
    "object-detection": TaskFacts(
        "finds objects as boxes", "ap", "AP, %", ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    ),
    "image-segmentation": TaskFacts(
        "gives every pixel a class", "miou", "mIoU, %", ("miou", "pixel_acc", "mean_acc", "loss")
    ),
}
"""By the word that a card has under `task`."""


def facts_of(task: str) -> TaskFacts:
    """What the verbs must know of a task. Raises ConfigError for a word that is none."""
    if task not in TASKS:
        raise ConfigError(f"A model's task is one of {', '.join(TASKS)}; its card says {task!r}.")
    return TASKS[task]


def make_task(
    task: str,
    labels: Sequence[str],
    *,
    smoothing: float = 0.0,
    loss: str = "ce",
    auxiliary: float = 0.4,
    weights: Sequence[float] | None = None,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """The task object (Classify, Detect or Segment) of a card's word.

    Args:
        smoothing, loss: of a classification (label smoothing; ce or bce).
        auxiliary: of a segmentation, the weight of the auxiliary heads; weights: of its classes.
        mean: of a detection, brings a number to its mean over processes.
    """
    facts_of(task)
    if task == "object-detection":
        from vitrail.tasks.detect import Detect

        return Detect(labels, mean=mean)
    if task == "image-segmentation":
        from vitrail.tasks.segment import Segment

        return Segment(labels, auxiliary=auxiliary, weights=weights)
    from vitrail.tasks.classify import Classify

    return Classify(labels, smoothing=smoothing, objective="sigmoid" if loss == "bce" else "softmax")
