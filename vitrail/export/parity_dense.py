"""The proof of an export of boxes or masks: the same pictures through the network and through what was made of it.

Every tensor that the network answers is compared, and what is decoded from it: boxes by class, place and score,
masks pixel by pixel. Where the pictures have annotations, the task's score (AP, mIoU) is measured on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitrail.errors import DataError
from vitrail.export.parity import Findings
from vitrail.nn.shapes import MaskOutput
from vitrail.tasks.boxes import iou, to_corners

Answer = Callable[[Tensor, Tensor | None], Any]
"""From uint8 images `[B, C, h, w]` and their padding `[B, h, w]` (or None) to the record of a dense model."""


def answering(engine: Any) -> Answer:
    """An engine that is told of padding only where there is some: segmenters know none."""
    return lambda images, padding: engine(images) if padding is None else engine(images, padding)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far an exported file may differ from its network."""

    logits: float | None = None
    """Largest difference of an output of a picture, as a share of its largest value."""
    agreement: float = 1.0
    """Smallest share of boxes (pixels) that come out the same, among those that do not hang on rounding."""
    score_drop: float = 0.005
    """Largest loss of AP (mIoU), as a share."""


BOUNDS = {
    "fp32": Bounds(logits=1e-3, agreement=0.999),
    "bf16": Bounds(agreement=0.95, score_drop=0.02),
}
"""By the precision that the artefact computes in. A detector's logits add up over thousands of cells in other orders
than torch's, so they get more room than a classifier's."""

TOLD = 0.05
"""Score from which a box is compared."""

SAME_PLACE = 0.99
"""IoU from which two boxes lie in the same place (0.9 where the artefact is not float32)."""


@dataclass(frozen=True, kw_only=True)
class DenseProof(Findings):
    """What was found. Shares in 0..1; scores are None where the pictures have no annotations."""

    task: str
    precision: str
    images: int
    agreement: float
    """Share of the network's boxes (score above TOLD) that the artefact finds too, or of pixels of the same class."""
    agreement_clear: float
    """The same among the boxes and pixels that do not hang on rounding."""
    compared: int
    """Boxes or pixels that were compared."""
    logits_max: float
    """The largest difference of any output of any picture, as a share of its largest value."""
    logits_mean: float
    labelled: int = 0
    """Pictures with annotations."""
    score: str = ""
    """Name of the score: ap or miou."""
    score_before: float | None = None
    score_after: float | None = None
    pictures: str = ""
    """Which pictures were looked at."""
    failures: tuple[str, ...] = ()
    """What lies outside the bounds, in words; empty where all is well."""

    @property
    def things(self) -> str:
        """What is compared."""
        return "boxes" if self.task == "object-detection" else "pixels"

    def rows(self) -> list[list[str]]:
        """The numbers for a table: what, and how much."""
        same = f"{self.agreement:.4%} of {self.compared:,}"
        found = [
            [f"same {self.things}", same if self.compared else f"none to compare: no score reaches {TOLD:g}"],
            [
                "outputs differ",
                f"{self.logits_max:.1e} of the largest at most, {self.logits_mean:.1e} on average",
            ],
        ]
        if self.score_before is not None and self.score_after is not None:
            found.append([self.score, f"{self.score_before:.2%} before, {self.score_after:.2%} after"])
        return found


def prove_dense(
    reference: Answer,
    candidate: Answer,
    batches: Iterable[tuple[Tensor, Tensor | None, Sequence[Any] | None]],
    task: Any,
    *,
    precision: str,
    pictures: str,
    bounds: Bounds | None = None,
    watch: Callable[[int], None] | None = None,
) -> DenseProof:
    """Compare two ways from prepared pictures to a dense model's record.

    Args:
        batches: images, their padding, and their targets at the pictures' own sizes where they are known.
        task: Detect or Segment, with the model's class names.
        precision: what the candidate computes in; it chooses the bounds unless they are given.
        pictures: the name of the pictures, for the record.
        watch: called with the pictures done.

    Raises:
        DataError: there is no picture.
    """
    limits = BOUNDS[precision] if bounds is None else bounds
    look = _pixels if hasattr(task, "ignore") else _boxes
    counts = torch.zeros(4, dtype=torch.int64)  # same, all, same and clear, clear
    away: list[float] = []
    metrics = (task.metrics(), task.metrics())
    done = labelled = 0
    for images, padding, targets in batches:
        before, after = (_on_cpu(answer(images, padding)) for answer in (reference, candidate))
        counts += look(task, before, after, limits)
        away += _differences(before, after)
        if targets is not None:
            for one, output in zip(metrics, (before, after), strict=True):
                one.add(output, targets)
            labelled += len(targets)
        done += len(images)
        if watch is not None:
            watch(done)
    if not done:
        raise DataError("There is no picture to prove the export with; give some with --data.")
    same, every, clear_same, clear = counts.tolist()
    proof = DenseProof(
        task="image-segmentation" if hasattr(task, "ignore") else "object-detection",
        precision=precision,
        images=done,
        agreement=same / every if every else 1.0,
        agreement_clear=clear_same / clear if clear else 1.0,
        compared=every,
        logits_max=max(away),
        logits_mean=sum(away) / len(away),
        labelled=labelled,
        pictures=pictures,
    )
    if labelled:
        name = "miou" if hasattr(task, "ignore") else "ap"
        before_after = [one.result()[name] for one in metrics]
        proof = replace(proof, score=name, score_before=before_after[0], score_after=before_after[1])
    return replace(proof, failures=tuple(_failures(proof, limits)))


