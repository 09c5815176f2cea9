"""Any engine of a segmenter, over pictures larger than its window: their shape is kept, and logits are averaged."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from vitrail.errors import ConfigError
from vitrail.nn.shapes import MaskOutput
from vitrail.tasks.sliding import slide

LONGEST = 8
"""How many times its short side a picture may be long; beyond, it is made smaller."""


class SlidingEngine:
    """An engine whose pictures keep their shape: the short side is brought to `side`, and the engine's own input size
    slides over them by two thirds.

    Pictures of one call are best alone: where they are padded to one size, windows see the padding.

    Raises:
        ConfigError: the engine is no segmenter's, or the side is below one pixel.
    """

    def __init__(self, engine: Any, side: int) -> None:
        if engine.card.task != "image-segmentation":
            raise ConfigError(
                f"A window slides over pictures for masks alone; this is a model of {engine.card.task}."
            )
        if side < 1:
            raise ConfigError(
                f"The short side of pictures under a sliding window must be at least 1; got {side}."
            )
        self.inner = engine
        self.window: tuple[int, int] = engine.card.preprocessing.input_size
        preprocessing = dataclasses.replace(
            engine.card.preprocessing, crop_mode="fit", input_size=(side, LONGEST * side)
        )
        self.card = dataclasses.replace(engine.card, preprocessing=preprocessing)
        self.classes: int = engine.classes
        self.name, self.precision = f"{engine.name}, sliding", engine.precision

    def __call__(self, images: Tensor) -> Any:
        """A MaskOutput with logits at the images' size, of uint8 images `[B, C, h, w]` of any size."""
        return MaskOutput(slide(self.inner, images, self.window))
