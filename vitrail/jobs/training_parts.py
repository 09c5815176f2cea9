"""The network of a training run: built, given its weights, frozen, taught; and the facts for the plan."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrail import config as records
from vitrail.data.boxes import BoxSource
from vitrail.data.transforms import constants
from vitrail.errors import ConfigError, ModelError
from vitrail.jobs.doctor import usable_cores
from vitrail.jobs.plan import Facts
from vitrail.jobs.training_data import Data, Say, typical_side
from vitrail.models import loading, registry
from vitrail.models.backbones import backbone, load_backbone
from vitrail.models.classifier import Classifier
from vitrail.nn.block import drop_by_subset
from vitrail.runs import TrainRun
from vitrail.runtime import Runtime
from vitrail.train.distill import Distillation
from vitrail.train.log import Note
from vitrail.weights import folder as folders
from vitrail.weights.card import Card

Objective = Callable[[Any, Tensor, Tensor], Mapping[str, Tensor]]


def gather_facts(run: TrainRun, data: Data, runtime: Runtime) -> Facts:
    """What the plan wants to know."""
    card = _card(run.pretrained)
    return Facts(
        images=len(data.train),
        classes=len(data.classes),
        side=typical_side(data.train),
        task=data.task,
        device=runtime.device.type,
        cores=usable_cores(),
        digits="digits" in run.data,
        pretrained=(card.architecture or None) if card is not None else None,
        size=card.preprocessing.input_size if card is not None else None,
    )


def build_model(run: TrainRun, data: Data, say: Say) -> Any:
    """The network of a run, with the given weights in it; what became of them is said.

    The head is kept where the weights were trained on the same classes in the same order, else new.
    """
    if run.model is None:
        raise ConfigError(
            f"{run.pretrained} does not tell which network it holds: name it with --model (vitrail models lists"
            " them)."
        )
    torch.manual_seed(run.seed)
    config = _config(run, len(data.classes))
    if getattr(config, "masks", False):
        raise ConfigError(
            f"{run.model} learns masks of objects, and vitrail reads no panoptic annotations yet: train"
            f" {run.model.removesuffix('_panoptic')} on boxes, or use the Python interface (docs/detect.md)."
        )
    model: Any = registry.from_config(run.model, config)
    if run.backbone is not None:
        if run.pretrained is not None:
            raise ConfigError("Give whole weights (pretrained) or those of the backbone, not both.")
        for line in load_backbone(model, folders.model_folder(run.backbone)).lines():
            say(Note(text=f"backbone: {line}", kind="receipt"))
    if run.pretrained is not None:
        path = folders.find(run.pretrained) or run.pretrained
        receipt = loading.load_pretrained(model, path, replace_head=True, asked=read_fields(run.model_kwargs))
        known = model.card.labels
        if known is not None and tuple(known) != _called(model.card, data.classes):
            model.reset_classifier(len(data.classes))
            say(Note(text="The weights' classes have other names: the head is new.", kind="receipt"))
        elif any(name.startswith("head.") for name in receipt.fresh):
            say(Note(text=f"The head is new, for {len(data.classes)} classes.", kind="receipt"))
        else:
            say(Note(text=f"The head is kept: the same {len(data.classes)} classes.", kind="receipt"))
        for line in receipt.lines():
            say(Note(text=line, kind="receipt"))
    if run.freeze == "backbone" and run.pretrained is None and run.backbone is None:
        text = (
            "The frozen backbone has random weights: the head learns from features that nothing taught. Name"
        )
        say(Note(text=f"{text} weights with --pretrained.", kind="warning"))
    model.set_grad_checkpointing(run.grad_checkpointing)
    if run.drop_path_subset and not drop_by_subset(model):
        raise ConfigError(
            f"drop_path_subset is for transformer blocks with a drop_path above 0; this {run.model} has none. Give a"
            " --drop-path, or leave it out."
        )
    if run.patch_drop:
        if run.freeze == "backbone":
            raise ConfigError(
                "A frozen backbone sees whole pictures: patch_drop is for training all of a network."
            )
        if not hasattr(model, "set_patch_drop"):
            raise ConfigError("patch_drop is for networks that classify.")
        model.set_patch_drop(run.patch_drop)
    labels = _called(model.card, data.classes)
    model.card = dataclasses.replace(
        model.card,
        labels=labels,
        folders=data.classes if labels != data.classes else (),
        ids=_ids(data),
        preprocessing=_preprocessing(run, model, data),
        source="trained with vitrail",
        data=", ".join(Path(path).name for path in run.data),
    )
    return model


def _ids(data: Data) -> tuple[int, ...]:
    """What COCO data calls its classes by number; nothing where it does not."""
    known = data.train.table.ids if isinstance(data.train, BoxSource) else {}
    ids = tuple(known.get(name) for name in data.classes)
    return cast(tuple[int, ...], ids) if all(isinstance(id, int) for id in ids) else ()


def _called(card: Card, classes: tuple[str, ...]) -> tuple[str, ...]:
    """What a card calls the classes of data."""
    return tuple(card.names.get(name, name) for name in classes)


def _config(run: TrainRun, classes: int) -> Any:
    """The family's configuration, with the fields that the run changes."""
    assert run.model is not None
    card = _card(run.pretrained)
    family = registry.family_of(run.model)
    if card is not None and card.config and card.architecture == run.model:
        config = records.from_dict(family.Config, card.config, where=f"{run.pretrained}/config.json")
    else:
        config = registry.variant(run.model)
    changes: dict[str, Any] = {"num_classes": classes}
    if run.img_size:
        changes["img_size"] = size_of(run.img_size)
    if run.drop_path is not None:
        changes["drop_path_rate"] = run.drop_path
    if run.backbone is not None:
        changes |= _backbone_fields(run.backbone, config)
    return registry.changed(config, **{**changes, **read_fields(run.model_kwargs)})


