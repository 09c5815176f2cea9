"""How far a map can be trusted: what happens to the class when the regions that it names are taken away.

deletion    the regions are filled in, those that count most first; the class's probability should fall fast. The
            area under its curve is low for a good map.
insertion   the same from an image that is all filled in, the regions brought back; the area should be high.

Both after Petsiuk et al. 2018 (1806.07421), with two fills, since a fill is itself a picture that the network has
an opinion about: the mean colour, and the picture blurred away. Where a head reads [CLS] alone over one grid of
patches, tokens can also be left out for good: no query sees them. A map says something only if it does better than
chance and better than pointing at the middle, so both controls go through the same measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.explain.attention import Look, blocks_of, explicit, mixers_of
from vitrail.explain.capture import stages_of
from vitrail.explain.occlusion import region_labels
from vitrail.explain.places import reaches
from vitrail.explain.rollout import reads_prefix
from vitrail.explain.still import held_still

Fill = Literal["mean", "blur", "removal"]
FILLS: tuple[Fill, ...] = ("mean", "blur")
"""The fills that every network takes."""
CONTROLS = ("random", "centre")
"""Maps that know nothing of the image: a new one by chance for each, and the distance from the middle."""

MAY_BE_CHANCE = "its lead over the middle may be chance"
"""Warning for a method that surely beats the random map, but the centre map only on average."""

TOO_FEW = "too few pictures to tell"
UNSURE = frozenset((MAY_BE_CHANCE, TOO_FEW))
"""Warnings that nothing is proved, where the others say that a method fails."""

SURE = 0.01
"""Largest p-value at which a lead counts."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Areas under the two curves of one map, of probabilities 0..1."""

    deletion: float
    insertion: float

    @property
    def gap(self) -> float:
        """Insertion less deletion: 0 in the mean for a map that knows nothing."""
        return self.insertion - self.deletion

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return {
            "deletion": round(self.deletion, 4),
            "insertion": round(self.insertion, 4),
            "gap": round(self.gap, 4),
        }


def forwards(maps: int, steps: int, fills: int = len(FILLS)) -> int:
    """Forward passes that scoring so many maps of one image costs: two curves for each fill, with shared ends."""
    return fills * (2 * (steps - 1) * maps + 2)


def fills_for(network: nn.Module) -> tuple[Fill, ...]:
    """The fills that mean something for a network: tokens can be removed where only attention ever reads them."""
    stages = list(stages_of(network).values())
    kept = all(not _changes_size(stage.entry) for stage in stages[1:])
    removable = stages and kept and reads_prefix(network) and not _no_mixers(network)
    return (*FILLS, "removal") if removable else FILLS


def _changes_size(entry: nn.Module) -> bool:
    """Whether an entry makes new cells of several old ones."""
    return bool(reaches(entry, (64, 64)))


def _no_mixers(network: nn.Module) -> bool:
    mixers = mixers_of(network)
    return any(not any(name.startswith(block + ".") for name in mixers) for block in blocks_of(network))


def filled(image: Float[Tensor, "C I J"], fill: Fill) -> Float[Tensor, "C I J"]:
    """The image with nothing left to see: the mean colour (0 after normalising), or blurred by an eighth of a side."""
    if fill == "mean":
        return torch.zeros_like(image)
    sigma = max(image.shape[1:]) / 8
    return _blur(_blur(image, sigma, 1), sigma, 2)


def _blur(image: Tensor, sigma: float, axis: int) -> Tensor:
    """A Gaussian along one axis; what lies beyond the border is its nearest pixel."""
    size = image.shape[axis]
    reach = torch.arange(size, device=image.device)
    far = (reach[:, None] - reach[None]).float()
    weights = torch.exp(-(far**2) / (2 * sigma**2))
    weights = weights / weights.sum(dim=1, keepdim=True)
    return weights @ image if axis == 1 else image @ weights.t()


