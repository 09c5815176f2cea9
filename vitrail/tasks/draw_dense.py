"""Drawings of boxes and masks on pictures, with a legend of what occurs. Pillow is loaded when one is drawn."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    Array = np.ndarray[Any, np.dtype[Any]]

SIDE = 640
"""Pixels that the longer side of a drawing has at least, so that lines and letters can be seen."""

PAPER, INK, MUTED = (255, 255, 255), (28, 33, 40), (91, 101, 112)

COLOURS = (
    (230, 75, 53), (46, 160, 67), (47, 111, 214), (245, 166, 35), (155, 81, 224), (0, 168, 181), (233, 84, 164),
    (124, 92, 60), (160, 196, 40), (90, 90, 200), (255, 127, 102), (0, 120, 90), (120, 150, 180), (200, 170, 0),
)  # fmt: skip
"""Colours (RGB) of the first classes; further ones are spread over the circle of hues."""

IGNORED = 255


class Drawn(NamedTuple):
    """One box on a drawing."""

    number: int
    """The class's number."""
    corners: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels of the picture."""
    score: float | None = None


def colour_of(index: int) -> tuple[int, int, int]:
    """The colour of a class, the same in every picture."""
    if index < len(COLOURS):
        return COLOURS[index]
    red, green, blue = colorsys.hsv_to_rgb((index * 0.618034) % 1, 0.75, 0.85 - 0.3 * (index % 3 == 0))
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(pixels: Array, boxes: Sequence[Drawn], labels: Sequence[str], title: str = "") -> Image.Image:
    """A picture uint8 `[H, W, 3]` with boxes, scores where there are some, and a legend with counts."""
    from PIL import ImageDraw

    picture, scale = _enlarged(pixels)
    draw, font = ImageDraw.Draw(picture), _font(12)
    line = max(2, round(max(picture.size) / 320))
    for box in sorted(boxes, key=lambda box: box.score or 0.0):
        colour = colour_of(box.number)
        left, top, right, bottom = (value * scale for value in box.corners)
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=line)
        if box.score is not None:
            text = f"{100 * box.score:.0f}"
            wide = draw.textlength(text, font)
            place = max(0.0, top - 15)
            draw.rectangle((left, place, left + wide + 5, place + 15), fill=colour)
            draw.text((left + 3, place), text, PAPER, font)
    counts = [sum(box.number == index for box in boxes) for index in range(len(labels))]
    entries = [(index, f"{labels[index]} {count}") for index, count in enumerate(counts) if count]
    return _with_legend(picture, entries, title or ("" if entries else "nothing found"))


def draw_mask(
    pixels: Array, mask: Array, labels: Sequence[str], title: str = "", strength: float = 0.55
) -> Image.Image:
    """A picture uint8 `[H, W, 3]` under its mask uint8 `[H, W]`, and a legend with shares of the picture.

    Ignored pixels stay as they are.
    """
    from PIL import Image

    picture, _ = _enlarged(pixels)
    numbers = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))
    seen = np.asarray(picture).astype(np.float32)
    colours = palette(len(labels))[numbers].astype(np.float32)
    weight = np.where(numbers == IGNORED, 0.0, strength)[..., None]
    mixed = Image.fromarray((seen * (1 - weight) + colours * weight).round().astype(np.uint8))
    shares = np.bincount(mask.reshape(-1), minlength=256) / max(1, mask.size)
    entries = [
        (index, f"{labels[index]} {shares[index]:.1%}") for index in range(len(labels)) if shares[index] > 0
    ]
    return _with_legend(mixed, sorted(entries, key=lambda entry: -shares[entry[0]]), title)


def index_png(mask: Array, classes: int) -> bytes:
    """A mask uint8 `[H, W]` as a PNG of numbers, with the classes' colours as its palette."""
    from PIL import Image

    with_palette = Image.frombytes("P", (mask.shape[1], mask.shape[0]), np.ascontiguousarray(mask).tobytes())
    with_palette.putpalette(palette(classes).reshape(-1).tolist())
    buffer = io.BytesIO()
    with_palette.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def palette(classes: int) -> Array:
    """Colours uint8 `[256, 3]` of class numbers; black for numbers that are none."""
    table = np.zeros((256, 3), dtype=np.uint8)
    for index in range(min(classes, len(table))):
        table[index] = colour_of(index)
    return table


def as_png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def titled(pixels: Array, title: str) -> Image.Image:
    """A picture uint8 `[H, W, 3]` with a line below it."""
    return _with_legend(_enlarged(pixels)[0], [], title)


def side_by_side(rows: Sequence[Sequence[Image.Image]], title: str, caption: str = "") -> Image.Image:
    """Drawings in rows under a heading; each row is as high as its highest."""
    from PIL import Image, ImageDraw

    gap = 12
    width = max(sum(tile.width + gap for tile in row) for row in rows) + gap
    heights = [max(tile.height for tile in row) + gap for row in rows]
    sheet = Image.new("RGB", (width, 56 + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 8), title, INK, _font(20))
    draw.text((gap, 34), caption, MUTED, _font(13))
    y = 56
    for row, height in zip(rows, heights, strict=True):
        x = gap
        for tile in row:
            sheet.paste(tile, (x, y))
            x += tile.width + gap
        y += height
    return sheet


def _enlarged(pixels: Array) -> tuple[Image.Image, float]:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(pixels))
    scale = max(1.0, SIDE / max(picture.size))
    if scale > 1:
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return picture.convert("RGB"), scale


def _with_legend(picture: Image.Image, entries: Sequence[tuple[int, str]], title: str) -> Image.Image:
    """The picture with a strip below it: a line of title, and coloured squares with words, wrapped."""
    from PIL import Image, ImageDraw

    font, pad, line = _font(14), 8, 22
    ruler = ImageDraw.Draw(picture)
    rows: list[list[tuple[int, str, int]]] = [[]]
    x = pad
    for index, text in entries:
        wide = 18 + round(ruler.textlength(text, font)) + 16
        if x + wide > picture.width and rows[-1]:
            rows.append([])
            x = pad
        rows[-1].append((index, text, x))
        x += wide
    lines = (1 if title else 0) + (len(rows) if entries else 0)
    sheet = Image.new("RGB", (picture.width, picture.height + pad + lines * line), PAPER)
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    y = picture.height + 5
    if title:
        draw.text((pad, y), _fitted(draw, title, font, picture.width - 2 * pad), MUTED, font)
        y += line
    for row in rows if entries else []:
        for index, text, left in row:
            draw.rectangle((left, y + 3, left + 12, y + 15), fill=colour_of(index))
            draw.text((left + 18, y), text, INK, font)
        y += line
    return sheet


def _fitted(draw: Any, text: str, font: Any, width: int) -> str:
    """The text, its beginning left out where it is too long."""
    text = text.encode("utf-8", "replace").decode().replace("×", "x")  # the font has no such sign
    while text and draw.textlength(text, font) > width:
        text = "…" + text[2:]
    return text


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
