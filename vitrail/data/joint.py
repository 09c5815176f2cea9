"""What is done to a picture together with its boxes or its mask, through torchvision's v2 transforms.

Large-scale jitter (Ghiasi et al. 2021, 2012.07177): the picture is scaled by a random factor; what then is larger
than the network's input is cropped, what is smaller is laid on the mean colour. Then a flip and a change of
colours. Every choice follows from the seed of the sample, never from the worker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vitrail.data.augment import seeded
from vitrail.data.boxes import PictureBoxes
from vitrail.data.masks import IGNORED
from vitrail.data.transforms import Preprocess, colour, luma, resize
from vitrail.errors import ConfigError
from vitrail.weights.card import Preprocessing

LEFT_OVER = 0.1
"""Share of a box that must still be seen after the crop; a sliver names nothing."""


class BoxLabels(NamedTuple):
    """What a detector learns of one picture, or is scored against."""

    boxes: Tensor
    """Float32 `[n, 4]`: centre x, centre y, width, height in 0..1 of the network's input without padding."""
    labels: Tensor
    """Int64 `[n]`."""
    size: tuple[int, int]
    """Height and width of the original picture."""
    crowd: Tensor
    """Bool `[n]`; never set in training, where crowds are left out."""
    area: Tensor
    """Float32 `[n]`, in pixels of the original picture."""
    index: int  # type: ignore[assignment]  # a field of this name hides the tuple's method
    """The picture's place in its source."""

    def __reduce__(self) -> tuple[Any, ...]:
        # As arrays: a worker hands every tensor over in shared memory of its own, and a few batches of boxes
        # would use up the files that a process may open.
        arrays = {name: value.numpy() for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return _unpacked, (self.size, self.index, arrays)

    def to(self, device: torch.device) -> BoxLabels:
        return self._replace(**{
            name: getattr(self, name).to(device) for name in ("boxes", "labels", "crowd", "area")
        })  # fmt: skip


def _unpacked(size: tuple[int, int], index: int, arrays: dict[str, Any]) -> BoxLabels:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return BoxLabels(size=size, index=index, **tensors)


class JointTransform(Protocol):
    """What a dense loader needs: `DenseTransform` or `DenseTrainTransform`."""

    reference: Preprocess
    own_size: bool

    def __call__(self, image: Tensor, target: Any, seed: int, index: int) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True, kw_only=True)
class JointAugmentation:
    """What is done to training pictures with boxes or masks."""

    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest factor of large-scale jitter; 1, 1 leaves the size alone."""

    hflip: float = 0.5
    """Probability of a left-right flip."""

    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""

    def __post_init__(self) -> None:
        if not 0.05 <= self.scale[0] <= self.scale[1] <= 20:
            raise ConfigError(
                f"scale of boxes and masks must be two factors, 0.05 <= low <= high <= 20; got {self.scale}."
            )
        if not 0 <= self.hflip <= 1:
            raise ConfigError(f"hflip is a probability in 0..1, got {self.hflip}.")
        if not 0 <= self.color_jitter <= 1:
            raise ConfigError(f"color_jitter must lie in 0..1, got {self.color_jitter}.")


class DenseTransform:
    """As a model is used: the reference preprocessing, boxes and masks of the original picture.

    Raises ConfigError for a preprocessing that cuts some of the picture off, since what lies there could not
    be found again.
    """

    own_size = True
    """Targets are those of the original picture."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.reference = whole_picture(preprocessing)

    def __call__(self, image: Tensor, target: Any, seed: int, index: int) -> tuple[Tensor, Any]:
        """The network's input uint8 `[C, h, w]` and the target: BoxLabels, or a mask uint8 `[H, W]`."""
        size = (int(image.shape[1]), int(image.shape[2]))
        if isinstance(target, PictureBoxes):
            boxes = torch.from_numpy(target.boxes.copy())
            return self.reference(image), box_labels(boxes, target, size, size, index)
        return self.reference(image), torch.from_numpy(target)


class DenseTrainTransform:
    """Uint8 `[3, H, W]` with boxes or a mask, and a seed, to the network's input with its target.

    Masks come at the input's size. Equal seeds give equal results, on every worker and in every process.
    """

    own_size = False
    """Targets are those of the changed picture."""

    def __init__(self, preprocessing: Preprocessing, augmentation: JointAugmentation | None = None) -> None:
        self.reference = whole_picture(preprocessing)
        self.preprocessing = preprocessing
        self.augmentation = augmentation or JointAugmentation()

    def __call__(self, image: Tensor, target: Any, seed: int, index: int) -> tuple[Tensor, Any]:
        """The network's input uint8 `[C, h, w]` and the target: BoxLabels, or a mask uint8 `[h, w]`."""
        with seeded(seed):
            return self._changed(image, target, index)

    def _changed(self, image: Tensor, target: Any, index: int) -> tuple[Tensor, Any]:
        from torchvision import tv_tensors

        record, height, width = self.augmentation, image.shape[1], image.shape[2]
        original = (int(height), int(width))
        rows, columns = self.reference.plan(*original).size
        place = draw_place(original, (rows, columns), record.scale)
        flipped = bool(torch.rand(()) < record.hflip)
        image = resize(place.cut(image), place.size, self.preprocessing.interpolation)
        image = place.laid(image, (rows, columns), colour(self.preprocessing)[: image.shape[0], None, None])
        image = image.flip(-1) if flipped else image
        if record.color_jitter:
            image = _jitter(record.color_jitter)(image)
        if self.preprocessing.in_chans == 1:
            image = luma(image)
        image = image.contiguous()
        if isinstance(target, PictureBoxes):
            own = tv_tensors.BoundingBoxes(
                torch.from_numpy(target.boxes.copy()), format="XYXY", canvas_size=original
            )
            boxes = _moved_boxes(own, place, (rows, columns), flipped)
            kept = _still_seen(torch.from_numpy(target.boxes), boxes, place) & ~torch.from_numpy(target.crowd)
            return image, box_labels(boxes[kept], target, (rows, columns), original, index, kept)
        mask = resize(place.cut(torch.from_numpy(target)[None]), place.size, "nearest")
        mask = place.laid(mask, (rows, columns), torch.tensor(IGNORED, dtype=torch.uint8))[0]
        return image, (mask.flip(-1) if flipped else mask).contiguous()


