"""Training as a person watches it, on stderr: a moving bar in a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from vitrail.cli import show

if TYPE_CHECKING:
    from vitrail.train.log import Note, Progress, Record, Saved, Scores, Stopped


class TrainingView:
    """A reporter for the training job: draws its records (vitrail.train.log)."""

    PAUSE = 5.0
    """Seconds between plain lines of progress."""

    def __init__(self, handler: show.Messages) -> None:
        self.handler = handler
        self.spoken = float("-inf")
        self.bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            parts = (
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:3.0f} %"),
                TextColumn("{task.description}"),
            )
            self.bar = Progress(*parts, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("starting", total=None)

    def __enter__(self) -> TrainingView:
        if self.bar is not None:
            self.bar.start()
            self.handler.console = self.bar.console
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.handler.console = None

    def __call__(self, record: Record) -> None:
        """Draw one record."""
        draw = getattr(self, f"_{type(record).__name__.lower()}")
        draw(record)

    def _line(self, text: str) -> None:
        if self.bar is None:
            show.say(text)
        else:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _note(self, note: Note) -> None:
        self._line(f"warning: {note.text}" if note.kind == "warning" else note.text)

    def _progress(self, now: Progress) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=now.step, total=now.steps, description=progress_text(now))
            return
        last = now.step >= now.steps
        if last or time.monotonic() - self.spoken >= self.PAUSE:
            self.spoken = time.monotonic()
            self._line(f"step {now.step}/{now.steps}  {progress_text(now)}")

    def _scores(self, found: Scores) -> None:
        self._line(scores_text(found))

    def _saved(self, saved: Saved) -> None:
        """Checkpoints come often and mean nothing until they are needed; the run folder shows them."""

    def _stopped(self, stopped: Stopped) -> None:
        if stopped.reason != "done":
            self._line(f"stopped at step {stopped.step}: {stopped.reason}")


DENSE = {"ap": "AP", "ap50": "AP50", "miou": "mIoU", "pixel_acc": "pixels"}
"""Scores of boxes and masks that are shown while training."""


def progress_text(now: Progress) -> str:
    """The numbers of one moment: epoch, loss, accuracy, speed, time left, and where the time goes."""
    parts = [f"epoch {now.epoch:.1f}/{round(now.epochs, 1):g}", f"loss {now.loss:.4f}"]
    if now.accuracy is not None:
        parts.append(f"train acc {100 * now.accuracy:.1f} %")
    parts.append(f"{now.images_per_second:,.0f} images/s")
    parts.append(f"{show.duration(now.seconds_left)} left")
    parts.append(f"{100 * now.waiting:.0f} % waiting for data")
    if now.skipped:
        parts.append(f"{now.skipped} steps skipped (not finite)")
    return "  ".join(parts)


def scores_text(found: Scores) -> str:
    """One validation: the scores that people look at first, then a mark on the best."""
    parts = [f"epoch {found.epoch:.1f}  {found.split}"]
    for name, value in found.scores.items():
        if name in ("acc1", "acc5"):
            parts.append(f"top-{name[-1]} {show.percent(value)}")
        elif name in DENSE and value == value:
            parts.append(f"{DENSE[name]} {show.percent(value)}")
        elif name == "loss":
            parts.append(f"loss {value:.4f}")
    if found.weights != "raw":
        parts.append(f"({found.weights} weights)")
    if found.best:
        parts.append("best so far")
    return "  ".join(parts)