def score_maps(
    network: nn.Module,
    image: Float[Tensor, "C I J"],
    target: int,
    maps: Float[Tensor, "K r c"],
    *,
    fill: Fill,
    steps: int = 10,
    chunk: int = 64,
) -> list[Score]:
    """Deletion and insertion of several maps of one normalised image, over regions that share it out evenly.

    Ties, such as the zeros of Grad-CAM, are broken from the middle outwards, so that they gain nothing from the
    order in which an image is stored, and are charged with what the centre prior would get for them.
    """
    grid = (maps.shape[1], maps.shape[2])
    labels = region_labels((image.shape[1], image.shape[2]), grid).to(image.device)
    inside = torch.linspace(0, grid[0] * grid[1], steps + 1).round().long()[1:-1]
    ranks = [rank(map) for map in maps]  # [r * c] each
    # The regions that count most, in growing numbers.
    masks = [(found[labels] < count.to(labels.device)) for found in ranks for count in inside]
    if fill == "removal":
        hidden = torch.stack([labels < 0, labels >= 0, *masks, *(~mask for mask in masks)])
        return _areas(_without(network, image, hidden, target, chunk), len(maps), steps)
    blank = filled(image, fill)
    pictures = [torch.where(mask, blank, image) for mask in masks] + [
        torch.where(mask, image, blank) for mask in masks
    ]
    return _areas(_probabilities(network, [image, blank, *pictures], target, chunk), len(maps), steps)


def _areas(found: Float[Tensor, " n"], maps: int, steps: int) -> list[Score]:
    """Scores from the probabilities of the whole image, of nothing, and of what lies between, deletion first."""
    whole, nothing, curves = found[:1], found[1:2], found[2:].view(2, maps, steps - 1)
    scores = []
    for deleting, inserting in zip(curves[0], curves[1], strict=True):
        deletion = torch.trapezoid(torch.cat([whole, deleting, nothing])) / steps
        insertion = torch.trapezoid(torch.cat([nothing, inserting, whole])) / steps
        scores.append(Score(deletion=float(deletion), insertion=float(insertion)))
    return scores


def rank(map: Float[Tensor, "r c"]) -> Int[Tensor, " n"]:
    """For every region, how many come before it when the map is read from its highest value down."""
    nearer = centre_map((map.shape[0], map.shape[1])).flatten().argsort(descending=True, stable=True)
    order = nearer[map.flatten()[nearer].argsort(descending=True, stable=True)]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def _probabilities(
    network: nn.Module, images: Sequence[Tensor], target: int, chunk: int
) -> Float[Tensor, " n"]:
    found = []
    with held_still(network), torch.no_grad():
        for first in range(0, len(images), chunk):
            logits = network(torch.stack(list(images[first : first + chunk])))
            found.append(logits.float().softmax(dim=1)[:, target].cpu())
    return torch.cat(found)


def _without(
    network: nn.Module, image: Tensor, hidden: Tensor, target: int, chunk: int
) -> Float[Tensor, " n"]:
    """The class's probability when no query sees the tokens whose middle lies in a hidden pixel [n, I, J]."""
    found = []
    for first in range(0, len(hidden), chunk):
        part = hidden[first : first + chunk]

        def alter(look: Look, weights: Tensor, part: Tensor = part) -> Tensor:
            place = look.placement
            ys = ((torch.arange(look.grid.rows) + 0.5) * place.scale_y + place.shift_y).long()
            xs = ((torch.arange(look.grid.columns) + 0.5) * place.scale_x + place.shift_x).long()
            cells = ~part[:, ys][:, :, xs].flatten(1)  # [n, cells]
            seen = torch.cat([cells.new_ones(len(cells), look.keys.prefix), cells], dim=1)
            kept = weights * seen[:, None, None]
            return kept / kept.sum(dim=-1, keepdim=True).clamp_min(1e-12)

        with held_still(network), torch.no_grad(), explicit(network, alter=alter):
            logits = network(image.expand(len(part), -1, -1, -1))
        found.append(logits.float().softmax(dim=1)[:, target].cpu())
    return torch.cat(found)


