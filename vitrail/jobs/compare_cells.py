"""What a comparison measures: a cell for each training, a price for each network and size, and what they add up to."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Literal

EPOCHS = 5
"""Passes over the data where no budget was given."""

Quantity = Literal["seconds", "memory", "multiply_adds"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training: a model, a share of the pictures, a seed, and what came of it."""

    model: str
    share: float
    seed: int
    acc1: float
    """Top-1 (AP of boxes, mIoU of masks) on the test split where the data has one, else on val; a share of 1."""
    split: str
    steps: int
    seconds: float
    """Training alone, without start-up."""
    images_per_second: float
    parameters: int
    multiply_adds: int
    score: str = "acc1"
    """Name of the score that `acc1` holds."""

    @property
    def key(self) -> tuple[str, float, int]:
        return self.model, self.share, self.seed


@dataclass(frozen=True, kw_only=True)
class Price:
    """One network at one picture size."""

    model: str
    size: int
    seconds: float
    """Forward pass of one picture, the fastest of the rounds."""
    memory: int
    """Bytes that building the network and running it added to a process."""
    multiply_adds: int
    device: str = ""
    """Where it was measured, such as cpu or cuda:0; empty where nobody wrote it down."""


def exponents(prices: list[Price], quantity: Quantity) -> dict[str, float]:
    """The power of the number of tokens by which a quantity grows between the two largest sizes, by model.

    Tokens go with the area of the picture. At small sizes the linear layers, whose cost is linear in tokens,
    hide what attention does; the largest pair shows most of it.
    """
    found: dict[str, float] = {}
    for name in dict.fromkeys(price.model for price in prices):
        own = sorted((price for price in prices if price.model == name), key=lambda price: price.size)
        if len(own) >= 2:
            small, large = own[-2:]
            ratio = getattr(large, quantity) / getattr(small, quantity)
            found[name] = math.log(ratio) / (2 * math.log(large.size / small.size))
    return found


def by_model(cells: list[Cell], share: float) -> dict[str, tuple[float, float, Cell]]:
    """Mean accuracy, its spread over seeds (standard deviation) and one cell, by model, best first."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.share == share:
            found.setdefault(cell.model, []).append(cell)
    rows = {
        name: (
            statistics.mean(cell.acc1 for cell in group),
            statistics.stdev(cell.acc1 for cell in group) if len(group) > 1 else 0.0,
            group[0],
        )
        for name, group in found.items()
    }
    return dict(sorted(rows.items(), key=lambda item: -item[1][0]))
