"""`vitrail evaluate`: score a model on labelled images, and show where it is wrong."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitrail.config import finite, to_dict
from vitrail.data.loader import Loader
from vitrail.data.sources import Source, Splits, open_splits
from vitrail.data.transforms import Preprocess
from vitrail.disk import write_atomically
from vitrail.engines import Engine, open_engine
from vitrail.engines.artefact import format_of
from vitrail.engines.sliding import SlidingEngine
from vitrail.errors import ConfigError, DataError
from vitrail.evaluate import evaluate as run_batches
from vitrail.jobs import evaluate_dense
from vitrail.jobs.dense_data import held_back, kind_for, learned_from, open_kind
from vitrail.jobs.opening import engine_for, engine_name
from vitrail.runs import EvaluateRun
from vitrail.tasks.classify import Classify, ClassMetrics, Mistake, Mistakes
from vitrail.tasks.draw import NAMED, Tile, confusion_picture, contact_sheet
from vitrail.weights.card import Card
from vitrail.weights.folder import model_folder

logger = logging.getLogger(__name__)

WORTH_WORKERS = 2000
"""Images below which starting worker processes takes longer than they save."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The numbers, and the files that hold and show them."""

    scores: dict[str, float]
    """By name, shares in 0..1: acc1, acc5, loss, precision_macro, recall_macro, f1_macro, ece, images; of boxes ap,
    ap50, ap75 ...; of masks miou, pixel_acc, mean_acc, loss."""
    classes: list[dict[str, Any]]
    """One row a class: label, support, and the class's own scores."""
    split: str
    """Which part of the data was scored."""
    notes: tuple[str, ...]
    """What was decided or is odd, for people."""
    skipped: tuple[str, ...]
    """Why some images could not be read."""
    files: tuple[Path, ...]
    """report.json, and confusion.png, mistakes.png or worst.png, as far as there was something to draw."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "scores": finite(self.scores),
            "classes": finite(self.classes),
            "split": self.split,
            "notes": list(self.notes),
            "skipped": list(self.skipped),
            "files": [str(path) for path in self.files],
        }


def evaluate(run: EvaluateRun, watch: Callable[[int, int], None] | None = None) -> Evaluation:
    """Score a model on one split of a data set.

    Classes are matched by name: data that lists them in another order is remapped, data with a class that the
    model does not know is refused. Images that cannot be read are left out and listed.

    Args:
        run: what to score, on what.
        watch: called after each batch with the images done and the images there are.

    Raises:
        DataError: the data cannot be used, or its classes do not fit the model's.
        WeightsError: the folder holds no model.
    """
    if run.batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1; got {run.batch_size}.")
    engine = open_engine(run.model, engine_name(run), device=run.device, precision=run.precision)
    engine = _neighbours(run, engine)
    if run.window:
        engine = SlidingEngine(engine, run.window)
        run = replace(run, batch_size=1)  # a picture alone needs no padding
    if engine.card.task != "image-classification":
        return _dense(run, engine, watch)
    splits = open_kind(
        kind_for(engine.card.task, run.data, run.model), run.data, ignore=run.ignore, reduce_zero=run.reduce_zero,
        **({"val_share": 0.0} if whole(run, engine.card) else held_back(engine.card)),
    )  # fmt: skip
    source, split, notes = _source(run, splits, engine.card)
    source, more = _matched(source, engine)
    labels = engine.card.labels or source.classes
    engine = engine if run.knn else engine_for(engine, run, len(source))
    loader = _in_order(run, source, engine)
    task = Classify(labels)
    metrics, mistakes, done = task.metrics(), Mistakes(labels), 0

    def seen(output: Any, batch: Any) -> None:
        nonlocal done
        mistakes.add(output, batch)
        done = min(done + run.batch_size, len(source))
        if watch is not None:
            watch(done, len(source))

    scores = dict(run_batches(engine, loader, metrics, watch=seen))
    notes = [*notes, *more]
    if same := getattr(engine, "met", 0):
        notes.append(
            f"{same} of the scored pictures are among the remembered ones too: each was asked without itself"
        )
    if loader.skipped:
        notes.append(f"{len(loader.skipped)} of {len(source)} images could not be read and are left out")
    for note in notes:
        logger.info(note)
    result = Evaluation(
        scores=scores,
        classes=metrics.classes(),
        split=split,
        notes=tuple(notes),
        skipped=tuple(loader.skipped.values()),
        files=(),
    )
    return _written(run, result, metrics, mistakes.result(), source)


def _neighbours(run: EvaluateRun, engine: Engine) -> Engine:
    """The engine that asks the nearest of the labelled pictures, where the run names some; else the same."""
    if not run.knn:
        return engine
    from vitrail.engines.neighbours import Neighbours

    splits = open_splits(run.knn, val_share=0.0)
    known = splits.train if splits.train is not None else splits.everything
    return Neighbours(engine, _in_order(run, known, engine), known.classes, run.knn_k)


def _in_order(run: EvaluateRun, source: Source, engine: Engine) -> Loader:
    """Every readable picture once, prepared as the model's card says."""
    return Loader(
        source,
        Preprocess(engine.card.preprocessing),
        run.batch_size,
        workers=_workers(run.workers, len(source)),
        unreadable="drop",
        max_bad_share=1.0,
    )


