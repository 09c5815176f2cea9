"""Training pictures that live on the device: decoded once, augmented there a whole batch at a time.

A GPU trains a small network faster than processors decode pictures for it. Where the set fits into the device's
memory as uint8, nothing is decoded or copied after the start. The price is said: of each picture the middle square is
kept, at `STORED` times the input size for resized crops, so what lies outside it is never seen.

Random choices are drawn on the CPU from (seed, epoch, batch), so a resumed run repeats them and every device makes
the same ones; pixels agree between devices to a rounding of 1/255, but for the noise of random erasing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from vitrail.data.augment import TRIES, Augmentation, sample_seed
from vitrail.data.batch_policy import grey, rand, trivial
from vitrail.data.image import decode
from vitrail.data.loader import Batch
from vitrail.data.sources import Source
from vitrail.data.transforms import Preprocess, colour
from vitrail.errors import ConfigError, DataError, ImageError
from vitrail.weights.card import Preprocessing

Pixels = UInt8[Tensor, "B C h w"]

STORED = 8 / 7
"""Side of a stored picture over the input's, where crops are resized: 256 for 224."""

SHARE = 0.5
"""Share of a GPU's free memory that pictures may take; the rest is the network's."""


class Resident:
    """Batches of uint8 pictures on the device, one epoch an iteration, as `data.loader.Loader` gives them.

    Args:
        source: pictures and labels, read by `readers` threads; unreadable pictures are left out and stand in
            `skipped`.
        preprocessing: the model's; input size and channels.
        augmentation: as for `TrainTransform`.
        batch_size: pictures in one step over all processes, `world` of them, of which this one is `rank`.
        device: where the pictures live.

    Raises:
        ConfigError: other channels than three, or more pictures than fit.
        DataError: too few pictures can be read for one batch.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        batch_size: int,
        *,
        device: torch.device,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        readers: int = 1,
    ) -> None:
        if preprocessing.in_chans != 3:
            raise ConfigError(
                f"Pictures that live on the device have 3 channels; the network takes {preprocessing.in_chans}. Leave"
                " --resident out."
            )
        self.preprocessing, self.augmentation = preprocessing, augmentation
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.rank, self.world = rank, world
        self.epoch = self._position = 0
        self.skipped: dict[int, str] = {}
        red, green, blue = colour(preprocessing).tolist()
        self.fill = float(red), float(green), float(blue)
        self.side = _stored(preprocessing.input_size, augmentation.crop)
        _fits(len(source) * 3 * self.side[0] * self.side[1], device)
        self.pixels, kept = self._read(source, readers)
        self.indices = torch.tensor(kept, dtype=torch.int64)
        self.targets = torch.from_numpy(source.labels[kept]).to(device)
        if len(kept) < batch_size:
            raise DataError(
                f"One batch takes {batch_size} pictures, and {len(kept)} can be read: lower --batch-size."
            )

    def __len__(self) -> int:
        """Batches of a whole epoch; the last few pictures are left out."""
        return len(self.indices) // self.batch_size

    def resume(self, epoch: int, position: int = 0) -> None:
        """The next iteration begins at this picture of this epoch."""
        self.epoch, self._position = epoch, position

    def __iter__(self) -> Iterator[Batch]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.indices))
        epoch, first = self.epoch, self._position // self.batch_size
        for number in range(first, len(self)):
            mine = order[number * self.batch_size : (number + 1) * self.batch_size][self.rank :: self.world]
            rows = torch.from_numpy(mine)
            generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, number, self.rank))
            there = rows.to(self.device, non_blocking=True)
            images = self.augmented(self.pixels[there], generator)
            yield Batch(images, self.targets[there], self.indices[rows])
        self.epoch, self._position = epoch + 1, 0

    def augmented(self, pictures: Pixels, generator: torch.Generator) -> Pixels:
        """What training sees of stored pictures: crop, flip, colour, policy, erasing, in that order."""
        record, size = self.augmentation, self.preprocessing.input_size
        if record.crop == "resized":
            pictures = resized_crop(pictures, boxes(len(pictures), self.side, record, generator), size)
        elif record.crop == "pad":
            pictures = padded_crop(pictures, record.pad, generator)
        if record.hflip:
            pictures = flipped(pictures, torch.rand(len(pictures), generator=generator) < record.hflip)
        if record.aa == "three":
            pictures = three(pictures, generator)
        elif record.aa == "rand":
            pictures = rand(pictures, generator, self.fill, record.layers, record.magnitude)
        elif record.aa == "trivial":
            pictures = trivial(pictures, generator, self.fill)
        if record.color_jitter:
            pictures = jittered(pictures, record.color_jitter, generator)
        if record.reprob:
            pictures = self._erased(pictures, generator)
        return pictures

    def _erased(self, pictures: Pixels, generator: torch.Generator) -> Pixels:
        """Random erasing with noise in the statistics that normalising undoes, as TrainTransform does it."""
        record = Augmentation(scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
        chosen = torch.rand(len(pictures), generator=generator) < self.augmentation.reprob
        drawn = boxes(len(pictures), self.preprocessing.input_size, record, generator)
        top, left, tall, wide = drawn.unbind(1)
        y, x = (torch.arange(side)[None] for side in self.preprocessing.input_size)
        rows = (y >= top[:, None]) & (y < (top + tall)[:, None])  # [B, h]
        columns = (x >= left[:, None]) & (x < (left + wide)[:, None])  # [B, w]
        inside = (rows[:, :, None] & columns[:, None, :] & chosen[:, None, None])[:, None]  # [B, 1, h, w]
        mean, std = (
            torch.tensor((values * 3)[:3], device=self.device)[:, None, None]
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        # Noise for every pixel of a batch takes a processor longer than a GPU takes for the step.
        seed = int(torch.randint(2**62, (), generator=generator))
        there = torch.Generator(self.device).manual_seed(seed)
        noise = torch.randn(pictures.shape, generator=there, device=self.device) * std + mean
        return torch.where(inside.to(self.device, non_blocking=True), _pixels(255 * noise), pictures)

    def _read(self, source: Source, readers: int) -> tuple[Pixels, list[int]]:
        """Every readable picture at the stored size, on the device, and their places in the source."""
        square = Preprocessing(
            input_size=self.side, crop_pct=1.0, interpolation=self.preprocessing.interpolation
        )
        prepare = Preprocess(square)
        pixels = torch.empty(len(source), 3, *self.side, dtype=torch.uint8)

        def read(index: int) -> None:
            try:
                pixels[index] = prepare(decode(source.read(index), name=source.name(index)))
            except ImageError as error:
                self.skipped[index] = str(error)

        # Threads suffice: decoders and resizing release Python's lock.
        with ThreadPoolExecutor(max(1, readers)) as pool:
            for _ in pool.map(read, range(len(source))):
                pass
        kept = [index for index in range(len(source)) if index not in self.skipped]
        return (pixels[kept] if self.skipped else pixels).to(self.device), kept


def _stored(size: tuple[int, int], crop: str) -> tuple[int, int]:
    """Rows and columns that are kept of each picture."""
    factor = STORED if crop == "resized" else 1.0
    return math.ceil(size[0] * factor), math.ceil(size[1] * factor)


def _fits(wanted: int, device: torch.device) -> None:
    """Raise ConfigError where so many bytes of pictures leave a GPU too little for the network."""
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    if wanted > SHARE * free:
        raise ConfigError(
            f"The pictures take {wanted / 2**30:.1f} GiB, and at most {SHARE:.0%} of the device's"
            f" {free / 2**30:.1f} GiB may be theirs: leave --resident out, or lower --img-size."
        )


def boxes(
    count: int, side: tuple[int, int], record: Augmentation, generator: torch.Generator
) -> Int[Tensor, "B 4"]:
    """Top, left, height and width of a random box in each of `count` pictures: uniform in area, log-uniform in shape.

    The first of ten draws that fits; the whole picture where none does.
    """
    low, high = math.log(record.ratio[0]), math.log(record.ratio[1])
    area, shape = torch.rand(2, count, TRIES, generator=generator)
    area = side[0] * side[1] * (record.scale[0] + area * (record.scale[1] - record.scale[0]))
    shape = torch.exp(low + shape * (high - low))
    wide, tall = (area * shape).sqrt().round(), (area / shape).sqrt().round()  # [B, TRIES]
    fits = (wide > 0) & (wide <= side[1]) & (tall > 0) & (tall <= side[0])
    first = fits.to(torch.int64).argmax(dim=1, keepdim=True)
    none = ~fits.any(dim=1)
    tall = tall.gather(1, first)[:, 0].masked_fill(none, side[0])
    wide = wide.gather(1, first)[:, 0].masked_fill(none, side[1])
    down, across = torch.rand(2, count, generator=generator)
    top, left = (down * (side[0] - tall + 1)).floor(), (across * (side[1] - wide + 1)).floor()
    return torch.stack([top, left, tall, wide], dim=1).to(torch.int64)


def resized_crop(pictures: Pixels, box: Int[Tensor, "B 4"], size: tuple[int, int]) -> Pixels:
    """Each picture's box, resized bilinearly to `size`; its edge pixels go on beyond it."""
    height, width = pictures.shape[2:]
    top, left, tall, wide = box.to(pictures.device, torch.float32).unbind(1)
    # Centres of pixels stand at half numbers; grid_sample's -1..1 are the picture's outer edges.
    rows = torch.arange(size[0], device=pictures.device) + 0.5
    columns = torch.arange(size[1], device=pictures.device) + 0.5
    y = top[:, None] + rows * tall[:, None] / size[0]  # [B, h]
    x = left[:, None] + columns * wide[:, None] / size[1]  # [B, w]
    places = torch.broadcast_tensors(2 * x[:, None, :] / width - 1, 2 * y[:, :, None] / height - 1)
    places = torch.stack(places, dim=-1)  # [B, h, w, 2]
    return _pixels(F.grid_sample(pictures.float(), places, padding_mode="border", align_corners=False))


