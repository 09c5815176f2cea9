"""The course of the learning rate: a pure function of the step, so that nothing can drift on resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vitrail.errors import ConfigError

Course = Literal["cosine", "linear", "poly", "constant", "rsqrt", "step"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Factor on every peak learning rate.

    Warm-up climbs linearly over `warmup` steps and reaches 1 at its end; then the course falls from 1 towards
    `floor` (the final rate as a share of the peak), which the step after the last of `steps` would have.
    poly is what is left of the run to the power 0.9 (DeepLab 1606.00915; SETR, Trans2Seg); rsqrt falls with the
    square root of the step and cools down linearly over the last `cooldown` steps; step divides by ten at each of
    three equal parts of what follows the warm-up.
    """

    course: Course = "cosine"
    steps: int
    warmup: int = 0
    floor: float = 0.0
    cooldown: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"A schedule needs at least 1 step, not {self.steps}.")
        if not 0 <= self.warmup <= self.steps:
            raise ConfigError(f"Warm-up takes {self.warmup} steps, but the run has {self.steps}; shorten it.")
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"The final learning rate must be 0 to 1 times the peak, not {self.floor:g}.")

    def __call__(self, step: int) -> float:
        """The factor for step 0, 1, ..., steps - 1, in 0..1."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        remaining = max(1, self.steps - self.warmup)
        done = min(1.0, (step - self.warmup) / remaining)
        return self.floor + (1 - self.floor) * self._shape(done, step)

    def _shape(self, done: float, step: int) -> float:
        if self.course == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        if self.course == "linear":
            return 1 - done
        if self.course == "poly":
            return float((1 - done) ** 0.9)
        if self.course == "step":
            return 10.0 ** -min(2, int(3 * done))
        if self.course == "rsqrt":
            start = max(1, self.warmup)
            return math.sqrt(start / max(start, step + 1)) * self._cooling(step)
        return 1.0

    def _cooling(self, step: int) -> float:
        if not self.cooldown:
            return 1.0
        return min(1.0, max(0.0, (self.steps - step) / self.cooldown))
