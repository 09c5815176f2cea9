"""What a run says while it goes: plain records, and the files they are kept in.

A reporter is any function of one record. The command line draws the records; the job writes them to
`metrics.jsonl`, to TensorBoard, and as `curves.png`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitrail.disk import write_atomically
from vitrail.errors import TrainingError
from vitrail.tasks.draw import png_of


@dataclass(frozen=True, kw_only=True)
class Note:
    """A sentence for the reader: a choice and its reason, a receipt, a warning."""

    text: str
    kind: str = "note"
    """note, choice (of the plan), receipt (of weights), or warning."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run is. Numbers cover the steps since the record before."""

    step: int
    """Optimiser steps done."""
    steps: int
    """Optimiser steps in all."""
    epoch: float
    """Epochs done, with the fraction."""
    epochs: float
    loss: float
    """Training loss, mean over the steps."""
    accuracy: float | None
    """Share of training images classified rightly, 0..1; None where mixed labels leave it undefined."""
    rate: float
    """Highest learning rate in force."""
    gradient: float
    """Norm of the gradient before clipping, of the last step."""
    images_per_second: float
    waiting: float
    """Share of the time spent waiting for images, 0..1."""
    seconds: float
    """Time trained so far, over all sittings."""
    seconds_left: float
    skipped: int
    """Steps left out so far because a number was not finite."""
    passing: bool = False
    """For the eye alone: comes by the clock, between two records that are kept in the log."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A validation: scores by name, shares in 0..1."""

    step: int
    epoch: float
    scores: Mapping[str, float]
    best: bool
    """Whether this is the best so far."""
    weights: str = "raw"
    """raw, or average when the averaged weights were scored."""
    split: str = "val"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint has been written."""

    step: int
    path: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """Why the loop ended: done, interrupted, or patience."""

    step: int
    reason: str


Record = Note | Progress | Scores | Saved | Stopped
Reporter = Callable[[Record], None]


class Log:
    """Keeps the records of a run in its folder."""

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = True) -> None:
        """Opens the log; records beyond `step`, written before a crash and to be repeated, are dropped."""
        self.path = folder / "metrics.jsonl"
        kept = [record for record in read_log(self.path) if record.get("step", 0) <= step]
        write_atomically(
            self.path, "".join(json.dumps(record) + "\n" for record in kept).encode(), TrainingError
        )
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _board(folder / "tensorboard", step) if tensorboard else None

    def write(self, record: Record) -> None:
        """Keeps a Progress or Scores record; the others are not numbers."""
        if not isinstance(record, Progress | Scores) or (isinstance(record, Progress) and record.passing):
            return
        plain = {"kind": "train" if isinstance(record, Progress) else "scores", **asdict(record)}
        plain.pop("passing", None)
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in _numbers(record).items():
                self._board.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line torn by a crash is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return [record for record in records if isinstance(record, dict)]


def _numbers(record: Progress | Scores) -> dict[str, float]:
    if isinstance(record, Scores):
        return {f"{record.split}/{name}": value for name, value in record.scores.items()}
    wanted = ("loss", "accuracy", "rate", "gradient", "images_per_second", "waiting")
    values = {f"train/{name}": getattr(record, name) for name in wanted}
    return {name: value for name, value in values.items() if value is not None}


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def draw_curves(
    records: Iterable[Mapping[str, Any]],
    path: Path,
    title: str,
    score: tuple[str, str] = ("acc1", "top-1, %"),
) -> None:
    """Loss, accuracy, learning rate and speed over the epochs, as one PNG.

    `records` are those of `read_log`; `score` is the one that counts, by its name and in words.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(records)
    train = [record for record in records if record.get("kind") == "train"]
    scores = [record for record in records if record.get("kind") == "scores" and record.get("split") == "val"]
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(2, 2)
    loss, accuracy, rate, speed = panels.flat
    _line(loss, train, "loss", "training", "#4c72b0")
    _score(loss, scores, "loss", "validation", "#c44e52")
    _line(accuracy, train, "accuracy", "training", "#4c72b0", scale=100)
    _score(accuracy, scores, score[0], "validation", "#c44e52", scale=100)
    _line(rate, train, "rate", "learning rate", "#55a868")
    _line(speed, train, "images_per_second", "images/s", "#8172b3")
    _mark_best(accuracy, scores, score[0])
    for axes, name in zip(panels.flat, ("loss", score[1], "learning rate", "images/s"), strict=True):
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.get_legend_handles_labels()[0]) > 1:  # one line alone is named by the title
            # A corner, since looking for the best place takes seconds in a long run.
            corner = "lower right" if axes is accuracy else "upper right"
            axes.legend(fontsize=8, frameon=False, loc=corner)
    speed.set_ylim(bottom=0)
    write_atomically(path, png_of(figure, dpi=110, metadata={"Software": "vitrail"}))


def _line(
    axes: Any, records: list[Mapping[str, Any]], key: str, label: str, colour: str, scale: float = 1
) -> None:
    points = [
        (r["epoch"], r[key] * scale) for r in records if r.get(key) is not None and math.isfinite(r[key])
    ]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.2)


def _score(
    axes: Any, records: list[Mapping[str, Any]], key: str, label: str, colour: str, scale: float = 1
) -> None:
    points = [(r["epoch"], r["scores"][key] * scale) for r in records if key in r["scores"]]
    if points:
        axes.plot(
            *zip(*points, strict=True), color=colour, label=label, linewidth=1.6, marker=".", markersize=4
        )


def _mark_best(axes: Any, records: list[Mapping[str, Any]], score: str) -> None:
    points = [(r["epoch"], r["scores"][score] * 100) for r in records if score in r["scores"]]
    if points:
        epoch, best = max(points, key=lambda point: point[1])
        axes.annotate(
            f"{best:.2f}", (epoch, best), textcoords="offset points", xytext=(0, -14), ha="center", fontsize=9
        )
