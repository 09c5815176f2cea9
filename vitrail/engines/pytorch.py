"""The engine that is always there: the network itself, on PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.data.transforms import normalise
from vitrail.models.registry import from_pretrained
from vitrail.runtime import Runtime, choose_device, choose_precision
from vitrail.weights.card import Card


class TorchEngine:
    """A network on its device, in evaluation mode while it computes.

    Args:
        model: a model folder, a run folder (its `model/`), or a classifier that is already built.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto (bf16 where the chip computes in it), fp32, bf16, or fp16 on CUDA.
    """

    def __init__(
        self, model: str | Path | nn.Module, *, device: str = "auto", precision: str = "auto"
    ) -> None:
        place = choose_device(device)
        self.runtime = Runtime(device=place, precision=choose_precision(precision, place))
        network: Any = model if isinstance(model, nn.Module) else from_pretrained(model)
        self.network: Any = network.to(place)
        self.card: Card = network.card
        self.classes = int(network.num_classes)

    def __call__(self, images: Tensor, padding: Tensor | None = None) -> Any:
        """What the network answers, in float32 on the engine's device, to uint8 images `[B, C, h, w]`.

        A classifier answers logits `[B, K]`, a dense model its record (nn.shapes). `padding` is for detectors:
        Bool `[B, h, w]`, True where there is no picture.
        """
        training = self.network.training
        self.network.eval()
        try:
            with torch.no_grad(), self.runtime.autocast():
                place = self.runtime.device
                batch = normalise(images.to(place), self.card.preprocessing, padding=padding)
                output = self.network(batch) if padding is None else self.network(batch, padding.to(place))
        finally:
            self.network.train(training)
        return in_float32(output)


def in_float32(output: Any) -> Any:
    """A tensor, or a named tuple of tensors and tuples of them, in float32."""
    if isinstance(output, Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, tuple):
        parts = [in_float32(part) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    return output
