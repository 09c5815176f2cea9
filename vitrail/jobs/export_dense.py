"""What `vitrail export` shows a model of boxes or masks, and how it judges what was made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.data.dense import kinds_of
from vitrail.data.dense_loader import pad_together
from vitrail.data.image import decode
from vitrail.data.sample import photographs
from vitrail.data.sources import open_pictures
from vitrail.data.transforms import Preprocess, colour
from vitrail.engines import Engine
from vitrail.errors import ConfigError, DataError, ImageError
from vitrail.export.parity_dense import DenseProof, answering, prove_dense
from vitrail.jobs.dense_data import loader_in_order, rows
from vitrail.jobs.evaluate_dense import in_models_order, open_for
from vitrail.runs import ExportRun
from vitrail.tasks.registry import make_task

BATCH = 4
"""Pictures that the proof shows at a time: answers of dense models are large."""

PHOTOGRAPHS = 12
"""Cuttings of photographs that are shown where there is no data."""


def check(run: ExportRun, task: str) -> None:
    """Refuse what is for classes of whole pictures alone. Raises ConfigError."""
    if run.int8:
        raise ConfigError(f"int8 is for models that classify whole pictures; {run.model} is one of {task}.")
    if run.format == "triton":
        raise ConfigError(
            f"A Triton repository holds models that classify whole pictures; {run.model} is one of {task}: take"
            " --format onnx."
        )


class DensePictures:
    """Prepared pictures with padding and targets, for the proof: the run's data, else photographs without targets."""

    def __init__(self, run: ExportRun, reference: Engine) -> None:
        self.engine = reference
        self.notes: list[str] = []
        self.name = "cuttings of two photographs"
        self.source: Any = None
        self.annotated = bool(run.data)
        if not run.data:
            return
        self.name = ", ".join(Path(path).name for path in run.data)
        try:
            splits, notes = open_for(reference, run.data, run.model)
            source, more = in_models_order(splits.scored, reference)
            self.notes += [*notes, *more]
        except DataError as error:
            self.annotated, source = False, open_pictures(run.data)
            bare = kinds_of(run.data) == ("classes",)
            self.notes.append(
                f"no score is measured: {'no boxes or masks lie beside the pictures' if bare else error}"
            )
        self.source = source.sample(run.samples, run.seed)

    def __len__(self) -> int:
        return PHOTOGRAPHS if self.source is None else len(self.source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, Sequence[Any] | None]]:
        preprocessing = self.engine.card.preprocessing
        if self.annotated:
            loader = loader_in_order(
                self.source, preprocessing, batch_size=BATCH, workers=0, max_bad_share=1.0
            )
            for batch in rows(loader):
                yield batch.images, batch.padding, list(batch.targets)
            self.notes += [f"left out: {reason}" for reason in loader.skipped.values()]
            return
        prepare, fill = Preprocess(preprocessing), colour(preprocessing)
        ready: list[Tensor] = []
        for picture in self._decoded():
            ready.append(prepare(picture))
            if len(ready) == BATCH:
                yield *pad_together(ready, fill), None
                ready = []
        if ready:
            yield *pad_together(ready, fill), None

    def _decoded(self) -> Iterator[Tensor]:
        if self.source is None:
            yield from photographs(PHOTOGRAPHS)
            return
        for number in range(len(self.source)):
            try:
                yield decode(self.source.read(number), name=self.source.name(number))
            except ImageError as error:
                self.notes.append(f"left out: {error}")


def prove(
    reference: Engine, candidate: Engine, pictures: DensePictures, watch: Callable[[int], None] | None
) -> DenseProof:
    """How far an exported file differs from its network."""
    labels = reference.card.labels or tuple(f"class {number}" for number in range(reference.classes))
    task = make_task(reference.card.task, labels)
    with torch.no_grad():
        return prove_dense(
            answering(reference), answering(candidate), pictures, task,
            precision=candidate.precision, pictures=pictures.name, watch=watch,
        )  # fmt: skip
