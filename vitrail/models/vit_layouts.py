"""How ViT weights are written down elsewhere (replaced by the tables as they land)."""

from __future__ import annotations

from typing import Any

from vitrail.weights.adapter import Layout

RENAMES: tuple[Layout, ...] = ()


def context(config: Any) -> dict[str, Any]:
    """What the rules must know of a configuration."""
    return {"heads": config.heads}
