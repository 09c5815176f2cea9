"""A model as a whole, in numbers: what its weights and its habits are over many pictures.

The figures of the papers, for any network: filters of the patch embedding and similarity of positions (ViT,
figure 7), how far each head looks (the same), layer scale (CaiT, figure 4), gates (SENet, figure 5), tokens of
outlying norm (Darcet et al. 2024, 2309.16588, section 2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.data.finding import some
from vitrail.explain.attention import Look, blocks_of, explicit
from vitrail.explain.capture import listen, stages_of
from vitrail.explain.gates import gates_of
from vitrail.explain.places import Placement
from vitrail.explain.still import held_still
from vitrail.models.registry import name_of
from vitrail.nn.block import LayerScale
from vitrail.nn.position import LearnedPosition
from vitrail.nn.shapes import Grid

COMPONENTS = 28
"""Principal components of the filters that are kept, as in ViT's figure."""

UNIFORM = 0.99
"""Share of the largest entropy above which a head tells no token from another."""

ONE_KEY = 0.95
"""Mean weight on a single key above which a head looks at the same token whatever the query."""

OUTLYING = 3.0
"""A token is a sink where its norm is this many times the median of its layer."""


@dataclass(kw_only=True)
class Head:
    """One head of one layer, over all pictures."""

    layer: str
    number: int
    distance: float
    """Mean distance in pixels between a patch and what it attends to, by attention; NaN where no patch asks."""
    entropy: float
    """Mean entropy of its rows over the largest possible, 0..1."""
    one_key: float
    """Mean weight of the key that gets most."""

    @property
    def placed(self) -> bool:
        """Whether its queries are patches; class tokens have no place to measure a distance from."""
        return not math.isnan(self.distance)

    @property
    def dead(self) -> str:
        """Why the head tells nothing; empty where it does."""
        if self.entropy > UNIFORM:
            return "looks everywhere alike"
        return "looks at one token whatever is asked" if self.one_key > ONE_KEY else ""


@dataclass(kw_only=True)
class Norms:
    """Lengths of the tokens after one block."""

    layer: str
    median: float
    largest: float
    outlying: float
    """Share of patch tokens whose norm is OUTLYING times the median."""


