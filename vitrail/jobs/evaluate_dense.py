"""`vitrail evaluate` for boxes and masks: the scores of COCO and of segmentation, and the worst pictures drawn."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail.data.dense_loader import capped_batch_size
from vitrail.data.image import decode
from vitrail.data.sources import Splits
from vitrail.errors import DataError
from vitrail.evaluate import evaluate as run_batches
from vitrail.jobs.dense_data import held_back, kind_for, loader_in_order, open_kind, why_nothing
from vitrail.jobs.overlays import draw_target
from vitrail.runs import EvaluateRun
from vitrail.tasks.draw_dense import Drawn, as_png, draw_boxes, draw_mask, side_by_side
from vitrail.tasks.registry import make_task

logger = logging.getLogger(__name__)

WORST = 6
"""Pictures that are drawn: those on which the model does worst."""

SURE = 0.5
"""Score from which a box is drawn, and counts as found when pictures are compared."""


@dataclass(frozen=True, kw_only=True)
class DenseScores:
    """What an evaluation of boxes or masks came to."""

    scores: dict[str, float]
    classes: list[dict[str, Any]]
    split: str
    notes: list[str]
    skipped: list[str]
    worst: list[dict[str, Any]]
    """The pictures with the lowest scores of their own: image and score."""
    picture: bytes
    """PNG: the worst pictures, truth beside what was found."""
    extra: dict[str, Any]
    """What else the report holds."""


def score(
    run: EvaluateRun,
    engine: Any,
    whole: bool,
    choose_split: Callable[[Splits], tuple[Any, str, list[str]]],
    workers: Callable[[int], int],
    watch: Callable[[int, int], None] | None = None,
) -> DenseScores:
    """Score a detector or a segmenter on one split of a data set; `whole` as in `open_for`.

    Raises DataError where they do not fit.
    """
    splits, notes = open_for(engine, run.data, run.model, run.ignore, run.reduce_zero, whole=whole)
    source, split, more = choose_split(splits)
    notes = list(dict.fromkeys([*notes, *splits.notes, *more]))
    if engine.card.config.get("masks"):
        notes.append("the boxes of this panoptic network are scored; its segments are not")
    source, more = in_models_order(source, engine)
    notes += more
    labels = source.classes
    size = capped_batch_size(run.batch_size, engine.card.preprocessing)
    loader = loader_in_order(
        source, engine.card.preprocessing, batch_size=size, workers=workers(len(source)), max_bad_share=1.0
    )  # fmt: skip
    task = make_task(engine.card.task, labels)
    metrics, worst, done = task.metrics(), Worst(task, source.kind), 0

    def seen(output: Any, batch: Any) -> None:
        nonlocal done
        worst.add(output, batch)
        done = min(done + size, len(source))
        if watch is not None:
            watch(done, len(source))

    scores = dict(run_batches(engine, loader, metrics, watch=seen))
    notes += filter(None, [why_nothing(metrics, scores)])
    if loader.skipped:
        notes.append(f"{len(loader.skipped)} of {len(source)} images could not be read and are left out")
    for note in notes:
        logger.info(note)
    found = worst.result()
    confusion = getattr(metrics, "confusion", None)
    return DenseScores(
        scores=scores,
        classes=metrics.classes(),
        split=split,
        notes=notes,
        skipped=list(loader.skipped.values()),
        worst=[{"image": source.name(index), "score": value} for value, index, _ in found],
        picture=as_png(_sheet(found, source, labels)),
        extra={"confusion": confusion.tolist()} if confusion is not None else {},
    )


def open_for(
    engine: Any,
    data: Sequence[str],
    model: str,
    ignore: Sequence[int] = (),
    reduce_zero: bool = False,
    whole: bool = False,
) -> tuple[Splits, list[str]]:
    """The data in the model's terms; masks are read as they were in its training where nothing else is said.

    Where there is no val, the pictures are held back that its training held back; with `whole`, none.
    """
    card, notes = engine.card, []
    kind = kind_for(card.task, data, model)
    options: dict[str, Any] = {"val_share": 0.0} if whole else held_back(card)
    if kind == "masks":
        options |= {"ignore": ignore, "reduce_zero": reduce_zero, "otherwise": card.labels or ()}
        known = card.recipe
        otherwise = reduce_zero and not known.get("reduce_zero")  # other numbers than those of training
        if not ignore and known.get("ignore") and otherwise:
            values = ", ".join(map(str, known["ignore"]))
            notes.append(
                f"masks: with --reduce-zero the numbers are not those of training, which ignored {values}"
            )
        elif not ignore and known.get("ignore"):
            options["ignore"] = tuple(known["ignore"])
            notes.append(f"masks: {', '.join(map(str, known['ignore']))} ignored, as in training")
        if not reduce_zero and known.get("reduce_zero"):
            options["reduce_zero"] = True
            notes.append("masks: 0 is no class, as in training")
    return open_kind(kind, data, **options), notes


def in_models_order(source: Any, engine: Any) -> tuple[Any, list[str]]:
    """The pictures with the model's class numbers, and what must be said of it. Raises DataError."""
    labels = engine.card.labels or source.classes
    if engine.classes != len(labels):
        raise DataError(
            f"The model has {engine.classes} classes without names, the data has {len(labels)}; they cannot be matched."
        )
    if source.classes == labels:
        return source, []
    note = "the data lists its classes in another order than the model: they are matched by name"
    return source.relabel(labels), [note]


