"""A contact sheet: rows of small pictures under headings, drawn with Pillow."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vitrail.disk import write_atomically

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

TILE = 112
"""Pixels of a tile's side."""

GAP = 8
CAPTION = 14
HEADING = 24

PAPER, INK, FAINT, ALARM = (255, 255, 255), (32, 32, 32), (110, 110, 110), (190, 40, 40)


class Tile(NamedTuple):
    """A picture uint8 `[H, W, 3]` with its caption; None stands for one that cannot be shown."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]] | None
    caption: str


def draw_sheet(rows: Iterable[tuple[str, list[Tile]]], path: Path, columns: int = 6) -> None:
    """Write the rows as a PNG, committed whole or not at all. Long rows are wrapped."""
    from PIL import Image, ImageDraw, ImageFont

    laid: list[tuple[str, list[Tile]]] = []
    for heading, tiles in rows:
        for start in range(0, max(1, len(tiles)), columns):
            laid.append((heading if start == 0 else "", tiles[start : start + columns]))
    step = TILE + GAP
    heights = [(HEADING if heading else 0) + TILE + CAPTION + GAP for heading, _ in laid]
    sheet = Image.new("RGB", (GAP + columns * step, GAP + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(14), ImageFont.load_default(10)
    y = GAP
    for (heading, tiles), height in zip(laid, heights, strict=True):
        if heading:
            draw.text((GAP, y), _fitted(draw, heading, large, sheet.width - 2 * GAP), INK, large)
        top = y + (HEADING if heading else 0)
        for column, tile in enumerate(tiles):
            x = GAP + column * step
            _draw_tile(sheet, draw, tile, x, top, small)
        y += height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def _draw_tile(
    sheet: Any, draw: ImageDraw.ImageDraw, tile: Tile, x: int, y: int, font: ImageFont.ImageFont | Any
) -> None:
    from PIL import Image

    if tile.pixels is None:
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline=ALARM, width=2)
        draw.line((x, y, x + TILE - 1, y + TILE - 1), ALARM, 2)
        draw.line((x, y + TILE - 1, x + TILE - 1, y), ALARM, 2)
    else:
        picture = Image.fromarray(tile.pixels)
        scale = TILE / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        picture = picture.resize(size, kind, reducing_gap=3.0)
        sheet.paste(picture, (x + (TILE - size[0]) // 2, y + (TILE - size[1]) // 2))
    draw.text((x, y + TILE + 1), _fitted(draw, tile.caption, font, TILE), FAINT, font)


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """The text, its middle left out where it is too long."""
    text = text.encode("utf-8", "replace").decode()
    if draw.textlength(text, font) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        shorter = text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]
        if draw.textlength(shorter, font) <= width:
            return shorter
    return "…"
