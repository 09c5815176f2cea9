"""The torch engine with token merging, compared with the same without it: what it gains and what it costs."""

from __future__ import annotations

import logging

import torch

from vitrail.data.sample import photographs
from vitrail.data.transforms import Preprocess
from vitrail.engines import Engine
from vitrail.engines.choose import PHOTOGRAPHS, speeds
from vitrail.engines.pytorch import TorchEngine
from vitrail.errors import ConfigError
from vitrail.models.merging import merge_tokens

logger = logging.getLogger(__name__)

BATCH = 8
"""Photographs in one batch of the comparison."""


def merging(engine: Engine, count: int) -> Engine:
    """The same model with `count` tokens fewer after every block; speed and agreement are measured and said.

    Raises:
        ConfigError: the engine does not hold the network itself.
        UnsupportedError: the network is no plain ViT.
    """
    if not isinstance(engine, TorchEngine):
        raise ConfigError(
            f"Tokens are merged by the engine torch; got {engine.name}. Leave merge-tokens out."
        )
    merged = TorchEngine(
        merge_tokens(engine.network, count), device=str(engine.runtime.device), precision=engine.precision
    )
    prepare = Preprocess(engine.card.preprocessing)
    images = torch.stack([prepare(picture) for picture in photographs(PHOTOGRAPHS)])
    with torch.no_grad():
        before, after = engine(images), merged(images)
    same = float((before.argmax(dim=1) == after.argmax(dim=1)).double().mean())
    change = float((before.softmax(dim=1) - after.softmax(dim=1)).abs().max())
    rates = speeds({"plain": engine, "merged": merged}, images[:BATCH])
    logger.info(
        "merging %d tokens a block: %.1f images/s here at batch %d, %.1f without; on %d photographs the first class"
        " is the same in %.0f %%, probabilities move by %.3f at most",
        count, rates["merged"], BATCH, rates["plain"], PHOTOGRAPHS, 100 * same, change,
    )  # fmt: skip
    return merged
