"""The training loop: set the rate, fetch, forward, loss, backward, clip, step, average; then what is due."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from vitrail.runtime import Runtime
from vitrail.train.average import Average
from vitrail.train.health import refuse
from vitrail.train.interrupt import Interrupt
from vitrail.train.log import Record, Saved, Scores, Stopped
from vitrail.train.meter import Batches, Feed, Meter
from vitrail.train.optim import Optimiser
from vitrail.train.pace import Pace
from vitrail.train.schedule import Schedule
from vitrail.train.state import Place


@dataclass(kw_only=True)
class Training:
    """Everything that takes part in a run."""

    network: nn.Module
    """As the runtime prepared it."""
    runtime: Runtime
    batches: Batches
    inputs: Callable[..., Tensor]
    """From a loader's uint8 images (and their padding, if they have some) to the network's input, on the device."""
    objective: Callable[[Any, Any, Tensor], Mapping[str, Tensor]]
    """Loss terms of (output, targets, input images); the total is called `loss`."""
    optimiser: Optimiser
    schedule: Schedule
    pace: Pace
    place: Place
    average: Average | None = None
    mix: Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]] | None = None
    """Mixes images and labels; the generator is seeded anew for every batch."""
    mix_until: int | None = None
    """The step from which on nothing is mixed any more."""
    before_step: Callable[[int], None] | None = None
    """Called with the number of the step that comes: for what changes in the course of a run."""
    frozen: Sequence[nn.Module] = ()
    """Parts that stay in evaluation mode."""
    evaluate: Callable[[], tuple[Mapping[str, float], str]] | None = None
    """Scores on validation images, and which weights were scored."""
    save: Callable[[Place], str] | None = None
    """Writes a checkpoint; its path."""
    keep_best: Callable[[Place], None] | None = None
    """Keeps the weights that were scored last."""
    score: str = "acc1"
    """The score that is to grow."""


def train(training: Training) -> Iterator[Record]:
    """Runs from `training.place` to the end, and yields what happens as it happens.

    The network's random choices depend on (seed, step, part of it, rank) only, so a resumed run repeats them.
    Raises TrainingError when losses stay non-finite, the disk is full, or another process is lost.
    """
    t, place, pace, runtime = training, training.place, training.pace, training.runtime
    feed, meter = Feed(t.batches, place, pace), Meter(place, pace, runtime)
    set_training_mode(t)
    if place.step < pace.steps and out_of_patience(t):
        yield Stopped(step=place.step, reason="patience")
        return
    with Interrupt() as interrupt:
        while place.step < pace.steps:
            t.optimiser.set_rate(t.schedule(place.step))
            if t.before_step is not None:
                t.before_step(place.step)
            for part in range(pace.accumulate):
                with meter.waiting():
                    batch = feed.fetch()
                # After fetching: a loader that begins an epoch draws random numbers of its own.
                generator = seed_part(pace.seed, place.step, part, runtime.rank)
                padding = padding_of(batch, runtime)
                images, targets = t.inputs(batch.images, *padding), batch.targets.to(runtime.device)
                if t.mix is not None and (t.mix_until is None or place.step < t.mix_until):
                    images, targets = t.mix(images, targets, generator)
                with runtime.no_sync(t.network, more=part + 1 < pace.accumulate):
                    with runtime.autocast():
                        output = t.network(images, *padding)
                        loss = t.objective(output, targets, images)["loss"]
                    backward(loss / pace.accumulate, runtime)
                meter.count(output, targets, loss)
            norm = t.optimiser.clip(pace.clip)
            bad, stop, late = meter.settle(norm, interrupt.requested)
            if bad:
                refuse(place, pace, runtime, t.network, images, norm, t.optimiser.rate)
            else:
                t.optimiser.step()
                place.skipped_in_a_row = 0
                if t.average is not None:
                    t.average.update(place.step)
            if runtime.scaler is not None:
                runtime.scaler.update()
            t.optimiser.zero()
            place.step += 1

            if pace.logs(place.step) or stop:
                yield meter.progress(t.optimiser.rate)
            elif meter.silent_for() > pace.speak_seconds:
                yield meter.progress(t.optimiser.rate, passing=True)
            if t.evaluate is not None and pace.evaluates(place.step):
                with meter.paused():
                    scores = validate(t)
                yield scores
                stop = stop or runtime.any(interrupt.requested)
            done = out_of_patience(t)
            if t.save is not None and (pace.saves(place.step) or stop or done or late):
                with meter.paused():
                    saved = save_checkpoint(t, meter)
                yield saved
            if place.step < pace.steps and (stop or done):
                yield Stopped(step=place.step, reason="interrupted" if stop else "patience")
                return
    yield Stopped(step=place.step, reason="done")


def padding_of(batch: Any, runtime: Runtime) -> tuple[Tensor, ...]:
    """Where pictures of a batch end and padding begins, on the device, as an argument; none where none is padded."""
    padding = getattr(batch, "padding", None)
    return () if padding is None else (padding.to(runtime.device),)


def seed_part(seed: int, step: int, part: int, rank: int) -> torch.Generator:
    """Seeds every global generator for one batch of one step, and gives one for mixing."""
    streams = numpy.random.SeedSequence([seed, step, part, rank]).generate_state(4)
    everywhere, mixing, arrays, plain = (int(word) for word in streams)
    torch.manual_seed(everywhere)
    numpy.random.seed(arrays)
    random.seed(plain)
    return torch.Generator().manual_seed(mixing)


def set_training_mode(training: Training) -> None:
    """Puts the network into training mode, but for its frozen parts."""
    training.network.train()
    for module in training.frozen:
        module.eval()


def backward(loss: Tensor, runtime: Runtime) -> None:
    """Adds the loss's gradients to those that are there."""
    with runtime.watch("adding up gradients"):
        (loss if runtime.scaler is None else runtime.scaler.scale(loss)).backward()


def validate(training: Training) -> Scores:
    """Scores the network on validation images, and notes whether it is the best so far."""
    assert training.evaluate is not None
    place = training.place
    scores, weights = training.evaluate()
    set_training_mode(training)
    value, loss = scores[training.score], scores.get("loss", 0.0)
    best = place.best is None or place.best_loss is None or (value, -loss) > (place.best, -place.best_loss)
    if best:
        place.best, place.best_loss = value, loss
        place.best_step, place.evaluations_since_best = place.step, 0
        if training.keep_best is not None:
            training.keep_best(place)
    else:
        place.evaluations_since_best += 1
    epoch = place.step / training.pace.steps_per_epoch
    return Scores(step=place.step, epoch=epoch, scores=dict(scores), best=best, weights=weights)


def out_of_patience(training: Training) -> bool:
    """Whether the score has not grown for as long as the run may wait."""
    return 0 < training.pace.patience <= training.place.evaluations_since_best


def save_checkpoint(training: Training, meter: Meter) -> Saved:
    """Writes a checkpoint."""
    assert training.save is not None
    meter.clock()
    start = time.perf_counter()
    path = training.save(training.place)
    meter.saved = time.perf_counter()
    return Saved(step=training.place.step, path=path, seconds=meter.saved - start)
