"""A small model that knows colours, on disk, and pictures that it is right about."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import torch
from PIL import Image

import vitrail

LABELS = ("red", "green", "blue")


@contextmanager
def untyped() -> Iterator[None]:
    """Shape checks off: tracers cannot see through them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def colour_model(folder: Path, **changes: Any) -> Path:
    """A ViT whose head reads the mean colour, saved; its preprocessing is not the plainest, so that it matters."""
    torch.manual_seed(0)
    shape = {
        "img_size": 16, "patch_size": 8, "width": 12, "depth": 1, "heads": 2, "hidden": 16, "num_classes": 3,
        "class_token": False, "pool": "mean", "position": "learned", "norm_order": "post",
    }  # fmt: skip
    model: Any = vitrail.create_model("vit_tiny_patch16_224", **(shape | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.05)
        for channel in range(3):
            model.backbone.stages[0].entry.patches.proj.weight[channel, channel] = 1 / 64
        model.backbone.stages[0].blocks[0].norm1.weight.fill_(1)
        model.backbone.stages[0].blocks[0].norm2.weight.fill_(1)
        model.head.linear.weight[:, :3] = torch.eye(3) * 2
    wanted = dataclasses.replace(
        model.card.preprocessing,
        mean=(0.4, 0.5, 0.6),
        std=(0.3, 0.2, 0.25),
        crop_pct=1.0,
        interpolation="bicubic",
    )
    model.card = dataclasses.replace(model.card, labels=LABELS, preprocessing=wanted)
    model.save_pretrained(folder)
    return folder


def pictures(place: Path, count: int = 4) -> Path:
    """val/COLOUR/N.png: noisy pictures of one colour, larger than the model's input."""
    generator = np.random.default_rng(0)
    for index, label in enumerate(LABELS):
        folder = place / "val" / label
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 90, (40, 52, 3), dtype=np.uint8)
            pixels[..., index] += 150
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return place
