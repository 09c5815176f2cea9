"""The data path, ours against torchvision's usual one, on one core, in one run.

    python benchmarks/data_path.py ../shared/data/imagenette/train-0.zip ../shared/data/photos/imagenet-30.zip

Both read the same files from the same archive, decode, take a random resized crop to 224, flip half of them
and end at what goes on to the device. The usual path is torchvision's own: Pillow decoding, RandomResizedCrop
and RandomHorizontalFlip on the Pillow image, float, normalised. Ours ends at uint8, a quarter of the bytes;
the device normalises the batch. That step is timed on its own, on this core, and counted in the last column.
Time is the processor's own (both paths use one thread), and the paths take turns, so that both meet the same
moments of a busy machine; the best and the middle of the repeats are shown.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
import zipfile
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from vitrail.data.augment import Augmentation, TrainTransform, sample_seed
from vitrail.data.image import decode
from vitrail.data.sources import Source, open_pictures
from vitrail.data.transforms import normalise
from vitrail.weights.card import Preprocessing

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
USUAL = "usual: Pillow, float (bilinear)"

Path = Callable[[int], Any]


def usual_path(archive: str, names: list[str]) -> Path:
    """torchvision's usual training pipeline."""
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    opened = zipfile.ZipFile(archive)
    return lambda index: pipeline(Image.open(io.BytesIO(opened.read(names[index]))).convert("RGB"))


def our_decoding(source: Source, index: int) -> torch.Tensor:
    return decode(source.read(index), source.name(index))


def our_path(source: Source, interpolation: str) -> Path:
    """Ours, from the file to uint8."""
    preprocessing = Preprocessing(mean=MEAN, std=STD, interpolation=interpolation)
    transform = TrainTransform(preprocessing, Augmentation())
    return lambda index: transform(our_decoding(source, index), sample_seed(0, 0, index))


def normalising(batch: int = 64) -> float:
    """Seconds per image of the device's share, done on this core."""
    images = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8)
    preprocessing = Preprocessing(mean=MEAN, std=STD)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        normalise(images, preprocessing)
        best = min(best, (time.process_time() - start) / batch)
    return best


def measure(paths: dict[str, Path], chosen: list[int], repeats: int) -> dict[str, list[float]]:
    """Images per second of each path, `repeats` times, in turn."""
    rates: dict[str, list[float]] = {name: [] for name in paths}
    for one in paths.values():
        for index in chosen[:8]:
            one(index)
    for repeat in range(repeats):
        torch.manual_seed(repeat)
        for name, one in paths.items():
            start = time.process_time()
            for index in chosen:
                one(index)
            rates[name].append(len(chosen) / (time.process_time() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("archives", nargs="+", help="zip archives of pictures")
    parser.add_argument("--images", type=int, default=200, help="pictures of each archive, spread over it")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each path")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device_share = normalising()
    print(f"one core, torch {torch.__version__}, images/s; × usual: middle of the turns' own ratios")
    head = f"{'archive':<18}{'path':<34}{'best':>7}{'median':>8}{'× usual':>9}{'+ normalise':>13}"
    print(f"{head}\n{'-' * len(head)}")
    for archive in arguments.archives:
        source = open_pictures([archive])
        names = [source.name(index).removeprefix(archive + os.sep) for index in range(len(source))]
        chosen = np.linspace(0, len(names) - 1, min(arguments.images, len(names))).astype(int).tolist()
        paths: dict[str, Path] = {
            USUAL: usual_path(archive, names),
            "ours, uint8 (bilinear)": our_path(source, "bilinear"),
            "ours, uint8 (bicubic)": our_path(source, "bicubic"),
            "our decoding alone": partial(our_decoding, source),
        }
        rates = measure(paths, chosen, arguments.repeats)
        for name, found in rates.items():
            best, middle = max(found), statistics.median(found)
            turns = zip(found, rates[USUAL], strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in turns)
            whole = best / (1 + best * device_share) / max(rates[USUAL])
            last = f"{whole:.2f}" if name.startswith("ours") else ""
            print(
                f"{os.path.basename(archive):<18}{name:<34}{best:>7.0f}{middle:>8.0f}{ratio:>9.2f}{last:>13}"
            )


if __name__ == "__main__":
    main()
