"""Which slot answers for which object: the cheapest one-to-one assignment of a picture (DETR, 2005.12872, section 3.1).

The cost of slot q for object t is

    class · (how little the slot believes in the object's class) + l1 · |b_q - b_t| + giou · (-GIoU(b_q, b_t))

Belief is the softmax's probability where logits have a column for no object, and else the difference between focal
losses of "is it" and "is it not" (2010.04159), which also knows how sure a slot is of the class's absence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vitrail.tasks.boxes import generalized_iou, to_corners

Pairs = tuple[Int[Tensor, " T"], Int[Tensor, " T"]]
"""Slots and the objects that they answer for."""


class Boxed(Protocol):
    """Objects of one picture."""

    @property
    def boxes(self) -> Tensor:
        """Float `[n, 4]`, (cx, cy, w, h) in 0..1 of the picture."""

    @property
    def labels(self) -> Tensor:
        """Int64 `[n]`."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How much each term counts, in matching or in a loss."""

    category: float = 1.0
    """The class."""
    l1: float = 5.0
    """The sum of the four differences."""
    giou: float = 2.0
    """Generalized IoU."""


@torch.no_grad()
def match(
    logits: Float[Tensor, "B Q K"],
    boxes: Float[Tensor, "B Q 4"],
    targets: Sequence[Boxed],
    weights: Weights,
    *,
    softmax: bool = True,
) -> list[Pairs]:
    """The cheapest assignment of every picture; min(Q, objects) pairs each, on the logits' device."""
    counts = [len(target.labels) for target in targets]
    labels = pad_sequence([target.labels.to(logits.device) for target in targets], batch_first=True)  # [B, T]
    wanted = pad_sequence([target.boxes.to(boxes) for target in targets], batch_first=True)  # [B, T, 4]
    costs = cost_matrix(logits, boxes, labels, wanted, weights, softmax).cpu()  # [B, Q, T]
    return [
        tuple(part.to(logits.device) for part in assign(own[:, :count]))  # type: ignore[misc]
        for own, count in zip(costs, counts, strict=True)
    ]


def cost_matrix(
    logits: Float[Tensor, "B Q K"],
    boxes: Float[Tensor, "B Q 4"],
    labels: Int[Tensor, "B T"],
    wanted: Float[Tensor, "B T 4"],
    weights: Weights,
    softmax: bool,
) -> Float[Tensor, "B Q T"]:
    """The cost of every slot for every object of its picture."""
    columns = labels[:, None].expand(-1, logits.shape[1], -1)  # [B, Q, T]
    if softmax:
        category = -logits.softmax(dim=-1).gather(2, columns)  # [B, Q, T]
    else:
        chosen = logits.gather(2, columns)
        chance = chosen.sigmoid()
        present = 0.25 * (1 - chance) ** 2 * F.softplus(-chosen)
        absent = 0.75 * chance**2 * F.softplus(chosen)
        category = present - absent
    l1 = (boxes[:, :, None] - wanted[:, None]).abs().sum(dim=-1)
    giou = generalized_iou(to_corners(boxes)[:, :, None], to_corners(wanted)[:, None])
    return weights.category * category + weights.l1 * l1 - weights.giou * giou


def assign(costs: Float[Tensor, "Q T"]) -> Pairs:
    """The pairs of least total cost, in the order of the slots."""
    from scipy.optimize import linear_sum_assignment

    # The loss of answers that are no number is none either, and training stops there.
    costs = costs.nan_to_num(1e8, 1e8, -1e8)
    slots, objects = linear_sum_assignment(costs.numpy())
    return torch.as_tensor(slots, dtype=torch.int64), torch.as_tensor(objects, dtype=torch.int64)