def centre_map(grid: tuple[int, int]) -> Float[Tensor, "r c"]:
    """The control that points at the middle: a Gaussian of a quarter of each side."""
    rows, columns = (torch.linspace(-2, 2, side) if side > 1 else torch.zeros(1) for side in grid)
    return torch.exp(-(rows[:, None] ** 2 + columns[None] ** 2) / 2)


def random_map(grid: tuple[int, int], seed: int) -> Float[Tensor, "r c"]:
    """The control that knows nothing."""
    return torch.rand(grid, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over images, and the middle 95 % of what resampling the images gives for it."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return {"mean": round(self.mean, 4), "low": round(self.low, 4), "high": round(self.high, 4)}


def interval(values: Float[Tensor, " n"], seed: int = 0, repeats: int = 2000) -> Interval:
    """The mean with its bootstrap interval (Efron 1979, percentiles)."""
    means = _resampled(values, seed, repeats)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return Interval(mean=float(values.mean()), low=low, high=high)


def better_by_chance(differences: Float[Tensor, " n"], seed: int = 0, repeats: int = 10_000) -> float:
    """One-sided paired bootstrap: how often the resampled mean of the differences is not above 0.

    At least 2^-n for n images, what n signs that agree are worth: few images that are alike give narrow resamples.
    """
    means = _resampled(differences, seed, repeats)
    return max((float((means <= 0).sum()) + 1) / (repeats + 1), 0.5 ** len(differences))


def _resampled(values: Tensor, seed: int, repeats: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = values.double()
    means = [
        values[torch.randint(len(values), (min(500, repeats), len(values)), generator=generator)].mean(dim=1)
        for _ in range(-(-repeats // 500))
    ]
    return torch.cat(means)[:repeats]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One method, or control, over a set of images with one fill."""

    method: str
    fill: Fill
    deletion: Interval
    insertion: Interval
    gap: Interval
    over_random: float
    """Mean of gap less the random map's gap, image by image."""
    p_random: float
    """How often chance gives the method no lead over the random map."""
    over_centre: float
    """Mean of gap less the centre map's gap."""
    p_centre: float
    warning: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "method": self.method,
            "fill": self.fill,
            "deletion": self.deletion.to_dict(),
            "insertion": self.insertion.to_dict(),
            "gap": self.gap.to_dict(),
            "over_random": round(self.over_random, 4),
            "p_random": round(self.p_random, 5),
            "over_centre": round(self.over_centre, 4),
            "p_centre": round(self.p_centre, 5),
            "warning": self.warning,
        }


def standings(found: dict[str, list[Score]], fill: Fill) -> list[Standing]:
    """The table of one fill: every method and control, best gap first, with a warning where it fails."""
    gaps = {name: torch.tensor([score.gap for score in scores]) for name, scores in found.items()}
    rows = []
    for name, scores in found.items():
        lead, ahead = gaps[name] - gaps["random"], gaps[name] - gaps["centre"]
        p_random, p_centre = better_by_chance(lead), better_by_chance(ahead)
        warning = ""
        if name not in CONTROLS:
            if 0.5 ** len(scores) >= SURE:
                warning = TOO_FEW
            elif p_random >= SURE:
                warning = "no better than a random map"
            elif float(ahead.mean()) <= 0:
                warning = "no better than pointing at the middle"
            elif p_centre >= SURE:
                warning = MAY_BE_CHANCE
        rows.append(
            Standing(
                method=name,
                fill=fill,
                deletion=interval(torch.tensor([score.deletion for score in scores])),
                insertion=interval(torch.tensor([score.insertion for score in scores])),
                gap=interval(gaps[name]),
                over_random=float(lead.mean()),
                p_random=p_random,
                over_centre=float(ahead.mean()),
                p_centre=p_centre,
                warning=warning,
            )
        )
    return sorted(rows, key=lambda row: -row.gap.mean)
