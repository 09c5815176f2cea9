"""Loss and decoding of detectors that answer at every cell of a pyramid (FCOS, Tian et al. 2019, 1904.01355).

A cell answers for an object when its centre lies in the object's box, no further than 1.5 cells from the box's
middle, and the furthest side of the box is 4 to 8 cells away: from 0 at the finest level, to any at the coarsest.
Where several objects remain, the smallest is meant. Classes are learned by focal loss, boxes by GIoU, and a third
output learns how well centred a cell is: sqrt of the nearer over the further side, across and down. The score
is sqrt(class · centredness), and non-maximum suppression at IoU 0.6 leaves one box an object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.nn.shapes import DenseBoxOutput
from vitrail.tasks.boxes import area, generalized_iou, to_corners
from vitrail.tasks.focal import exact, focal
from vitrail.tasks.matcher import Boxed

RADIUS = 1.5
"""Cells from a box's middle, across and down, that may answer for it."""
REACH = (4.0, 8.0)
"""Cells from a cell to the furthest side of the boxes of its level."""
CANDIDATES = 1000
"""Answers of a picture, best first, that go into the suppression."""
LEAST = 0.01
"""Score below which an answer is dropped before the suppression."""
OVERLAP = 0.6
"""IoU with a better box of the class above which a box is suppressed."""


def dense_loss(
    output: DenseBoxOutput, targets: Sequence[Boxed], mean: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """The total as "loss", and its terms: class, giou, centre.

    mean: brings a number to its mean over processes, for the number of answering cells and their weight.
    """
    logits, boxes, quality, cells = (exact(part) for part in output)
    present, wanted, centred = [], [], []
    for row, target in enumerate(targets):
        owner, centredness = owners(cells[row], to_corners(target.boxes.to(boxes)))
        answers = owner >= 0
        labels = target.labels.to(logits.device)[owner[answers]]
        classes = torch.zeros_like(logits[row])
        classes[answers, labels] = 1
        present.append(classes)
        wanted.append(target.boxes.to(boxes)[owner[answers]])
        centred.append(centredness)
    centre = torch.stack(centred)  # [B, N], 0 where a cell answers for nothing
    answers = centre > 0
    share = mean or (lambda value: value)
    count = share(answers.sum().to(logits.dtype)).clamp(min=1)
    weight = share(centre.sum()).clamp(min=1e-6)
    real = ((cells[..., :2] >= 0) & (cells[..., :2] <= 1)).all(dim=-1)  # the rest is padding
    category = (focal(logits, torch.stack(present)).sum(dim=-1) * real).sum() / count
    overlap = generalized_iou(to_corners(boxes[answers]), to_corners(torch.cat(wanted)))
    giou = ((1 - overlap) * centre[answers]).sum() / weight
    entropy = F.binary_cross_entropy_with_logits(quality[answers], centre[answers], reduction="sum") / count
    return {"loss": category + giou + entropy, "class": category, "giou": giou, "centre": entropy}


@torch.no_grad()
def owners(
    cells: Float[Tensor, "N 4"], corners: Float[Tensor, "T 4"]
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """The object that each cell answers for (-1 for none), and how well centred it is there (0 for none)."""
    if not len(corners):
        return torch.full_like(cells[:, 0], -1, dtype=torch.int64), torch.zeros_like(cells[:, 0])
    place, step = cells[:, None, :2], cells[:, None, 2:]
    low, high = (place - corners[:, :2]) / step, (corners[:, 2:] - place) / step  # [N, T, 2], in cells
    inside = torch.cat([low, high], dim=-1).amin(dim=-1) > 0
    furthest = torch.cat([low, high], dim=-1).amax(dim=-1)
    middle = (corners[:, :2] + corners[:, 2:]) / 2
    near = ((place - middle).abs() <= RADIUS * step).all(dim=-1)
    sides = cells[:, 2]
    least = torch.where(sides > sides.min() * 1.5, REACH[0], 0.0)[:, None]
    most = torch.where(sides < sides.max() / 1.5, REACH[1], torch.inf)[:, None]
    fits = inside & near & (furthest > least) & (furthest <= most)
    sizes = torch.where(fits, area(corners), torch.inf)  # [N, T]
    smallest, owner = sizes.min(dim=1)
    answers = torch.isfinite(smallest)
    taken = owner[:, None, None].expand(-1, 1, 2)
    low, high = low.gather(1, taken)[:, 0], high.gather(1, taken)[:, 0]  # [N, 2]
    balance = torch.min(low, high) / torch.max(low, high).clamp(min=1e-9)
    centred = balance.clamp(min=0).prod(dim=-1).sqrt()
    return torch.where(answers, owner, -1), torch.where(answers, centred.clamp(min=1e-6), 0.0)


@torch.no_grad()
def dense_detections(output: DenseBoxOutput, most: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Scores `[M]`, class numbers `[M]` and boxes `[M, 4]` (centres, 0..1) of every picture, best first."""
    from torchvision.ops import batched_nms

    logits, boxes, quality, cells = (exact(part.detach()) for part in output)
    real = ((cells[..., :2] >= 0) & (cells[..., :2] <= 1)).all(dim=-1)
    scores = (logits.sigmoid() * quality.sigmoid()[..., None]).sqrt() * real[..., None]  # [B, N, K]
    classes = logits.shape[-1]
    answer = []
    for row, of_picture in enumerate(scores.flatten(1)):
        best, places = of_picture.topk(min(CANDIDATES, len(of_picture)))
        best, places = best[best > LEAST], places[best > LEAST]
        indices = places % classes
        found = boxes[row, torch.div(places, classes, rounding_mode="floor")]
        keep = batched_nms(to_corners(found), best, indices, OVERLAP)[:most]
        answer.append((best[keep], indices[keep], found[keep]))
    return answer
