"""How long a run is, and when something is due."""

from __future__ import annotations

from dataclasses import dataclass

from vitrail.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long a run is and when something is due, in optimiser steps."""

    steps: int
    steps_per_epoch: int
    accumulate: int = 1
    """Batches in a step."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 leaves it."""
    log_every: int = 10
    evaluate_every: int = 0
    """0 never evaluates."""
    save_every: int = 0
    """0 saves at the end only."""
    save_seconds: float = 600.0
    """A checkpoint is also due when this much time has passed since the last."""
    speak_seconds: float = 2.0
    """A passing record of progress comes when nothing was said for so long."""
    patience: int = 0
    """Evaluations without a better score before the run stops; 0 never stops it."""
    bad_steps: int = 10
    """Steps in a row with numbers that are not finite, after which the run stops."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1:
            raise DataError("An epoch has not one full batch; take a smaller batch size.")

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after so many steps."""
        return self.evaluate_every > 0 and (step % self.evaluate_every == 0 or step == self.steps)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps."""
        return step == self.steps or (self.save_every > 0 and step % self.save_every == 0)

    def logs(self, step: int) -> bool:
        """Whether a line of the log is due after so many steps."""
        return step % self.log_every == 0 or step == self.steps
