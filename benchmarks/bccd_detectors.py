"""Detectors trained on few pictures from nothing, at an equal budget: loss and average precision by CPU seconds.

    python benchmarks/bccd_detectors.py BCCD.zip MODEL [--epochs 15] [--lr 5e-4]

One thread, AdamW on matrices with weight decay 1e-4, batches of 8, cosine after 100 steps of warm-up, gradients
clipped at 1; crops of 0.6 to 1 of the sides, flips both ways, brightness. Reads Pascal VOC inside a zip by itself,
so that nothing but network, loss and metrics is vitrail's. The CPU seconds are this process's own: they hold on a
busy machine.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import time
import xml.etree.ElementTree as ET
import zipfile
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.models.registry import create_model
from vitrail.tasks.detect import BoxTarget, Detect

LABELS = ("RBC", "WBC", "Platelets")
BATCH = 8


class Sample(NamedTuple):
    """A picture at 320 x 240, and its objects."""

    image: Image.Image
    target: BoxTarget


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--every", type=int, default=5, help="epochs between evaluations")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    train, val = read(given.data, "train"), read(given.data, "val")
    model: Any = create_model(given.model, num_classes=len(LABELS))
    print(f"{given.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train)} pictures")
    optimiser = optimiser_of(model, given.lr)
    steps, spent = given.epochs * (len(train) // BATCH), 0.0
    for epoch in range(given.epochs):
        start = time.process_time()
        terms = one_epoch(model, train, optimiser, given.lr, epoch * (len(train) // BATCH), steps)
        spent += time.process_time() - start
        told = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
        if (epoch + 1) % given.every == 0 or epoch == given.epochs - 1:
            told += " | " + precision(model, val)
        print(f"epoch {epoch + 1} CPU {spent:.0f} s: {told}", flush=True)


def read(path: str, split: str) -> list[Sample]:
    """The pictures of a split whose boxes have an area."""
    samples: list[Sample] = []
    with zipfile.ZipFile(path) as archive:
        root = "BCCD/" if f"BCCD/ImageSets/Main/{split}.txt" in archive.namelist() else ""
        for name in archive.read(f"{root}ImageSets/Main/{split}.txt").decode().split():
            image = Image.open(io.BytesIO(archive.read(f"{root}JPEGImages/{name}.jpg"))).convert("RGB")
            width, height = image.size
            boxes, labels = [], []
            for item in ET.fromstring(archive.read(f"{root}Annotations/{name}.xml")).iter("object"):
                ends = [
                    float(item.findtext(f"bndbox/{word}", "0")) for word in ("xmin", "ymin", "xmax", "ymax")
                ]
                x1, y1, x2, y2 = ends[0] / width, ends[1] / height, ends[2] / width, ends[3] / height
                if x2 > x1 and y2 > y1:
                    boxes.append([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
                    labels.append(LABELS.index(item.findtext("name", "")))
            target = BoxTarget(torch.tensor(boxes).view(-1, 4), torch.tensor(labels), (height, width))
            small = image.resize((320, 240), Image.Resampling.BILINEAR)
            samples.append(Sample(small, target._replace(index=len(samples))))
    return samples


def pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The network's input."""
    array = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(array) - mean) / std).permute(2, 0, 1)


def varied(sample: Sample, size: tuple[int, int]) -> tuple[Tensor, BoxTarget]:
    """A crop, flipped or not, brighter or darker."""
    image, (boxes, labels) = sample.image, sample.target[:2]
    if random.random() < 0.8:
        share = random.uniform(0.6, 1)
        left, top = random.uniform(0, 1 - share), random.uniform(0, 1 - share)
        width, height = image.size
        ends = (left * width, top * height, (left + share) * width, (top + share) * height)
        image = image.crop(tuple(int(end) for end in ends))  # type: ignore[arg-type]
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)
        corners = (corners - torch.tensor([left, top, left, top])) / share
        area = (corners[:, 2:] - corners[:, :2]).prod(dim=1)
        corners = corners.clamp(0, 1)
        keep = (corners[:, 2:] - corners[:, :2]).prod(dim=1) > 0.3 * area
        corners, labels = corners[keep], labels[keep]
        boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
    made, boxes = pixels(image, size), boxes.clone()
    for axis, column in ((2, 0), (1, 1)):
        if random.random() < 0.5:
            made = made.flip(axis)
            boxes[:, column] = 1 - boxes[:, column]
    made = made * random.uniform(0.8, 1.2) + random.uniform(-0.2, 0.2)
    return made, BoxTarget(boxes, labels)


def optimiser_of(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    rest = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 1e-4}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate)


def one_epoch(
    model: Any, samples: list[Sample], optimiser: torch.optim.Optimizer, rate: float, done: int, steps: int
) -> dict[str, float]:
    """The mean of every term of the loss."""
    task, order, sums = Detect(LABELS), list(range(len(samples))), dict[str, float]()
    random.shuffle(order)
    model.train()
    batches = len(order) // BATCH
    for number in range(batches):
        step = done + number
        share = min(1, (step + 1) / 100) * (0.5 * (1 + math.cos(math.pi * step / steps)) * 0.98 + 0.02)
        for group in optimiser.param_groups:
            group["lr"] = rate * share
        chosen = order[number * BATCH : (number + 1) * BATCH]
        made = [varied(samples[place], model.config.img_size) for place in chosen]
        terms = task.loss(model(torch.stack([image for image, _ in made])), [target for _, target in made])
        optimiser.zero_grad()
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) / batches
    return sums


def precision(model: Any, samples: list[Sample]) -> str:
    """COCO's numbers, and AP50 by class."""
    model.eval()
    metrics = Detect(LABELS).metrics()
    with torch.inference_mode():
        for start in range(0, len(samples), 16):
            part = samples[start : start + 16]
            images = torch.stack([pixels(sample.image, model.config.img_size) for sample in part])
            metrics.add(model(images), [sample.target for sample in part])
    result = metrics.result()
    told = " ".join(f"{name} {result[name]:.3f}" for name in ("ap", "ap50", "ap75"))
    return told + " " + " ".join(f"{row['label']} {row['ap50']:.2f}" for row in metrics.classes())


if __name__ == "__main__":
    main()
