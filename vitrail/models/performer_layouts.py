"""How Performer ViTs are written down: as ViTs and DeiTs are, with the random features beside them.

No package has Performer ViTs; what is here lets every plain ViT's file load. Features that a file lacks stay as drawn.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vitrail.models import vit_layouts as plain
from vitrail.weights.adapter import Layout, Rule

if TYPE_CHECKING:
    from vitrail.models.performer import Config


def context(config: Config) -> dict[str, Any]:
    """What the rules must know of a configuration."""
    rows, columns = config.patch_size
    grid = (config.img_size[0] // rows, config.img_size[1] // columns)
    return {"heads": config.heads, "prefix": 1, "grid": grid}


_FEATURES = (
    Rule("blocks.{i}.attn.projection", f"{plain.BLOCK}.mixer.projection", default="fresh"),
    Rule("redraw.calls", f"{plain.ENTRY}.redraw.calls", default="fresh"),
    Rule("redraw.seed", f"{plain.ENTRY}.redraw.seed", default="fresh"),
)

RENAMES: tuple[Layout, ...] = tuple(
    dataclasses.replace(layout, rules=(*layout.rules, *_FEATURES), describe=None) for layout in plain.RENAMES
)
