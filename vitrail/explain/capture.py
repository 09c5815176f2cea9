"""Record what a network computes, by forward hooks that are gone afterwards.

The fast path stays as it is: nothing is recorded unless asked, attention weights are computed afterwards from
what the mixer was given (`mixer.weights`), and a network leaves the recording with the hooks, flags and mode
that it came with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.explain.places import keys_of
from vitrail.nn.entry import Chain
from vitrail.nn.shapes import Grid
from vitrail.nn.trunk import Stage

Heard = Callable[[str, nn.Module, tuple[Any, ...], Any], Any]


@contextmanager
def listen(modules: Mapping[str, nn.Module], heard: Heard) -> Iterator[None]:
    """While inside, call `heard(name, module, arguments, output)` after each of the modules has run.

    What `heard` returns takes the output's place, unless it is None: a mixer's output can so be computed
    again from weights that keep their gradient. Hooks are removed at the end, also after an error.
    """
    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(_hook(name, heard)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, heard: Heard) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    return lambda module, arguments, output: heard(name, module, arguments, output)


@contextmanager
def evaluation(network: nn.Module) -> Iterator[None]:
    """Evaluation mode while inside; afterwards every module is in the mode that it came with."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@dataclass(kw_only=True)
class EntryRecord:
    """One entry of a stage (patches, positions, [CLS], merging ...), with what came in and what went out."""

    stage: int
    name: str
    """Name within the stage's chain, or `entry` where it stands alone."""
    module: nn.Module
    map_before: Tensor
    prefix_before: Tensor | None
    map: Tensor
    prefix: Tensor | None

    @property
    def grid(self) -> Grid:
        """Rows and columns after the entry."""
        return Grid(self.map.shape[2], self.map.shape[3])


@dataclass(kw_only=True)
class MixerRecord:
    """One mixer, and what it was given."""

    module: nn.Module
    arguments: tuple[Any, ...]
    """Tokens and grid, as its forward takes them."""

    def weights(self) -> Float[Tensor, "B H N M"]:
        """Attention of queries to keys, rows summing to one, computed now.

        There may be fewer queries than tokens (class attention), and fewer keys (spatial reduction);
        `places.keys_of` says where the keys lie.
        """
        mixer: Any = self.module
        weights: Tensor = mixer.weights(*self.arguments)
        return weights


@dataclass(kw_only=True)
class BlockRecord:
    """One block: its tokens afterwards, and what its mixers were given."""

    stage: int
    number: int
    """Counted from 0 within the stage."""
    name: str
    """The module's name within the network."""
    grid: Grid
    tokens: Tensor
    """[B, N, D] after the block, prefix first."""
    mixers: tuple[MixerRecord, ...] = ()
    """Those whose weights can be written down; more than one where they stand side by side."""
    module: nn.Module | None = None
    """The block itself, where it hands on a map."""

    @property
    def prefix(self) -> int:
        """Tokens that stand before the grid's."""
        return self.tokens.shape[1] - self.grid.size


@dataclass(kw_only=True)
class Recording:
    """What was recorded of one forward pass, in the order in which it was computed."""

    entries: list[EntryRecord] = field(default_factory=list)
    blocks: list[BlockRecord] = field(default_factory=list)
    output: Any = None
    """What the network answered."""

    @property
    def stages(self) -> int:
        numbers = [entry.stage for entry in self.entries] + [block.stage for block in self.blocks]
        return 1 + max(numbers, default=-1)


