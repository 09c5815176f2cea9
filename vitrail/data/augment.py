"""What training does to a picture: crop, flip, a policy, colour jitter, erasing, on uint8.

The crop is taken from the decoded tensor before it is resized, so only its pixels are touched. The policies
are torchvision's v2 transforms; they get the small crop as a Pillow image, on which torchvision does them up
to six times as fast as on a tensor. Every choice follows from the seed of the sample, never from the worker.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vitrail.data.transforms import Preprocess, colour, cover, luma, resize
from vitrail.errors import ConfigError
from vitrail.weights.card import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

CROPS = ("resized", "pad", "none")
POLICIES = ("none", "rand", "trivial", "three")
TRIES = 10
"""Draws of a box before giving up on one that fits, as in torchvision."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to training pictures. Names and defaults as TrainRun's."""

    crop: str = "resized"
    """`resized`: random resized crop. `pad`: short side to the input size, `pad` pixels mirrored on
    every side, random crop (CIFAR's way, and DeiT III's simple random crop). `none`: as in evaluation."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the picture's area in a resized crop."""

    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a resized crop."""

    pad: int = 4
    """Pixels around the picture for the `pad` crop."""

    hflip: float = 0.5
    """Probability of a left-right flip."""

    aa: str = "none"
    """Policy: `rand` RandAugment, `trivial` TrivialAugment (wide), `three` 3-Augment of DeiT III section 3
    (one of grey, solarise, blur; the paper adds color_jitter 0.3)."""

    layers: int = 2
    """RandAugment's operations on each picture."""

    magnitude: int = 9
    """RandAugment's strength, 0..30."""

    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""

    reprob: float = 0.0
    """Probability that a box of 2 to 33 % of the area is replaced by noise of the data's mean and spread."""

    def __post_init__(self) -> None:
        for name, value, legal in (("crop", self.crop, CROPS), ("aa", self.aa, POLICIES)):
            if value not in legal:
                raise ConfigError(f"{name} must be one of {', '.join(legal)}, got {value!r}.")
        for name in ("hflip", "reprob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a probability in 0..1, got {getattr(self, name)}.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"scale must be two shares with 0 < low <= high <= 1, got {self.scale}.")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ConfigError(f"ratio must be two numbers with 0 < low <= high, got {self.ratio}.")
        if not 0 <= self.magnitude <= 30 or self.layers < 0 or self.pad < 0:
            raise ConfigError("magnitude must lie in 0..30, layers and pad be at least 0.")
        if not 0 <= self.color_jitter <= 1:
            raise ConfigError(f"color_jitter must lie in 0..1, got {self.color_jitter}.")


def sample_seed(*numbers: int) -> int:
    """One seed of 63 bits from whole numbers such as (seed, epoch, index, copy), well mixed (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's own CPU generator (which torchvision draws from) at a seed; put back as it was afterwards."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


class TrainTransform:
    """Uint8 `[3, H, W]` and a seed to uint8 `[in_chans, *input_size]`.

    Equal seeds give equal pixels, on every worker and in every process. Not for several threads at once:
    torchvision draws from torch's one CPU generator.
    """

    def __init__(self, preprocessing: Preprocessing, augmentation: Augmentation | None = None) -> None:
        self.reference = Preprocess(preprocessing)  # raises ConfigError for channels that pictures lack
        self.preprocessing = preprocessing
        self.augmentation = augmentation or Augmentation()

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        record = self.augmentation
        with seeded(seed):
            if record.crop == "resized":
                image = self._resized_crop(image)
            elif record.crop == "pad":
                image = self._padded_crop(image)
            else:
                image = self.reference(image)
            if record.hflip and float(torch.rand(())) < record.hflip:
                image = image.flip(-1)
            if record.aa != "none" or record.color_jitter:
                image = self._recoloured(image)
            if self.preprocessing.in_chans == 1 and image.shape[0] == 3:
                image = luma(image)
            if record.reprob and float(torch.rand(())) < record.reprob:
                image = self._erased(image)
        return image.contiguous()

    def _resized_crop(self, image: Tensor) -> Tensor:
        record, (height, width) = self.augmentation, (image.shape[1], image.shape[2])
        top, left, tall, wide = _box(height, width, record.scale, record.ratio) or _central(
            height, width, record.ratio
        )
        cut = image[:, top : top + tall, left : left + wide]
        return resize(cut, self.preprocessing.input_size, self.preprocessing.interpolation)

    def _padded_crop(self, image: Tensor) -> Tensor:
        rows, columns = self.preprocessing.input_size
        (top, left, bottom, right), size = cover(image.shape[1], image.shape[2], rows, columns)
        image = resize(image[:, top:bottom, left:right], size, self.preprocessing.interpolation)
        pad = self.augmentation.pad
        down, across = torch.rand(2).tolist()
        y = math.floor(down * (size[0] + 2 * pad - rows + 1)) - pad
        x = math.floor(across * (size[1] + 2 * pad - columns + 1)) - pad
        pixels = image.permute(1, 2, 0).numpy()  # [h, w, 3]: numpy gathers whole pixels, ten times as fast
        pixels = pixels.take(_mirrored(y, rows, size[0]), 0).take(_mirrored(x, columns, size[1]), 1)
        return torch.from_numpy(pixels).permute(2, 0, 1)  # [3, rows, columns]

    def _recoloured(self, image: Tensor) -> Tensor:
        from PIL import Image

        record = self.augmentation
        if image.shape[0] == 1:
            image = image.expand(3, -1, -1)
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        fill = tuple((colour(self.preprocessing).tolist() * 3)[:3])
        for step in _policy(record.aa, record.layers, record.magnitude, record.color_jitter, fill):
            picture = step(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # [3, h, w]

    def _erased(self, image: Tensor) -> Tensor:
        """Random erasing (Zhong et al. 2017) with noise in the statistics that normalising undoes."""
        box = _box(image.shape[1], image.shape[2], (0.02, 1 / 3), (0.3, 1 / 0.3))
        if box is None:
            return image
        top, left, tall, wide = box
        channels = image.shape[0]
        mean = torch.tensor((self.preprocessing.mean * channels)[:channels])[:, None, None]
        std = torch.tensor((self.preprocessing.std * channels)[:channels])[:, None, None]
        noise = (torch.randn(channels, tall, wide) * std + mean) * 255
        image = image.clone()
        image[:, top : top + tall, left : left + wide] = noise.round().clamp(0, 255).to(torch.uint8)
        return image


def _box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int] | None:
    """Top, left, height, width of a random box: uniform in area, log-uniform in shape; None if none fits."""
    draws = torch.rand(2 * TRIES + 2).tolist()
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for turn in range(TRIES):
        area = height * width * (scale[0] + draws[2 * turn] * (scale[1] - scale[0]))
        shape = math.exp(low + draws[2 * turn + 1] * (high - low))
        wide, tall = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < tall <= height:
            top = math.floor(draws[-2] * (height - tall + 1))
            left = math.floor(draws[-1] * (width - wide + 1))
            return top, left, tall, wide
    return None


def _central(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest middle box whose shape is allowed: for pictures in which no random box fits."""
    wide = max(1, min(width, round(height * ratio[1])))
    tall = max(1, min(height, round(width / ratio[0])))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _mirrored(start: int, count: int, size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices of a row of `size` pixels, from `start` on; outside it the row is mirrored."""
    if size == 1:
        return np.zeros(count, dtype=np.int64)
    index = np.arange(start, start + count) % (2 * size - 2)
    return np.where(index < size, index, 2 * size - 2 - index)


Step = Callable[[Any], Any]


@functools.lru_cache(maxsize=8)
def _policy(name: str, layers: int, magnitude: int, jitter: float, fill: tuple[int, ...]) -> tuple[Step, ...]:
    """Transforms of a Pillow image, in order; torchvision is imported on first use."""
    from torchvision.transforms import v2

    steps: list[Step] = []
    if name == "rand":
        steps.append(v2.RandAugment(num_ops=layers, magnitude=magnitude, fill=list(fill)))
    elif name == "trivial":
        steps.append(v2.TrivialAugmentWide(fill=list(fill)))
    elif name == "three":
        steps.append(_three)
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter))
    return tuple(steps)


def _three(picture: Image.Image) -> Image.Image:
    """3-Augment (DeiT III, section 3): exactly one of grey, solarise, Gaussian blur."""
    from PIL import ImageFilter
    from torchvision.transforms.v2 import functional as v2

    choice, strength = torch.rand(2).tolist()
    if choice < 1 / 3:
        return v2.to_grayscale(picture, num_output_channels=3)
    if choice < 2 / 3:
        return v2.solarize(picture, threshold=128)
    return picture.filter(ImageFilter.GaussianBlur(0.1 + strength * 1.9))
