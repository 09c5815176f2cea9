"""Another library's network with random weights, its file on disk, and our model of that file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parity_table import Difference, measured
from rebuild import apart
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrail.jobs.models import Cost, cost
from vitrail.models.registry import create_model


def counted(name: str) -> Cost:
    """Parameters and multiply-adds of a variant at its own image size, counted without memory."""
    with torch.device("meta"):
        model = create_model(name)
    return cost(model, model.config.img_size, model.config.in_chans)


def shaken(network: nn.Module) -> nn.Module:
    """The network in evaluation mode with every number moved, so that no zero or one hides a fault."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.add_(torch.rand(buffer.shape, generator=generator))
            elif name.endswith("running_mean"):
                buffer.add_(torch.randn(buffer.shape, generator=generator), alpha=0.1)
    return network.eval()


def difference(
    theirs: nn.Module,
    name: str,
    folder: Path,
    size: tuple[int, int],
    logits: Callable[[Any], Tensor] = lambda output: output,
    **changes: Any,
) -> Difference:
    """How far our logits are from theirs, with their weights read from a file; float32, a batch of two."""
    state = {key: value.contiguous() for key, value in shaken(theirs).state_dict().items()}
    save_file(state, folder / "theirs.safetensors")
    ours = create_model(name, pretrained=folder / "theirs.safetensors", **changes).eval()
    channels = ours.config.in_chans
    images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return measured(apart(ours(images), logits(theirs(images))), ours, theirs, size)