class Place(NamedTuple):
    """The window of a picture that is seen, the size that it gets, and where it is laid on the input."""

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]
    corner: tuple[int, int]

    def cut(self, image: Tensor) -> Tensor:
        """The window `[C, height, width]` of an image."""
        return image[:, self.top : self.top + self.height, self.left : self.left + self.width]

    def laid(self, image: Tensor, size: tuple[int, int], fill: Tensor) -> Tensor:
        """`[C, *size]` with the image at its corner, and `fill` around it."""
        if tuple(image.shape[1:]) == tuple(size):
            return image
        canvas = fill.expand(image.shape[0], *size).clone()
        (y, x), (tall, wide) = self.corner, image.shape[1:]
        canvas[:, y : y + tall, x : x + wide] = image
        return canvas


def draw_place(original: tuple[int, int], size: tuple[int, int], scale: tuple[float, float]) -> Place:
    """Where large-scale jitter puts a picture of the original size, whose plain size would be `size`."""
    low, high = np.log(scale[0]), np.log(scale[1])
    draws = torch.rand(5).tolist()
    factor = float(np.exp(low + draws[0] * (high - low)))
    tall, wide = (factor * to / side for to, side in zip(size, original, strict=True))
    height, width = (
        min(side, max(1, round(to / ratio)))
        for side, to, ratio in zip(original, size, (tall, wide), strict=True)
    )
    drawn = min(size[0], max(1, round(height * tall))), min(size[1], max(1, round(width * wide)))
    return Place(
        int(draws[1] * (original[0] - height + 1)),
        int(draws[2] * (original[1] - width + 1)),
        height,
        width,
        drawn,
        (int(draws[3] * (size[0] - drawn[0] + 1)), int(draws[4] * (size[1] - drawn[1] + 1))),
    )


def _moved_boxes(own: Any, place: Place, size: tuple[int, int], flipped: bool) -> Tensor:
    """The boxes `[n, 4]` where the picture was put, cut at the edges of the window."""
    from torchvision.transforms.v2 import functional as joint

    top, left, height, width = place[:4]
    boxes = joint.resized_crop(own, top, left, height, width, list(place.size))
    (y, x), (tall, wide) = place.corner, place.size
    boxes = joint.clamp_bounding_boxes(boxes)
    boxes = joint.pad(boxes, [x, y, size[1] - x - wide, size[0] - y - tall])
    boxes = joint.horizontal_flip(boxes) if flipped else boxes
    return boxes.as_subclass(Tensor)


def _still_seen(before: Tensor, after: Tensor, place: Place) -> Tensor:
    """Bool `[n]`: boxes of which enough is left, and a pixel at least each way."""
    tall, wide = place.size[0] / place.height, place.size[1] / place.width
    whole = ((before[:, 2:] - before[:, :2]) * torch.tensor([wide, tall])).prod(dim=1)
    sides = after[:, 2:] - after[:, :2]
    return (sides.prod(dim=1) >= LEFT_OVER * whole) & (sides >= 1).all(dim=1)


def box_labels(
    boxes: Tensor,
    target: PictureBoxes,
    seen: tuple[int, int],
    original: tuple[int, int],
    index: int,
    kept: Tensor | None = None,
) -> BoxLabels:
    """The target of boxes (left, top, right, bottom) in pixels of a picture of the size `seen`."""
    rows, columns = seen
    scale = torch.tensor([columns, rows, columns, rows], dtype=torch.float32)
    corners = boxes.to(torch.float32) / scale
    ours = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
    chosen = slice(None) if kept is None else kept.numpy()
    return BoxLabels(
        boxes=ours,
        labels=torch.from_numpy(target.labels[chosen].copy()),
        size=original,
        crowd=torch.from_numpy(target.crowd[chosen].copy()),
        area=torch.from_numpy(target.area[chosen].copy()),
        index=index,
    )


def whole_picture(preprocessing: Preprocessing) -> Preprocess:
    """The reference preprocessing; ConfigError where it cuts something off or adds a border."""
    cuts = preprocessing.crop_mode == "squash" and preprocessing.crop_pct < 1
    if preprocessing.crop_mode not in ("squash", "fit") or cuts:
        raise ConfigError(
            "Boxes and masks want the whole picture: crop_mode squash with crop_pct 1, or fit; the model's card has"
            f" {preprocessing.crop_mode} with {preprocessing.crop_pct}."
        )
    return Preprocess(preprocessing)


@functools.lru_cache(maxsize=4)
def _jitter(strength: float) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    made: Callable[[Tensor], Tensor] = v2.ColorJitter(strength, strength, strength)
    return made
