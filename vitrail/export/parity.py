"""The proof of an export: the same pictures through the network and through what was made of it.

Each side gets the decoded picture and prepares it by its own card, so that a wrong mean, another filter or a
resizing without antialiasing shows as surely as a wrong weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from vitrail.config import finite
from vitrail.errors import DataError

Answer = Callable[[Sequence[Tensor]], Tensor]
"""From decoded pictures, uint8 `[3, H, W]` of any sizes, to logits `[B, K]` in float32."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far an exported file may differ from its network."""

    logits: float | None = None
    """Largest difference of a picture's logits, as a share of its largest logit."""
    agreement: float = 1.0
    """Smallest share of pictures with the same first class. Pictures whose two best logits lie closer than
    the bound on logits are not asked: rounding decides them."""
    accuracy_drop: float | None = None
    """Largest loss of top-1 accuracy, as a share (0.005 is half a point); one picture is always forgiven, since
    fewer than two hundred cannot measure half a point."""


BOUNDS = {
    "fp32": Bounds(logits=1e-4, agreement=1.0, accuracy_drop=0.0),
    "bf16": Bounds(agreement=0.99),
    "int8": Bounds(agreement=0.98, accuracy_drop=0.005),
}
"""By the precision that the artefact computes in."""


class Findings:
    """What proofs of every kind have in common; the fields are theirs."""

    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is not finite is null."""
        own: Any = self
        view: dict[str, Any] = finite({**asdict(own), "passed": self.passed})
        return view

    @classmethod
    def from_dict(cls, view: dict[str, Any]) -> Self:
        """What `to_dict` gave."""
        own: Any = cls
        known = {field.name for field in fields(own)}
        values = {name: value for name, value in view.items() if name in known}
        found: Self = own(**{**values, "failures": tuple(values.get("failures", ()))})
        return found


@dataclass(frozen=True, kw_only=True)
class Proof(Findings):
    """What was found. Shares in 0..1; accuracies are None where the pictures have no labels."""

    precision: str
    images: int
    agreement: float
    """Share of pictures with the same first class."""
    agreement_clear: float
    """The same among the pictures whose first class does not hang on rounding."""
    logits_max: float
    """The largest relative difference of logits of any picture."""
    logits_mean: float
    probability_max: float
    """The largest difference of any class's probability in any picture."""
    probability_mean: float
    labelled: int
    """Pictures whose class is known."""
    accuracy_before: float | None
    accuracy_after: float | None
    pictures: str
    """Which pictures were looked at."""
    failures: tuple[str, ...] = ()
    """What lies outside the bounds, in words; empty where all is well."""


def prove(
    reference: Answer,
    candidate: Answer,
    batches: Iterable[tuple[Sequence[Tensor], Sequence[int] | None]],
    *,
    precision: str,
    pictures: str,
    bounds: Bounds | None = None,
    watch: Callable[[int], None] | None = None,
) -> Proof:
    """Compare two ways from decoded pictures to logits.

    Args:
        batches: decoded pictures, with their classes where they are known (-1 for one that is not).
        precision: what the candidate computes in; it chooses the bounds unless they are given.
        pictures: the name of the pictures, for the record.
        watch: called with the pictures done.

    Raises:
        DataError: there is no picture.
    """
    limits = BOUNDS[precision] if bounds is None else bounds
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: list[int] = []
    for images, truth in batches:
        for side, answer in zip(sides, (reference, candidate), strict=True):
            side.append(answer(images).detach().double().cpu())
        labels += [-1] * len(images) if truth is None else [int(label) for label in truth]
        if watch is not None:
            watch(len(labels))
    if not labels:
        raise DataError("There is no picture to prove the export with; give some with --data.")
    return compared(
        torch.cat(sides[0]), torch.cat(sides[1]), labels, limits, precision=precision, pictures=pictures
    )


def compared(
    before: Tensor, after: Tensor, labels: Sequence[int], limits: Bounds, *, precision: str, pictures: str
) -> Proof:
    """The proof of two sets of logits `[N, K]` in float64."""
    largest = before.abs().amax(dim=1).clamp(min=1e-6)  # [N]
    away = ((before - after).abs().amax(dim=1) / largest).nan_to_num(math.inf)  # [N]
    change = (before.softmax(dim=1) - after.softmax(dim=1)).abs().nan_to_num(1.0)  # [N, K]
    first, then = before.argmax(dim=1), after.argmax(dim=1)
    same = first == then
    clear = _clear(before, largest, limits)
    truth = torch.tensor(labels)
    known = truth >= 0
    accuracies = (
        [float((found == truth)[known].double().mean()) for found in (first, then)]
        if known.any()
        else [None, None]
    )
    proof = Proof(
        precision=precision,
        images=len(before),
        agreement=float(same.double().mean()),
        agreement_clear=float(same[clear].double().mean()) if clear.any() else 1.0,
        logits_max=float(away.max()),
        logits_mean=float(away.mean()),
        probability_max=float(change.max()),
        probability_mean=float(change.mean()),
        labelled=int(known.sum()),
        accuracy_before=accuracies[0],
        accuracy_after=accuracies[1],
        pictures=pictures,
    )
    return Proof(**{**asdict(proof), "failures": tuple(_failures(proof, limits))})


def _clear(before: Tensor, largest: Tensor, limits: Bounds) -> Tensor:
    """Pictures whose two best logits lie further apart than rounding may move them."""
    if limits.logits is None or before.shape[1] < 2:
        return torch.ones(len(before), dtype=torch.bool)
    best = before.topk(2, dim=1).values
    apart: Tensor = (best[:, 0] - best[:, 1]) > 2 * limits.logits * largest
    return apart


def _failures(proof: Proof, limits: Bounds) -> list[str]:
    found = []
    if limits.logits is not None and not proof.logits_max <= limits.logits:
        found.append(
            f"logits differ by {proof.logits_max:.2e} of the largest, allowed are {limits.logits:.0e}"
        )
    if proof.agreement_clear < limits.agreement:
        found.append(
            f"the first class is the same in {100 * proof.agreement_clear:.2f} % of the pictures, wanted are"
            f" {100 * limits.agreement:g} %"
        )
    if limits.accuracy_drop is None or proof.accuracy_before is None or proof.accuracy_after is None:
        return found
    # One picture that rounding decides is no loss of accuracy: in float32 the logits' own bound is the judge.
    drop = proof.accuracy_before - proof.accuracy_after
    if limits.logits is None and drop > max(limits.accuracy_drop, 1 / proof.labelled) + 1e-9:
        found.append(
            f"top-1 falls by {100 * drop:.2f} points, from {100 * proof.accuracy_before:.2f} % to"
            f" {100 * proof.accuracy_after:.2f} %; allowed are {100 * limits.accuracy_drop:g}"
        )
    return found
