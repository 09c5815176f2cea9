"""The pictures of a training run, and the batches that are made of them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy

from vitrail.data.augment import Augmentation, TrainTransform
from vitrail.data.cache import cached
from vitrail.data.dense import TASKS, Kind
from vitrail.data.image import decode
from vitrail.data.joint import JointAugmentation
from vitrail.data.loader import Loader
from vitrail.data.resident import Resident
from vitrail.data.sources import Source
from vitrail.data.transforms import Preprocess
from vitrail.errors import ConfigError, DataError
from vitrail.jobs import dense_data
from vitrail.jobs.doctor import usable_cores
from vitrail.runs import TrainRun
from vitrail.runtime import Runtime
from vitrail.train.log import Note
from vitrail.weights.card import Preprocessing

Say = Callable[[Note], None]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The pictures of a run."""

    train: Source
    val: Source | None
    """What chooses the best weights."""
    test: Source | None
    """Scored once, at the end; chooses nothing."""
    fingerprint: str
    val_given: bool = False
    """Whether the data, or --val, names the validation pictures; else they were held back."""

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def task(self) -> str:
        """What a network must be for that learns from these pictures."""
        return TASKS[cast(Kind, self.train.kind)]


def open_data(run: TrainRun, say: Say) -> Data:
    """The pictures of a run. Test pictures never stand in for validation pictures that are missing:
    those are then held back from the training pictures."""
    task = dense_data.task_of(run.model, run.pretrained)
    kind = dense_data.kind_for(task, run.data, run.model or str(run.pretrained))
    found = dense_data.open_kind(
        kind, run.data, val=run.val, val_share=run.val_share, seed=run.seed,
        classes=run.classes, ignore=run.ignore, reduce_zero=run.reduce_zero,
    )  # fmt: skip
    train, val, test = found.train, found.val, found.test
    if train is None:
        raise DataError(f"{', '.join(run.data)} holds no training pictures, only {', '.join(found.given)}.")
    for note in found.notes:
        say(Note(text=note))
    if run.train_share != 1.0:
        train = part_of(train, run.train_share)
        of = "of each class" if train.kind == "classes" else "of all"
        say(Note(text=f"{len(train):,} training pictures: {run.train_share:.0%} {of}."))
    return Data(
        train=train, val=val, test=test, fingerprint=train.fingerprint(), val_given="val" in found.given
    )


