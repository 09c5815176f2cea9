"""Data that fits a model: what the data can teach, what the model is for, and batches of boxes or masks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vitrail.data.dense import TASKS as TASK_OF
from vitrail.data.dense import WORDS, Kind, class_names, kinds_of, open_boxes, open_masks
from vitrail.data.dense_loader import DenseBuilder
from vitrail.data.finding import some
from vitrail.data.joint import DenseTrainTransform, DenseTransform, JointAugmentation
from vitrail.data.loader import Loader
from vitrail.data.sources import Splits, open_splits
from vitrail.errors import ConfigError, DataError
from vitrail.models import registry
from vitrail.tasks.registry import facts_of
from vitrail.weights import folder as folders
from vitrail.weights.card import Card, Preprocessing

DEFAULTS: dict[Kind, str] = {
    "classes": "vit_nano_patch4_32",
    "boxes": "quick_detr_nano",
    "masks": "setr_pup_nano",
}
"""A small network of ours for each kind of data."""


def task_of(model: str | None, pretrained: str | None) -> str | None:
    """What a run's network is for, by its name or by the weights it starts from; None where neither tells."""
    if model is not None:
        return str(registry.default_card(model, registry.variant(model)).task)
    if pretrained is not None and folders.find(pretrained) is not None:
        return str(folders.load(folders.model_folder(pretrained))[1].task)
    return None


def kind_for(task: str | None, paths: Sequence[str], model: str) -> Kind:
    """The kind of the data that the task learns from; of the data's first kind without a task.

    Raises DataError where the data cannot teach the task.
    """
    kinds = kinds_of(paths)
    if task is None:
        return kinds[0]
    for kind in kinds:
        if TASK_OF[kind] == task:
            return kind
    if task == TASK_OF["classes"]:
        with contextlib.suppress(DataError):  # class folders may hold annotation files too
            open_splits(paths)
            return "classes"
    fitting = ", ".join(f"{DEFAULTS[kind]} for {WORDS[kind].split(' (')[0]}" for kind in kinds)
    wanted = next(WORDS[kind] for kind, name in TASK_OF.items() if name == task)
    raise DataError(
        f"{some(paths)} holds {' and '.join(WORDS[kind] for kind in kinds)}, and {model} {facts_of(task).words}:"
        f" it needs {wanted}. Take a network for this data ({fitting}; vitrail models lists them all), or other data."
    )


def open_kind(
    kind: Kind,
    paths: Sequence[str],
    *,
    val: Sequence[str] = (),
    val_share: float = 0.1,
    seed: int = 0,
    classes: Sequence[str] = (),
    ignore: Sequence[int] = (),
    reduce_zero: bool = False,
    otherwise: Sequence[str] = (),
) -> Splits:
    """The splits of data of a known kind; `otherwise` as in open_masks.

    Raises ConfigError for an option of another kind.
    """
    names = class_names(classes)
    if kind != "masks" and (ignore or reduce_zero):
        raise ConfigError(f"ignore and reduce_zero speak of values in masks; {some(paths)} has none.")
    if kind == "masks":
        return open_masks(
            paths, val=val, val_share=val_share, seed=seed, classes=names, ignore=ignore, reduce_zero=reduce_zero,
            otherwise=otherwise,
        )  # fmt: skip
    if kind == "boxes":
        return open_boxes(paths, val=val, val_share=val_share, seed=seed, classes=names)
    if names:
        raise ConfigError("Class folders have names of their own; classes is for boxes and masks.")
    return open_splits(paths, val=val, val_share=val_share, seed=seed)


def held_back(card: Card) -> dict[str, Any]:
    """How the model's training split off pictures for validation, as open_kind's options; empty where unknown."""
    return {name: card.recipe[name] for name in ("val_share", "seed") if name in card.recipe}


def learned_from(card: Card, data: Sequence[str]) -> bool:
    """Whether the model was trained on just these folders and files."""

    def places(paths: Sequence[str]) -> set[str]:
        return {os.path.realpath(path) for path in paths}

    return places(data) == places(card.recipe.get("data") or ())


def training_loader(
    source: Any, preprocessing: Preprocessing, augmentation: JointAugmentation, **options: Any
) -> Loader:
    """Shuffled, changed batches of boxes or masks; `options` as Loader's."""
    transform = DenseTrainTransform(preprocessing, augmentation)
    return Loader(source, transform, shuffle=True, drop_last=True, builder=DenseBuilder, **options)


def loader_in_order(source: Any, preprocessing: Preprocessing, **options: Any) -> Loader:
    """Every picture once, as the model is used, with targets of the original pictures; options as Loader's."""
    return Loader(source, DenseTransform(preprocessing), unreadable="drop", builder=DenseBuilder, **options)


def rows(batches: Loader) -> Iterator[Any]:
    """The batches without those that only keep processes in step."""
    return (batch for batch in batches if int(batch.indices[0]) >= 0)


def why_nothing(metrics: Any, scores: Mapping[str, float]) -> str:
    """A sentence for boxes whose AP50 is 0 (or below a thousandth): what was found instead. Empty otherwise."""
    if not scores.get("ap50", 1.0) < 0.001:
        return ""
    seen = list(metrics.seen.values())
    found, truth = sum(len(one.found) for one in seen), sum(len(one.truth) for one in seen)
    if not found:
        return f"AP is 0: the network found no box at all, and there are {truth} in {len(seen)} pictures."
    best = max(float(one.found[:, 4].max()) for one in seen if len(one.found))
    named = {int(number) for one in seen for number in one.found[:, 5].tolist()}
    there = {int(number) for one in seen for number in one.truth[:, 4].tolist()}
    told = "" if named & there else (
        f" None of the classes that it names ({_names(metrics, named)}) is in the data ({_names(metrics, there)})."
    )  # fmt: skip
    return (
        f"AP is 0: none of the {found} boxes found (highest score {best:.3f}) fits one of the {truth} true ones."
        f"{told} A network that has hardly been trained does this; else look at the annotations: vitrail data check."
    )


def _names(metrics: Any, numbers: set[int]) -> str:
    return some(metrics.labels[number] for number in sorted(numbers))
