"""The module that is exported: normalising, network and decoding in one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.data.transforms import constants
from vitrail.errors import ModelError
from vitrail.export.manifest import OUTPUTS
from vitrail.models.model import Model
from vitrail.nn.shapes import BoxOutput, DenseBoxOutput, MaskOutput
from vitrail.weights.card import Card

CLASSES = "image-classification"

SMALL = (128, 128)
"""A picture that every dense network takes."""


class Deployed(nn.Module):
    """A network as it is deployed: uint8 images `[B, C, I, J]` in, what it says of them out (`outputs`).

    Classes: logits and probabilities `[B, K]`. Boxes: logits, boxes and scores `[B, Q, K]` (0..1, without "no
    object"), of a dense detector quality and cells too, of a panoptic one masks. Masks: logits `[B, K, I, J]` and
    classes uint8 `[B, I, J]`. A detector whose pictures keep their shape takes `padding` Bool `[B, I, J]` too, True
    where there is no picture (`inputs`).

    Works on a copy in float32, in evaluation mode. Normalising is folded into the first convolution where that
    is exact (`folded`), else it is a multiplication and an addition.
    """

    factor: Tensor
    summand: Tensor

    def __init__(self, model: Model, *, fold: bool = True) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        self.inputs: tuple[str, ...] = ("images", "padding") if takes_padding(model.card) else ("images",)
        factor, summand = constants(model.card.preprocessing)
        self.register_buffer("factor", torch.tensor(factor)[:, None, None])
        self.register_buffer("summand", torch.tensor(summand)[:, None, None])
        self.folded = len(self.inputs) == 1 and fold and fold_normalisation(self.network, factor, summand)
        self.outputs = OUTPUTS if model.card.task == CLASSES else self._looked_up()

    def forward(self, images: Tensor, padding: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(self._told(images, padding).values())

    def _told(self, images: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        """What the network says of images, by name."""
        pixels = images.to(torch.float32)
        if not self.folded:
            pixels = pixels * self.factor + self.summand
        if padding is None:
            return told(self.network(pixels), self.network.num_classes)
        pixels = pixels.masked_fill(padding[:, None], 0.0)
        return told(self.network(pixels, padding), self.network.num_classes)

    def _looked_up(self) -> tuple[str, ...]:
        """The names of a dense network's outputs, from its answer to a small picture."""
        with torch.no_grad():
            return tuple(self._told(torch.zeros(1, self.network.config.in_chans, *SMALL, dtype=torch.uint8)))


def told(output: Any, classes: int) -> dict[str, Tensor]:
    """A network's answer as tensors by name, with what can be decoded without choosing behind it."""
    if isinstance(output, Tensor):
        return {"logits": output, "probabilities": output.softmax(dim=-1)}
    if isinstance(output, MaskOutput):
        return {"logits": output.logits, "classes": output.logits.argmax(dim=1).to(torch.uint8)}
    if isinstance(output, DenseBoxOutput):
        centre = output.cells[..., :2]
        real = ((centre >= 0) & (centre <= 1)).all(dim=-1, keepdim=True)  # the rest is padding
        scores = (output.logits.sigmoid() * output.quality.sigmoid()[..., None]).sqrt() * real
        return {**output._asdict(), "scores": scores}
    logits: Tensor = output.logits
    scores = logits.sigmoid() if logits.shape[-1] == classes else logits.softmax(dim=-1)[..., :-1]
    found = {"logits": logits, "boxes": output.boxes, "scores": scores}
    return found if output.masks is None else {**found, "masks": output.masks}


def answer_of(found: Mapping[str, Tensor], task: str) -> Any:
    """What a network answered: logits, or the record (nn.shapes) that a file's outputs by name came from."""
    if task == CLASSES:
        return found["logits"]
    if "quality" in found:
        return DenseBoxOutput(*(found[name] for name in DenseBoxOutput._fields))
    if "boxes" in found:
        return BoxOutput(found["logits"], found["boxes"], (), found.get("masks"))
    return MaskOutput(found["logits"])


def takes_padding(card: Card) -> bool:
    """Whether the network is told where pictures end: a detector whose pictures keep their shape."""
    return card.task == "object-detection" and card.preprocessing.crop_mode == "fit"


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
