"""vitrail: Vision Transformers, from a folder of pictures to a model that others can trust.

Public names are looked up on first use, so that importing vitrail never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrail.explain.explainer import Explainer as Explainer
    from vitrail.explain.explainer import explain as explain
    from vitrail.models.registry import create_model as create_model
    from vitrail.models.registry import from_pretrained as from_pretrained
    from vitrail.models.registry import is_model as is_model
    from vitrail.models.registry import list_models as list_models
    from vitrail.predict import Predictor as Predictor

__version__ = "0.1.0"

_HOMES = {
    "Explainer": "vitrail.explain.explainer",
    "Predictor": "vitrail.predict",
    "create_model": "vitrail.models.registry",
    "explain": "vitrail.explain.explainer",
    "from_pretrained": "vitrail.models.registry",
    "is_model": "vitrail.models.registry",
    "list_models": "vitrail.models.registry",
}

__all__ = sorted(
    ["Explainer", "Predictor", "create_model", "explain", "from_pretrained", "is_model", "list_models"]
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
