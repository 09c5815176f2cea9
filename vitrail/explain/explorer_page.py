"""One self-contained page: the maps, what every patch attends to and who attends to it, in every layer and head.

No request leaves the page; it works by mouse, touch and keyboard. Where attention is not between places of the picture
(a detector's queries, a network of convolutions), the page shows the maps alone and says so.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.data.transforms import normalise
from vitrail.explain.attention import Look, blocks_of, explicit, mixers_of
from vitrail.explain.explainer import Explainer, Explanation, cautions
from vitrail.explain.overlay import contoured, outlined, shares
from vitrail.explain.pages import data_url, fill_template, packed
from vitrail.explain.places import covering
from vitrail.explain.questions import Asked
from vitrail.explain.still import held_still
from vitrail.nn.entry import PrefixTokens

MOST_BYTES = 8_000_000
"""Numbers of attention in one page, a byte each; finer grids are averaged until they fit."""

FINEST = 28
"""Rows and columns that are told apart at most, whatever the layer's grid."""


def explorer(explainer: Explainer, explanations: Sequence[Explanation], note: str = "") -> str:
    """The page of one picture's explanations; everything it shows is in it."""
    first = explanations[0]
    data = {
        "image": _url(first),
        "outline": _outline(first),
        "height": first.geometry.output[0],
        "width": first.geometry.output[1],
        "maps": [_map(found) for found in explanations],
        "shown": _shown(explainer, explanations),
        "layers": attention_data(explainer, first) if explorable(explainer.network) else [],
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    said = [note, *cautions(explanations)]
    texts = {
        "TITLE": html.escape(f"{first.source}: where {first.model} looks"),
        "SUMMARY": html.escape(_summary(first)),
        "NOTE": "".join(f'<p class="note">{html.escape(one)}.</p>' for one in dict.fromkeys(said) if one),
        "SCORES": _scores(explanations),
        "DATA": text,
    }
    return fill_template("explorer.html", texts)


def explorable(network: nn.Module) -> bool:
    """Whether all of a network's attention is between places of the picture: queries that read a map have no place."""
    mixers, blocks = mixers_of(network), blocks_of(network)
    placed = all(any(name.startswith(f"{block}.") for block in blocks) for name in mixers)
    return bool(mixers) and (placed or not isinstance(network, Asked))


def _summary(found: Explanation) -> str:
    best = found.prediction.top[0]
    if found.corners is not None:
        return f"{found.model} sees {best.label} in the box, {best.score:.1%}" + _instead(found)
    if found.region is not None:
        return f"{found.model} calls the outlined pixels {found.label}, {found.score:.1%} in the mean"
    return f"{found.model} says {best.label}, {best.score:.1%}" + _instead(found)


def _instead(found: Explanation) -> str:
    """The class that is explained, where it is not the surest."""
    return (
        ""
        if found.target == found.prediction.top[0].index
        else f"; explained is {found.label}, {found.score:.1%}"
    )


def _shown(explainer: Explainer, explanations: Sequence[Explanation]) -> int:
    """The map that the page opens with: the default method's where it is there."""
    methods = [found.method for found in explanations]
    return methods.index(explainer.default) if explainer.default in methods else 0


def _url(found: Explanation) -> str:
    pixels = found.pixels.expand(3, -1, -1) if found.pixels.shape[0] == 1 else found.pixels
    return data_url(pixels.permute(1, 2, 0).contiguous().numpy())


def _outline(found: Explanation) -> str:
    """The line round the box or region that is explained, on glass; empty where there is none."""
    rows, columns = found.geometry.output
    ground = np.full((rows, columns, 3), 128, dtype=np.uint8)  # no line has this grey
    if found.outline is not None:
        x1, y1, x2, y2 = found.outline
        drawn = outlined(ground, (x1 * columns, y1 * rows, x2 * columns, y2 * rows))
    elif found.region is not None:
        drawn = contoured(ground, found.region.cpu())
    else:
        return ""
    line = (drawn != 128).any(axis=2, keepdims=True).astype(np.uint8) * 255
    return data_url(np.concatenate([drawn, line], axis=2))


def _map(found: Explanation) -> dict[str, Any]:
    """One method's map at the input's resolution, at most 112 cells a side."""
    rows, columns = (min(side, 112) for side in found.geometry.output)
    values, signed = shares(found.shown.regions(found.geometry.output, (rows, columns))[0])
    return {
        "method": found.method,
        "label": found.label,
        "specific": found.class_specific,
        "units": found.heat.units,
        "where": found.heat.where,
        "signed": signed,
        "rows": rows,
        "columns": columns,
        "data": packed(values * 255),
    }


def _scores(explanations: Sequence[Explanation]) -> str:
    """Rows of the table of deletion and insertion; empty where nothing was scored."""
    rows = []
    for found in explanations:
        for fill, score in found.faithfulness.items():
            controls = found.controls[fill]
            cells = [
                found.method,
                fill,
                f"{score.deletion:.3f}",
                f"{score.insertion:.3f}",
                f"{score.gap:+.3f}",
            ]
            cells += [f"{controls[name].gap:+.3f}" for name in ("random", "centre")]
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)


