"""COCO's average precision, by faster-coco-eval, over everything that was found and everything there was.

AP is the mean over ten IoUs (0.50 to 0.95), 101 recalls and the classes that occur; AP50 and AP75 hold one IoU. Small
objects have less than 32² pixels of area, large ones more than 96². Every picture counts its 100 best boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import ConfigError, DataError, UnsupportedError
from vitrail.tasks.boxes import to_pixels

MOST = 100
"""Boxes of a picture that count."""

NAMES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
"""COCO's twelve numbers in the order of its summary."""


class Seen(NamedTuple):
    """One picture: its size, what was found and what there was."""

    size: tuple[int, int]
    found: Tensor
    """Float64 `[M, 6]`: corners in pixels, score, class number."""
    truth: Tensor
    """Float64 `[n, 7]`: corners in pixels, class number, crowd (0 or 1), area."""


class BoxMetrics:
    """Collects pictures; every number is computed at the end.

    Args:
        labels: class names.
        detections: from a detector's output to scores, class numbers and boxes of every picture, best first.

    Raises UnsupportedError where faster-coco-eval is not installed: before pictures are looked at, not after.
    """

    def __init__(self, labels: Sequence[str], detections: Callable[..., Any]) -> None:
        _coco_eval()
        self.labels = tuple(labels)
        self.detections = detections
        self.seen: dict[int, Seen] = {}
        self._evaluated: Any = None

    def add(self, output: Any, targets: Sequence[Any]) -> None:
        """One batch: a detector's output and the pictures' objects (tasks.detect.BoxTarget, or its fields).

        A picture whose number (`index`) was there before does not count again. Raises DataError for a picture
        whose size nobody told.
        """
        self._evaluated = None
        for (scores, indices, boxes), target in zip(self.detections(output, MOST), targets, strict=True):
            number = int(getattr(target, "index", -1))
            number = len(self.seen) if number < 0 else number
            if number in self.seen:
                continue
            rows, columns = (int(side) for side in target.size)
            if rows < 1 or columns < 1:
                raise DataError(
                    f"Average precision needs every picture's size; got {rows} x {columns} pixels."
                )
            corners = to_pixels(boxes.double().cpu(), (rows, columns))
            rest = torch.stack([scores.double().cpu(), indices.double().cpu()], dim=1)
            found = torch.cat([corners, rest], dim=1)  # [M, 6]
            self.seen[number] = Seen((rows, columns), found, _truth(target, (rows, columns)))

    def merge(self, other: BoxMetrics) -> None:
        """Add the pictures of another accumulator over the same classes."""
        if other.labels != self.labels:
            raise ConfigError("Boxes over different classes cannot be merged.")
        self._evaluated = None
        for number, seen in other.seen.items():
            self.seen.setdefault(number, seen)

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Take in the pictures of all processes; `total` sums a tensor over them.

        Each writes its pictures into their own rows of one table of zeros, whose sum is everybody's. Pictures
        must be numbered from 0 without gaps (BoxTarget.index); those that two processes had count once.
        """
        self._evaluated = None
        last = max(self.seen, default=-1) + 1
        most = max((len(seen.truth) for seen in self.seen.values()), default=0)
        pictures = int(total(torch.tensor(last)))  # at least as many as there are: numbers have no gaps
        objects = int(total(torch.tensor(most)))
        table = torch.zeros(pictures, 5 + 6 * MOST + 7 * objects, dtype=torch.float64)
        for number, (size, found, truth) in self.seen.items():
            table[number, :5] = torch.tensor([1, *size, len(found), len(truth)])
            table[number, 5 : 5 + found.numel()] = found.flatten()
            start = 5 + 6 * MOST
            table[number, start : start + truth.numel()] = truth.flatten()
        self.seen = _read(total(table))

    def result(self) -> dict[str, float]:
        """COCO's twelve numbers in 0..1 (nan where no object is of that kind), and `images`.

        Raises DataError where no picture or no object was there to score.
        """
        if not self.seen:
            raise DataError("There was not one image to score; look at the data with vitrail data check.")
        if not any(len(seen.truth) for seen in self.seen.values()):
            raise DataError(
                f"None of the {len(self.seen)} images has a box to find, so that there is nothing to score; look at"
                " the data with vitrail data check."
            )
        values = [float(value) for value in self._evaluation().stats[: len(NAMES)]]
        found = {
            name: value if value >= 0 else float("nan") for name, value in zip(NAMES, values, strict=True)
        }
        return {**found, "images": float(len(self.seen))}

    def classes(self) -> list[dict[str, Any]]:
        """One row a class: label, index, ap, ap50 (nan where no object is of it), support (objects)."""
        precision = np.asarray(self._evaluation().eval["precision"])[:, :, :, 0, -1]  # [IoU, recall, class]
        truth = torch.cat([seen.truth for seen in self.seen.values()])
        support = torch.bincount(truth[truth[:, 5] == 0, 4].long(), minlength=len(self.labels)).tolist()
        return [
            {
                "label": label,
                "index": index,
                "ap": _mean(precision[:, :, index]),
                "ap50": _mean(precision[0, :, index]),
                "support": support[index],
            }
            for index, label in enumerate(self.labels)
        ]

    def coco(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Truth and detections as COCO's files hold them; classes and annotations are numbered from 1."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for number, (size, detections, truth) in sorted(self.seen.items()):
            images.append({"id": number, "height": size[0], "width": size[1], "file_name": str(number)})
            for x1, y1, x2, y2, index, crowd, area in truth.tolist():
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": int(index) + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                )
            for x1, y1, x2, y2, score, index in detections.tolist():
                box = [x1, y1, x2 - x1, y2 - y1]
                found.append({"image_id": number, "category_id": int(index) + 1, "bbox": box, "score": score})
        categories = [{"id": index + 1, "name": label} for index, label in enumerate(self.labels)]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}, found

    def _evaluation(self) -> Any:
        """faster-coco-eval's evaluation of everything seen."""
        if self._evaluated is None:
            coco = _coco_eval()
            truth, found = self.coco()
            known = coco.COCO(truth)
            evaluation = coco.COCOeval_faster(known, known.loadRes(found), "bbox", print_function=_silent)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            self._evaluated = evaluation
        return self._evaluated