def part_of(source: Source, share: float) -> Source:
    """A share of each class: the pictures whose names below the data's place have the smallest hashes, one at least.

    Whatever the seed and wherever the data lies, so that several runs see the same pictures. Raises ConfigError
    outside (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"train-share lies above 0 and at most at 1; got {share}.")
    kept: list[int] = []
    for label in numpy.unique(source.labels).tolist():
        own = numpy.flatnonzero(source.labels == label).tolist()
        own.sort(
            key=lambda index: hashlib.sha256(
                source.entry_name(index).encode("utf-8", "surrogateescape")
            ).digest()
        )
        kept += own[: max(1, round(share * len(own)))]
    return source.subset(sorted(kept))


def decode_once(data: Data, say: Say) -> Data:
    """The same pictures; those of a small data set are decoded here, and never again."""
    train = cached(data.train)
    if train is data.train:
        return data
    say(Note(text=f"{len(train):,} small pictures are kept decoded in memory."))
    return dataclasses.replace(data, train=train, val=cached(data.val) if data.val is not None else None)


def typical_side(source: Source, looks: int = 24) -> int:
    """The middle short side of a few pictures spread over a source, in pixels."""
    sides: list[int] = []
    reasons: list[str] = []
    for index in numpy.linspace(0, len(source) - 1, min(looks, len(source))).astype(int).tolist():
        try:
            sides.append(min(decode(source.read(index), name=source.name(index)).shape[1:]))
        except DataError as error:
            reasons.append(str(error))
    if not sides:
        raise DataError(
            f"Not one of {len(reasons)} training pictures that were tried can be read; the first: {reasons[0]}"
            " vitrail data check lists them all."
        )
    return sorted(sides)[len(sides) // 2]


def batch_size(run: TrainRun, images: int, world: int) -> int:
    """Images in one batch over all processes, which share it evenly. Raises ConfigError when they cannot."""
    size = cast(int, run.batch_size)
    if size < 1 or size % world:
        raise ConfigError(f"batch_size {size} is shared by {world} processes: take a multiple of {world}.")
    if size * run.grad_accum_steps > images:
        raise ConfigError(
            f"One step takes {size * run.grad_accum_steps} images, and there are {images}: lower --batch-size"
            " or --grad-accum-steps."
        )
    return size


def leaves_pictures_alone(run: TrainRun) -> bool:
    """Whether training sees every picture as evaluation does."""
    changed = run.crop != "none" or run.hflip or run.aa != "none" or run.reprob or run.color_jitter
    return not changed and not run.mixup and not run.cutmix


def training_batches(
    run: TrainRun, source: Source, preprocessing: Preprocessing, runtime: Runtime
) -> Loader | Resident:
    """This process's share of the shuffled, augmented batches."""
    options: dict[str, Any] = {
        "batch_size": batch_size(run, len(source), runtime.world),
        "seed": run.seed,
        "workers": cast(int, run.workers),
        "rank": runtime.rank,
        "world": runtime.world,
        "repeats": run.aug_repeats,
        "max_bad_share": run.max_bad_share,
        "pin_memory": runtime.device.type == "cuda",
    }
    if run.resident and (source.kind != "classes" or run.aug_repeats != 1):
        raise ConfigError(
            f"Pictures live on the device for classes, one view an epoch; got {source.kind}, {run.aug_repeats} views:"
            " leave --resident out."
        )
    if source.kind != "classes":
        joint = JointAugmentation(
            scale=cast(tuple[float, float], run.scale) if run.crop == "resized" else (1.0, 1.0),
            hflip=cast(float, run.hflip),
            color_jitter=cast(float, run.color_jitter),
        )
        return dense_data.training_loader(source, preprocessing, joint, **options)
    augmentation = Augmentation(
        crop=cast(str, run.crop),
        scale=cast(tuple[float, float], run.scale),
        pad=max(1, min(preprocessing.input_size) // 8),
        hflip=cast(float, run.hflip),
        aa=cast(str, run.aa),
        color_jitter=cast(float, run.color_jitter),
        reprob=cast(float, run.reprob),
    )
    if run.resident:
        return Resident(
            source, preprocessing, augmentation, options["batch_size"],
            device=runtime.device, seed=run.seed, rank=runtime.rank, world=runtime.world,
            readers=usable_cores(),
        )  # fmt: skip
    return Loader(
        source, TrainTransform(preprocessing, augmentation), shuffle=True, drop_last=True, **options
    )


def batches_in_order(
    run: TrainRun,
    source: Source,
    preprocessing: Preprocessing,
    runtime: Runtime,
    shared: bool = False,
    max_bad_share: float = 1.0,
) -> Loader:
    """Every picture once, preprocessed as the model is used; `shared` over processes, or all in each.

    Pictures that cannot be read are left out, as `vitrail evaluate` does; DataError where they are more than
    `max_bad_share`. Go through it with `dense_data.rows`.
    """
    options: dict[str, Any] = {
        "batch_size": cast(int, run.batch_size),
        "seed": run.seed,
        "workers": cast(int, run.workers),
        "rank": runtime.rank if shared else 0,
        "world": runtime.world if shared else 1,
        "max_bad_share": max_bad_share,
    }
    if source.kind != "classes":
        return dense_data.loader_in_order(source, preprocessing, **options)
    return Loader(source, Preprocess(preprocessing), unreadable="drop", **options)
