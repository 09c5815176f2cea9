"""What gradients say: Grad-CAM on tokens or maps, and integrated gradients on pixels.

gradcam                Selvaraju et al. 2017 (1610.02391), equations 1 and 2: channels of a layer, weighted by the
                       mean of their gradient, summed, and cut at 0.
integrated_gradients   Sundararajan et al. 2017 (1703.01365), equation 1, by the midpoint rule: the values of all
                       pixels and channels sum to f(image) - f(baseline).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.explain.attention import blocks_of, chosen, explicit, last_map, slid
from vitrail.explain.capture import stages_of
from vitrail.explain.heat import Heat
from vitrail.explain.places import PIXELS, Placement
from vitrail.explain.rollout import reads_prefix
from vitrail.explain.still import held_still
from vitrail.nn.shapes import Grid
from vitrail.nn.trunk import split


def scores(network: nn.Module, images: Tensor, targets: Sequence[int] | Tensor) -> Float[Tensor, " B"]:
    """The logits of one class an image."""
    logits: Tensor = network(images)
    return logits.gather(1, torch.as_tensor(targets, device=logits.device)[:, None])[:, 0]


@dataclass(kw_only=True)
class Tap:
    """A place in a network where a map, or tokens over a grid, come by."""

    module: nn.Module
    name: str
    before: bool = False
    """Whether what goes into the module is meant, instead of what comes out."""
    values: Tensor | None = None
    """What came by, as a leaf that gradients are taken by: a map, or tokens."""
    grid: Grid | None = None
    placement: Placement = PIXELS

    @property
    def leaf(self) -> Tensor:
        """What came by; the pass must have run."""
        assert self.values is not None
        return self.values

    def map(self, values: Tensor) -> Float[Tensor, "B C h w"]:
        """Values of the tap's shape as a map, without the prefix."""
        if values.ndim == 4 or self.grid is None:
            return values
        return split(values, self.grid)[0]

    def heard(self, _module: nn.Module, arguments: tuple[Any, ...], output: Any = None) -> Any:
        """The hook: before or after the module."""
        given = arguments if self.before else output
        values = given if isinstance(given, Tensor) else given[0]
        self.values = values.detach().requires_grad_()
        self.grid = (
            given[1]
            if isinstance(given, tuple)
            else arguments[1]
            if values.ndim == 3
            else Grid(*values.shape[2:])
        )
        return self.values if isinstance(given, Tensor) else (self.values, *given[1:])


def gradcam(
    network: nn.Module,
    images: Float[Tensor, "B C I J"],
    targets: Sequence[int] | Tensor,
    layer: int | None = None,
) -> Heat:
    """Grad-CAM at the last place where the image's cells still act on the class, or after the block `layer`.

    Where the head reads prefix tokens, nothing depends on the cells after the last block; they are taken as its
    mixer reads them, after the norm. Where the head averages the cells, they are taken as it reads them.
    """
    tap = _tap(network, images, layer)
    with held_still(network), torch.enable_grad(), tapped(network, tap):
        score = scores(network, images, targets).sum()
        (gradient,) = torch.autograd.grad(score, [tap.leaf])
    weights = tap.map(gradient).mean(dim=(2, 3), keepdim=True)
    return Heat(
        values=(weights * tap.map(tap.leaf.detach())).sum(dim=1).clamp_min(0).float().cpu(),
        placement=tap.placement,
        units="channels weighted by their gradient, cut at 0",
        where=f"{'before' if tap.before else 'after'} {tap.name}",
    )


def _tap(network: nn.Module, images: Tensor, layer: int | None) -> Tap:
    """Where Grad-CAM looks."""
    stages, blocks = stages_of(network), blocks_of(network)
    if not stages and layer is not None:
        raise ConfigError(
            "gradcam takes a layer of transformer blocks; this network has none: leave the layer out."
        )
    if not stages:
        name = last_map(network, images)
        return Tap(module=network.get_submodule(name), name=name)
    names = list(blocks)
    on_prefix = reads_prefix(network)
    if layer is None and not on_prefix:
        name = list(stages)[-1]
        return Tap(module=stages[name], name=name)
    if layer is None:
        mixer = getattr(blocks[names[-1]], "mixer", blocks[names[-1]])
        return Tap(module=mixer, name=names[-1], before=True)
    name = chosen(names, layer, "layer")
    if on_prefix and name == names[-1]:
        raise ConfigError(
            f"After {name} the class no longer depends on the image's cells: take layer 0 to {len(names) - 2}."
        )
    return Tap(module=blocks[name], name=name)


@contextmanager
def tapped(network: nn.Module, tap: Tap) -> Iterator[Tap]:
    """While inside, the tap keeps what comes by; everything before it is computed without a graph."""
    with explicit(network, only=()) as found, slid(network) as maps:

        def heard(*given: Any) -> Any:
            out = tap.heard(*given)
            tap.placement = found.placement
            if not found.moves and tap.values is not None:
                tap.placement = maps.get(Grid(*tap.values.shape[2:]), PIXELS)
            return out

        register = tap.module.register_forward_pre_hook if tap.before else tap.module.register_forward_hook
        handle = register(heard)
        try:
            yield tap
        finally:
            handle.remove()


def integrated_gradients(
    network: nn.Module,
    images: Float[Tensor, "B C I J"],
    targets: Sequence[int] | Tensor,
    *,
    steps: int = 64,
    baseline: Tensor | None = None,
    chunk: int = 32,
) -> Heat:
    """Integrated gradients of a class's logit from a baseline (0: the mean colour), summed over channels.

    `chunk` images go through the network together.
    """
    base = torch.zeros_like(images[:1]) if baseline is None else baseline
    total = torch.zeros_like(images)
    shares = (torch.arange(steps, device=images.device) + 0.5) / steps
    wanted = torch.as_tensor(targets, device=images.device)
    with held_still(network):
        points = [(image, share) for image in range(images.shape[0]) for share in range(steps)]
        for first in range(0, len(points), chunk):
            numbers = torch.tensor(
                [image for image, _ in points[first : first + chunk]], device=images.device
            )
            places = shares[[share for _, share in points[first : first + chunk]]][:, None, None, None]
            between = base + (images[numbers] - base) * places
            gradient = input_gradient(network, between, wanted[numbers])
            total.index_add_(0, numbers, gradient)
    return Heat(
        values=((images - base) * total / steps).sum(dim=1).float().cpu(),
        placement=PIXELS,
        units="share of the change of the class's logit from the mean colour",
        where=f"pixels, {steps} steps",
    )


def input_gradient(network: nn.Module, images: Tensor, targets: Sequence[int] | Tensor) -> Tensor:
    """The gradient of one class's logit an image by its pixels, [B, C, I, J]."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(scores(network, leaf, targets).sum(), [leaf])
    return gradient
