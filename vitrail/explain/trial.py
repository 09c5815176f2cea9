"""Methods on trial over a set of pictures: the same measurement for all of them, and for maps that know nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from vitrail.data.transforms import normalise
from vitrail.explain.explainer import STEPS, Explainer
from vitrail.explain.faithfulness import (
    CONTROLS,
    Fill,
    Score,
    Standing,
    centre_map,
    fills_for,
    forwards,
    random_map,
    score_maps,
    standings,
)
from vitrail.explain.methods import METHODS, Options, choose, heat_of
from vitrail.explain.still import held_still


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of it."""

    model: str
    images: int
    regions: tuple[int, int]
    steps: int
    tables: dict[Fill, list[Standing]]
    """For each fill, methods and controls, best gap first."""
    scores: dict[Fill, dict[str, list[Score]]]
    """Every picture's scores, in the pictures' order."""

    @property
    def agreed(self) -> bool:
        """Whether all fills put the methods in the same order."""
        orders = {
            tuple(row.method for row in rows if row.method not in CONTROLS) for rows in self.tables.values()
        }
        return len(orders) == 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model,
            "images": self.images,
            "regions": list(self.regions),
            "steps": self.steps,
            "fills_agree_on_the_order": self.agreed,
            "tables": {fill: [row.to_dict() for row in rows] for fill, rows in self.tables.items()},
        }


def cost(explainer: Explainer, methods: Sequence[str], images: int, options: Options) -> float:
    """About how many forward passes a trial takes."""
    maps = sum(METHODS[method].forwards(options) for method in methods)
    fills = len(fills_for(explainer.network))
    return images * (1 + maps + forwards(len(methods) + len(CONTROLS), STEPS, fills))


def trial(
    explainer: Explainer,
    pictures: Iterable[UInt8[Tensor, "C h w"]],
    methods: Sequence[str],
    *,
    options: Options | None = None,
    seed: int = 0,
    watch: Callable[[int], None] | None = None,
) -> Trial:
    """Deletion and insertion of every method, for the predicted class of every picture.

    Args:
        explainer: the model.
        pictures: as its preprocessing made them.
        methods: names; each must be defined for the model.
        options: what the methods are told; the grid of regions is the explainer's.
        seed: of the random maps, a new one for each picture.
        watch: called after each picture with the number done.

    Raises ConfigError and UnsupportedError as `methods.choose` does.
    """
    options = options or Options(grid=explainer.regions)
    methods = [choose(explainer.network, method) for method in methods]
    network, regions, fills = explainer.network, explainer.regions, fills_for(explainer.network)
    found: dict[Fill, dict[str, list[Score]]] = {
        fill: {name: [] for name in (*methods, *CONTROLS)} for fill in fills
    }
    done = 0
    for picture in pictures:
        images = normalise(picture[None].to(explainer.device), explainer.engine.card.preprocessing)
        with held_still(network), torch.no_grad():
            target = int(network(images)[0].argmax())
        size = (images.shape[2], images.shape[3])
        maps = [
            heat_of(network, images, [target], method, options).regions(size, regions)[0]
            for method in methods
        ]
        maps += [random_map(regions, seed + done), centre_map(regions)]
        for fill in fills:
            scores = score_maps(network, images[0], target, torch.stack(maps), fill=fill, steps=STEPS)
            for name, score in zip((*methods, *CONTROLS), scores, strict=True):
                found[fill][name].append(score)
        done += 1
        if watch is not None:
            watch(done)
    return Trial(
        model=explainer.name,
        images=done,
        regions=regions,
        steps=STEPS,
        tables={fill: standings(found[fill], fill) for fill in fills},
        scores=found,
    )
