"""How a trace is told: what the poster and the page call the pieces that they show."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitrail.explain.trace import Trace

IN_FLOAT32 = "Computed in float32: `vitrail predict --precision fp32` gives the same numbers."


@dataclass(frozen=True, kw_only=True)
class Words:
    """Headings and nouns."""

    cut: str
    """Heading of the image under its grid."""
    piece: str
    """One pane of the grid, in pixels."""
    pieces: str
    flat: str
    """Heading of one piece's pixels."""
    read: str
    """What reads these numbers."""
    made: str
    """Heading of what the pieces become."""
    items: str
    """What the network goes on with."""
    when: str
    """The moment at which these are shown."""
    placed: str
    """Heading of the positions, or that none are added, and why that is no loss."""
    order: str
    blocks: str
    """Heading of the blocks."""


TOKENS = Words(
    cut="The image is cut into patches",
    piece="patch",
    pieces="patches",
    flat="A patch is flattened",
    read="are what the projection reads",
    made="Each patch becomes a token",
    items="tokens",
    when="before positions are added",
    placed="Each token knows its place",
    order="the order enters in the blocks themselves",
    blocks="Block after block, tokens look at each other",
)
"""For networks that cut patches which do not overlap, and read each alone."""

WINDOWS = dataclasses.replace(
    TOKENS,
    cut="The image is read in windows",
    piece="window",
    pieces="windows",
    flat="The pixels of one token",
    read="are all that makes this token",
    made="Each window becomes a token",
)
"""For networks whose tokens come of convolutions or windows that overlap."""

CELLS = Words(
    cut="The cells of the first map",
    piece="cell",
    pieces="cells",
    flat="A cell is made of these pixels",
    read="are all that makes this cell",
    made="Each cell becomes a vector",
    items="cells",
    when="after the stem",
    placed="No positions are added",
    order="a convolution knows its places by their neighbours",
    blocks="Block after block, cells see more of the image",
)
"""For convolutional networks."""


def words(trace: Trace) -> Words:
    """Those that fit a trace."""
    if trace.convolutional:
        return CELLS
    found = WINDOWS if trace.overlapping else TOKENS
    if trace.placed is None:
        return dataclasses.replace(found, when="as they are made", placed="No positions are added")
    return found
