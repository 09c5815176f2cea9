"""The engine that is always there: the network itself, on PyTorch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.data.transforms import normalise
from vitrail.errors import ConfigError
from vitrail.models.registry import from_pretrained
from vitrail.runtime import Runtime, choose_device, choose_precision
from vitrail.weights.card import Card

logger = logging.getLogger(__name__)


class TorchEngine:
    """A network on its device, in evaluation mode while it computes.

    Args:
        model: a model folder, a run folder (its `model/`), or a classifier that is already built.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto (bf16 where the chip computes in it), fp32, bf16, or fp16 on CUDA.
        compile: run the network through torch.compile. Batches are then filled up to a few sizes, so that it
            compiles a few times and not at every odd batch.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        device: str = "auto",
        precision: str = "auto",
        compile: bool = False,
    ) -> None:
        place = choose_device(device)
        self.runtime = Runtime(device=place, precision=choose_precision(precision, place))
        network: Any = model if isinstance(model, nn.Module) else from_pretrained(model)
        _check_dtypes(network, self.runtime.precision)
        self.network: Any = network.to(place)
        self.card: Card = network.card
        self.classes = int(network.num_classes)
        self.name, self.precision = "compiled" if compile else "torch", str(self.runtime.precision)
        self.compiled: Any = torch.compile(self.network, dynamic=False) if compile else None

    def __call__(self, images: Tensor, padding: Tensor | None = None) -> Any:
        """What the network answers, in float32 on the engine's device, to uint8 images `[B, C, h, w]`.

        A classifier answers logits `[B, K]`, a dense model its record (nn.shapes). `padding` is for detectors:
        Bool `[B, h, w]`, True where there is no picture.
        """
        training = self.network.training
        # Else nothing is touched: several threads may compute at once.
        changed = any(part.training for part in self.network.modules())
        if changed:
            self.network.eval()
        try:
            with torch.no_grad(), self.runtime.autocast():
                place = self.runtime.device
                batch = normalise(images.to(place), self.card.preprocessing, padding=padding)
                if padding is not None:
                    output = self.network(batch, padding.to(place))
                elif self.compiled is not None:
                    output = cut(self._compiled(fill(batch)), len(batch))
                else:
                    output = self.network(batch)
        finally:
            if changed:
                self.network.train(training)
        return in_float32(output)

    def _compiled(self, batch: Tensor) -> Any:
        """Through the compiled network; where compiling fails, the plain one takes over for good."""
        try:
            return self.compiled(batch)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            logger.warning("engine compiled cannot be used (%s); torch does the work", reason)
            self.compiled, self.name = self.network, "torch"
            return self.network(batch)


def _check_dtypes(network: nn.Module, precision: str) -> None:
    """Raise ConfigError for a network whose weights the precision cannot compute with."""
    legal = {torch.float32, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)}
    others = {weight.dtype for weight in network.parameters() if weight.is_floating_point()} - legal
    if others:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        raise ConfigError(
            f"The network's weights are {names}, and {precision} is computed from float32: call .float() on it first."
        )


def fill(batch: Tensor) -> Tensor:
    """The batch with its last picture repeated up to the next power of two."""
    missing = (1 << (len(batch) - 1).bit_length()) - len(batch)
    return torch.cat([batch, batch[-1:].expand(missing, -1, -1, -1)]) if missing > 0 else batch


def cut(output: Any, count: int) -> Any:
    """The first rows of a tensor, or of a named tuple of tensors and tuples of them."""
    if isinstance(output, Tensor):
        return output[:count]
    if isinstance(output, tuple):
        parts = [cut(part, count) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    return output


def in_float32(output: Any) -> Any:
    """A tensor, or a named tuple of tensors and tuples of them, in float32."""
    if isinstance(output, Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, tuple):
        parts = [in_float32(part) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    return output
