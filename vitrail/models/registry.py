"""The table of families, and models by name.

A family is a module with six names: `Config`, `build`, `VARIANTS`, `TINY`, `CARDS`, `RENAMES`. Packages outside
vitrail bring their own: `create_model("their_package.their_module:variant")`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import logging
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from vitrail import config as records
from vitrail.errors import ConfigError, ModelError, suggestion
from vitrail.models.model import Model
from vitrail.weights import shipped
from vitrail.weights.card import Card

logger = logging.getLogger(__name__)

CLASSIFICATION = "image-classification"

FAMILIES: dict[str, str] = {
    # family   module
    "vit":     "vitrail.models.vit",
    "deit":    "vitrail.models.deit",
    "cait":    "vitrail.models.cait",
    "t2t":     "vitrail.models.t2t",
    "performer": "vitrail.models.performer",
    "pvt":     "vitrail.models.pvt",
    "swin":    "vitrail.models.swin",
    "pit":     "vitrail.models.pit",
    "resnet":  "vitrail.models.resnet",
    "senet":   "vitrail.models.senet",
    "nonlocal": "vitrail.models.nonlocal_net",
    "detr":    "vitrail.models.detr",
    "quick_detr": "vitrail.models.quick_detr",
    "fcos":    "vitrail.models.fcos",
    "setr":    "vitrail.models.setr",
    "trans2seg": "vitrail.models.trans2seg",
    "fpn":     "vitrail.models.fpn",
}  # fmt: skip

PARTS = ("Config", "build", "VARIANTS", "CARDS", "RENAMES")
"""What a family's module must have to be used; TINY is for tests."""


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Names of all variants that match a shell pattern (`"vit_*_384"`) or contain the text, sorted; with `pretrained`
    those of the models that ship, with their tags."""
    names = (
        shipped.names()
        if pretrained
        else [name for family in FAMILIES for name in module_of(family).VARIANTS]
    )
    return sorted(name for name in names if fnmatch.fnmatch(name, pattern) or pattern in name)


def families(task: str = CLASSIFICATION) -> tuple[str, ...]:
    """The families whose networks do a task: "image-classification", "object-detection", "image-segmentation"."""
    return tuple(family for family in FAMILIES if task_of(module_of(family)) == task)


def task_of(module: ModuleType) -> str:
    """What a family's networks do: its TASK, or classification."""
    return getattr(module, "TASK", CLASSIFICATION)


def is_model(name: str) -> bool:
    """Whether `create_model` knows the name."""
    return any(_bare(name) in module_of(family).VARIANTS for family in _likely(name))


def family_of(name: str) -> ModuleType:
    """The family module that has a variant of this name. Raises ModelError with near matches."""
    if ":" in name:
        return _outside(name)
    for family in _likely(name):
        if _bare(name) in module_of(family).VARIANTS:
            return module_of(family)
    raise ModelError(
        f"There is no model {name!r}.{suggestion(_bare(name), list_models())} `vitrail models` lists them all."
    )


def family_name(module: ModuleType) -> str:
    """The key in FAMILIES of a family module; an outside module goes by its own name."""
    return next((family for family, path in FAMILIES.items() if path == module.__name__), module.__name__)


def name_of(network: object) -> str:
    """The name that a network was built by; its class's where it was not built here."""
    return str(getattr(network, "name", "")) or type(network).__name__


def variant(name: str, **changes: Any) -> Any:
    """The configuration of a variant, with some fields changed. Raises ModelError on unknown names and fields."""
    return changed(family_of(name).VARIANTS[_bare(name)], **changes)


def changed(config: Any, **changes: Any) -> Any:
    """A family's configuration with some fields changed; one number stands for a square size."""
    hints = typing.get_type_hints(type(config))
    values = {
        field: (value, value) if isinstance(value, int) and _is_pair(hints.get(field)) else value
        for field, value in changes.items()
    }
    try:
        return records.override(config, values)
    except ConfigError as error:
        raise ModelError(str(error)) from None