def _coco_eval() -> Any:
    """The package that computes average precision."""
    try:
        import faster_coco_eval
    except ImportError:
        raise UnsupportedError(
            "Average precision is computed by faster-coco-eval, which is not installed: pip install"
            " 'vitrail[coco]'."
        ) from None
    return faster_coco_eval


def _truth(target: Any, size: tuple[int, int]) -> Tensor:
    """A picture's objects as rows of Seen.truth."""
    boxes = to_pixels(target.boxes.double().cpu(), size)
    labels = target.labels.double().cpu()
    crowd, area = getattr(target, "crowd", None), getattr(target, "area", None)
    own = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    crowds = torch.zeros_like(labels) if crowd is None else crowd.double().cpu()
    areas = own if area is None else area.double().cpu()
    return torch.cat([boxes, torch.stack([labels, crowds, areas], dim=1)], dim=1)  # [n, 7]


def _read(table: Tensor) -> dict[int, Seen]:
    """The pictures of a summed table; what several processes wrote alike is divided by their number."""
    seen = {}
    for number, row in enumerate(table.cpu()):
        if row[0] == 0:
            continue
        row = row / row[0]
        rows, columns, found, objects = (round(value) for value in row[1:5].tolist())
        start = 5 + 6 * MOST
        seen[number] = Seen(
            (rows, columns),
            row[5 : 5 + 6 * found].view(found, 6),
            row[start : start + 7 * objects].view(objects, 7),
        )
    return seen


def _mean(precision: Any) -> float:
    """The mean of what is defined; nan where nothing is."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")


def _silent(*words: object) -> None:
    """Takes what faster-coco-eval would say."""
