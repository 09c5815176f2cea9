"""Masks of queries: their losses, and one map of segments out of many masks (DETR, 2005.12872, section 4.4).

Focal loss (alpha 0.25, gamma 2, mean over pixels) and dice are summed over matched queries and divided by the number
of objects, each with weight 1; padding counts as background. To merge, queries that are sure enough compete for every
pixel by a softmax over their logits; regions of one "stuff" class become one segment; segments of at most four pixels
go, and what they held is competed for again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.errors import DataError
from vitrail.nn.shapes import BoxOutput
from vitrail.tasks.focal import exact, focal
from vitrail.tasks.matcher import Pairs

SURE = 0.85
"""Probability above which a query takes part in the merge."""
SMALLEST = 4
"""Pixels up to which a segment is dropped."""


@dataclass(frozen=True, kw_only=True)
class PanopticSegment:
    """One region of a panoptic map."""

    number: int
    """Its value in the map."""
    label: str
    index: int
    """The class's number."""
    thing: bool
    """Whether it is one object, or all there is of a class."""
    score: float
    """Probability of the class, 0..1 (the best of what was joined)."""
    pixels: int


@dataclass(frozen=True, kw_only=True)
class PanopticPrediction:
    """A picture cut into segments."""

    source: str = ""
    map: Int[Tensor, "I J"] | None = None
    """The segment's number at each pixel of the original picture; -1 where nothing was found."""
    segments: tuple[PanopticSegment, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the map: id, label, index, isthing, score and area (pixels) of each segment."""
        told = [
            {
                "id": segment.number,
                "label": segment.label,
                "index": segment.index,
                "isthing": segment.thing,
                "score": segment.score,
                "area": segment.pixels,
            }
            for segment in self.segments
        ]
        return {"source": self.source, "segments_info": told}


def segment_numbers(found: PanopticPrediction) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], list[str]]:
    """A picture's map for drawing: segment numbers uint8 `[I, J]`, 255 where there is none, and a name for each.

    Raises DataError for more than 255 segments, or a picture without a map.
    """
    if found.map is None or len(found.segments) > 255:
        raise DataError(f"A map of at most 255 segments can be drawn; got {len(found.segments)}.")
    numbers = torch.where(found.map < 0, 255, found.map).to(torch.uint8).cpu().numpy()
    return numbers, [
        f"{segment.label} {segment.number}" if segment.thing else segment.label for segment in found.segments
    ]


def mask_loss(
    masks: Float[Tensor, "B Q h w"],
    targets: Sequence[Bool[Tensor, "n I J"]],
    pairs: Sequence[Pairs],
    count: Tensor,
) -> dict[str, Tensor]:
    """Focal and dice loss of matched queries, "mask" and "dice".

    targets: each picture's object masks at the network's input size, padding included. Raises DataError where
    sizes differ within the batch.
    """
    sizes = {tuple(target.shape[-2:]) for target in targets}
    if len(sizes) != 1:
        raise DataError(
            f"The masks of a batch must be as large as its pictures with their padding; got {sizes}."
        )
    rows = torch.cat([torch.full_like(slots, row) for row, (slots, _) in enumerate(pairs)])
    slots = torch.cat([slots for slots, _ in pairs])
    wanted = torch.cat(
        [target.to(masks.device)[objects] for target, (_, objects) in zip(targets, pairs, strict=True)]
    )
    chosen = exact(masks[rows, slots])[:, None]  # [T, 1, h, w]
    found = F.interpolate(chosen, size=sizes.pop(), mode="bilinear", align_corners=False)
    found = found.flatten(1)  # [T, I * J]
    truth = wanted.flatten(1).to(found)
    chance = found.sigmoid()
    overlap = (2 * (chance * truth).sum(dim=1) + 1) / (chance.sum(dim=1) + truth.sum(dim=1) + 1)
    return {"mask": focal(found, truth).mean(dim=1).sum() / count, "dice": (1 - overlap).sum() / count}


@torch.no_grad()
def merge(
    output: BoxOutput,
    sizes: Sequence[Sequence[int]],
    labels: Sequence[str],
    things: Collection[int],
    *,
    sources: Sequence[str] = (),
    threshold: float = SURE,
    regions: Sequence[tuple[int, int]] | None = None,
) -> list[PanopticPrediction]:
    """One map of segments for every picture.

    Args:
        output: of a detector with a panoptic head.
        sizes: rows and columns of the original pictures, which the maps have too.
        labels: class names; things: numbers of the classes whose objects stay apart.
        regions: rows and columns of the masks that a picture fills where its batch was padded.

    Raises DataError where the output holds no masks.
    """
    if output.masks is None:
        raise DataError(
            "The network answers no masks; take one with a panoptic head, such as detr_resnet50_panoptic."
        )
    found = []
    for row, size in enumerate(sizes):
        scores, indices = exact(output.logits[row]).softmax(dim=-1).max(dim=-1)
        keep = (indices < len(labels)) & (scores > threshold)
        masks = exact(output.masks[row, keep])
        if regions is not None:
            masks = masks[:, : regions[row][0], : regions[row][1]]
        rows, columns = (int(side) for side in size)
        if len(masks):
            masks = F.interpolate(masks[None], size=(rows, columns), mode="bilinear", align_corners=False)[0]
        found.append(
            _merged(
                sources[row] if sources else "",
                masks.reshape(-1, rows, columns),
                scores[keep],
                indices[keep],
                labels,
                things,
            )
        )
    return found


def _merged(
    source: str,
    masks: Float[Tensor, "S I J"],
    scores: Float[Tensor, " S"],
    indices: Int[Tensor, " S"],
    labels: Sequence[str],
    things: Collection[int],
) -> PanopticPrediction:
    """Segments of one picture: compete, join stuff, drop the smallest, and again until none is too small."""
    while len(masks):
        owner = masks.argmax(dim=0)  # the softmax over queries keeps their order
        joined: dict[int, int] = {}
        for place, index in enumerate(indices.tolist()):
            if index not in things:
                first = joined.setdefault(index, place)
                owner = torch.where(owner == place, first, owner)
        pixels = torch.bincount(owner.flatten(), minlength=len(masks))
        gone = set(joined.values())
        small = [
            int(pixels[place]) <= SMALLEST and (index in things or place in gone)
            for place, index in enumerate(indices.tolist())
        ]
        if not any(small):
            return _told(source, owner, pixels, scores, indices, labels, things)
        keep = ~torch.tensor(small, device=masks.device)
        masks, scores, indices = masks[keep], scores[keep], indices[keep]
    return PanopticPrediction(source=source, map=torch.full(masks.shape[1:], -1, dtype=torch.int64))


def _told(
    source: str,
    owner: Int[Tensor, "I J"],
    pixels: Int[Tensor, " S"],
    scores: Float[Tensor, " S"],
    indices: Int[Tensor, " S"],
    labels: Sequence[str],
    things: Collection[int],
) -> PanopticPrediction:
    """The record, its segments numbered from 0."""
    numbers = torch.full((len(pixels),), -1, dtype=torch.int64, device=owner.device)
    segments: list[PanopticSegment] = []
    for place in pixels.nonzero().flatten().tolist():
        index = int(indices[place])
        same = scores[indices == index].max() if index not in things else scores[place]
        numbers[place] = len(segments)
        segments.append(
            PanopticSegment(
                number=len(segments),
                label=labels[index],
                index=index,
                thing=index in things,
                score=float(same),
                pixels=int(pixels[place]),
            )
        )
    return PanopticPrediction(source=source, map=numbers[owner].cpu(), segments=tuple(segments))
