"""The report of a comparison: figures, one self-contained page, and the numbers as JSON."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrail.config import to_dict
from vitrail.disk import write_atomically
from vitrail.jobs.compare_cells import EPOCHS, Cell, Price, Quantity, by_model, exponents
from vitrail.jobs.models import RULE
from vitrail.runs import CompareRun
from vitrail.tasks.draw import png_of

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #fbfaf7; --line: #d8d4ca; --faint: #6a7180; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e0; --paper: #15181e; --line: #353b47; --faint: #9aa2b1; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { max-width: 46rem; } .faint { color: var(--faint); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .75rem 0; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
"""


def write_report(folder: Path, cells: list[Cell], prices: list[Price], run: CompareRun) -> Path:
    """Write report.html, report.json and the figures into the folder; the page's path."""
    parts: list[str] = ["<h1>Families side by side</h1>", f"<p class='faint'>{html.escape(_budget(run))}</p>"]
    if cells:
        parts += _accuracy(folder, cells)
    if prices:
        parts += _costs(folder, prices)
    data = {
        "run": to_dict(run),
        "cells": [to_dict(cell) for cell in cells],
        "prices": [to_dict(price) for price in prices],
        "exponents": {name: exponents(prices, name) for name in QUANTITIES} if prices else {},
    }
    write_atomically(folder / "report.json", json.dumps(data, indent=2).encode())
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>vitrail compare</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>"
    )
    write_atomically(folder / "report.html", page.encode())
    return folder / "report.html"


QUANTITIES: dict[Quantity, str] = {
    "multiply_adds": "multiply-adds",
    "seconds": "time",
    "memory": "memory",
}


def _budget(run: CompareRun) -> str:
    if run.part == "cost":
        return "Cost of one picture at growing sizes."
    budget = (
        f"{run.minutes:g} minutes each" if run.minutes is not None else f"{run.epochs or EPOCHS} epochs each"
    )
    return f"{' '.join(Path(path).name for path in run.data)}: {budget}, batch {run.batch_size}, seeds {run.seeds}."


def accuracy_rows(cells: list[Cell]) -> list[list[str]]:
    """The table of the largest share: model, score, spread, parameters, GFLOPs, images a second, seconds."""
    share = max(cell.share for cell in cells)
    return [
        [
            name,
            f"{100 * mean:.2f} %",
            f"± {100 * spread:.2f}" if spread else "",
            f"{cell.parameters / 1e6:.2f} M",
            f"{cell.multiply_adds / 1e9:.3f}",
            f"{cell.images_per_second:.0f}",
            f"{cell.seconds:.0f}",
        ]
        for name, (mean, spread, cell) in by_model(cells, share).items()
    ]


def accuracy_columns(cells: list[Cell]) -> list[str]:
    """Heads of the columns of `accuracy_rows`."""
    score = score_words(cells)
    return ["model", score, "sd of seeds", "parameters", "GFLOPs", "images/s in training", "seconds"]


def score_words(cells: list[Cell]) -> str:
    """What is compared, in words."""
    return {"ap": "AP", "miou": "mIoU"}.get(cells[0].score, "top-1")


COST_COLUMNS = ["model", "exponent of multiply-adds", "of time", "of memory"]


def cost_rows(prices: list[Price]) -> list[list[str]]:
    """The table of exponents: model, and the power of N by which each quantity grows at the largest sizes."""
    found = {name: exponents(prices, name) for name in QUANTITIES}
    return [
        [model, *(f"{found[name][model]:z.2f}" for name in QUANTITIES)]  # z: no minus before 0.00
        for model in sorted(found["multiply_adds"], key=lambda model: -found["multiply_adds"][model])
    ]


def _accuracy(folder: Path, cells: list[Cell]) -> list[str]:
    largest = max(cell.share for cell in cells)
    split = cells[0].split
    parts = [
        f"<h2>{score_words(cells).capitalize() if cells[0].score == 'acc1' else score_words(cells)} at equal budget"
        f" ({html.escape(split)})</h2>",
        _table(accuracy_columns(cells), accuracy_rows(cells)),
        f"<p class='faint'>{html.escape(RULE)}.</p>",
        _picture(folder / "accuracy.png", _draw_accuracy(cells, largest), "Accuracy against multiply-adds"),
    ]
    if len({cell.share for cell in cells}) > 1:
        drawn = _draw_efficiency(cells)
        parts += [
            "<h2>Accuracy against the share of the training pictures</h2>",
            _picture(
                folder / "data-efficiency.png", drawn, "Accuracy against share of the training pictures"
            ),
        ]
    return parts


