"""Methods on trial over a set of pictures: the same measurement for all of them, and for maps that know nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from vitrail.data.transforms import normalise
from vitrail.explain.explainer import STEPS, Explainer, scored
from vitrail.explain.faithfulness import (
    CONTROLS,
    UNSURE,
    Fill,
    Interval,
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

Made = TypeVar("Made")


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
    costs: dict[str, float]
    """What a method's map takes, in forwards of one picture: the median of its time over that of a forward."""

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
            "cost_in_forwards": {name: round(cost, 2) for name, cost in self.costs.items()},
            "tables": {fill: [row.to_dict() for row in rows] for fill, rows in self.tables.items()},
        }

    def verdict(self, method: str) -> str:
        """What came of a method under all fills; for a control, that it is one."""
        if method in CONTROLS:
            return "control"
        blind = "" if METHODS[method].class_specific else "; knows no class"
        rows = [(fill, row) for fill, table in self.tables.items() for row in table if row.method == method]
        said: dict[str, list[str]] = {}  # warning -> the fills that give it
        for fill, row in rows:
            if row.warning:
                said.setdefault(row.warning, []).append(fill)
        failed = "; ".join(f"{warning} ({', '.join(fills)})" for warning, fills in said.items())
        worst = "fails" if any(warning not in UNSURE for warning in said) else "not proved"
        return (f"**{worst}**: {failed}" if failed else "leads both controls") + blind

    def to_markdown(self) -> str:
        """The table for a document: a row a method and fill, best mean gap first, with 95 % intervals."""
        fills = list(self.tables)
        rows = {(fill, row.method): row for fill, table in self.tables.items() for row in table}
        names = sorted(
            {method for _, method in rows},
            key=lambda name: -sum(rows[fill, name].gap.mean for fill in fills),
        )
        lines = [
            "| method | forwards | fill | deletion | insertion | gap | verdict |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in names:
            first = f"*{CALLED[name]}* | 0" if name in CONTROLS else f"{name} | {self.costs[name]:.1f}"
            verdict = self.verdict(name)
            for fill in fills:
                row = rows[fill, name]
                areas = " | ".join(_between(area) for area in (row.deletion, row.insertion))
                gap = _between(row.gap, signed=True)
                lines.append(f"| {first} | {fill} | {areas} | {gap} | {verdict} |")
                first, verdict = " | ", ""
        return "\n".join(lines) + "\n"


CALLED = {"random": "random map", "centre": "pointing at the middle"}


def _between(found: Interval, signed: bool = False) -> str:
    """A mean with its interval, in thousandths."""
    form = "+.3f" if signed else ".3f"
    return f"{found.mean:{form}} ({found.low:.3f} to {found.high:.3f})".replace("-", "−")


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
    seconds: dict[str, list[float]] = {name: [] for name in ("", *methods)}  # "": one forward

    def timed(name: str, work: Callable[[], Made]) -> Made:
        begun = time.perf_counter()
        made = work()
        seconds[name].append(time.perf_counter() - begun)
        return made

    done = 0
    for picture in pictures:
        images = normalise(picture[None].to(explainer.device), explainer.engine.card.preprocessing)
        with held_still(network), torch.no_grad():
            logits = timed("", lambda: network(images).cpu())  # noqa: B023 called at once
        target, size = int(logits[0].argmax()), (images.shape[2], images.shape[3])
        ask = partial(heat_of, network, images, [target], options=options)
        heats = [timed(method, partial(ask, method=method)) for method in methods]
        controls = [random_map(regions, seed + done), centre_map(regions)]
        for fill in fills:
            maps = torch.stack([*(scored(heat, size, regions, fill) for heat in heats), *controls])
            scores = score_maps(network, images[0], target, maps, fill=fill, steps=STEPS)
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
        costs={name: median(seconds[name]) / median(seconds[""]) for name in methods},
    )
