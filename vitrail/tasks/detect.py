"""Detection: boxes around what a picture shows. Loss, decoding, and COCO's metrics, for every kind of detector.

The kind is told by the output: a BoxOutput with a logit more than there are classes is a softmax with no object,
one with as many is a set of sigmoids, and a DenseBoxOutput has one answer for every cell of a pyramid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.errors import ConfigError, DataError
from vitrail.nn.shapes import BoxOutput, DenseBoxOutput
from vitrail.tasks.average_precision import BoxMetrics
from vitrail.tasks.boxes import to_pixels
from vitrail.tasks.dense_loss import dense_detections, dense_loss
from vitrail.tasks.focal import exact
from vitrail.tasks.panoptic import PanopticPrediction
from vitrail.tasks.set_loss import set_loss

DetectorOutput = BoxOutput | DenseBoxOutput


class BoxTarget(NamedTuple):
    """The objects of one picture. The task takes anything that has these fields."""

    boxes: Float[Tensor, "n 4"]
    """(cx, cy, w, h) in 0..1 of the picture without its padding."""
    labels: Int[Tensor, " n"]
    """Class numbers."""
    size: tuple[int, int] = (0, 0)
    """Rows and columns of the original picture, for metrics."""
    crowd: Bool[Tensor, " n"] | None = None
    """COCO's iscrowd: boxes around many objects, which no answer is right or wrong about."""
    area: Float[Tensor, " n"] | None = None
    """In pixels of the original picture, where it is not the box's."""
    index: int = -1  # type: ignore[assignment]  # a field, in place of the method of tuples
    """The picture's number in the data, to merge metrics of several processes."""
    masks: Bool[Tensor, "n I J"] | None = None
    """The objects' masks at the network's input size, padding included, for a panoptic head."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """One object that was found."""

    label: str
    index: int
    """The class's number."""
    score: float
    """0..1."""
    corners: tuple[float, float, float, float]
    """(x1, y1, x2, y2) in pixels of the original picture; may reach beyond its edges."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: bbox is [x, y, width, height], as in COCO."""
        x1, y1, x2, y2 = self.corners
        return {
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "label": self.label,
            "index": self.index,
            "score": self.score,
        }