def _backbone_fields(folder: str, config: Any) -> dict[str, Any]:
    """What a dense network's configuration says of a backbone, read from the card of a classification model."""
    card = _card(folder)
    if card is None or not card.architecture:
        raise ConfigError(
            f"backbone takes the folder of a classification model made by vitrail; got {folder}."
        )
    if not isinstance(getattr(config, "backbone", None), str):
        raise ConfigError(f"backbone is for networks of boxes and masks; {type(config).__module__} has none.")
    plain = records.to_dict(registry.variant(card.architecture))
    own = ("img_size", "num_classes", "in_chans", "drop_path_rate", "drop_rate", "attn_drop_rate")
    changed = {
        name: value for name, value in card.config.items() if name not in own and plain.get(name) != value
    }
    fields: dict[str, Any] = {"backbone": card.architecture, "backbone_changes": changed}
    # What residual networks alone have:
    if hasattr(config, "dilated") and "dilated" not in plain:
        fields["dilated"] = 0
    if hasattr(config, "frozen_norm") and "norm" not in plain:
        fields["frozen_norm"] = False
    if hasattr(config, "maps"):  # a plain ViT has one map
        with torch.device("meta"):
            there = len(backbone(card.architecture, **changed).levels)
        fields["maps"] = min(config.maps, there)
        if hasattr(config, "encoded"):
            fields["encoded"] = min(config.encoded, there)
    return fields


