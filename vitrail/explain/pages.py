"""What the self-contained pages share: filling a template, and pictures and numbers as text inside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib import resources

from torch import Tensor

from vitrail.explain.overlay import Pixels, png


def fill_template(template: str, texts: Mapping[str, str]) -> str:
    """A template of this package with a text for each of its <!--NAME--> places; the texts are HTML already."""
    page = resources.files("vitrail.explain").joinpath(template).read_text(encoding="utf-8")
    for name, text in texts.items():
        page = page.replace(f"<!--{name}-->", text)
    return page


def data_url(pixels: Pixels) -> str:
    """An image `[H, W, 3]` or `[H, W, 4]` as the URL of a PNG."""
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"


def packed(values: Tensor) -> str:
    """Values in 0..255, rounded, a byte each, as base64."""
    array = values.round().clamp(0, 255).byte().contiguous().numpy()
    return base64.b64encode(array.tobytes()).decode()
