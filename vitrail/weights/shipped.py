"""The small models that ship with vitrail: model folders inside the package, usable by name and without a network.

A name is a network's and a tag, `vit_nano_patch4_32.cifar10`; each folder's README.md says what it was trained on.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets"


def names() -> list[str]:
    """Names of the models that ship, sorted."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def find(name: str) -> Path | None:
    """The folder of a model that ships: by its name, or by the network's where only one of that network ships."""
    fitting = [known for known in names() if name == known or name == known.partition(".")[0]]
    return ASSETS / fitting[0] if len(fitting) == 1 else None


def by_full_name(name: str) -> Path | None:
    """The folder of a model that ships, by its name with the tag: the network's name alone means the network."""
    return ASSETS / name if name in names() else None
