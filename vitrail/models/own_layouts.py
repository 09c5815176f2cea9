"""Layouts of families that only vitrail has: their files hold our modules' names, and here is what may be replaced."""

from __future__ import annotations

from vitrail.weights.adapter import Layout, Rule


def own_layout(*class_layers: str) -> tuple[Layout, ...]:
    """RENAMES for a family without foreign files; the class layers may give way to new ones."""
    rules = tuple(
        Rule(f"{layer}.{{weight|bias}}", f"{layer}.{{weight|bias}}", fit="classes") for layer in class_layers
    )
    return (Layout("vitrail", rules, signature=tuple(f"{layer}.weight" for layer in class_layers)),)
