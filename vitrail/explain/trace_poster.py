"""A trace as one picture (PNG): from the patch grid at the top to the probabilities at the bottom."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

from vitrail.explain.places import Reach
from vitrail.explain.trace import Layer, Trace
from vitrail.explain.trace_words import words
from vitrail.nn.shapes import Grid
from vitrail.tasks.draw import as_rgb, clipped, png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

INK, MUTED, LINE, ACCENT, BLUE = "#1c2128", "#5b6570", "#d5dae0", "#d55e00", "#0072b2"
"""Text, captions, rules, the marked patch, bars: Okabe and Ito's hues, apart for every kind of eye."""

LOOKS, SIGNED, LIKE = "cividis", "PuOr_r", "viridis"
"""Colour scales of attention, of values around zero, of similarity."""

AVERAGE = "the average token"
COLUMNS, MOST_LAYERS = 6, 12
LINE_HEIGHT = 0.15
"""Inches from one line of a step's note to the next."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "svg.fonttype": "none",
}


def poster(trace: Trace) -> bytes:
    """The PNG of a trace, about 1,500 pixels wide."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = _chosen([layer for stage in trace.stages for layer in stage.layers])
    rows = -(-len(layers) // COLUMNS)
    table = 0.55 + sum(_tall(note) for _, _, note in shortened(trace))
    guesses = 0.75 + 0.3 * len(trace.prediction.top)
    heights = [0.95, max(4.6, table), 4.1, 0.75 + 2.35 * rows, 0.75 + 2.2 * rows, guesses]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, sum(heights)), dpi=110, facecolor="white")
        FigureCanvasAgg(figure)
        bands: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
        _title(bands[0], trace)
        _patches(bands[1], trace)
        _tokens(bands[2], trace)
        _attention(bands[3], trace, layers)
        _components(bands[4], layers, trace.convolutional)
        _probabilities(bands[5], trace)
        return png_of(figure, metadata={"Title": f"{trace.model}: {trace.source}"})


def _chosen(layers: list[Layer]) -> list[Layer]:
    """At most MOST_LAYERS, evenly spread, the first and the last among them."""
    if len(layers) <= MOST_LAYERS:
        return layers
    return [layers[round(place * (len(layers) - 1) / (MOST_LAYERS - 1))] for place in range(MOST_LAYERS)]


def contrasted(trace: Trace) -> tuple[int, int]:
    """Row and column of the window whose pixels differ most: the one that is shown flattened.

    Windows that hang over the image's border are passed over where others do not.
    """
    image = trace.pixels.double()
    grid = trace.stages[0].grid
    (top, bottom), (left, right) = (
        _spans(reach, size) for reach, size in zip(trace.windows, image.shape[1:], strict=True)
    )
    count = (bottom - top)[:, None] * (right - left)[None]  # [h, w]
    mean, square = (
        _sums(values, top, bottom, left, right) / count.clamp_min(1) for values in (image, image**2)
    )
    spread = (square - mean**2).sum(dim=0)  # [h, w]
    whole = count == trace.patch[0] * trace.patch[1]
    if bool(whole.any()):
        spread = spread.masked_fill(~whole, -1.0)
    return divmod(int(spread.argmax()), grid.columns)


def _spans(reach: Reach, size: int) -> tuple[Tensor, Tensor]:
    """First pixel of each window along an axis, and the one behind its last, within the image."""
    first = torch.arange(reach.after) * reach.stride - reach.padding
    return first.clamp(0, size), (first + reach.kernel).clamp(0, size)


