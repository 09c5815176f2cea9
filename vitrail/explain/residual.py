"""Residual networks in a trace: a stem and blocks that hand on maps, where other networks hand on tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vitrail.explain.capture import BlockRecord, EntryRecord, MixerRecord, Recording, listen
from vitrail.nn.gates import NonLocal, SqueezeExcite
from vitrail.nn.resnet import ResidualBlock, ResidualStage, Stem
from vitrail.nn.shapes import Grid
from vitrail.nn.trunk import join


def is_residual(network: nn.Module) -> bool:
    """Whether a network is made of residual blocks (`nn.resnet`)."""
    return any(isinstance(module, ResidualStage) for module in network.modules())


@contextmanager
def capture_maps(network: nn.Module) -> Iterator[Recording]:
    """Record stem and blocks of one forward pass, as `capture` does it; cells take the place of tokens."""
    recording = Recording()
    modules: dict[str, nn.Module] = {}
    places: dict[str, tuple[int, int]] = {}  # name of a block -> stage, number
    stages = [(name, module) for name, module in network.named_modules() if isinstance(module, ResidualStage)]
    for number, (name, stage) in enumerate(stages):
        for block, module in enumerate(stage.blocks):
            modules[f"{name}.blocks.{block}"], places[f"{name}.blocks.{block}"] = module, (number, block)
    for name, module in network.named_modules():
        # The sum of the other forms' weights is no share of anything.
        attends = isinstance(module, NonLocal) and module.form in ("gaussian", "embedded")
        if attends or isinstance(module, Stem):
            modules[name] = module
    mixers: list[MixerRecord] = []  # of the block that is running

    def heard(name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, NonLocal):
            mixers.append(MixerRecord(module=module, arguments=arguments))
        elif isinstance(module, Stem):
            recording.entries.append(_stem_record(module, arguments[0], output))
        else:
            stage, number = places[name]
            recording.blocks.append(
                BlockRecord(
                    stage=stage,
                    number=number,
                    name=name,
                    grid=Grid(output.shape[2], output.shape[3]),
                    tokens=join(output, None),
                    mixers=tuple(mixers),
                    module=module,
                )
            )
            mixers.clear()

    with listen(modules, heard):
        yield recording


def _stem_record(stem: Stem, before: Tensor, map: Tensor) -> EntryRecord:
    return EntryRecord(
        stage=0, name="stem", module=stem, map_before=before, prefix_before=None, map=map, prefix=None
    )


def stem_words(stem: Stem) -> str:
    """What a stem is made of: `7 × 7 convolution of stride 2, 3 × 3 maximum of stride 2`."""
    words = []
    for layer in stem.layers:
        conv: Any = layer.conv
        stride = f" of stride {conv.stride[0]}" if conv.stride[0] > 1 else ""
        words.append(f"{conv.kernel_size[0]} × {conv.kernel_size[1]} convolution{stride}")
    if stem.pool is not None:
        words.append("3 × 3 maximum of stride 2")
    return ", ".join(words)


def block_words(block: ResidualBlock) -> str:
    """What a block is made of: `1 × 1, 3 × 3, 1 × 1 convolutions + shortcut`, and the gates in it."""
    layers: Any = block.layers
    kernels = [layer.conv.kernel_size for layer in layers]
    words = ", ".join(f"{rows} × {columns}" for rows, columns in kernels) + " convolutions"
    if isinstance(block.gate, SqueezeExcite):
        words += ", squeeze-and-excitation"
    words += " + shortcut"
    return words + (", then non-local" if isinstance(block.after, NonLocal) else "")