def create_model(
    name: str,
    pretrained: bool | str | Path = False,
    *,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    **changes: Any,
) -> Model:
    """Build a model by name, and load weights into it where a path is given.

    name: a variant (`list_models()`), with or without a `.tag`, or `package.module:variant`. The full name of a model
        that ships means its configuration, whatever weights it gets; other tags (timm's) change nothing.
    pretrained: a model folder or a weight file in any published layout of the family; True takes the weights
        that ship with vitrail, and their configuration in place of the variant's. The receipt of what was loaded is
        the model's `receipt`.
    num_classes, img_size, in_chans, changes: replace fields of the variant's Config. Where the classes differ from
        the file's, the last layer is new; positions are resampled to the grid.

    Raises ModelError on unknown names, fields and illegal combinations, WeightsError on files that do not fit.
    """
    family = family_of(name)
    asked = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans}
    changes |= {field: value for field, value in asked.items() if value is not None}
    path = _shipped(name) if pretrained is True else pretrained
    told = path if pretrained is True else shipped.by_full_name(name)
    config = changed(_kept_config(family, told), **changes) if told else variant(name, **changes)
    if path and num_classes is None:
        config = _classes_of(family, config, path)
    model = from_config(name, config)
    if path:
        from vitrail.models.loading import load_pretrained

        receipt = load_pretrained(model, path, replace_head=num_classes is not None, asked=changes)
        logger.info(receipt.summary())
    return model


def from_config(name: str, config: Any) -> Model:
    """The network of a configuration, with name, family, configuration and card attached."""
    module = family_of(name)
    model: Model = module.build(config)
    model.name, model.family, model.config = _bare(name), family_name(module), config
    model.card = default_card(name, config)
    return model


def from_pretrained(folder: str | Path) -> Model:
    """The model of a folder that vitrail saved, ready to use (evaluation mode)."""
    from vitrail.models.loading import load_folder

    return load_folder(folder)


def default_card(name: str, config: Any) -> Card:
    """The variant's card, brought to a configuration's size, channels and classes."""
    bare = _bare(name)
    family = family_of(name)
    card: Card = family.CARDS.get(bare, Card(architecture=bare, task=task_of(family)))
    if config.in_chans == card.preprocessing.in_chans:
        mean, std = card.preprocessing.mean, card.preprocessing.std
    else:
        mean, std = (0.5,) * config.in_chans, (0.5,) * config.in_chans
    preprocessing = dataclasses.replace(
        card.preprocessing, input_size=config.img_size, in_chans=config.in_chans, mean=mean, std=std
    )
    ids = card.ids if len(card.ids) == config.num_classes else ()  # of other classes, they would be wrong
    return dataclasses.replace(
        card, architecture=bare, preprocessing=preprocessing, ids=ids, config=records.to_dict(config)
    )


def _classes_of(family: ModuleType, config: Any, path: str | Path) -> Any:
    """The configuration with as many classes as the file's head has, since nobody asked for another number."""
    from vitrail.models.loading import classes_in

    count = classes_in(family, config, path)
    return config if count is None else changed(config, num_classes=count)


def _shipped(name: str) -> Path:
    found = shipped.find(name)
    if found is None:
        several = [known for known in shipped.names() if known.partition(".")[0] == _bare(name)]
        raise ModelError(
            f"Several weights of {name} ship: name one, {' or '.join(several)}."
            if len(several) > 1
            else f"No weights of {name} ship with vitrail; those of {', '.join(shipped.names())} do. Give a model"
            " folder or a weight file: pretrained='PATH'."
        )
    return found


def _kept_config(family: ModuleType, folder: str | Path) -> Any:
    """The configuration that a model folder's card tells."""
    from vitrail.weights.folder import read_card

    return records.from_dict(family.Config, read_card(str(folder)).config, where=f"{folder}/config.json")


def _bare(name: str) -> str:
    """The variant's name without its tag or its package."""
    return name.rpartition(":")[2].partition(".")[0]


def _likely(name: str) -> Iterator[str]:
    """Families, those whose name begins the model's name first, so that most look-ups import one module."""
    yield from sorted(FAMILIES, key=lambda family: not name.startswith(family))


def module_of(family: str) -> ModuleType:
    """The module of a family, by its key in FAMILIES."""
    return importlib.import_module(FAMILIES[family])


def _outside(name: str) -> ModuleType:
    """The family module of `package.module:variant`. Raises ModelError where it is none, or has no such variant."""
    path = name.partition(":")[0]
    try:
        module = importlib.import_module(path)
    except (ImportError, ValueError, TypeError) as error:  # the last two: an empty path, a relative one
        raise ModelError(f"The package of {path!r} cannot be imported: {error}.") from None
    absent = [part for part in PARTS if not hasattr(module, part)]
    if absent:
        raise ModelError(
            f"{path} is no family of networks: it lacks {', '.join(absent)}. A family's module has"
            f" {', '.join(PARTS)}."
        )
    if _bare(name) not in module.VARIANTS:
        raise ModelError(
            f"There is no model {_bare(name)!r} in {path}.{suggestion(_bare(name), module.VARIANTS)}"
        )
    return module


def _is_pair(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple and typing.get_args(hint) == (int, int)
