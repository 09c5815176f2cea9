"""Backbones of dense models: any classification variant by its name, and weights for it from a folder or a file.

A dense model keeps its backbone in `.backbone` and the variant's name in its Config's `backbone`; the parts have the
names that they have in the classifier, so a classifier's files fit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from vitrail.errors import ModelError, WeightsError
from vitrail.models import loading, meaning, registry
from vitrail.models.classifier import Backbone
from vitrail.models.model import Model
from vitrail.nn.resnet import ResidualTrunk
from vitrail.nn.shapes import Level
from vitrail.weights import adapter
from vitrail.weights.card import Card

SILENT = {"heads", "gelu", "qk_norm", "norm_order", "position"}
"""Fields of a backbone that no tensor shows, and that a dense model has no reason of its own to change."""


class Chosen(NamedTuple):
    """A backbone and what it was built from."""

    trunk: Any
    """The module; called with images it answers Features."""
    config: Any
    """The classification family's Config, without classes."""
    levels: tuple[Level, ...]
    """Channels and stride of each of its maps, fine to coarse."""

    def coarsest(self, maps: int) -> tuple[Level, ...]:
        """The last so many levels. Raises ModelError where the backbone has fewer."""
        if len(self.levels) < maps:
            raise ModelError(
                f"The backbone has {len(self.levels)} maps; maps={maps} asks for more: take maps={len(self.levels)},"
                " or a backbone with more stages."
            )
        return self.levels[-maps:]


def backbone(name: str, in_chans: int = 3, **changes: Any) -> Chosen:
    """The backbone of a classification variant, freshly initialised.

    Args:
        name: a variant; its own image size is kept unless `img_size` says another, since every backbone takes
            any size.
        changes: fields of its Config. One that is None means nothing; one that the family does not have raises
            ModelError.
    """
    config = backbone_config(name, in_chans, **changes)
    trunk: Backbone = registry.from_config(name, config).backbone  # type: ignore[assignment]
    _leave_untrained(trunk)
    return Chosen(trunk, config, trunk.levels)


def backbone_config(name: str, in_chans: int = 3, **changes: Any) -> Any:
    """The Config that `backbone` builds from."""
    asked = {field: value for field, value in changes.items() if value is not None}
    task = registry.task_of(registry.family_of(name))
    if task != registry.CLASSIFICATION:
        raise ModelError(f"A backbone is a classification network; {name} is for {task}.")
    plain = registry.variant(name)
    for field, value in asked.items():
        if not hasattr(plain, field):
            raise ModelError(
                f"The backbone {name} has no {field} that could be {value!r}; leave it, or take a resnet50."
            )
    return registry.changed(plain, num_classes=0, in_chans=in_chans, **asked)


def load_backbone(model: Model, path: str | Path) -> adapter.Receipt:
    """Put the backbone of a classification model (folder or weight file, any layout of its family) into a dense model.

    The classifier's head, and parts that the dense model does not use, are left out, and the receipt says so.
    Raises WeightsError where it does not fit; the model is then as it was.
    """
    own = getattr(model.config, "backbone", None)
    config = getattr(model, "backbone_config", None)
    if not isinstance(own, str) or config is None:
        raise WeightsError(
            f"{model.name} has no backbone of its own to load; give whole weights: --pretrained."
        )
    module = registry.family_of(own)
    trunk: nn.Module = model.backbone  # type: ignore[assignment]
    tensors, card, sha256 = loading.read(path, averaged=getattr(module, "AVERAGED", False))
    if card is not None and card.architecture and card.config:
        _check_origin(own, module, card.architecture, path)
    if card is not None:
        _check_meaning(own, model, config, card, path)
    state, receipt = adapter.read(
        tensors, _headless(module.RENAMES), loading.shapes_of(own, config),
        {**loading.context(module, config, card), "dense": True, **getattr(model, "backbone_context", {})},
        layout=card.layout if card is not None and card.layout else None, source=str(path), sha256=sha256,
    )  # fmt: skip
    wanted = {f"backbone.{name}" for name in trunk.state_dict()}
    spare = [(name, "the dense model has no such part") for name in sorted(set(state) - wanted)]
    trunk.load_state_dict(
        {name.removeprefix("backbone."): value for name, value in state.items() if name in wanted},
        strict=False,
    )
    receipt = dataclasses.replace(receipt, dropped=(*receipt.dropped, *spare))
    return receipt


def _headless(layouts: Sequence[adapter.Layout]) -> tuple[adapter.Layout, ...]:
    """Layouts that also leave out our own head, of files that hold our modules' names."""
    drop = adapter.Drop("head.*", "the dense model has a head of its own")
    return tuple(dataclasses.replace(layout, dropped=(*layout.dropped, drop)) for layout in layouts)


def _check_meaning(own: str, model: Model, config: Any, card: Card, path: str | Path) -> None:
    """Refuse a backbone that computes something else with tensors that look alike."""
    wrong = [found for found in meaning.differences(own, config, card) if found.field in SILENT]
    if wrong:
        made = ", ".join(f"{found.field}={found.theirs!r}" for found in wrong)
        has = ", ".join(f"{found.field}={found.ours!r}" for found in wrong)
        changes = dict(getattr(model.config, "backbone_changes", None) or {})
        changes |= {found.field: found.theirs for found in wrong}
        raise WeightsError(
            f"{path} was made with {made}, and the backbone {own} has {has}: their tensors look alike, and what they"
            f" compute is not. Build it alike: --model-kwargs 'backbone_changes={json.dumps(changes)}'."
        )


def _check_origin(own: str, module: Any, architecture: str, path: str | Path) -> None:
    """Refuse a folder of another family before its tensors are compared one by one."""
    try:
        theirs = registry.family_of(architecture)
    except ModelError:
        return
    if theirs is not module:
        raise WeightsError(
            f"{path} holds a {architecture}, and the model's backbone is a {own}: take weights of a"
            f" {registry.family_name(module)}, or build the model with backbone={architecture!r}."
        )


def _leave_untrained(trunk: Any) -> None:
    """Freeze what maps do not see: the last norm of a trunk whose maps are taken before it."""
    if isinstance(trunk, ResidualTrunk):
        return
    last = trunk.stages[-1]
    if last.taps:
        last.norm.requires_grad_(False)
