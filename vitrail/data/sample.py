"""A few real photographs that are always there, for proofs and measurements without data of one's own."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor


@functools.cache
def photographs(count: int = 32) -> tuple[Tensor, ...]:
    """Cuttings of the two photographs that come with scikit-learn, uint8 `[3, H, W]` of many sizes and shapes.

    The same ones every time. They have no classes: they show whether two ways of computing agree.
    """
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    generator = np.random.default_rng(20)
    found = []
    for number in range(count):
        photo = photos[number % len(photos)]
        height, width = (int(generator.integers(side // 3, side + 1)) for side in photo.shape[:2])
        top, left = (
            int(generator.integers(0, whole - part + 1))
            for whole, part in zip(photo.shape[:2], (height, width), strict=True)
        )
        piece = photo[top : top + height, left : left + width]
        piece = piece[:, ::-1] if number % 4 >= 2 else piece
        found.append(torch.from_numpy(np.ascontiguousarray(piece.transpose(2, 0, 1))))
    return tuple(found)
