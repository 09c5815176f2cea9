"""A plain ViT that merges tokens while it computes (nn.merging): faster, and nearly the same answers."""

from __future__ import annotations

import copy
from typing import Any

from vitrail.errors import ModelError, UnsupportedError
from vitrail.models.classifier import Classifier
from vitrail.nn.merging import MergingTrunk


def merge_tokens(model: Any, count: int) -> Classifier:
    """The same classifier with `count` tokens fewer after every block; weights are shared with `model`.

    Raises:
        ModelError: a count below 1.
        UnsupportedError: the model is no plain ViT, or its head reads all tokens one by one.
    """
    if count < 1:
        raise ModelError(f"The tokens that a block merges must be at least 1; got {count}.")
    if not isinstance(model, Classifier) or getattr(model.head, "pooling", "token") == "flatten":
        raise UnsupportedError(f"Tokens are merged in plain ViTs that classify; {model.name} is none.")
    merged = copy.copy(model)
    merged._modules = dict(model._modules)
    merged.backbone = MergingTrunk(model.backbone, count)  # type: ignore[arg-type]
    return merged
