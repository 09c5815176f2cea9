"""Batches without end, and the sums of what happens to them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from vitrail.errors import DataError
from vitrail.nn.shapes import ClassOutput
from vitrail.runtime import Runtime
from vitrail.train.log import Progress
from vitrail.train.pace import Pace
from vitrail.train.state import Place


class Batches(Protocol):
    """What the loop asks of a loader: to begin at any image of an epoch."""

    batch_size: int
    """Images in a batch, over all processes."""

    def resume(self, epoch: int, position: int) -> None:
        """Begin the next iteration in this epoch, behind so many of its images."""

    def __iter__(self) -> Iterator[Any]: ...


class Feed:
    """Batches without end; `place` always says which one comes next."""

    def __init__(self, batches: Batches, place: Place, pace: Pace) -> None:
        self.batches, self.place = batches, place
        self.usable = pace.steps_per_epoch * pace.accumulate * batches.batch_size
        self.iterator: Iterator[Any] | None = None

    def fetch(self) -> Any:
        """The next batch. The last few batches of an epoch, too few for a step, are left out."""
        if self.iterator is None:
            self.batches.resume(self.place.epoch, self.place.position)
            self.iterator = iter(self.batches)
        batch = next(self.iterator, None)
        if batch is None:
            raise DataError(
                f"Epoch {self.place.epoch} ended after {self.place.position} of {self.usable} images: some went"
                " missing while the run was going on."
            )
        self.place.position += self.batches.batch_size
        if self.place.position >= self.usable:
            self.place.epoch, self.place.position, self.iterator = self.place.epoch + 1, 0, None
        return batch


class Meter:
    """Adds up losses, hits and times between two records, over all processes."""

    def __init__(self, place: Place, pace: Pace, runtime: Runtime) -> None:
        self.place, self.pace, self.runtime = place, pace, runtime
        self.began = self.saved = self.last = self.ticked = self.spoken = time.perf_counter()
        self.first_step = place.step
        self.waited = self.norm = self.images = 0.0
        self.losses: list[Tensor] = []
        self.hits: list[Tensor] = []
        self.seen = 0
        self.sums = [0.0] * 4  # loss, batches, hits, images with one label

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for images."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the images per second."""
        start = time.perf_counter()
        yield
        self.last += time.perf_counter() - start

    def count(self, output: Any, targets: Any, loss: Tensor) -> None:
        """Notes one batch; nothing is fetched from the device yet."""
        logits = output.logits if isinstance(output, ClassOutput) else output
        self.seen += len(targets)
        self.losses.append(loss.detach())
        if isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point():
            self.hits.append((logits.detach().argmax(dim=1) == targets).sum())

    def settle(self, norm: float, stop: bool) -> tuple[bool, bool, bool]:
        """Agrees with the other processes: whether the step is bad, whether to stop, whether to save."""
        place, runtime = self.place, self.runtime
        sums = [torch.stack(found).sum().float() for found in (self.losses, self.hits) if found]
        loss, hits = [*torch.stack(sums).tolist(), 0.0][:2]  # fetched at once
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        late = time.perf_counter() - self.saved > self.pace.save_seconds
        mine = [0.0 if bad else loss, float(len(self.losses)), hits, float(self.seen), bad, stop, late]
        total = runtime.sum([float(value) for value in mine])
        place.images += int(total[3])
        if total[4] == 0:
            labelled = total[3] if self.hits else 0.0
            step = [total[0], total[1], total[2], labelled]
            self.sums = [before + value for before, value in zip(self.sums, step, strict=True)]
        self.images += total[3]
        self.norm, self.losses, self.hits, self.seen = norm, [], [], 0
        return total[4] > 0, total[5] > 0, total[6] > 0

    def clock(self) -> float:
        """Brings the run's time up to now."""
        now = time.perf_counter()
        self.place.seconds += now - self.ticked
        self.ticked = now
        return now

    def silent_for(self) -> float:
        """Seconds since the last record."""
        return time.perf_counter() - self.spoken

    def progress(self, rate: float, passing: bool = False) -> Progress:
        """The record of the steps since the last one that was not passing."""
        place, pace = self.place, self.pace
        now = self.clock()
        passed = max(now - self.last, 1e-9)
        loss, batches, hits, labelled = self.sums
        left = (now - self.began) / max(1, place.step - self.first_step) * (pace.steps - place.step)
        record = Progress(
            step=place.step,
            steps=pace.steps,
            epoch=place.step / pace.steps_per_epoch,
            epochs=pace.steps / pace.steps_per_epoch,
            loss=loss / batches if batches else math.nan,
            accuracy=hits / labelled if labelled else None,
            rate=rate,
            gradient=self.norm,
            images_per_second=self.images / passed,
            waiting=min(1.0, self.waited / passed),
            seconds=place.seconds,
            seconds_left=left,
            skipped=place.skipped,
            passing=passing,
        )
        self.spoken = now
        if passing:
            return record
        self.last, self.waited, self.images, self.sums = now, 0.0, 0.0, [0.0] * 4
        return record
