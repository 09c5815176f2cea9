"""What no configuration may say, whichever family it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitrail.errors import ModelError


def check_config(config: Any, counts: Sequence[str]) -> None:
    """Refuse numbers that mean nothing. Raises ModelError: what, what is allowed, what came.

    counts: fields that are at least 1. Besides, `num_classes` is 0 or more, `img_size` and `patch_size` hold
    numbers from 1, whatever ends in `_rate` lies in [0, 1), and `heads`, where it is one number, divides `width`.
    """
    for name in (*counts, "in_chans"):
        if getattr(config, name) < 1:
            raise ModelError(f"{name} must be at least 1; got {getattr(config, name)}.")
    if config.num_classes < 0:
        raise ModelError(f"num_classes must be 0 or more; got {config.num_classes}.")
    for name in ("img_size", "patch_size"):
        size = getattr(config, name, 1)
        if min(size if isinstance(size, tuple) else (size,)) < 1:
            raise ModelError(f"{name} must be at least 1 pixel by 1; got {size}.")
    for name, value in vars(config).items():
        if name.endswith("_rate") and not 0.0 <= value < 1.0:
            raise ModelError(f"{name} must lie in [0, 1); got {value}.")
    if isinstance(getattr(config, "heads", None), int) and config.width % config.heads:
        raise ModelError(
            f"The width must be a multiple of the heads; got width {config.width}, {config.heads} heads."
        )


def check_stages(config: Any, stages: int, least: Mapping[str, int]) -> None:
    """Refuse fields that do not hold one number for each stage, of at least so much."""
    for name, lowest in least.items():
        values = getattr(config, name)
        if not values or len(values) != stages or min(values) < lowest:
            raise ModelError(
                f"{name} must hold a number of at least {lowest} for each of {stages} stages; got {values}."
            )


def check_heads(widths: Sequence[int], heads: Sequence[int]) -> None:
    """Refuse stages whose heads do not divide their width."""
    for width, count in zip(widths, heads, strict=True):
        if width % count:
            raise ModelError(
                f"A stage's width must be a multiple of its heads; got width {width}, {count} heads."
            )
