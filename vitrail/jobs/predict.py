"""`vitrail predict`: files, folders and patterns in, one record for each image out, as they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vitrail.errors import DataError
from vitrail.predict import Predictor, expand
from vitrail.runs import PredictRun
from vitrail.tasks.classify import Prediction


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The records of a run, in the images' order, computed while they are iterated over; once."""

    total: int
    """Images that there are, readable or not."""
    labels: tuple[str, ...]
    """The model's class names."""
    records: Iterator[Prediction]

    def __iter__(self) -> Iterator[Prediction]:
        return self.records


def predict(run: PredictRun) -> Predictions:
    """Open the model and find the images; an image that cannot be read gets a record with its error.

    Raises DataError where a folder or pattern holds no image, and what opening a model raises.
    """
    paths = expand(run.images)
    if not paths:
        raise DataError("There is no image to look at: name files, folders or patterns.")
    predictor = Predictor(
        run.model, precision=run.precision, device=run.device, batch_size=run.batch_size, top_k=run.top_k
    )
    return Predictions(total=len(paths), labels=predictor.labels, records=predictor.stream(paths))
