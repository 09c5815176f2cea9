"""`vitrail info`: the card of a network, a model folder, or a weight file whose layout is recognised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitrail.config import from_dict, to_dict
from vitrail.errors import ModelError, WeightsError, suggestion
from vitrail.jobs.models import Cost, cost
from vitrail.models import loading, registry
from vitrail.runs import InfoRun
from vitrail.weights import adapter, files, folder
from vitrail.weights.card import Card


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """What is known of a model."""

    what: str
    """network, model folder or weight file."""
    model: str
    """Name of the network; empty where none fits."""
    family: str = ""
    cost: Cost | None = None
    """Parameters and multiply-adds, where the network is known."""
    card: Card | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The family's Config as plain data."""
    layout: str = ""
    """Layout of the weights."""
    fit: float | None = None
    """Share of the network's tensors that a weight file holds, 0..1."""
    also: tuple[str, ...] = ()
    """Other networks that the file fits as well: the same tensors, other preprocessing or another computation."""
    tensors: int = 0
    bytes: int = 0
    """Size of the weights."""
    sha256: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = {name: value for name, value in to_dict(self).items() if value not in (None, "", {}, [])}
        if self.cost is not None:
            plain["cost"] = {"parameters": self.cost.parameters, "gflops": self.cost.gflops}
        return plain


def info(run: InfoRun) -> Info:
    """Look at a name, a folder (of vitrail, timm or transformers) or a weight file.

    Raises ModelError for what is none of them, WeightsError for a file that cannot be read.
    """
    place = Path(run.model)
    found = folder.find(place)
    if found is not None:
        return _of_folder(found)
    if place.is_file():
        return _of_weights(place, files.sha256(place))
    if registry.is_model(run.model):
        return _of_name(run.model)
    near = suggestion(run.model, registry.list_models())
    raise ModelError(f"{run.model} is no file, no folder and no name of a network.{near}")


def _of_name(name: str) -> Info:
    config = registry.variant(name)
    card = registry.default_card(name, config)
    return _described("network", name, config, card)


def _of_folder(place: Path) -> Info:
    tensors, card = folder.load(place)
    if not (registry.is_model(card.architecture) and card.config):
        return dataclasses.replace(
            _of_weights(place, card.sha256), what="folder of another library", card=card
        )
    config = from_dict(
        registry.family_of(card.architecture).Config, card.config, where=f"{place}/config.json"
    )
    return dataclasses.replace(
        _described("model folder", card.architecture, config, card),
        layout=card.layout,
        tensors=len(tensors),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        sha256=card.sha256,
    )


def _of_weights(place: Path, sha256: str) -> Info:
    tensors = files.read_tensors(place)
    likes = adapter.ranked(tensors, loading.candidates())
    if not likes or likes[0].share < 0.5:
        names = ", ".join(list(tensors)[:3])
        raise WeightsError(
            f"{place} holds {len(tensors)} tensors ({names} ...) of no layout that vitrail knows."
        )
    best = likes[0]
    module, config = registry.family_of(best.name), registry.variant(best.name)
    if getattr(module, "AVERAGED", False):
        tensors = files.read_tensors(place, averaged=True)
    classes = loading.classes_in(module, config, place)
    if classes is not None:
        config = registry.changed(config, num_classes=classes)
    described = _described("weight file", best.name, config, None)
    return dataclasses.replace(
        described,
        layout=best.layout,
        fit=best.share,
        also=tuple(like.name for like in likes[1:] if like[2:] == best[2:]),
        tensors=len(tensors),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        sha256=sha256,
    )


def _described(what: str, name: str, config: Any, card: Card | None) -> Info:
    with torch.device("meta"):
        model = registry.from_config(name, config)
    return Info(
        what=what,
        model=name,
        family=registry.family_name(registry.family_of(name)),
        cost=cost(model, config.img_size, config.in_chans),
        card=card,
        config=to_dict(config),
    )
