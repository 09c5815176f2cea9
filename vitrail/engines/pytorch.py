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

    def __call__(self, images: Tensor) -> Tensor:
        """Logits `[B, K]`, float32 on the engine's device, of uint8 images `[B, C, h, w]`."""
        training = self.network.training
        self.network.eval()
        try:
            with torch.no_grad(), self.runtime.autocast():
                batch = normalise(images.to(self.runtime.device), self.card.preprocessing)
                logits: Tensor = self.network(batch)
        finally:
            self.network.train(training)
        return logits.float()
