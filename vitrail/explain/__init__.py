"""Explanations: what a network did with a picture, read from the outside. No model file knows of this.

`vitrail.explain(model, picture)` is the one call for all of it. Since the package has the same name, the package
itself can be called, and hands the call on to `vitrail.explain.explainer.explain`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that is a function too."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from vitrail.explain.explainer import explain

        return explain(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
