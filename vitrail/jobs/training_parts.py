"""What a training run is put together from: its data, its network, and the record of both."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn

import vitrail
from vitrail import config as records
from vitrail.data.image import decode
from vitrail.data.sources import Source, open_splits
from vitrail.errors import ConfigError, DataError, ModelError
from vitrail.jobs.doctor import usable_cores
from vitrail.jobs.plan import Facts
from vitrail.models import loading, registry
from vitrail.models.classifier import Classifier
from vitrail.runs import TrainRun
from vitrail.runtime import Runtime
from vitrail.train.log import Note
from vitrail.weights import folder as folders

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

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


def open_data(run: TrainRun, say: Say) -> Data:
    """The pictures of a run. Test pictures never stand in for validation pictures that are missing:
    those are then held back from the training pictures."""
    found = open_splits(run.data, val=run.val, val_share=run.val_share, seed=run.seed)
    train, val, test = found.train, found.val, found.test
    if train is None:
        raise DataError(f"{', '.join(run.data)} holds no training pictures, only {', '.join(found.given)}.")
    for note in found.notes:
        say(Note(text=note))
    return Data(train=train, val=val, test=test, fingerprint=train.fingerprint())


def gather_facts(run: TrainRun, data: Data, runtime: Runtime) -> Facts:
    """What the plan wants to know."""
    card = _card(run.pretrained)
    return Facts(
        images=len(data.train),
        classes=len(data.classes),
        side=typical_side(data.train),
        device=runtime.device.type,
        cores=usable_cores(),
        digits="digits" in run.data,
        pretrained=(card.architecture or None) if card is not None else None,
        size=card.preprocessing.input_size if card is not None else None,
    )


def typical_side(source: Source, looks: int = 24) -> int:
    """The middle short side of a few pictures spread over a source, in pixels."""
    sides = []
    for index in numpy.linspace(0, len(source) - 1, min(looks, len(source))).astype(int).tolist():
        try:
            sides.append(min(decode(source.read(index), name=source.name(index)).shape[1:]))
        except DataError:
            continue
    if not sides:
        raise DataError(f"Not one of {looks} training pictures can be read; look with vitrail data check.")
    return sorted(sides)[len(sides) // 2]


def build_model(run: TrainRun, data: Data, say: Say) -> Classifier:
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
    model = cast(Classifier, registry.from_config(run.model, config))
    if run.pretrained is not None:
        receipt = loading.load_pretrained(model, run.pretrained, replace_head=True)
        known = model.card.labels
        if known is not None and tuple(known) != data.classes:
            model.reset_classifier(len(data.classes))
            say(Note(text="The weights' classes have other names: the head is new.", kind="receipt"))
        elif any(name.startswith("head.") for name in receipt.fresh):
            say(Note(text=f"The head is new, for {len(data.classes)} classes.", kind="receipt"))
        else:
            say(Note(text=f"The head is kept: the same {len(data.classes)} classes.", kind="receipt"))
        for line in receipt.lines():
            say(Note(text=line, kind="receipt"))
    model.set_grad_checkpointing(run.grad_checkpointing)
    model.card = dataclasses.replace(
        model.card,
        labels=data.classes,
        preprocessing=_preprocessing(run, model, data),
        source="trained with vitrail",
        data=", ".join(Path(path).name for path in run.data),
    )
    return model


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
    return registry.changed(config, **changes, **read_fields(run.model_kwargs))


def size_of(values: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns from one number or two."""
    if len(values) not in (1, 2):
        raise ConfigError(f"img_size takes one number, or rows and columns; got {len(values)} numbers.")
    return values[0], values[-1]


def read_fields(texts: tuple[str, ...]) -> dict[str, Any]:
    """`("width=192", "pool=mean")` as fields with values: numbers, true, false, none or words."""
    fields: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ConfigError(f"model_kwargs takes NAME=VALUE, such as patch_size=4; got {text!r}.")
        fields[name] = _value(value)
    return fields


def _value(text: str) -> Any:
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


def _preprocessing(run: TrainRun, model: Classifier, data: Data) -> Any:
    """The card's preprocessing; pictures that are small already lose nothing at their edges."""
    wanted = model.card.preprocessing
    if run.pretrained is None and typical_side(data.train) <= 2 * min(wanted.input_size):
        return dataclasses.replace(wanted, crop_pct=1.0)
    return wanted


def _card(pretrained: str | None) -> Any:
    """The card of a model folder; None for a weight file, or without weights."""
    if pretrained is None or not Path(pretrained).is_dir():
        return None
    return folders.load(pretrained)[1]


def freeze(model: Classifier, run: TrainRun) -> list[nn.Module]:
    """Freezes what the run does not train; the modules that stay in evaluation mode."""
    if run.freeze == "none":
        return []
    trained = {id(parameter) for parameter in learned_layers(model).parameters()}
    if not trained:
        raise ModelError("A linear probe needs a model with a class layer; this one has none.")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return [model.backbone]


def learned_layers(model: Classifier) -> nn.ModuleList:
    """The last layers, which a linear probe trains."""
    head = cast(Any, model.head)
    return nn.ModuleList(
        [getattr(head, name) for name in ("hidden", "linear", "distilled") if hasattr(head, name)]
    )


def has_one_layer(model: Classifier) -> bool:
    """Whether the logits are one linear layer away from a vector, so that the vectors can be kept."""
    head = cast(Any, model.head)
    plain = not hasattr(head, "distilled") and not len(getattr(head, "hidden", ()))
    return plain and not getattr(head.dropout, "p", 0.0)


def fresh_copy(model: Classifier, weights: Mapping[str, Tensor]) -> Classifier:
    """The same network on the CPU with other weights, neither compiled nor sharded."""
    copy = cast(Classifier, registry.from_config(model.name, model.config))
    copy.load_state_dict(dict(weights))
    copy.card = model.card
    return copy


def versions() -> dict[str, str]:
    """What a result may depend on besides the record of its run."""
    return {
        "vitrail": vitrail.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


# Fields in which a resumed run may differ from the one it goes on with: where and how fast it computes, how long
# it goes on, and how often it looks up.
FREE = {
    "output", "resume", "workers", "device", "compile", "shard", "keep", "patience", "epochs", "steps",
    "eval_every", "save_every", "deterministic", "max_bad_share", "grad_checkpointing", "recipe", "data", "val",
    "precision",
}  # fmt: skip


def check_same(before: Mapping[str, Any], run: TrainRun, where: Path) -> None:
    """Raises ConfigError when a checkpoint belongs to another run than the one asked for."""
    now = records.to_dict(run)
    changed = [name for name in now if name not in FREE and name in before and before[name] != now[name]]
    if changed:
        listed = ", ".join(f"{name} was {before[name]}, is {now[name]}" for name in changed[:4])
        raise ConfigError(
            f"{where} holds another run ({listed}). Give the same settings to go on with it, --resume none to"
            " start it anew, or another --output."
        )