def _failures(proof: DenseProof, limits: Bounds) -> list[str]:
    found = []
    if limits.logits is not None and not proof.logits_max <= limits.logits:
        found.append(
            f"outputs differ by {proof.logits_max:.2e} of the largest, allowed are {limits.logits:.0e}"
        )
    if proof.agreement_clear < limits.agreement:
        found.append(
            f"{proof.agreement_clear:.3%} of the {proof.things} are the same, wanted are {limits.agreement:.1%}"
        )
    if proof.score_before is None or proof.score_after is None:
        return found
    if proof.score_before - proof.score_after > limits.score_drop:
        found.append(
            f"{proof.score} falls from {proof.score_before:.2%} to {proof.score_after:.2%}; allowed are"
            f" {100 * limits.score_drop:g} points"
        )
    return found


def _tensors(output: Any) -> list[Tensor]:
    """What a network answered, without what is only there while training."""
    return [part for part in output if isinstance(part, Tensor)]


def _on_cpu(output: Any) -> Any:
    parts = [part.detach().float().cpu() if isinstance(part, Tensor) else part for part in output]
    return type(output)(*parts)


def _differences(before: Any, after: Any) -> list[float]:
    """For every picture the largest difference of any output, as a share of its largest value."""
    worst: Tensor | None = None
    for mine, theirs in zip(_tensors(before), _tensors(after), strict=True):
        largest = mine.flatten(1).abs().amax(dim=1).clamp(min=1e-6)
        found = ((mine - theirs).flatten(1).abs().amax(dim=1) / largest).nan_to_num(math.inf)  # [B]
        worst = found if worst is None else torch.maximum(worst, found)
    assert worst is not None
    return [float(value) for value in worst]


def _pixels(task: Any, before: MaskOutput, after: MaskOutput, limits: Bounds) -> Tensor:
    """Pixels of the same class, all pixels, and both among those whose two best classes lie apart."""
    same = before.logits.argmax(dim=1) == after.logits.argmax(dim=1)  # [B, I, J]
    clear = torch.ones_like(same)
    if limits.logits is not None and before.logits.shape[1] > 1:
        best = before.logits.topk(2, dim=1).values
        largest = before.logits.flatten(1).abs().amax(dim=1)[:, None, None]
        clear = (best[:, 0] - best[:, 1]) > 2 * limits.logits * largest
    return torch.stack([same.sum(), torch.tensor(same.numel()), (same & clear).sum(), clear.sum()])


def _boxes(task: Any, before: Any, after: Any, limits: Bounds) -> Tensor:
    """Boxes that both find, all boxes of the first, and both among those with a score well above TOLD.

    A box is found again where one of its class lies in its place with about its score.
    """
    counts = torch.zeros(4, dtype=torch.int64)
    close, near = (SAME_PLACE, 0.01) if limits.logits is not None else (0.9, 0.1)
    for mine, theirs in zip(task.detections(before), task.detections(after), strict=True):
        scores, classes, boxes = mine
        kept = scores >= TOLD
        found = torch.zeros(int(kept.sum()), dtype=torch.bool)
        if len(theirs[0]) and len(found):
            overlap, _ = iou(to_corners(boxes[kept])[:, None], to_corners(theirs[2]))  # [n, m]
            alike = (classes[kept][:, None] == theirs[1]) & (
                (scores[kept][:, None] - theirs[0]).abs() <= near
            )
            found = ((overlap >= close) & alike).any(dim=1)
        clear = scores[kept] >= TOLD + near
        counts += torch.stack([found.sum(), torch.tensor(len(found)), (found & clear).sum(), clear.sum()])
    return counts