def stages_of(network: nn.Module) -> dict[str, Stage]:
    """The stages of a network's trunk by module name, in their order; empty for networks that have none."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Stage)}


@contextmanager
def capture(network: nn.Module) -> Iterator[Recording]:
    """Record entries and blocks of the forward pass inside; a second pass replaces the first one's record.

    Works for any network that holds stages (`nn.trunk`), whatever the mixers are. Tensors are kept as the
    network made them, with their graph where gradients are on; run it under `torch.no_grad()` when only
    values are wanted.
    """
    recording = Recording()
    places: dict[str, tuple[str, int, int]] = {}  # module name -> what it is, stage, number
    modules: dict[str, nn.Module] = {}
    for number, (name, stage) in enumerate(stages_of(network).items()):
        chained = isinstance(stage.entry, Chain)
        entries = list(stage.entry.named_children()) if chained else [("entry", stage.entry)]
        for inner, entry in entries:
            modules[f"{name}.entry.{inner}"], places[f"{name}.entry.{inner}"] = entry, ("entry", number, 0)
        for block, module in enumerate(stage.blocks):
            modules[f"{name}.blocks.{block}"], places[f"{name}.blocks.{block}"] = (
                module,
                ("block", number, block),
            )
            for inner, mixer in module.named_modules():
                if hasattr(mixer, "weights") and hasattr(mixer, "mix"):
                    modules[f"{name}.blocks.{block}.{inner}"] = mixer
                    places[f"{name}.blocks.{block}.{inner}"] = ("mixer", number, block)
    mixers: list[MixerRecord] = []  # of the block that is running

    def heard(name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        kind, stage, number = places[name]
        if kind == "mixer":
            mixers.append(MixerRecord(module=module, arguments=arguments))
        elif kind == "entry":
            recording.entries.append(_entry_record(stage, name.rpartition(".")[2], module, arguments, output))
        else:
            recording.blocks.append(
                BlockRecord(
                    stage=stage,
                    number=number,
                    name=name,
                    grid=arguments[1],
                    tokens=output,
                    mixers=tuple(mixers),
                )
            )
            mixers.clear()

    def begin(_module: nn.Module, _arguments: Any) -> None:
        recording.entries.clear()
        recording.blocks.clear()
        mixers.clear()

    def end(_module: nn.Module, _arguments: Any, output: Any) -> None:
        recording.output = output

    outer = [network.register_forward_pre_hook(begin), network.register_forward_hook(end)]
    try:
        with listen(modules, heard):
            yield recording
    finally:
        for handle in outer:
            handle.remove()


def _entry_record(
    stage: int, name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any
) -> EntryRecord:
    return EntryRecord(
        stage=stage,
        name=name,
        module=module,
        map_before=arguments[0],
        prefix_before=arguments[1],
        map=output[0],
        prefix=output[1],
    )


@dataclass(kw_only=True)
class Gaze:
    """Where a block looks, or where it answers most strongly, over its grid."""

    maps: Float[Tensor, "H h w"]
    """Share of each head's attention that each cell gets; a key made of several cells is shared out over them."""
    elsewhere: Float[Tensor, " H"]
    """Share of each head's attention that goes to prefix tokens, or to the padding of windows."""
    token: bool
    """Whether it is the attention of the first prefix token ([CLS]); if not, the mean over all queries."""
    kind: Literal["attention", "strength"] = "attention"
    """strength is the root mean square over channels, as a share of the whole map: convolutions do not look."""


def gaze(record: BlockRecord) -> Gaze | None:
    """The attention of [CLS] (the first prefix token) to the picture in one block, for the first image.

    Without prefix tokens it is the mean over all queries: how much each place is looked at. Heads of mixers side
    by side follow each other. None where no mixer has weights, or their keys cannot be laid out over the grid.
    """
    found = [maps for mixer in record.mixers if (maps := _maps(mixer, record)) is not None]
    if not found:
        return None
    maps = torch.cat(found)  # [H, h, w]
    elsewhere = (1 - maps.sum(dim=(1, 2))).clamp(min=0)
    return Gaze(maps=maps, elsewhere=elsewhere, token=record.prefix > 0)


def strength(record: BlockRecord) -> Gaze:
    """How strongly a block answers at each place, for the first image, where there is no attention to show."""
    cells = record.tokens[0, record.prefix :].detach().float().cpu()
    values = cells.square().mean(dim=1).sqrt().unflatten(0, tuple(record.grid))  # [h, w]
    maps = (values / values.sum().clamp_min(1e-12))[None]
    return Gaze(maps=maps, elsewhere=torch.zeros(1), token=False, kind="strength")


def _maps(mixer: MixerRecord, record: BlockRecord) -> Float[Tensor, "H h w"] | None:
    with torch.no_grad():
        weights = mixer.weights()[0].detach().float().cpu()  # [H, N, M]
    keys = keys_of(mixer.module, weights.shape[2], record.grid, record.prefix)
    if keys is None:
        return None
    row = weights[:, 0] if record.prefix else weights.mean(dim=1)  # [H, M]
    cells = row[:, keys.prefix :].unflatten(1, tuple(keys.grid))  # [H, m, n]
    maps: Tensor = keys.rows.t() @ cells @ keys.columns  # [H, h, w]
    return maps
