"""What channel gates say: where the channels are strong that squeeze-and-excitation lets through.

A gate has one factor a channel for the whole image, and so no map of its own. What can be shown is what it does to
the map that it scales.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.explain.attention import chosen, slid
from vitrail.explain.capture import listen
from vitrail.explain.heat import Heat
from vitrail.explain.places import PIXELS
from vitrail.explain.still import held_still
from vitrail.nn.gates import SqueezeExcite
from vitrail.nn.shapes import Grid


def gates_of(network: nn.Module) -> dict[str, nn.Module]:
    """The channel gates of a network, by name, in their order."""
    return {name: module for name, module in network.named_modules() if isinstance(module, SqueezeExcite)}


def gated(network: nn.Module, images: Float[Tensor, "B C I J"], layer: int | None = None) -> Heat:
    """The strength of a gate's output at every place; `layer` counts gates, by default the last."""
    name = chosen(list(gates_of(network)), -1 if layer is None else layer, "layer")
    kept: list[Tensor] = []

    def heard(_name: str, _module: nn.Module, _arguments: tuple[Any, ...], output: Tensor) -> None:
        kept.append(output)

    with held_still(network), torch.no_grad(), slid(network) as maps:
        with listen({name: network.get_submodule(name)}, heard):
            network(images)
    map = kept[0].float()  # [B, C, h, w]
    return Heat(
        values=map.square().mean(dim=1).sqrt().cpu(),
        placement=maps.get(Grid(map.shape[2], map.shape[3]), PIXELS),
        units="root mean square of the gated channels",
        where=name,
    )