@dataclass(kw_only=True)
class Anatomy:
    """Everything that was found; what the model has not is empty."""

    model: str
    pictures: int
    filters: Float[Tensor, "n C p q"] | None = None
    """Principal components of the first projection's filters, largest first."""
    explained: Float[Tensor, " n"] | None = None
    """Share of the filters' variance in each."""
    positions: Float[Tensor, "h w h w"] | None = None
    """Cosine between the positions of any two cells."""
    scales: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Mean and largest magnitude of each layer scale."""
    heads: list[Head] = field(default_factory=list)
    gates: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Mean factor of each channel gate, its spread over channels, and over pictures."""
    norms: list[Norms] = field(default_factory=list)

    def findings(self) -> list[tuple[str, str]]:
        """In words, for people."""
        found = [("pictures looked at", str(self.pictures))]
        if self.explained is not None:
            found.append(
                (
                    "filters",
                    f"{len(self.explained)} components hold {float(self.explained.sum()):.0%} of them",
                )
            )
        if self.positions is not None:
            found.append(
                ("positions", f"a cell's nearest neighbours are {self._nearness():.2f} alike (cosine)")
            )
        for name, (mean, largest) in list(self.scales.items())[:: max(1, len(self.scales) - 1)]:
            found.append((f"layer scale {name}", f"mean {mean:.2g}, largest {largest:.2g}"))
        if self.heads:
            reach: dict[str, list[float]] = {}
            for head in self.heads:
                if head.placed:
                    reach.setdefault(head.layer, []).append(head.distance)
            for layer in list(reach)[:: max(1, len(reach) - 1)]:
                span = f"{min(reach[layer]):.0f} to {max(reach[layer]):.0f} pixels"
                found.append((f"heads of {layer} look", span))
            dead = [head for head in self.heads if head.dead]
            names = some(f"{head.layer} head {head.number} ({head.dead})" for head in dead)
            found.append(
                (
                    "dead heads",
                    f"{len(dead)} of {len(self.heads)}" + (f": {names}" if dead else ""),
                )
            )
        for name, (mean, spread, change) in list(self.gates.items())[:: max(1, len(self.gates) - 1)]:
            found.append(
                (
                    f"gate {name}",
                    f"mean {mean:.2f}, ± {spread:.2f} over channels, ± {change:.3f} over pictures",
                )
            )
        if self.norms:
            worst = max(self.norms, key=lambda norms: norms.outlying)
            share = f"{worst.outlying:.2%} of the patches of {worst.layer} are {OUTLYING:g} times as long as the median"
            found.append(
                ("attention sinks", share if worst.outlying else "none: no patch token is outlyingly long")
            )
        return found

    def _nearness(self) -> float:
        """Mean cosine between cells side by side."""
        assert self.positions is not None
        rows, columns = self.positions.shape[:2]
        beside = [
            float(self.positions[row, column, row, column + 1])
            for row in range(rows)
            for column in range(columns - 1)
        ]
        return sum(beside) / max(1, len(beside))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the pictures."""
        return {
            "model": self.model,
            "pictures": self.pictures,
            "findings": dict(self.findings()),
            "layer_scale": {
                name: {"mean": mean, "largest": most} for name, (mean, most) in self.scales.items()
            },
            "heads": [{**vars(head), "dead": head.dead} for head in self.heads],
            "gates": {
                name: {"mean": mean, "over_channels": spread, "over_pictures": change}
                for name, (mean, spread, change) in self.gates.items()
            },
            "norms": [vars(norms) for norms in self.norms],
        }


def anatomy(network: nn.Module, batches: Iterable[Float[Tensor, "B C I J"]] = ()) -> Anatomy:
    """What the weights tell, and, where there are normalised pictures, what the model does with them."""
    filters, explained = _filters(network)
    found = Anatomy(
        model=name_of(network),
        pictures=0,
        filters=filters,
        explained=explained,
        positions=_positions(network),
        scales=_scales(network),
    )
    habits = _Habits()
    for images in batches:
        habits.add(network, images)
    found.pictures, found.heads = habits.pictures, habits.heads()
    found.gates, found.norms = habits.gates(), habits.norms()
    return found


def _filters(network: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Principal components of the first convolution that reads the image, as filters."""
    channels = int(getattr(getattr(network, "config", None), "in_chans", 3))
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == channels and module.kernel_size[0] > 1:
            weight = module.weight.detach().float().cpu()
            flat = weight.flatten(1) - weight.flatten(1).mean(dim=0)
            _, spread, components = torch.linalg.svd(flat, full_matrices=False)
            count = min(COMPONENTS, len(components))
            shares = spread.square() / spread.square().sum().clamp_min(1e-12)
            return components[:count].unflatten(1, tuple(weight.shape[1:])), shares[:count]
    return None, None


def _positions(network: nn.Module) -> Tensor | None:
    """Cosines between the learned positions of a grid's cells."""
    for module in network.modules():
        if isinstance(module, LearnedPosition):
            table = module.table.detach().float().cpu()[0, module.prefix :]  # [N, D]
            alike = F.normalize(table, dim=1) @ F.normalize(table, dim=1).t()
            return alike.unflatten(1, tuple(module.grid)).unflatten(0, tuple(module.grid))
    return None


def _scales(network: nn.Module) -> dict[str, tuple[float, float]]:
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, LayerScale):
            size = module.gamma.detach().abs()
            found[_named(network, name)] = (float(size.mean()), float(size.max()))
    return found


def _named(network: nn.Module, name: str) -> str:
    """What a trace calls the module: block 4, or stage 2 block 4 where there are several stages."""
    for number, stage in enumerate(stages := list(stages_of(network))):
        name = re.sub(rf"^{re.escape(stage)}\b", f"stage {number + 1}" if len(stages) > 1 else "", name)
    name = re.sub(r"\bblocks\.(\d+)", lambda found: f"block {int(found[1]) + 1}", name)
    return name.removesuffix(".mixer").replace(".", " ").strip()


