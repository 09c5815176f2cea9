"""The loss of detectors that answer with a set (DETR, 2005.12872, section 3.2), and its sigmoid relative.

Every layer's answer is matched to the objects by itself. Matched slots learn the class and the box of their object,
the others that there is none:

    softmax   cross-entropy over all slots, no object weighing 0.1, divided by the sum of the weights
    sigmoid   focal loss (alpha 0.25, gamma 2) summed over slots and classes, divided by the number of objects

The box terms, L1 and 1 - GIoU, are divided by the number of objects of the batch (averaged over processes, at
least 1). The total adds all layers; where a panoptic head answers and the objects have masks, focal and dice losses of
the last layer's pairs are added (tasks.panoptic).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.nn.shapes import BoxOutput
from vitrail.tasks.boxes import generalized_iou, to_corners
from vitrail.tasks.focal import exact, focal
from vitrail.tasks.matcher import Boxed, Pairs, Weights, match
from vitrail.tasks.panoptic import mask_loss

NO_OBJECT = 0.1
"""Weight of "no object" among the classes of the softmax."""

SOFTMAX = Weights(category=1.0, l1=5.0, giou=2.0)
SIGMOID = Weights(category=2.0, l1=5.0, giou=2.0)


def set_loss(output: BoxOutput, targets: Sequence[Boxed], count: Tensor, softmax: bool) -> dict[str, Tensor]:
    """The total as "loss", the last layer's terms unweighted, and two numbers to watch, without gradient.

    Args:
        targets: the objects of each picture.
        count: objects of the batch, a mean over processes, at least 1.
        softmax: whether the last logit is "no object".
    """
    weights = SOFTMAX if softmax else SIGMOID
    terms: dict[str, Tensor] = {}
    total = count.new_zeros(())
    for logits, boxes in (*output.auxiliary, output[:2]):
        logits, boxes = exact(logits), exact(boxes)
        pairs = match(logits, boxes, targets, weights, softmax=softmax)
        terms = layer_terms(logits, boxes, targets, pairs, count, softmax)
        total = total + (
            weights.category * terms["class"] + weights.l1 * terms["l1"] + weights.giou * terms["giou"]
        )
    masks = [getattr(target, "masks", None) for target in targets]
    if output.masks is not None and all(mask is not None for mask in masks):
        more = mask_loss(output.masks, masks, pairs, count)  # type: ignore[arg-type]
        total, terms = total + more["mask"] + more["dice"], terms | more
    terms |= watched(logits.detach(), targets, pairs, softmax)
    return {"loss": total, **terms}


def layer_terms(
    logits: Float[Tensor, "B Q K"],
    boxes: Float[Tensor, "B Q 4"],
    targets: Sequence[Boxed],
    pairs: Sequence[Pairs],
    count: Tensor,
    softmax: bool,
) -> dict[str, Tensor]:
    """One layer's terms, unweighted: class, l1, giou."""
    rows, slots, labels, wanted = joined(targets, pairs, boxes)
    found = boxes[rows, slots]
    l1 = (found - wanted).abs().sum() / count
    giou = (1 - generalized_iou(to_corners(found), to_corners(wanted))).sum() / count
    if softmax:
        return {"class": _cross_entropy(logits, rows, slots, labels), "l1": l1, "giou": giou}
    present = torch.zeros_like(logits)
    present[rows, slots, labels] = 1
    return {"class": focal(logits, present).sum() / count, "l1": l1, "giou": giou}


def joined(
    targets: Sequence[Boxed], pairs: Sequence[Pairs], like: Tensor
) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"], Int[Tensor, " T"], Float[Tensor, "T 4"]]:
    """Pictures, slots, classes and boxes of all matched objects."""
    device = like.device
    rows = torch.cat([torch.full_like(slots, row) for row, (slots, _) in enumerate(pairs)])
    slots = torch.cat([slots for slots, _ in pairs])
    both = list(zip(targets, pairs, strict=True))
    labels = torch.cat([target.labels.to(device)[objects] for target, (_, objects) in both])
    wanted = torch.cat([target.boxes.to(like)[objects] for target, (_, objects) in both])
    return rows, slots, labels, wanted


def _cross_entropy(logits: Tensor, rows: Tensor, slots: Tensor, labels: Tensor) -> Tensor:
    none = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:2], none, dtype=torch.int64, device=logits.device)
    wanted[rows, slots] = labels
    weights = torch.ones(none + 1, dtype=logits.dtype, device=logits.device)
    weights[none] = NO_OBJECT
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weights)


@torch.no_grad()
def watched(
    logits: Float[Tensor, "B Q K"], targets: Sequence[Boxed], pairs: Sequence[Pairs], softmax: bool
) -> dict[str, Tensor]:
    """Per cent of matched slots whose best class is wrong, and how far the number of found objects is off."""
    rows, slots, labels, _ = joined(targets, pairs, logits)
    classes = logits.shape[-1] - int(softmax)
    right = (logits[rows, slots].argmax(dim=-1) == labels).float().sum()
    wrong = 100 * (1 - right / max(len(labels), 1))
    some = logits.argmax(dim=-1) != classes if softmax else (logits > 0).any(dim=-1)  # [B, Q]
    counts = torch.tensor([len(target.labels) for target in targets], device=logits.device)
    off = (some.sum(dim=1) - counts).abs().float().mean()
    return {"class_error": wrong, "cardinality_error": off}
