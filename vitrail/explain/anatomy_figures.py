"""The figures of a model's anatomy, as PNG files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vitrail.explain.anatomy import UNIFORM, Anatomy
from vitrail.tasks.draw import png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, BLUE, ORANGE = "#1c2128", "#5b6570", "#0072b2", "#d55e00"
LINE_PIXELS = 16
"""Height of a line of words at matplotlib's 100 dots an inch."""

MOST_PLACES = 14
"""Cells a side whose similarity to all others is drawn."""

STYLE: Any = {"font.family": "DejaVu Sans", "font.size": 9.0, "text.color": INK, "axes.edgecolor": "#d5dae0",
              "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED}  # fmt: skip


def figures(found: Anatomy) -> dict[str, bytes]:
    """Name and PNG of every figure for which there is something to draw."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        drawn = {
            "filters": _filters(found),
            "positions": _positions(found),
            "distance": _distance(found),
            "heads": _heads(found),
            "layer-scale": _scales(found),
            "gates": _gates(found),
            "norms": _norms(found),
        }
        return {name: png_of(figure, dpi=150) for name, figure in drawn.items() if figure is not None}


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _filters(found: Anatomy) -> Figure | None:
    if found.filters is None or found.explained is None:
        return None
    count = len(found.filters)
    columns = 7
    figure = _figure(7, 1.15 * -(-count // columns) + 0.6, f"{found.model}: the first projection's filters")
    for number, (component, share) in enumerate(zip(found.filters, found.explained, strict=True)):
        axes = figure.add_subplot(-(-count // columns), columns, number + 1)
        scaled = (component - component.min()) / (component.max() - component.min()).clamp_min(1e-9)
        shown = scaled.permute(1, 2, 0) if scaled.shape[0] == 3 else scaled[0]
        axes.imshow(shown.numpy(), cmap="gray", interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"{float(share):.1%}", fontsize=7, color=MUTED, pad=2)
    return figure


def _positions(found: Anatomy) -> Figure | None:
    if found.positions is None:
        return None
    rows, columns = found.positions.shape[:2]
    picked = [_thinned(size) for size in (rows, columns)]
    tiles = found.positions[picked[0]][:, picked[1]]  # [r, c, h, w]
    gap = 1
    sheet = torch.full(((rows + gap) * len(picked[0]), (columns + gap) * len(picked[1])), float("nan"))
    for y, line in enumerate(tiles):
        for x, tile in enumerate(line):
            sheet[y * (rows + gap) :, x * (columns + gap) :][:rows, :columns] = tile
    figure = _figure(7, 5.7 * rows / columns + 0.75, f"{found.model}: how alike positions are (cosine)")
    axes = figure.add_subplot()
    image = axes.imshow(sheet.numpy(), cmap="cividis", vmin=min(0.0, float(found.positions.min())), vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("each tile: one cell's position beside all others; tiles lie where their cells do")
    figure.colorbar(image, ax=axes, shrink=0.6)
    return figure


def _thinned(size: int) -> list[int]:
    step = -(-size // MOST_PLACES)
    return list(range(0, size, step))


def _layers(found: Anatomy) -> dict[str, int]:
    return {layer: number for number, layer in enumerate(dict.fromkeys(head.layer for head in found.heads))}


def _distance(found: Anatomy) -> Figure | None:
    placed = [head for head in found.heads if head.placed]
    if not placed:
        return None
    numbers = _layers(found)
    figure = _figure(7, 3.6, f"{found.model}: how far heads look, mean over {found.pictures} pictures")
    axes = figure.add_subplot()
    axes.scatter(
        [numbers[head.layer] for head in placed],
        [head.distance for head in placed],
        s=22,
        color=BLUE,
        alpha=0.75,
    )
    _named(axes, numbers)
    axes.set_ylabel("mean attention distance, pixels")
    axes.set_ylim(0, 1.08 * max(head.distance for head in placed) or 1.0)
    return figure


def _heads(found: Anatomy) -> Figure | None:
    if not found.heads:
        return None
    numbers = _layers(found)
    most = max(head.number for head in found.heads) + 1
    sheet = torch.full((most, len(numbers)), float("nan"))
    for head in found.heads:
        sheet[head.number, numbers[head.layer]] = head.entropy
    figure = _figure(7, 1.4 + 0.28 * most, f"{found.model}: how evenly heads look (1 = everywhere alike)")
    axes = figure.add_subplot()
    image = axes.imshow(sheet.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for head in found.heads:
        if head.dead:
            axes.text(
                numbers[head.layer],
                head.number,
                "×",
                ha="center",
                va="center",
                color=ORANGE,
                fontweight="bold",
            )
    _named(axes, numbers)
    axes.set_ylabel("head")
    axes.set_yticks(range(0, most, max(1, most // 8)))
    axes.set_title(
        f"× dead: looks everywhere alike (entropy over {UNIFORM:g}), or at one token whatever is asked",
        fontsize=8,
        color=MUTED,
        loc="left",
    )
    figure.colorbar(image, ax=axes)
    return figure


def _scales(found: Anatomy) -> Figure | None:
    if not found.scales:
        return None
    numbers = {name: number for number, name in enumerate(found.scales)}
    figure = _figure(7, 3.2, f"{found.model}: layer scale")
    axes = figure.add_subplot()
    values = list(found.scales.values())
    axes.plot(
        range(len(values)), [largest for _, largest in values], "o-", color=ORANGE, markersize=3, linewidth=1
    )
    axes.plot(range(len(values)), [mean for mean, _ in values], "o-", color=BLUE, markersize=3, linewidth=1)
    _logarithmic(axes)
    axes.set_ylabel("magnitude of the factors")
    axes.margins(x=0.08)
    _ends(axes, len(values) - 1, {"largest": (values[-1][1], ORANGE), "mean": (values[-1][0], BLUE)})
    _named(axes, numbers)
    return figure


def _gates(found: Anatomy) -> Figure | None:
    if not found.gates:
        return None
    numbers = {name: number for number, name in enumerate(found.gates)}
    figure = _figure(7, 3.2, f"{found.model}: factors of the channel gates")
    axes = figure.add_subplot()
    values = list(found.gates.values())
    axes.errorbar(
        range(len(values)), [mean for mean, _, _ in values], [spread for _, spread, _ in values],
        fmt="o", color=BLUE, markersize=4, linewidth=1,
    )  # fmt: skip
    axes.set_ylabel("mean factor ± spread over channels")
    axes.set_ylim(0, 1)
    _named(axes, numbers)
    return figure


def _norms(found: Anatomy) -> Figure | None:
    if not found.norms:
        return None
    numbers = {norms.layer: number for number, norms in enumerate(found.norms)}
    figure = _figure(7, 3.2, f"{found.model}: lengths of patch tokens after each block")
    axes = figure.add_subplot()
    axes.plot(
        range(len(numbers)),
        [norms.largest for norms in found.norms],
        "o-",
        color=ORANGE,
        markersize=3,
        linewidth=1,
    )
    axes.plot(
        range(len(numbers)),
        [norms.median for norms in found.norms],
        "o-",
        color=BLUE,
        markersize=3,
        linewidth=1,
    )
    last = found.norms[-1]
    _logarithmic(axes)
    axes.margins(x=0.08)
    axes.set_ylabel("norm")
    _ends(axes, len(numbers) - 1, {"longest": (last.largest, ORANGE), "median": (last.median, BLUE)})
    _named(axes, numbers)
    return figure


def _ends(axes: Axes, place: float, lines: dict[str, tuple[float, str]]) -> None:
    """Names of an upper and a lower line at their right ends, one above and one below where they would touch."""
    (_, (upper, _)), (_, (lower, _)) = lines.items()
    heights = axes.transData.transform([(place, upper), (place, lower)])[:, 1]
    aligned = ("center", "center") if heights[0] - heights[1] > LINE_PIXELS else ("bottom", "top")
    for (name, (value, colour)), how in zip(lines.items(), aligned, strict=True):
        axes.text(place, value, f" {name}", color=colour, va=how)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis with numbers at 1, 2 and 5 alone: those of all its ticks would lie on each other."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _named(axes: Axes, numbers: dict[str, int]) -> None:
    """Layers along the axis, the names slanted, thinned where they would touch."""
    _plain(axes)
    names = list(numbers)
    step = -(-len(names) // 16)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=35, ha="right", fontsize=7)
