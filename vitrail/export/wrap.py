"""The module that is exported: normalising, network and decoding in one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.data.transforms import constants
from vitrail.errors import ModelError, UnsupportedError
from vitrail.models.model import Model

OUTPUTS = ("logits", "probabilities")
"""Names of an exported file's outputs."""


class Deployed(nn.Module):
    """A network as it is deployed: uint8 images `[B, C, I, J]` in, logits and probabilities `[B, K]` out.

    Works on a copy in float32, in evaluation mode. Normalising is folded into the first convolution where that
    is exact (`folded`), else it is a multiplication and an addition.
    """

    factor: Tensor
    summand: Tensor

    def __init__(self, model: Model, *, fold: bool = True) -> None:
        super().__init__()
        if model.card.task != "image-classification":
            raise UnsupportedError(
                f"Export takes models that classify whole pictures; {model.name} is for {model.card.task}."
            )
        self.network = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        factor, summand = constants(model.card.preprocessing)
        self.register_buffer("factor", torch.tensor(factor)[:, None, None])
        self.register_buffer("summand", torch.tensor(summand)[:, None, None])
        self.folded = fold and fold_normalisation(self.network, factor, summand)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = images.to(torch.float32)
        if not self.folded:
            pixels = pixels * self.factor + self.summand
        logits: Tensor = self.network(pixels)
        return logits, logits.softmax(dim=-1)


def fold_normalisation(network: Any, factor: list[float], summand: list[float]) -> bool:
    """Rewrite the first convolution so that it takes pixels of 0..255: w' = w · factor, b' = b + Σ w · summand.

    Exact where that convolution alone sees the image and pads nothing (zeros beyond the border would be black
    pixels then, and not mean colour). Elsewhere nothing is changed.

    Returns:
        Whether it was rewritten.
    """
    first = _first_convolution(network)
    if first is None:
        return False
    with torch.no_grad():
        weight = first.weight.double()  # [D, C, k, k]
        bias = weight.new_zeros(len(weight)) if first.bias is None else first.bias.double()
        scale, shift = (
            torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (factor, summand)
        )
        first.bias = nn.Parameter((bias + (weight * shift).sum(dim=(1, 2, 3))).float(), requires_grad=False)
        first.weight = nn.Parameter((weight * scale).float(), requires_grad=False)
    return True


def _first_convolution(network: Any) -> nn.Conv2d | None:
    """The convolution without padding that is the only one to see the image itself, at any size; else None."""
    rows, columns = network.config.img_size
    native = _seers(network, (rows, columns))
    if len(native) != 1 or not isinstance(native[0], nn.Conv2d) or native[0].groups != 1:
        return None
    first = native[0]
    if isinstance(first.padding, str) or any(first.padding):
        return None
    try:
        odd = _seers(network, (rows + 1, columns + 1))  # padding up to a multiple of the patch shows here
    except ModelError:
        return first
    return first if odd == [first] else None


def _seers(network: Any, size: tuple[int, int]) -> list[nn.Module]:
    """The modules without children that are called with the very image (not a padded copy), in turn."""
    image = torch.zeros(1, network.config.in_chans, *size)
    found: list[nn.Module] = []

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0] is image:
            found.append(module)

    with _watched(network, look), torch.no_grad():
        network(image)
    return found


@contextmanager
def _watched(network: nn.Module, look: Any) -> Iterator[None]:
    leaves = [module for module in network.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_pre_hook(look) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
