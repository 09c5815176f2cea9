"""Mixup and CutMix of a batch, as DeiT does them: one choice for the batch, partners in reversed order.

Every choice is drawn on the CPU from the generator or the number given, so it can be resumed and is the same
on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vitrail.errors import ConfigError


class Choice(NamedTuple):
    """What is done to one batch: `share` of each picture stays; `box` (top, left, bottom, right) is replaced.

    Without a box the pictures are blended; share 1 without a box leaves them as they are.
    """

    share: float
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) with soft targets.

    Called with images `[B, C, h, w]` (float, normalised; uint8 is refused, blending would round it), labels
    int64 `[B]`, and a CPU generator or a whole number; hands back new images and targets float32 `[B, K]`
    whose rows sum to 1. Picture b is mixed with picture B - 1 - b.
    """

    num_classes: int
    mixup: float = 0.8
    """Alpha of the Beta distribution of mixup's share; 0 turns mixup off."""
    cutmix: float = 1.0
    """Alpha of CutMix's share; 0 turns CutMix off."""
    probability: float = 1.0
    """Share of the batches that are mixed at all."""
    switch: float = 0.5
    """Probability of CutMix where both are on."""
    smoothing: float = 0.0
    """Label smoothing: the share of the target that is spread evenly over all classes."""

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ConfigError(f"num_classes must be at least 1, got {self.num_classes}.")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be 0 (off) or a positive number, got {value}.")
        for name in ("probability", "switch", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in 0..1, got {getattr(self, name)}.")

    def __call__(
        self, images: Tensor, targets: Tensor, generator: torch.Generator | int
    ) -> tuple[Tensor, Tensor]:
        if not images.is_floating_point():
            raise ConfigError(f"Mix blends normalised float images, got {images.dtype}.")
        choice = self.choose(images.shape[-2], images.shape[-1], generator)
        soft = self.soften(targets)  # [B, K]
        if choice.box is not None:
            top, left, bottom, right = choice.box
            mixed = images.clone()
            mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
            images = mixed
        elif choice.share < 1:
            images = images * choice.share + images.flip(0) * (1 - choice.share)
        return images, soft * choice.share + soft.flip(0) * (1 - choice.share)

    def soften(self, targets: Tensor) -> Tensor:
        """Smoothed one-hot targets float32 `[B, K]` of labels `[B]`."""
        one_hot = functional.one_hot(targets, self.num_classes).to(torch.float32)  # [B, K]
        return one_hot * (1 - self.smoothing) + self.smoothing / self.num_classes

    def choose(self, height: int, width: int, generator: torch.Generator | int) -> Choice:
        """Draw what is done to a batch of this picture size."""
        if isinstance(generator, torch.Generator):
            generator = int(torch.randint(2**62, (), generator=generator))
        random = np.random.default_rng(generator)
        mixed, cut = random.random(2)
        use_cutmix = self.cutmix > 0 and (self.mixup == 0 or cut < self.switch)
        alpha = self.cutmix if use_cutmix else self.mixup
        if alpha == 0 or mixed >= self.probability:
            return Choice(1.0, None)
        share = float(random.beta(alpha, alpha))
        if not use_cutmix:
            return Choice(share, None)
        tall, wide = (int(side * math.sqrt(1 - share)) for side in (height, width))
        y, x = int(random.integers(height)), int(random.integers(width))
        top, bottom = max(0, y - tall // 2), min(height, y + tall // 2)
        left, right = max(0, x - wide // 2), min(width, x + wide // 2)
        kept = 1 - (bottom - top) * (right - left) / (height * width)  # as cut at the border
        return Choice(kept, (top, left, bottom, right))