def attention_data(explainer: Explainer, found: Explanation) -> list[dict[str, Any]]:
    """Every mixer's weights for the picture, coarse enough to fit."""
    images = normalise(found.pixels[None].to(explainer.device), explainer.engine.card.preprocessing)
    finest = FINEST
    with held_still(explainer.network), torch.no_grad(), explicit(explainer.network) as recorded:
        explainer.network(images)
    while finest > 4 and sum(_size(look, finest) for look in recorded.looks) > MOST_BYTES:
        finest -= 1
    names = token_names(explainer.network)
    return [_layer(look, finest, names) for look in recorded.looks]


def token_names(network: nn.Module) -> list[str]:
    """What the tokens before the patches are called, in their order."""
    words = {"cls": "class token", "dist": "distillation token", "distillation": "distillation token"}
    names: list[str] = []
    for module in network.modules():
        if isinstance(module, PrefixTokens):
            for name in module.names:
                count = int(getattr(module, name).shape[1])
                called = words.get(name, name)
                if name == "tokens":  # PiT keeps both in one table
                    names += ["class token", "distillation token"][:count]
                else:
                    names += [called] if count == 1 else [f"{called} {number + 1}" for number in range(count)]
    return names


def _coarse(look: Look, finest: int) -> tuple[Tensor, Tensor]:
    """What rows and columns of the shown grid are means of, in rows and columns of the layer's."""
    sides = []
    for size in look.grid:
        step = -(-size // finest)
        sides.append(covering(size, step, step).matrix(size))
    return sides[0], sides[1]


def _size(look: Look, finest: int) -> int:
    rows, columns = _coarse(look, finest)
    cells = rows.shape[0] * columns.shape[0]
    queries = look.prefix + (cells if look.weights.shape[2] > look.prefix else 0)
    return int(look.weights.shape[1] * queries * (look.keys.prefix + cells))


def _layer(look: Look, finest: int, names: list[str]) -> dict[str, Any]:
    """Weights between cells of the shown grid: means over the askers of a cell, sums over those it asks."""
    rows, columns = _coarse(look, finest)
    weights = look.weights[0].float().cpu()  # [H, N, M]
    gained = weights[:, :, look.keys.prefix :].unflatten(2, tuple(look.keys.grid))  # [H, N, m, m]
    down = look.keys.rows @ (rows > 0).float().t()  # [m, h']
    across = look.keys.columns @ (columns > 0).float().t()
    gained = torch.einsum("hnab,ar,bc->hnrc", gained, down, across).flatten(2)  # [H, N, cells]
    keyed = torch.cat([weights[:, :, : look.keys.prefix], gained], dim=2)  # [H, N, K]
    asked = keyed[:, : look.prefix]
    if weights.shape[1] > look.prefix:
        cells = keyed[:, look.prefix :].unflatten(1, tuple(look.grid))  # [H, h, w, K]
        cells = torch.einsum("hijk,ri,cj->hrck", cells, rows, columns).flatten(1, 2)
        asked = torch.cat([asked, cells], dim=1)  # [H, Q, K]
    most = float(asked.max()) or 1.0
    scale_y = look.placement.scale_y * look.grid.rows / rows.shape[0]
    scale_x = look.placement.scale_x * look.grid.columns / columns.shape[0]
    return {
        "name": look.block if look.name == f"{look.block}.mixer" else look.name,
        "rows": rows.shape[0],
        "columns": columns.shape[0],
        "grid": list(look.grid),
        "place": [scale_y, scale_x, look.placement.shift_y, look.placement.shift_x],
        "heads": asked.shape[0],
        "tokens": names[: look.prefix],
        "prefix": look.prefix,
        "queries": asked.shape[1],
        "keyPrefix": look.keys.prefix,
        "keys": asked.shape[2],
        "most": most,
        "data": packed((asked.clamp_min(0) / most).sqrt() * 255),  # the root keeps small weights apart
    }
