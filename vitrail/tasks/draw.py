"""Pictures of results, as PNG bytes. matplotlib is loaded when the first one is drawn."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED = "#1c2128", "#5b6570"
RIGHT, WRONG = (0.0, 0.447, 0.698), (0.835, 0.369, 0.0)
"""Blue and vermillion of Okabe and Ito, apart for every kind of eye."""

NUMBERED, NAMED = 20, 200
"""Most classes with a number in every cell, and with a name at every row."""

STYLE: Any = {"font.family": "DejaVu Sans", "font.size": 9.0, "text.color": INK}


class Tile(NamedTuple):
    """One picture of a contact sheet: uint8 `[C, h, w]` and the lines under it, the first one emphasised."""

    pixels: Tensor
    lines: tuple[str, ...]


def confusion_picture(confusion: Tensor, labels: Sequence[str]) -> bytes:
    """Which class is taken for which: rows are true classes, columns the predicted ones.

    Colour is the share of the row: blue on the diagonal (right), vermillion beside it (wrong), with its root,
    so that rare mistakes are seen. Counts stand in the cells up to NUMBERED classes, names at the sides up to
    NAMED; the commonest mistakes are listed in words.
    """
    counts = confusion.numpy().astype(float)
    classes = len(labels)
    cell = min(0.62, max(0.115, 8.0 / classes)) if classes <= NAMED else 22 / classes
    side = max(3.2, cell * classes)
    letters = max((len(clipped(label)) for label in labels), default=0) if classes <= NAMED else 0
    size = max(6.0, min(10.0, cell * 40))
    margin = 0.75 + letters * size * 0.62 / 72
    words = 3.9
    below = margin - 0.45
    width, height = margin + side + 0.4 + words, 0.95 + side + below
    figure = _figure(width, height)
    figure.text(0.25 / width, 1 - 0.25 / height, "What is taken for what", size=15, weight="bold", va="top")
    figure.text(
        0.25 / width, 1 - 0.58 / height, "rows: true class, columns: predicted class; colour: share of the row",
        size=9, color=MUTED, va="top",
    )  # fmt: skip
    axes = _axes(figure, margin / width, below / height, side / width, side / height)
    axes.imshow(_confusion_colours(counts), interpolation="nearest", aspect="auto")
    if classes <= NAMED:
        names = [clipped(label) for label in labels]
        axes.set_yticks(range(classes), names, size=size)
        axes.set_xticks(range(classes), names, size=size, rotation=90 if letters > 3 else 0)
        axes.tick_params(length=0, pad=3)
    if classes <= NUMBERED:
        _numbers(axes, counts)
    for edge in np.arange(classes + 1) - 0.5 if classes <= 60 else []:
        axes.axhline(edge, color="white", linewidth=0.8)
        axes.axvline(edge, color="white", linewidth=0.8)
    _commonest(figure, counts, labels, (margin + side + 0.4) / width, height)
    return _png(figure)


def _confusion_colours(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """RGB `[K, K, 3]` on white."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    strength = np.sqrt(share)[..., None]
    right = np.eye(len(counts), dtype=bool)[..., None]
    strength = np.where(right, share[..., None], strength)
    floor = np.where(counts[..., None] > 0, 0.06, 0.0)
    strength = floor + (1 - floor) * strength
    colours: np.ndarray[Any, Any] = (1 - strength) * 0.985 + strength * np.where(right, RIGHT, WRONG)
    return colours


def _numbers(axes: Axes, counts: np.ndarray[Any, Any]) -> None:
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for row, column in zip(*np.nonzero(counts), strict=True):
        dark = share[row, column] > (0.6 if row == column else 0.35)
        axes.text(
            column, row, f"{int(counts[row, column])}", ha="center", va="center", size=8,
            color="white" if dark else INK,
        )  # fmt: skip


def _commonest(
    figure: Figure, counts: np.ndarray[Any, Any], labels: Sequence[str], left: float, height: float
) -> None:
    """The ten commonest mistakes: how often, true class → predicted class."""
    wrong = counts * (1 - np.eye(len(counts)))
    order = np.argsort(-wrong, axis=None, kind="stable")[:10]
    pairs = [divmod(int(place), len(counts)) for place in order if wrong.flat[place] > 0]
    figure.text(left, 1 - 0.95 / height, "The commonest mistakes", size=10, weight="bold", va="top")
    if not pairs:
        figure.text(left, 1 - 1.25 / height, "none", color=MUTED, va="top")
    for number, (row, column) in enumerate(pairs):
        y = 1 - (1.25 + 0.21 * number) / height
        count = f"{int(wrong[row, column])} ×"
        figure.text(
            left + 0.35 / figure.get_figwidth(), y, count, size=8.5, va="top", ha="right", color=MUTED
        )
        text = f"{clipped(labels[row], 20)} → {clipped(labels[column], 20)}"
        figure.text(left + 0.45 / figure.get_figwidth(), y, text, size=8.5, va="top")


def contact_sheet(tiles: Sequence[Tile], title: str, caption: str = "", columns: int = 5) -> bytes:
    """Pictures in rows, each with its lines of text below; small ones are enlarged without smoothing."""
    rows = max(1, -(-len(tiles) // columns))
    lines = max((len(tile.lines) for tile in tiles), default=0)
    side, gap = 1.9, 0.2
    pitch = side + 0.2 + 0.18 * lines + gap
    width, height = columns * (side + gap) + 0.3, 1.0 + rows * pitch
    figure = _figure(width, height)
    figure.text(0.25 / width, 1 - 0.25 / height, title, size=15, weight="bold", va="top")
    figure.text(0.25 / width, 1 - 0.58 / height, caption, size=9, color=MUTED, va="top")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        left, top = 0.25 + column * (side + gap), 1.0 + row * pitch
        axes = _axes(figure, left / width, 1 - (top + side) / height, side / width, side / height)
        axes.imshow(
            as_rgb(tile.pixels), interpolation="nearest" if tile.pixels.shape[2] < 96 else "antialiased"
        )
        axes.set_anchor("SW")
        for place, line in enumerate(tile.lines):
            figure.text(
                left / width, 1 - (top + side + 0.08 + 0.18 * place) / height, clipped(line, 30), size=8, va="top",
                color=MUTED if place else INK, weight="normal" if place else "bold",
            )  # fmt: skip
    return _png(figure)


def as_rgb(pixels: UInt8[Tensor, "C h w"]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image of any number of channels as RGB `[h, w, 3]`: grey where there are fewer than three."""
    array = pixels.permute(1, 2, 0).numpy()  # [h, w, C]
    return array[:, :, :3] if array.shape[2] >= 3 else np.repeat(array[:, :, :1], 3, axis=2)


def _figure(width: float, height: float) -> Figure:
    """A white figure of so many inches; it needs no display and leaves no state behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    axes = figure.add_axes((left, bottom, width, height))
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def png_of(figure: Figure, **options: Any) -> bytes:
    """A figure as PNG; `options` as savefig's. Signs that the font lacks are drawn as boxes, and not warned of."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", **options)
    return buffer.getvalue()


def _png(figure: Figure) -> bytes:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return png_of(figure)


def clipped(label: str, most: int = 28) -> str:
    """A label of at most `most` letters, with an ellipsis where it was longer."""
    return label if len(label) <= most else label[: most - 1] + "…"
