"""Small pictures for tests."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Smooth coloured noise uint8 `[H, W, 3]`: something that JPEG does not spoil."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(picture: Any, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file with this picture (an array or a Pillow image)."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()
