"""One forward pass with its attention written down, told in the order in which it was computed.

A `Look` is one mixer's weights, with the layout of its keys; a `Move` is what the entry of a stage does to the
places of tokens. Together they say how every last token hangs on the cells of the first grid, for any network
that is made of stages; nothing here knows a family.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import ConfigError, UnsupportedError
from vitrail.explain.capture import evaluation, listen, stages_of
from vitrail.explain.places import PIXELS, Axis, Keys, Placement, axes, keys_of
from vitrail.nn.resnet import ConvNorm, Stem
from vitrail.nn.shapes import Grid

Item = TypeVar("Item")


@dataclass(kw_only=True)
class Look:
    """One mixer in the pass."""

    name: str
    """The mixer's name within the network."""
    block: str
    """The name of the block that it stands in; mixers side by side share it."""
    number: int
    """Place in the pass, from 0."""
    grid: Grid
    prefix: int
    """Tokens before the grid's."""
    keys: Keys
    placement: Placement
    """Where the cells of the grid lie in the network's input."""
    weights: Tensor
    """Attention of queries to keys `[B, H, N, M]`; where N is the prefix alone, the other tokens are handed on
    unread. Window by window, `[B, H, W, L, L]`, where there are `members`. `[B, N, F]` where there is a `factor`."""
    members: Int[Tensor, "W L"] | None = None
    """Which keys (and which queries of the map padded like them) each window holds."""
    factor: Float[Tensor, "B M F"] | None = None
    """Where it is there, the mean over heads is `weights` times it, transposed: a product never written down."""


@dataclass(kw_only=True)
class Move:
    """One entry in the pass: the map's cells become coarser, prefix tokens come in behind those that are there."""

    name: str
    before: Grid
    after: Grid
    prefix_before: int
    prefix_after: int
    rows: Axis
    columns: Axis


@dataclass(kw_only=True)
class Pass:
    """What was recorded."""

    events: list[Look | Move] = field(default_factory=list)
    placement: Placement = PIXELS
    """Where the cells of the last grid lie in the network's input, for a network made of stages."""

    @property
    def looks(self) -> list[Look]:
        """Every mixer's weights, in the order of the pass."""
        return [event for event in self.events if isinstance(event, Look)]

    @property
    def moves(self) -> list[Move]:
        """Every stage's entry, in the order of the pass."""
        return [event for event in self.events if isinstance(event, Move)]

    @property
    def first(self) -> tuple[Grid, Placement]:
        """The grid of the first stage, and where its cells lie."""
        move = self.moves[0]
        return move.after, PIXELS.after(move.rows, move.columns)


def mixers_of(network: nn.Module) -> dict[str, nn.Module]:
    """The parts of a network whose attention can be written down, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if callable(getattr(module, "weights", None)) and callable(getattr(module, "mix", None))
    }


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks of all stages by name, in their order."""
    return {
        f"{name}.blocks.{number}": block
        for name, stage in stages_of(network).items()
        for number, block in enumerate(stage.blocks)
    }


