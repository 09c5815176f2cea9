"""`vitrail predict`: files, folders and patterns in, one record for each image out, as they come."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitrail.data.image import decode
from vitrail.disk import write_atomically
from vitrail.engines.sliding import SlidingEngine
from vitrail.errors import ConfigError, DataError
from vitrail.jobs.opening import engine_for, engine_name
from vitrail.predict import Predictor, expand
from vitrail.runs import PredictRun
from vitrail.tasks.draw_dense import Drawn, as_png, draw_boxes, draw_mask, index_png
from vitrail.tasks.panoptic import segment_numbers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The records of a run, in the images' order, computed while they are iterated over; once."""

    total: int
    """Images that there are, readable or not."""
    labels: tuple[str, ...]
    """The model's class names."""
    ids: tuple[int, ...] = ()
    """The classes' ids in the training data, where it numbers them itself."""
    records: Iterator[Any]
    """Prediction, BoxPrediction or Segmentation."""
    task: str = "image-classification"
    """What the model is for, in the words of its card."""
    folder: Path | None = None
    """Where drawings and index PNGs of boxes and masks lie."""

    def __iter__(self) -> Iterator[Any]:
        return self.records


def predict(run: PredictRun) -> Predictions:
    """Open the model and find the images; an image that cannot be read gets a record with its error.

    A model of boxes or masks draws what it finds: NAME.png in the folder of drawings, and NAME-mask.png, which
    holds the class numbers. Raises DataError where a folder or pattern holds no image, ConfigError for a form
    that the model's task does not have, and what opening a model raises.
    """
    paths = expand(run.images)
    if not paths:
        raise DataError("There is no image to look at: name files, folders or patterns.")
    predictor = Predictor(
        run.model, engine_name(run), run.precision, device=run.device, top_k=run.top_k, threshold=run.threshold,
        batch_size=1 if run.window else run.batch_size, workers=run.workers,
    )  # fmt: skip
    predictor.engine = engine_for(predictor.engine, run, len(paths))
    if predictor.engine.name == "torch":  # the others say it when they open
        logger.info("engine torch, %s", predictor.engine.precision)
    if run.window:
        predictor.engine = SlidingEngine(predictor.engine, run.window)
    task = predictor.engine.card.task
    idle = [name for name, value in (("draw", run.draw), ("window", run.window)) if value]
    if task == "image-classification" and (idle or run.threshold != PredictRun.threshold):
        raise ConfigError(
            f"{(idle or ['threshold'])[0]} is for boxes and masks, and {run.model} names the class of a whole picture:"
            " leave it out."
        )
    if run.format == "coco" and task != "object-detection":
        raise ConfigError(
            "The form coco lists boxes, and this model finds none; take json, jsonl, csv or table."
        )
    records, folder = predictor.stream(paths), None
    if task != "image-classification":
        folder = Path(run.draw or "predictions")
        records = _drawn(records, predictor.labels, folder)
    ids = predictor.engine.card.ids
    return Predictions(
        total=len(paths), labels=predictor.labels, ids=ids, records=records, task=task, folder=folder
    )


def _drawn(records: Iterator[Any], labels: Sequence[str], folder: Path) -> Iterator[Any]:
    """The same records, each drawn on its picture before it is handed on."""
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for record in records:
        if record.error is None:
            name = free_name(Path(record.source).stem, taken, ("-mask", "-segments"))
            pixels = decode(record.source, name=record.source).permute(1, 2, 0).numpy()
            if hasattr(record, "boxes"):
                boxes = [Drawn(box.index, box.corners, box.score) for box in record.boxes]
                drawing = draw_boxes(pixels, boxes, labels)
                if record.segments is not None:
                    numbers, names = segment_numbers(record.segments)
                    write_atomically(
                        folder / f"{name}-segments.png", as_png(draw_mask(pixels, numbers, names))
                    )
                    write_atomically(folder / f"{name}-mask.png", index_png(numbers, len(names)))
            else:
                mask = record.mask.numpy()
                drawing = draw_mask(pixels, mask, labels)
                file = folder / f"{name}-mask.png"
                write_atomically(file, index_png(mask, len(labels)))
                record = replace(record, mask_file=str(file))
            write_atomically(folder / f"{name}.png", as_png(drawing))
        yield record


def free_name(stem: str, taken: set[str], endings: Sequence[str] = ()) -> str:
    """The stem, with a number where it is in `taken`, alone or with one of `endings`; these are then taken too.

    Small and capital letters count as the same, as some file systems have it.
    """
    name, number = stem, 1
    while not taken.isdisjoint(own := {f"{name}{ending}".casefold() for ending in ("", *endings)}):
        number += 1
        name = f"{stem}-{number}"
    taken |= own
    return name


def coco_form(records: Sequence[Any], labels: Sequence[str], ids: Sequence[int] = ()) -> dict[str, Any]:
    """Boxes as a COCO json with images, categories and annotations; each annotation has its score.

    Categories have `ids`, those of the training data, or count from 1, as pictures do. The file is read by COCO's tools
    and by vitrail itself.
    """
    ids = ids or range(1, len(labels) + 1)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, record in enumerate(records, 1):
        if record.error is not None:
            continue
        height, width = record.size
        images.append({"id": number, "file_name": record.source, "height": height, "width": width})
        for box in record.boxes:
            left, top, right, bottom = box.corners
            wide, tall = right - left, bottom - top
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": ids[box.index],
                    "bbox": [round(value, 2) for value in (left, top, wide, tall)],
                    "area": round(wide * tall, 2),
                    "iscrowd": 0,
                    "score": round(box.score, 5),
                }
            )
    categories = [{"id": number, "name": label} for number, label in zip(ids, labels, strict=True)]
    return {"images": images, "categories": categories, "annotations": annotations}