def size_of(values: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns from one number or two."""
    if len(values) not in (1, 2):
        raise ConfigError(f"img_size takes one number, or rows and columns; got {len(values)} numbers.")
    return values[0], values[-1]


def read_fields(texts: tuple[str, ...]) -> dict[str, Any]:
    """`("width=192", "pool=mean")` as fields with values: numbers, true, false, none, words, or JSON in { }."""
    fields: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ConfigError(f"model_kwargs takes NAME=VALUE, such as patch_size=4; got {text!r}.")
        if name in fields:
            raise ConfigError(f"model_kwargs names {name} twice; once is enough.")
        fields[name] = _value(value)
    return fields


def _value(text: str) -> Any:
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ConfigError(f"model_kwargs takes JSON in {{ }}; {text} is none: {error}.") from None
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if "," in text:
        return tuple(_value(part) for part in text.strip("(),").split(","))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _preprocessing(run: TrainRun, model: Any, data: Data) -> Any:
    """The card's preprocessing; pictures that are small already lose nothing at their edges.

    A backbone keeps the brightness and contrast that it was trained with.
    """
    wanted = model.card.preprocessing
    if run.backbone is not None:
        known = _card(run.backbone).preprocessing
        wanted = dataclasses.replace(wanted, mean=known.mean, std=known.std)
    if run.pretrained is None and typical_side(data.train) <= 2 * min(wanted.input_size):
        return dataclasses.replace(wanted, crop_pct=1.0)
    return wanted


def _card(pretrained: str | None) -> Any:
    """The card of a model folder; None for a weight file, or without weights."""
    if pretrained is None or folders.find(pretrained) is None:
        return None
    return folders.load(folders.model_folder(pretrained))[1]


def freeze(model: Any, run: TrainRun) -> list[nn.Module]:
    """Freezes what the run does not train; the modules that stay in evaluation mode."""
    if run.freeze == "none":
        return []
    if not isinstance(model, Classifier):
        model.backbone.requires_grad_(False)
        return [cast(nn.Module, model.backbone)]
    trained = {id(parameter) for parameter in learned_layers(model).parameters()}
    if not trained:
        raise ModelError("A linear probe needs a model with a class layer; this one has none.")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return [cast(nn.Module, model.backbone)]


def learned_layers(model: Classifier) -> nn.ModuleList:
    """The last layers, which a linear probe trains."""
    head = cast(Any, model.head)
    return nn.ModuleList(
        [getattr(head, name) for name in ("hidden", "linear", "distilled") if hasattr(head, name)]
    )


def objective(run: TrainRun, task: Any, model: Any, runtime: Runtime) -> Objective:
    """The loss of (output, targets, images): on the labels, and on a teacher's answers where there is one."""
    if run.teacher is None:
        return lambda output, targets, images: task.loss(output, targets)
    if not isinstance(model, Classifier):
        raise ConfigError(
            "A teacher teaches classes of whole pictures; boxes and masks have no distillation."
        )
    teacher = cast(Classifier, registry.from_pretrained(run.teacher))
    if teacher.card.labels is not None and tuple(teacher.card.labels) != _called(teacher.card, task.labels):
        raise ModelError(
            f"The teacher {run.teacher} knows other classes ({', '.join(teacher.card.labels[:5])} ...) than the"
            f" data ({', '.join(task.labels[:5])} ...). Train one on these classes first."
        )
    if teacher.num_classes != len(task.labels):
        raise ModelError(f"The teacher has {teacher.num_classes} classes, the data {len(task.labels)}.")
    teacher.to(runtime.device).eval().requires_grad_(False)
    model.set_distilled_training(True)
    from_ours, to_theirs = constants(model.card.preprocessing), constants(teacher.card.preprocessing)
    # Back to pixels with our constants, and forward with the teacher's.
    factor = [theirs / ours for ours, theirs in zip(from_ours[0], to_theirs[0], strict=True)]
    shift = [
        theirs - scale * ours for ours, theirs, scale in zip(from_ours[1], to_theirs[1], factor, strict=True)
    ]
    scale, offset = (torch.tensor(values, device=runtime.device)[:, None, None] for values in (factor, shift))

    def answer(images: Tensor) -> Tensor:
        output: Tensor = teacher(images * scale.to(images) + offset.to(images))
        return output

    return Distillation(task, answer, run.distill, run.distill_weight, run.distill_temperature)


def class_weights(run: TrainRun, data: Data) -> list[float] | None:
    """What a pixel of each class counts: (median share / its class's share) ^ balance, 1 for a class without pixels.

    Median frequency balancing (Eigen and Fergus 2015, 1411.4734) is a balance of 1. None where all count alike.
    Raises ConfigError for data without masks.
    """
    if not run.balance:
        return None
    if data.train.kind != "masks":
        raise ConfigError(
            f"balance weighs the classes of masks; this data has {data.train.kind}: leave it out."
        )
    pixels = torch.tensor(list(cast(Any, data.train).counts().values()), dtype=torch.float64)
    met = pixels > 0
    weights = torch.ones_like(pixels)
    weights[met] = (pixels[met].median() / pixels[met]) ** run.balance
    return [float(weight) for weight in weights]


def has_one_layer(model: Any) -> bool:
    """Whether the logits are one linear layer away from a vector, so that the vectors can be kept."""
    if not isinstance(model, Classifier):
        return False
    head = cast(Any, model.head)
    plain = not hasattr(head, "distilled") and not len(getattr(head, "hidden", ()))
    return plain and not getattr(head.dropout, "p", 0.0)


def fresh_copy(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """The same network on the CPU with other weights, neither compiled nor sharded."""
    copy: Any = registry.from_config(model.name, model.config)
    copy.load_state_dict(dict(weights))
    copy.card = model.card
    return copy