@contextmanager
def explicit(
    network: nn.Module,
    *,
    gradients: bool = False,
    mean: bool = False,
    alter: Callable[[Look, Tensor], Tensor] | None = None,
    only: Collection[str] | None = None,
    local: bool = False,
) -> Iterator[Pass]:
    """Record the forward pass inside; the hooks are removed at the end, also after an error.

    Args:
        gradients: compute every mixer's output from its recorded weights, so that the output can be
            differentiated by them.
        mean: keep the mean over heads alone, and that of random features in its two factors.
        alter: other weights to compute the mixer's output from, such as those without some keys.
        only: names of the mixers that are recorded; all of them by default.
        local: leave weights window by window where a mixer has them so: most of the whole matrix is zero.
    """
    found = Pass()
    mixers, blocks, stages = mixers_of(network), blocks_of(network), stages_of(network)
    if only is not None:
        mixers = {name: mixer for name, mixer in mixers.items() if name in only}
    entries = {f"{name}.entry": stage.entry for name, stage in stages.items()}
    computed = gradients or alter is not None  # outputs are made from the recorded weights
    homes = {name: next((block for block in blocks if name.startswith(block + ".")), name) for name in mixers}

    def heard(name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if name in entries:
            move = _move(name, module, arguments, output)
            found.events.append(move)
            found.placement = found.placement.after(move.rows, move.columns)
            return None
        if not _placed(arguments):
            return None
        mixer: Any = module
        windowed = local and hasattr(mixer, "local_weights")
        factor: Tensor | None = None
        weights: Tensor
        if mean and not computed and hasattr(mixer, "factors"):
            weights, factor = _factored(*mixer.factors(*arguments))
        else:
            weights = (mixer.local_weights if windowed else mixer.weights)(*arguments)
        mix = mixer.local_mix if windowed else mixer.mix
        if gradients and not weights.requires_grad:
            weights.requires_grad_()
        members = mixer.members(arguments[1], weights.device) if windowed else None
        look = _look(name, homes[name], found, module, arguments, weights, members, factor)
        look.placement = maps.get(look.grid, look.placement)
        if mean and factor is None:
            look.weights = weights.mean(dim=1) if weights.shape[1] > 1 else weights[:, 0]
        found.events.append(look)
        if alter is not None:
            return mix(alter(look, weights), *arguments)
        return mix(weights, *arguments) if gradients else None

    def begin(_module: nn.Module, _arguments: Any) -> None:
        found.events.clear()
        found.placement = PIXELS

    started = network.register_forward_pre_hook(begin)
    try:
        with slid(network) as maps, shared(mixers.values()), listen({**entries, **mixers}, heard):
            yield found
    finally:
        started.remove()


def _placed(arguments: tuple[Any, ...]) -> bool:
    """Whether a mixer was given a map, or tokens with their grid; object queries and what they read have no place."""
    return arguments[0].ndim == 4 or isinstance(arguments[1], Grid)


def chosen(items: list[Item], number: int, what: str) -> Item:
    """One of several by number, from 0, or from the end. Raises ConfigError that says which there are."""
    if not -len(items) <= number < len(items):
        raise ConfigError(f"{what} must be 0 to {len(items) - 1}, or -1 to {-len(items)}; got {number}.")
    return items[number]


@contextmanager
def shared(mixers: Iterable[nn.Module]) -> Iterator[None]:
    """While inside, mixers remember the queries, keys and values of the tokens that they were given last.

    Forward, weights and mix of one mixer ask for the same ones: a quarter of a block's work each time.
    """
    held: list[Any] = [mixer for mixer in mixers if callable(getattr(mixer, "project", None))]
    for mixer in held:
        mixer.project = _remembering(mixer.project)
    try:
        yield
    finally:
        for mixer in held:
            del mixer.project  # the method of its class is there again


def _remembering(project: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    last: list[Any] = [None, None]

    def remembered(tokens: Tensor) -> Any:
        if last[0] is not tokens:
            last[:] = tokens, project(tokens)
        return last[1]

    return remembered


def _factored(
    queries: Float[Tensor, "B H N M"], keys: Float[Tensor, "B H N M"]
) -> tuple[Float[Tensor, "B N F"], Float[Tensor, "B N F"]]:
    """Two factors a head as two factors of the mean over heads: F is all heads' features."""
    return queries.transpose(1, 2).flatten(2) / queries.shape[1], keys.transpose(1, 2).flatten(2)


def _move(name: str, entry: nn.Module, arguments: tuple[Any, ...], output: Any) -> Move:
    (map_before, prefix_before), (map, prefix) = arguments[:2], output
    before, after = Grid(*map_before.shape[2:]), Grid(*map.shape[2:])
    rows, columns = axes(entry, before, after)
    return Move(
        name=name,
        before=before,
        after=after,
        prefix_before=0 if prefix_before is None else prefix_before.shape[1],
        prefix_after=0 if prefix is None else prefix.shape[1],
        rows=rows,
        columns=columns,
    )


def _look(
    name: str,
    block: str,
    found: Pass,
    mixer: nn.Module,
    arguments: tuple[Any, ...],
    weights: Tensor,
    members: Tensor | None,
    factor: Tensor | None,
) -> Look:
    given = arguments[0]
    # A mixer is given a map (non-local), or tokens with their grid.
    grid = Grid(*given.shape[2:]) if given.ndim == 4 else arguments[1]
    prefix = 0 if given.ndim == 4 else given.shape[1] - grid.size
    if factor is not None:
        count = factor.shape[1]
    else:
        count = weights.shape[3] if members is None else members.numel()
    keys = keys_of(mixer, count, grid, prefix)
    if keys is None:
        raise UnsupportedError(
            f"{name} attends to {count} keys from a grid of {grid.rows} x {grid.columns} cells, and"
            " nothing says where they lie: its attention cannot be laid over the picture."
            " gradcam, integrated_gradients and occlusion work without it."
        )
    return Look(
        name=name,
        block=block,
        number=len(found.looks),
        grid=grid,
        prefix=prefix,
        keys=keys,
        placement=found.placement,
        weights=weights,
        members=members,
        factor=factor,
    )


def last_map(network: nn.Module, images: Tensor) -> str:
    """The name of the last part that gives a map with several cells: what a convolutional network's head reads."""
    names: list[str] = []

    def heard(name: str, _module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            names.append(name)

    parts = {name: module for name, module in network.named_modules() if name}
    with evaluation(network), torch.no_grad(), listen(parts, heard):
        network(images[:1])
    if not names:
        raise UnsupportedError(
            "No part of this network gives a map over the image: Grad-CAM has nothing to weigh."
        )
    return names[-1]


@contextmanager
def slid(network: nn.Module) -> Iterator[dict[Grid, Placement]]:
    """Where the cells of maps of each size lie in what comes into a network, filled in by the pass inside.

    The entries of stages say so, and outside stages convolutions and poolings that change the size do, in their
    order. Parts side by side (a shortcut) agree on where the middle of a cell is, so the first of them is heard.
    """
    found: dict[Grid, Placement] = {}
    # A convolution that is computed together with its norm is not called itself.
    sliding = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d | Stem | ConvNorm
    stages = stages_of(network)
    parts: dict[str, nn.Module] = {f"{name}.entry": stage.entry for name, stage in stages.items()}
    for name, part in network.named_modules():
        if isinstance(part, sliding) and not any(name.startswith(f"{stage}.") for stage in stages):
            parts[name] = part

    def heard(_name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        map = output if isinstance(output, Tensor) else output[0]
        before, after = Grid(*arguments[0].shape[2:]), Grid(*map.shape[2:])
        at = found.get(before, PIXELS)
        if after not in found:
            found[after] = at.after(*axes(module, before, after))

    with listen(parts, heard):
        yield found