class Worst:
    """The pictures on which a model does worst; hand `add` to an evaluation as `watch`.

    Masks: share of the labelled pixels that are right. Boxes: F1 of found boxes (score above SURE) that overlap a
    true box of their class by half (IoU), each once.
    """

    def __init__(self, task: Any, kind: str, most: int = WORST) -> None:
        self.task, self.kind, self.most = task, kind, most
        self._found: list[tuple[float, int, Any]] = []

    def add(self, output: Any, batch: Any) -> None:
        """Look at one batch."""
        sizes = [t.size if self.kind == "boxes" else tuple(t.shape) for t in batch.targets]
        if self.kind == "boxes":
            records = self.task.decode(output, sizes, threshold=SURE)
        else:
            regions = {}
            if batch.padding is not None:
                regions["regions"] = [
                    (0, 0, int((~own[:, 0]).sum()), int((~own[0]).sum())) for own in batch.padding
                ]
            records = self.task.decode(output, sizes, **regions)
        for record, target, index in zip(records, batch.targets, batch.indices.tolist(), strict=True):
            own = self._boxes(record, target) if self.kind == "boxes" else self._pixels(record, target)
            if math.isfinite(own):
                self._found.append((own, index, record))
        self._found = sorted(self._found, key=lambda item: item[:2])[: self.most]

    def result(self) -> list[tuple[float, int, Any]]:
        """Score, place in the source, and record, worst first."""
        return list(self._found)

    @staticmethod
    def _pixels(record: Any, target: torch.Tensor) -> float:
        asked = target != 255
        return float((record.mask[asked] == target[asked]).float().mean()) if asked.any() else math.nan

    @staticmethod
    def _boxes(record: Any, target: Any) -> float:
        rows, columns = target.size
        centre, sides = target.boxes[:, :2], target.boxes[:, 2:]
        scale = torch.tensor([columns, rows, columns, rows])
        truth = torch.cat([centre - sides / 2, centre + sides / 2], dim=1) * scale
        free, hits = [True] * len(truth), 0
        for box in record.boxes:
            best, place = SURE, -1
            for number, (own, label) in enumerate(zip(truth.tolist(), target.labels.tolist(), strict=True)):
                if free[number] and label == box.index and _overlap(own, box.corners) >= best:
                    best, place = _overlap(own, box.corners), number
            if place >= 0:
                free[place], hits = False, hits + 1
        total = len(truth) + len(record.boxes)
        return 2 * hits / total if total else 1.0


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes by their corners."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    if wide <= 0 or tall <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return wide * tall / (sum(areas) - wide * tall)


def _sheet(found: list[tuple[float, int, Any]], source: Any, labels: Sequence[str]) -> Any:
    rows = []
    for value, index, record in found:
        name = Path(source.name(index)).name
        pixels = decode(source.read(index)).permute(1, 2, 0).numpy()
        said = f"found, {'F1' if source.kind == 'boxes' else 'right'} {value:.0%}"
        rows.append(draw_pair(pixels, source.target(index), record, labels, f"truth, {name}", said))
    return side_by_side(
        rows, "The pictures on which the model does worst", "left: truth, right: what was found"
    )


def draw_pair(
    pixels: np.ndarray[Any, Any], target: Any, record: Any, labels: Sequence[str], left: str, right: str
) -> list[Any]:
    """Truth and what was found, on the same picture."""
    true = draw_target(pixels, target, labels, left)
    if hasattr(record, "boxes"):
        return [true, draw_boxes(pixels, drawn(record), labels, right)]
    return [true, draw_mask(pixels, record.mask.numpy(), labels, right)]


def drawn(record: Any) -> list[Drawn]:
    """The boxes of a record, as the drawing takes them."""
    return [Drawn(box.index, box.corners, box.score) for box in record.boxes]