def _dense(run: EvaluateRun, engine: Engine, watch: Callable[[int, int], None] | None) -> Evaluation:
    """The same of boxes and masks, with report.json and worst.png."""
    found = evaluate_dense.score(
        run,
        engine,
        whole(run, engine.card),
        lambda splits: _source(run, splits, engine.card),
        lambda images: _workers(run.workers, images),
        watch,
    )
    folder = _output(run)
    folder.mkdir(parents=True, exist_ok=True)
    result = Evaluation(
        scores=found.scores,
        classes=found.classes,
        split=found.split,
        notes=tuple(found.notes),
        skipped=tuple(found.skipped),
        files=(folder / "report.json", folder / "worst.png"),
    )
    write_atomically(result.files[1], found.picture)
    labels = [row["label"] for row in found.classes]
    report = {"run": to_dict(run), **result.to_dict(), "labels": labels, "worst": found.worst, **found.extra}
    write_atomically(result.files[0], (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    return result


def _source(run: EvaluateRun, splits: Splits, card: Card) -> tuple[Any, str, list[str]]:
    """The pictures to score, the name of their split, and what to say about the choice."""
    if run.split != "auto":
        chosen: Source | None = getattr(splits, run.split)
        if chosen is None:
            has = ", ".join(splits.given) or "no splits"
            raise DataError(f"{', '.join(run.data)} has no {run.split} pictures; it has {has}.")
        notes = list(splits.notes)
        if run.split not in splits.given and not held_back(card):
            notes.append(
                "the model does not say which pictures its training held back: it may know some of these"
            )
        return chosen, run.split, notes
    for name in ("val", "test"):
        found: Source | None = getattr(splits, name)
        if name in splits.given and found is not None:
            return found, name, list(splits.notes)
    if splits.val is not None and not whole(run, card):
        return (
            splits.val,
            "val",
            [*splits.notes, "the model was trained on this data: what was held back is scored"],
        )
    note = "the data has no val or test: all its pictures are scored, which flatters a model trained on them"
    return splits.everything, "all", [*splits.notes, note]


def whole(run: EvaluateRun, card: Card) -> bool:
    """Whether nothing is held back where the data has no val: no split is named, and the model knows none of it."""
    return run.split == "auto" and not learned_from(card, run.data)


def _matched(source: Source, engine: Engine) -> tuple[Source, list[str]]:
    """The source with the model's class numbers, and what must be said of the matching. Raises DataError."""
    known = engine.card.labels
    if known is None:
        if len(source.classes) != engine.classes:
            raise DataError(
                f"The model has {engine.classes} classes without names, the data has {len(source.classes)};"
                " they cannot be matched. Give the model its class names (config.json, id2label)."
            )
        return source, ["the model has no class names: its classes are taken in the data's order, unchecked"]
    source = source.called(engine.card.names)
    if source.classes == known:
        return source, []
    shared = [name for name in source.classes if name in set(known)]
    notes = []
    if shared != [name for name in known if name in set(source.classes)]:
        notes.append("the data lists its classes in another order than the model: they are matched by name")
    if len(shared) < len(known):
        absent = len(known) - len(shared)
        notes.append(f"{absent} of the model's {len(known)} classes do not occur in the data")
    return source.relabel(known), notes


def _workers(asked: int | None, images: int) -> int:
    if asked is not None:
        return asked
    return 0 if images < WORTH_WORKERS else min(8, (os.cpu_count() or 1))


def _written(
    run: EvaluateRun, result: Evaluation, metrics: ClassMetrics, mistakes: list[Mistake], source: Source
) -> Evaluation:
    """Write report.json, confusion.png and mistakes.png into the run's output folder."""
    folder = _output(run)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "report.json"]
    confusion = metrics.confusion
    if confusion is not None and len(metrics.labels) > 1:
        files.append(folder / "confusion.png")
        write_atomically(files[-1], confusion_picture(confusion, metrics.labels))
    if mistakes:
        files.append(folder / "mistakes.png")
        write_atomically(files[-1], _sheet(mistakes, source))
    result = replace(result, files=tuple(files))
    report = {
        "run": to_dict(run),
        **result.to_dict(),
        "calibration": metrics.calibration(),
        "labels": list(metrics.labels),
        "confusion": confusion.tolist() if confusion is not None and len(metrics.labels) <= NAMED else None,
        "mistakes": [
            {"image": source.name(m.index), "truth": m.truth, "predicted": m.predicted, "score": m.score}
            for m in mistakes
        ],
    }
    write_atomically(files[0], (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    return result


def _sheet(mistakes: list[Mistake], source: Source) -> bytes:
    tiles = [
        Tile(
            mistake.pixels,
            (
                f"called {mistake.predicted}, {mistake.score:.1%}",
                f"is {mistake.truth}",
                Path(source.name(mistake.index)).name,
            ),
        )
        for mistake in mistakes
    ]
    return contact_sheet(
        tiles, "The most confident mistakes", "what the network saw, and what it took it for"
    )


def _output(run: EvaluateRun) -> Path:
    """The folder asked for; else `evaluation` in the model's run, or beside where one stands."""
    if run.output:
        return Path(run.output)
    if format_of(run.model) is not None:
        return Path("evaluation")
    folder = model_folder(run.model)
    return (folder.parent if folder.name == "model" else Path()) / "evaluation"
