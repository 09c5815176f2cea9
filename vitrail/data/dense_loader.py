"""Batches of pictures with boxes or masks: the same order, seeds and resume as data.loader, other targets.

Pictures of different sizes are padded at the bottom and the right to the largest of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vitrail.data.boxes import PictureBoxes
from vitrail.data.image import decode
from vitrail.data.joint import BoxLabels, JointTransform
from vitrail.data.loader import FILLER, Batch, Builder
from vitrail.data.masks import IGNORED
from vitrail.data.transforms import colour
from vitrail.errors import ImageError
from vitrail.weights.card import Preprocessing

MOST_PIXELS = 8 * 2**20
"""Pixels in one batch where no gradient is kept: a ResNet-50 takes 250 bytes of memory for each of them."""

Item = TypeVar("Item")


class Several(Generic[Item]):
    """One target for each picture, of any sizes: BoxLabels, or masks at the pictures' own sizes."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = tuple(items)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __getitem__(self, place: int) -> Item:
        return self.items[place]

    def to(self, device: torch.device) -> Several[Any]:
        """The same targets on a device."""
        return Several([item.to(device) for item in self.items])  # type: ignore[attr-defined]


class DenseBatch(NamedTuple):
    """Pictures ready for the device, uint8 `[B, C, h, w]`, and what is known of them."""

    images: Tensor
    targets: Any
    """Boxes: Several BoxLabels. Masks: int64 `[B, h, w]` in training, Several uint8 `[H, W]` in evaluation."""
    indices: Tensor
    padding: Tensor | None
    """Bool `[B, h, w]`, True where there is no picture; None where all is picture."""


class DenseBuilder(Builder):
    """Builds batches from a source with `target(index)` and a joint transform (data.joint)."""

    transform: JointTransform

    def picture(self, index: int, seed: int) -> Any:
        """One picture as the network gets it, with its target. Raises ImageError."""
        source: Any = self.source
        name = source.name(index)
        image, target = decode(source.read(index), name, self.limits), source.target(index)
        check_size(name, (int(image.shape[1]), int(image.shape[2])), target)
        return self.transform(image, target, seed, index)

    @property
    def blank(self) -> Tensor:
        """A black input of about the network's size."""
        return torch.zeros_like(self.transform.reference(torch.zeros(3, 32, 32, dtype=torch.uint8)))

    def _batch(self, rows: list[Any], indices: list[int]) -> Batch:
        if not rows:  # only keeps the processes in step
            filler: Any = DenseBatch(self.blank[None], Several([]), torch.tensor([FILLER]), None)
            return filler
        images, targets = [row[0] for row in rows], [row[1] for row in rows]
        padded, padding = pad_together(images, colour(self.transform.reference.preprocessing))
        batch: Any = DenseBatch(padded, self._together(targets, padded), torch.tensor(indices), padding)
        return batch

    def _together(self, targets: list[Any], images: Tensor) -> Any:
        if isinstance(targets[0], BoxLabels) or self.transform.own_size:
            return Several(targets)
        masks = torch.full((len(targets), *images.shape[2:]), IGNORED, dtype=torch.int64)
        for mask, own in zip(masks, targets, strict=True):
            mask[: own.shape[0], : own.shape[1]] = own
        return masks  # [B, h, w]


def check_size(name: str, size: tuple[int, int], target: Any) -> None:
    """Raises ImageError where boxes or a mask were made for a picture of another height and width."""
    told = tuple(target.size) if isinstance(target, PictureBoxes) else target.shape
    if any(told) and size != tuple(told):
        turned = (
            " (A picture that its camera turned is annotated unturned?)" if size == tuple(told)[::-1] else ""
        )
        raise ImageError(
            f"{name}: the picture has {size[0]}×{size[1]} pixels, its annotation {told[0]}×{told[1]}.{turned}"
        )


def capped_batch_size(most: int, preprocessing: Preprocessing) -> int:
    """How many pictures go through a dense network together: `most`, but no more than have `MOST_PIXELS`; one at
    least."""
    rows, columns = preprocessing.input_size
    return max(1, min(most, MOST_PIXELS // (rows * columns)))


def pad_together(images: Sequence[Tensor], fill: Tensor) -> tuple[Tensor, Tensor | None]:
    """A batch `[B, C, h, w]` of uint8 images `[C, _, _]`, and where it is padded `[B, h, w]`, None if nowhere."""
    sizes = np.array([image.shape[1:] for image in images])
    rows, columns = sizes.max(axis=0).tolist()
    if (sizes == (rows, columns)).all():
        return torch.stack(list(images)), None
    channels = images[0].shape[0]
    batch = fill[:channels, None, None].expand(len(images), channels, rows, columns).clone()
    padding = torch.ones(len(images), rows, columns, dtype=torch.bool)
    for place, image in enumerate(images):
        batch[place, :, : image.shape[1], : image.shape[2]] = image
        padding[place, : image.shape[1], : image.shape[2]] = False
    return batch, padding
