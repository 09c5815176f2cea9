"""Steps whose numbers are not finite: left out, counted, and explained when they do not end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import TrainingError
from vitrail.runtime import Runtime
from vitrail.train.pace import Pace
from vitrail.train.state import Place


def refuse(
    place: Place, pace: Pace, runtime: Runtime, network: nn.Module, images: Tensor, norm: float, rate: float
) -> None:
    """Counts a step that is left out; TrainingError when it keeps happening, naming the layer at fault."""
    place.skipped += 1
    place.skipped_in_a_row += 1
    # A scaler finds its scale by overflowing: that is no fault until the scale has become tiny.
    patience = pace.bad_steps if runtime.scaler is None else pace.bad_steps + 30
    if place.skipped_in_a_row < patience:
        return
    layer = first_overflow(network, images, runtime)
    raise TrainingError(
        f"Loss or gradients were not finite in {place.skipped_in_a_row} steps in a row up to step"
        f" {place.step + 1} (gradient norm {norm:g}, learning rate {rate:g}); {layer}."
        " The last checkpoint is from before. Lower --lr, set --clip-grad 1, lengthen --warmup-epochs, or use"
        " --precision fp32."
    )


@torch.no_grad()
def first_overflow(network: nn.Module, images: Tensor, runtime: Runtime) -> str:
    """Which layer's output is the first that is not finite, in words."""
    if not bool(torch.isfinite(images).all()):
        return "the images already hold values that are not finite"
    found: list[str] = []
    hooks = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return look

    for name, module in network.named_modules():
        if not any(True for _ in module.children()):
            hooks.append(module.register_forward_hook(watch(name)))
    try:
        with runtime.autocast():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return f"the first layer with such an output is {found[0]}" if found else "every layer's output is finite"