class _Habits:
    """Sums over pictures of what heads, gates and tokens do."""

    def __init__(self) -> None:
        self.pictures = 0
        self.seen: dict[str, list[Tensor]] = {}
        """By layer, for each batch [3, H]: distance, entropy, weight on one key."""
        self.factors: dict[str, list[Tensor]] = {}
        """By gate, for each batch [B, C]."""
        self.lengths: dict[str, list[Tensor]] = {}
        """By block, for each batch [B, n]."""

    def add(self, network: nn.Module, images: Tensor) -> None:
        gates, blocks = gates_of(network), blocks_of(network)

        def heard(name: str, module: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
            if name in gates:
                self.factors.setdefault(_named(network, name), []).append(
                    module.factors(*arguments).float().cpu()
                )
            else:
                patches = output[:, output.shape[1] - arguments[1].size :]
                self.lengths.setdefault(_named(network, name), []).append(patches.float().norm(dim=2).cpu())

        with held_still(network), torch.no_grad(), listen({**gates, **blocks}, heard):
            with explicit(network, alter=None) as found:
                network(images)
        for look in found.looks:
            self.seen.setdefault(_named(network, look.name), []).append(_habit(look) * images.shape[0])
        self.pictures += images.shape[0]

    def heads(self) -> list[Head]:
        rows = []
        for layer, sums in self.seen.items():
            distance, entropy, one_key = torch.stack(sums).sum(dim=0) / self.pictures
            rows += [
                Head(layer=layer, number=number, distance=float(a), entropy=float(b), one_key=float(c))
                for number, (a, b, c) in enumerate(zip(distance, entropy, one_key, strict=True))
            ]
        return rows

    def gates(self) -> dict[str, tuple[float, float, float]]:
        found = {}
        for name, batches in self.factors.items():
            factors = torch.cat(batches)
            change = float(factors.std(dim=0).mean()) if len(factors) > 1 else 0.0
            found[name] = (float(factors.mean()), float(factors.mean(dim=0).std()), change)
        return found

    def norms(self) -> list[Norms]:
        rows = []
        for layer, batches in self.lengths.items():
            lengths = torch.cat([batch.flatten() for batch in batches])
            median = float(lengths.median())
            rows.append(
                Norms(
                    layer=layer,
                    median=median,
                    largest=float(lengths.max()),
                    outlying=float((lengths > OUTLYING * median).float().mean()),
                )
            )
        return rows


def _habit(look: Look) -> Float[Tensor, "three H"]:
    """Distance, entropy and weight on one key of every head, means over a batch's pictures and queries."""
    weights = look.weights.float()  # [B, H, N, M]
    entropy = -(weights * weights.clamp_min(1e-12).log()).sum(dim=3)  # [B, H, N]
    reached = (weights > 0).sum(dim=3).clamp_min(2).float()  # outside its window a key cannot be looked at
    entropy = (entropy / reached.log()).mean(dim=(0, 2))
    one_key = weights.mean(dim=2).amax(dim=2).mean(dim=0)
    cells = weights[:, :, look.prefix :, look.keys.prefix :]
    if cells.shape[2] == 0:  # class attention: the tokens before the patches have no place to measure from
        return torch.stack([torch.full_like(entropy, float("nan")), entropy, one_key]).cpu()
    far = _distances(look.placement, look.grid, look).to(cells)
    distance = ((cells * far).sum(dim=(0, 2, 3)) / cells.sum(dim=(0, 2, 3)).clamp_min(1e-12)).cpu()
    return torch.stack([distance, entropy.cpu(), one_key.cpu()])


def _distances(placement: Placement, grid: Grid, look: Look) -> Float[Tensor, "n m"]:
    """Pixels between the middles of the cells that ask and of the keys; those of padding count where they would lie."""
    axes = []
    for size, keys, scale in zip(grid, (look.keys.rows, look.keys.columns), placement[:2], strict=True):
        cells = (torch.arange(size) + 0.5) * scale
        middles = keys @ cells
        beyond = keys.sum(dim=1) == 0
        middles[beyond] = (torch.arange(len(keys))[beyond] + 0.5) * scale
        axes.append(cells[:, None] - middles[None])  # [n, m]
    down, across = axes
    return (
        (down[:, None, :, None].square() + across[None, :, None, :].square()).sqrt().flatten(2).flatten(0, 1)
    )