def padded_crop(pictures: Pixels, pad: int, generator: torch.Generator) -> Pixels:
    """Each picture mirrored by `pad` pixels on every side, and a random crop of its own size."""
    count, _, height, width = pictures.shape
    down, across = torch.randint(-pad, pad + 1, (2, count), generator=generator)
    y = _mirrored(down[:, None] + torch.arange(height), height).to(pictures.device)  # [B, h]
    x = _mirrored(across[:, None] + torch.arange(width), width).to(pictures.device)  # [B, w]
    number = torch.arange(count, device=pictures.device)[:, None, None]
    cut = pictures.permute(0, 2, 3, 1)[number, y[:, :, None], x[:, None, :]]  # [B, h, w, C]
    return cut.permute(0, 3, 1, 2).contiguous()  # [B, C, h, w]


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Indices into a row of `size` pixels that is mirrored beyond its ends, the end itself not repeated."""
    if size == 1:
        return torch.zeros_like(index)
    index = index % (2 * size - 2)
    return torch.where(index < size, index, 2 * size - 2 - index)


def flipped(pictures: Pixels, chosen: Bool[Tensor, " B"]) -> Pixels:
    """The chosen pictures with left and right exchanged."""
    return torch.where(chosen.to(pictures.device)[:, None, None, None], pictures.flip(-1), pictures)


def three(pictures: Pixels, generator: torch.Generator) -> Pixels:
    """3-Augment (DeiT III, section 3): each picture grey, solarised or blurred, one of them."""
    choice, strength = torch.rand(2, len(pictures), generator=generator).to(pictures.device)
    choice = choice[:, None, None, None]
    dull = _pixels(grey(pictures.float())).expand_as(pictures)
    solar = torch.where(pictures >= 128, 255 - pictures, pictures)
    soft = _pixels(blurred(pictures.float(), 0.1 + 1.9 * strength))
    return torch.where(choice < 1 / 3, dull, torch.where(choice < 2 / 3, solar, soft))


def blurred(images: Float[Tensor, "B C h w"], sigma: Float[Tensor, " B"]) -> Float[Tensor, "B C h w"]:
    """Gaussian blur with a width of its own for each picture, at most 2 pixels; edges go on beyond the border."""
    count, channels, height, width = images.shape
    reach = 6
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)  # [B * C, 13]
    flat = F.pad(images.reshape(1, count * channels, height, width), [reach] * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=count * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=count * channels)
    return flat.reshape(images.shape)


def jittered(pictures: Pixels, strength: float, generator: torch.Generator) -> Pixels:
    """Brightness, contrast and saturation, each times a factor in 1 ± strength, in this order."""
    factors = 1 + strength * (2 * torch.rand(3, len(pictures), generator=generator) - 1)
    bright, contrast, saturation = (factor[:, None, None, None] for factor in factors.to(pictures.device))
    images = (pictures.float() * bright).clamp(0, 255)
    middle = grey(images).mean(dim=(1, 2, 3), keepdim=True)
    images = (middle + (images - middle) * contrast).clamp(0, 255)
    dull = grey(images)
    return _pixels(dull + (images - dull) * saturation)


def _pixels(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)