def _costs(folder: Path, prices: list[Price]) -> list[str]:
    sizes = sorted({price.size for price in prices})
    return [
        f"<h2>Cost of one picture, {sizes[0]} to {sizes[-1]} pixels</h2>",
        "<p>Exponents in the number of tokens N between the two largest sizes. The linear layers grow with N, softmax"
        " attention with N squared: a network lies between 1 and 2 by how much of it is attention.</p>",
        _table(COST_COLUMNS, cost_rows(prices)),
        _picture(
            folder / "cost.png", _draw_costs(prices), "Time, memory and multiply-adds against picture size"
        ),
    ]


def _figure(columns: int = 1, width: float = 7.0, height: float = 4.4) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)


def _styles(count: int) -> list[tuple[Any, str]]:
    """A colour and a mark for each model, as far apart as they get: the marks tell them apart without colour, too."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    marks = "osD^vP*X<>hp"
    return [
        (colours(0.05 + 0.85 * index / max(count - 1, 1)), marks[index % len(marks)])
        for index in range(count)
    ]


def _draw_accuracy(cells: list[Cell], share: float) -> bytes:
    figure, axes = _figure()
    axis = axes[0][0]
    rows = by_model(cells, share)
    for (name, (mean, spread, cell)), (colour, mark) in zip(rows.items(), _styles(len(rows)), strict=True):
        axis.errorbar(
            cell.multiply_adds / 1e9, 100 * mean, yerr=100 * spread, color=colour, marker=mark, markersize=8,
            capsize=3, linestyle="none", label=f"{name} ({cell.parameters / 1e6:.1f} M)",
        )  # fmt: skip
    axis.set_xscale("log")
    _plain_numbers(axis.xaxis)
    axis.set_xlabel("GFLOPs (10^9 multiply-adds)")
    axis.set_ylabel(f"{score_words(cells)}, %")
    _finish_axis(axis)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def _draw_efficiency(cells: list[Cell]) -> bytes:
    figure, axes = _figure()
    axis = axes[0][0]
    names = list(by_model(cells, max(cell.share for cell in cells)))
    for name, (colour, mark) in zip(names, _styles(len(names)), strict=True):
        shares = sorted({cell.share for cell in cells if cell.model == name})
        means = [100 * by_model(cells, share)[name][0] for share in shares]
        axis.plot([100 * share for share in shares], means, color=colour, marker=mark, label=name)
    axis.set_xscale("log")
    axis.set_xticks([100 * share for share in sorted({cell.share for cell in cells})])
    axis.get_xaxis().set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlabel("share of the training pictures, %")
    axis.set_ylabel(f"{score_words(cells)}, %")
    _finish_axis(axis)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def _draw_costs(prices: list[Price]) -> bytes:
    figure, axes = _figure(columns=3, width=13.0, height=4.6)
    scale = {"multiply_adds": 1e9, "seconds": 1e-3, "memory": 2**20}
    words = {"multiply_adds": "GFLOPs", "seconds": "milliseconds", "memory": "MiB"}
    names = list(dict.fromkeys(price.model for price in prices))
    for axis, quantity in zip(axes[0], QUANTITIES, strict=True):
        powers = exponents(prices, quantity)
        for name, (colour, mark) in zip(names, _styles(len(names)), strict=True):
            own = sorted((price for price in prices if price.model == name), key=lambda price: price.size)
            heights = [getattr(price, quantity) / scale[quantity] for price in own]
            label = f"{name}: N^{powers[name]:.2f}" if name in powers else name
            axis.plot([price.size for price in own], heights, color=colour, marker=mark, label=label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(sorted({price.size for price in prices}))
        axis.get_xaxis().set_major_formatter("{x:g}")
        axis.minorticks_off()
        _plain_numbers(axis.yaxis)
        axis.set_xlabel("picture side, pixels")
        axis.set_title(f"{QUANTITIES[quantity]}, {words[quantity]}", fontsize=10)
        _finish_axis(axis)
        axis.legend(
            fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15)
        )  # off the lines
    return _png(figure)


def _plain_numbers(axis: Any) -> None:
    """Numbers on a logarithmic axis that less than a decade may span: 0.5, 0.6, 0.8 and not one power of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _finish_axis(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    png = png_of(figure, dpi=150)
    plt.close(figure)
    return png


def _picture(path: Path, png: bytes, text: str) -> str:
    write_atomically(path, png)
    return f"<img alt='{html.escape(text)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope='col'>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