@dataclass(frozen=True, kw_only=True)
class BoxPrediction:
    """What was found in one picture, best first, or the reason why nothing was looked for."""

    source: str = ""
    """Name of the picture: its path, or its place in what was handed over."""
    size: tuple[int, int] = (0, 0)
    """Rows and columns of the original picture."""
    boxes: tuple[Box, ...] = ()
    segments: PanopticPrediction | None = None
    """The picture cut into segments, where the network has a panoptic head."""
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: source, height, width, detections (bbox, label, index, score each), error; of a
        panoptic network segments_info too."""
        told = {} if self.segments is None else {"segments_info": self.segments.to_dict()["segments_info"]}
        return {
            "source": self.source,
            "height": self.size[0],
            "width": self.size[1],
            "detections": [box.to_dict() for box in self.boxes],
            **told,
            "error": self.error,
        }


class Detect:
    """The task of finding objects.

    Args:
        labels: class names in the order of the logits.
        mean: brings a number to its mean over processes; the loss counts the objects of all of them.

    Raises:
        ConfigError: no labels.
    """

    def __init__(self, labels: Sequence[str], *, mean: Callable[[Tensor], Tensor] | None = None) -> None:
        if not labels:
            raise ConfigError("A detection needs at least one class name; got none.")
        self.labels = tuple(labels)
        self.mean = mean

    def loss(self, output: DetectorOutput, targets: Sequence[Any]) -> dict[str, Tensor]:
        """The total as "loss", and its terms by name; in float32 at least.

        Args:
            output: a detector's, in training mode where it has auxiliary answers.
            targets: one picture's objects each (BoxTarget, or anything with its fields). Crowds are left out.

        Raises DataError where a class number is none of the labels', or pictures and targets differ in number.
        """
        own = [self._kept(target, output.logits.device) for target in targets]
        if len(own) != len(output.logits):
            raise DataError(
                f"Each picture needs its objects; got {len(output.logits)} pictures, {len(own)} targets."
            )
        softmax = self.softmax(output)
        count = torch.tensor(
            float(sum(len(target.labels) for target in own)),
            dtype=exact(output.logits).dtype,
            device=output.logits.device,
        )
        count = (count if self.mean is None else self.mean(count)).clamp(min=1)
        if isinstance(output, DenseBoxOutput):
            return dense_loss(output, own, self.mean)
        return set_loss(output, own, count, softmax)

    def decode(
        self,
        output: DetectorOutput,
        sizes: Sequence[Sequence[int]],
        *,
        sources: Sequence[str] = (),
        threshold: float = 0.5,
        most: int = 100,
    ) -> list[BoxPrediction]:
        """The objects of every picture with a score of at least `threshold`, best first, `most` of them.

        sizes: rows and columns of the original pictures, in whose pixels the corners are given.
        """
        names = sources or [""] * len(sizes)
        found = []
        for (scores, indices, boxes), size, name in zip(
            self.detections(output, most), sizes, names, strict=True
        ):
            rows, columns = (int(side) for side in size)
            keep = scores >= threshold
            parts = (scores[keep], indices[keep], to_pixels(boxes[keep], (rows, columns)))
            found.append(
                BoxPrediction(
                    source=name,
                    size=(rows, columns),
                    boxes=tuple(
                        Box(label=self.labels[index], index=index, score=score, corners=tuple(corners))
                        for score, index, corners in zip(*(part.tolist() for part in parts), strict=True)
                    ),
                )
            )
        return found

    @torch.no_grad()
    def detections(self, output: DetectorOutput, most: int = 100) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Scores `[M]`, class numbers `[M]` and boxes `[M, 4]` (centres, 0..1) of every picture, best first."""
        if isinstance(output, DenseBoxOutput):
            return dense_detections(output, most)
        logits, boxes = exact(output.logits.detach()), exact(output.boxes.detach())
        if self.softmax(output):
            scores, indices = logits.softmax(dim=-1)[..., :-1].max(dim=-1)  # [B, Q]
            slots = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        else:
            scores = logits.sigmoid().flatten(1)  # [B, Q * K]
            order = torch.arange(scores.shape[1], device=scores.device)
            indices = (order % logits.shape[-1]).expand_as(scores)
            slots = torch.div(order, logits.shape[-1], rounding_mode="floor").expand_as(scores)
        best, places = scores.sort(dim=1, descending=True, stable=True)
        best, places = best[:, :most], places[:, :most]
        indices, slots = indices.gather(1, places), slots.gather(1, places)
        return [(best[row], indices[row], boxes[row, slots[row]]) for row in range(len(best))]

    def metrics(self) -> BoxMetrics:
        """A fresh accumulator of COCO's numbers."""
        return BoxMetrics(self.labels, self.detections)

    def softmax(self, output: DetectorOutput) -> bool:
        """Whether the last logit is "no object". Raises ConfigError where logits and labels do not go together."""
        columns, classes = output.logits.shape[-1], len(self.labels)
        if columns == classes:
            return False
        if columns == classes + 1 and isinstance(output, BoxOutput):
            return True
        raise ConfigError(
            f"The network answers {columns} numbers for a box and there are {classes} class names: build it with"
            f" num_classes={classes}."
        )

    def _kept(self, target: Any, device: torch.device) -> BoxTarget:
        """A picture's objects without crowds, on the network's device."""
        boxes, labels = target.boxes.to(device), target.labels.to(device)
        crowd, masks = getattr(target, "crowd", None), getattr(target, "masks", None)
        if crowd is not None and len(crowd):
            keep = ~crowd.to(device)
            boxes, labels = boxes[keep], labels[keep]
            masks = masks.to(device)[keep] if masks is not None else None
        if (
            device.type == "cpu"
            and len(labels)
            and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.labels)
        ):
            raise DataError(
                f"A class number must lie in 0..{len(self.labels) - 1}; got {int(labels.min())}..{int(labels.max())}."
                " The class names and the annotations belong to different data."
            )
        return BoxTarget(boxes, labels, masks=masks)