def _sums(values: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Sums `[C, h, w]` over the boxes that rows and columns span."""
    sums = functional.pad(values.cumsum(1).cumsum(2), (1, 0, 1, 0))
    down = sums[:, bottom] - sums[:, top]
    return down[:, :, right] - down[:, :, left]


def _title(band: SubFigure, trace: Trace) -> None:
    best = trace.prediction.top[0]
    band.text(0.03, 0.62, "How an image becomes a prediction", size=20, weight="bold", va="center")
    what = f"{trace.model}   ·   {trace.source}   ·   {best.label}, {best.score:.1%}"
    band.text(
        0.03, 0.22, what + (f"   ·   {trace.note}" if trace.note else ""), size=11, color=MUTED, va="center"
    )


def _heading(
    band: Figure | SubFigure, height: float, number: int, title: str, caption: str, x: float = 0.03
) -> None:
    """A numbered heading; `height` is the band's height in inches, so that all headings sit alike."""
    band.text(x, 1 - 0.18 / height, f"{number}  {title}", size=13, weight="bold", va="top")
    band.text(x, 1 - 0.45 / height, caption, size=9, color=MUTED, va="top")


def _inches(band: SubFigure) -> float:
    return float(band.bbox.height / band.figure.dpi)


def _place(band: SubFigure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes whose left and width are shares of the band, bottom and height inches from its bottom."""
    inches = _inches(band)
    axes = band.add_axes((left, bottom / inches, width, height / inches))
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def _patches(band: SubFigure, trace: Trace) -> None:
    """The picture under its grid, one patch flattened, and the table of steps."""
    height = _inches(band)
    grid, (rows, columns) = trace.stages[0].grid, trace.patch
    size, told = (trace.pixels.shape[1], trace.pixels.shape[2]), words(trace)
    _heading(
        band, height, 1, told.cut,
        f"{size[0]} × {size[1]} pixels, {grid.rows} × {grid.columns} {told.pieces} of {rows} × {columns}"
        + stepping(trace).replace(", ", ",\n"),
    )  # fmt: skip
    picture = as_rgb(trace.pixels)
    side = min(3.6, height - 1.0)
    axes = _place(band, 0.03, height - 0.8 - side, side / 14, side)
    axes.imshow(picture, interpolation="nearest")
    axes.set_anchor("NW")
    down, across = trace.placement.edges(grid, size)
    for y in down:
        axes.axhline(y - 0.5, color="white", linewidth=0.6, alpha=0.75)
    for x in across:
        axes.axvline(x - 0.5, color="white", linewidth=0.6, alpha=0.75)
    row, column = contrasted(trace)
    _frame(axes, trace.windows[1].first(column) - 0.5, trace.windows[0].first(row) - 0.5, columns, rows)

    numbers, inside = rows * columns * trace.pixels.shape[0], trace.window(row, column)
    cut = trace.pixels[:, inside[0], inside[1]]
    beyond = f", {numbers - cut.numel()} of them beyond the border" if cut.numel() < numbers else ""
    _heading(
        band, height, 2, told.flat,
        f"the marked {told.piece}, row {row + 1}, column {column + 1}:\n"
        f"{rows} · {columns} · {trace.pixels.shape[0]} = {numbers} numbers{beyond}", 0.325,
    )  # fmt: skip
    axes = _place(band, 0.325, height - 0.95 - 1.5, 1.5 / 14, 1.5)
    axes.imshow(as_rgb(cut), interpolation="nearest")
    _frame(axes, -0.5, -0.5, cut.shape[2], cut.shape[1])
    _strip(band, trace, cut, height - 0.95 - 1.5 - 0.5)
    _steps(band, trace, height)


def stepping(trace: Trace) -> str:
    """How far apart windows lie that overlap, behind a comma; empty where they do not."""
    if not trace.overlapping:
        return ""
    rows, columns = (window.stride for window in trace.windows)
    far = f"{rows}" if rows == columns else f"{rows} × {columns}"
    return ", one every pixel" if rows == columns == 1 else f", one every {far} pixels"


def _frame(axes: Axes, x: float, y: float, width: float, height: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((x, y), width, height, fill=False, edgecolor=ACCENT, linewidth=2.2, clip_on=False)
    )


def _strip(band: SubFigure, trace: Trace, cut: UInt8[Tensor, "C h w"], top: float) -> None:
    """The patch's pixels one after the other, then each channel's values."""
    flat = cut.flatten(1).numpy()  # [C, h * w]
    axes = _place(band, 0.325, top - 0.2, 0.215, 0.2)
    axes.imshow(as_rgb(cut.flatten(1)[:, None]), aspect="auto", interpolation="nearest")
    axes.set_title("its pixels, row by row", size=8, color=MUTED, loc="left", pad=3)
    names = (
        ("red", "green", "blue") if len(flat) == 3 else tuple(f"channel {c + 1}" for c in range(len(flat)))
    )
    for channel, name in enumerate(names[:4]):
        axes = _place(band, 0.325, top - 0.52 - 0.2 * channel, 0.215, 0.16)
        axes.imshow(
            flat[channel : channel + 1], aspect="auto", interpolation="nearest", cmap="gray", vmin=0, vmax=255
        )
        axes.set_ylabel(name, rotation=0, ha="right", va="center", size=7.5)
    axes.set_xlabel(
        f"these {flat.size} numbers, normalised, {words(trace).read}",
        size=8,
        loc="left",
    )


def shortened(trace: Trace) -> list[tuple[str, str, str]]:
    """Name, size and note of every step; runs of equal blocks are drawn together."""
    lines: list[tuple[str, str, str]] = []
    for step in trace.steps:
        alike = lines and "block" in step.name and lines[-1][1:] == (step.size, step.note)
        if alike:
            first = lines[-1][0].partition(" to ")[0]
            first = re.sub(r"block (\d+)$", r"blocks \1", first)
            lines[-1] = (f"{first} to {step.name.rpartition(' ')[2]}", step.size, step.note)
        else:
            lines.append((step.name, step.size, step.note))
    return lines


def _steps(band: SubFigure, trace: Trace, height: float) -> None:
    band.text(0.585, 1 - 0.18 / height, "Every step and its shape", size=13, weight="bold", va="top")
    top = 0.62
    for name, size, note in shortened(trace):
        y = 1 - top / height
        band.text(0.585, y, name, size=9, va="center")
        band.text(0.775, y, size, size=9, va="center", ha="right", family="DejaVu Sans Mono", weight="bold")
        for number, line in enumerate(_lines(note)):
            band.text(0.785, y - number * LINE_HEIGHT / height, line, size=8, va="center", color=MUTED)
        top += _tall(note)


def _lines(note: str) -> list[str]:
    return textwrap.wrap(note, 44)


def _tall(note: str) -> float:
    """Inches that a step takes in the table."""
    return 0.215 + LINE_HEIGHT * max(0, len(_lines(note)) - 1)


def _tokens(band: SubFigure, trace: Trace) -> None:
    """Embeddings as a heat map, and how alike the positions are."""
    height, stage, told = _inches(band), trace.stages[0], words(trace)
    values = stage.embeddings.numpy()
    _heading(
        band, height, 3, told.made,
        f"{values.shape[0]} {told.items} (down) of {values.shape[1]} numbers (across), {told.when}",
    )  # fmt: skip
    axes = _place(band, 0.06, 0.45, 0.43, height - 1.3)
    reach = float(np.percentile(np.abs(values), 99)) or 1.0
    image = axes.imshow(values, aspect="auto", cmap=SIGNED, vmin=-reach, vmax=reach, interpolation="nearest")
    axes.set_ylabel(told.piece)
    axes.set_xlabel("channel")
    _scale(band, image, 0.497, 0.45, height - 1.3, (-reach, 0.0, reach))
    placed = trace.placed
    if placed is None or placed.similarity is None:
        _heading(band, height, 4, told.placed, told.order, 0.585)
        return
    later = "" if placed is stage else f"{placed.name}: "
    _heading(
        band, height, 4, told.placed,
        f"{later}a tile for each place: the cosine of its position to every other's", 0.585,
    )  # fmt: skip
    tiles = _tiles(placed.similarity, placed.references)
    side = height - 1.0
    share = min(0.36, side / 14 * tiles.shape[1] / tiles.shape[0])
    axes = _place(band, 0.585, 0.15, share, side)
    axes.set_anchor("NW")
    least = stage.least_similarity
    image = axes.imshow(tiles, cmap=LIKE, interpolation="nearest", aspect="equal", vmin=least, vmax=1)
    _scale(band, image, 0.585 + share + 0.01, 0.15, side, (least, (least + 1) / 2, 1.0))


def _tiles(
    similarity: Tensor, references: tuple[tuple[int, int], ...]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The maps of all reference places, each where its place is, with a gap between."""
    maps = similarity.numpy()
    rows = sorted({row for row, _ in references})
    columns = sorted({column for _, column in references})
    height, width = maps.shape[1] + 1, maps.shape[2] + 1
    canvas = np.full((len(rows) * height - 1, len(columns) * width - 1), np.nan, dtype=np.float32)
    for map_, (row, column) in zip(maps, references, strict=True):
        top, left = rows.index(row) * height, columns.index(column) * width
        canvas[top : top + height - 1, left : left + width - 1] = map_
    return canvas


def _scale(
    band: SubFigure, image: Any, left: float, bottom: float, height: float, ticks: tuple[float, ...]
) -> None:
    axes = _place(band, left, bottom, 0.006, height)
    bar = band.figure.colorbar(image, cax=axes, ticks=list(ticks))
    bar.outline.set_visible(False)
    axes.tick_params(length=0, labelsize=7.5, labelcolor=MUTED)
    axes.set_yticklabels([f"{tick:.2g}" for tick in ticks])


def _attention(band: SubFigure, trace: Trace, layers: list[Layer]) -> None:
    gazes = [layer.gaze for layer in layers if layer.gaze is not None]
    seen = [found.token for found in gazes if found.kind == "attention"]
    whose = (
        "[CLS]" if all(seen) else "[CLS], or the average token where there is none," if any(seen) else AVERAGE
    )
    title = f"Where {whose} looks, block after block"
    caption = f"attention of {whose} to the patches, mean of the heads; from none (blue) to the block's most (yellow)"
    if len(seen) < len(gazes):
        title = "Where each block answers most strongly"
        caption = "root mean square over the channels" + (
            f"; attention of {whose} where the panel says so" if seen else ""
        )
    _heading(band, _inches(band), 5, title, caption)
    grey = as_rgb(trace.pixels).mean(axis=2) / 255
    for number, layer in enumerate(layers):
        axes = _panel(band, number, 1.9, 2.35)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        label = "no attention weights to show"
        if layer.gaze is not None:
            map_ = layer.gaze.maps.mean(dim=0).numpy()
            rows, columns = layer.placement.edges(Grid(*map_.shape), (grey.shape[0], grey.shape[1]))
            edges = [[place - 0.5 for place in places] for places in (columns, rows)]
            axes.pcolormesh(*edges, map_, cmap=LOOKS, vmin=0, alpha=0.72, linewidth=0, antialiased=False)
            itself = float(layer.gaze.elsewhere.mean())
            label = "attention, " if len(seen) < len(gazes) and layer.gaze.kind == "attention" else ""
            label += f"peak {map_.max() / max(map_.mean(), 1e-12):.1f} × mean"
            label += f", {itself:.0%} elsewhere" if itself > 0.005 else ""
        axes.set_title(layer.name, size=9, loc="left", pad=3)
        axes.set_xlabel(label, size=7.5, loc="left", labelpad=2)


def _components(band: SubFigure, layers: list[Layer], convolutional: bool) -> None:
    what, long = ("cells", "cells") if convolutional else ("tokens", "patch tokens")
    _heading(
        band, _inches(band), 6, f"What tells the {what} apart",
        f"the direction in which the {long} differ most (first principal component) after each block;"
        " its sign means nothing",
    )  # fmt: skip
    for number, layer in enumerate(layers):
        axes = _panel(band, number, 1.75, 2.2)
        values = layer.component.numpy()
        reach = float(np.abs(values).max()) or 1.0
        axes.imshow(values, cmap=SIGNED, vmin=-reach, vmax=reach, interpolation="nearest")
        axes.set_title(layer.name, size=9, loc="left", pad=3)


def _panel(band: SubFigure, number: int, side: float, pitch: float) -> Axes:
    """Axes of a small multiple: COLUMNS in a row, from the top."""
    row, column = divmod(number, COLUMNS)
    step = 0.94 / COLUMNS
    top = _inches(band) - 0.95 - pitch * row
    return _place(band, 0.03 + step * column, top - side, side / 14 * 1.04, side)


def _probabilities(band: SubFigure, trace: Trace) -> None:
    top = trace.prediction.top
    height = _inches(band)
    _heading(
        band,
        height,
        7,
        "The head turns the vector into probabilities",
        "softmax of the logits, the best classes",
    )
    axes = _place(band, 0.2, 0.12, 0.7, height - 0.82)
    places = list(range(len(top)))[::-1]
    axes.barh(places, [guess.score for guess in top], color=BLUE, height=0.62)
    axes.set_xlim(0, 1)
    for place, guess in zip(places, top, strict=True):
        axes.text(-0.01, place, clipped(guess.label), ha="right", va="center", size=10)
        inside = guess.score > 0.9
        axes.text(
            guess.score - 0.008 if inside else guess.score + 0.008,
            place,
            f"{guess.score:.1%}",
            ha="right" if inside else "left",
            va="center",
            size=9,
            color="white" if inside else INK,
        )
