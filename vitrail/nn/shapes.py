"""The letters, and the records in which parts hand tensors to each other.

Letters, library-wide:

    B batch      N tokens     P prefix tokens   D width     H heads     E width of a head
    C channels   K classes    Q queries         h w grid    I J image   M keys that are attended to

Height comes before width, always. Every reshape line ends with the new shape.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Grid(NamedTuple):
    """Rows and columns of a token grid, plain integers; token t lies at (t // columns, t % columns)."""

    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of cells."""
        return self.rows * self.columns


class Level(NamedTuple):
    """What a head may know of one feature map: its channels, and image pixels per cell."""

    channels: int
    stride: int


class Features(NamedTuple):
    """What a backbone answers: maps from fine to coarse `[B, C, h, w]`, and prefix tokens `[B, P, D]`."""

    maps: tuple[Float[Tensor, "B _ _ _"], ...]
    prefix: Float[Tensor, "B P D"] | None


class ClassOutput(NamedTuple):
    """Both heads of a distilled classifier, while it trains: class token's and distillation token's logits."""

    logits: Float[Tensor, "B K"]
    distilled: Float[Tensor, "B K"]


class BoxOutput(NamedTuple):
    """What a detector answers: class logits, and boxes (cx, cy, w, h) in 0..1 of the picture without its padding.

    One column more than there are classes is a softmax with no-object last; as many columns are sigmoids.
    `auxiliary` holds the same pair for every earlier decoder layer (and every further group of queries) while
    training, else it is empty. `masks` are the logits of a panoptic head, one map a query.
    """

    logits: Float[Tensor, "B Q K"]
    boxes: Float[Tensor, "B Q 4"]
    auxiliary: tuple[tuple[Tensor, Tensor], ...] = ()
    masks: Float[Tensor, "B Q h w"] | None = None


class DenseBoxOutput(NamedTuple):
    """What a detector answers that predicts at every cell of a pyramid: one row a cell, fine to coarse.

    `boxes` (cx, cy, w, h) are in 0..1 of the picture without its padding; `quality` is the logit of how well
    centred a cell is in its box; `cells` are each cell's centre and the distance to the next one (x, y, dx, dy)
    in the boxes' unit. A cell whose centre lies outside 0..1 is padding.
    """

    logits: Float[Tensor, "B N K"]
    boxes: Float[Tensor, "B N 4"]
    quality: Float[Tensor, "B N"]
    cells: Float[Tensor, "B N 4"]


class MaskOutput(NamedTuple):
    """What a segmenter answers: class logits per pixel, and those of auxiliary heads while training."""

    logits: Float[Tensor, "B K I J"]
    auxiliary: tuple[Float[Tensor, "B K I J"], ...] = ()
