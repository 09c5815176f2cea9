"""The card of a model: what it is, what it wants to see, and where it comes from.

A card travels in the `config.json` of a model folder. The keys on the outside are the ones that timm
(`local-dir:`) and transformers (its timm wrapper) read; what only vitrail knows lies under `"vitrail"`.
`preprocessor_config.json` repeats the preprocessing in transformers' words.

Preprocessing is part of a model: the same picture must become the same numbers in training, evaluation,
prediction and a served model. Nobody may guess it from a name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vitrail.errors import WeightsError

CROP_MODES = ("center", "squash", "border", "fit")
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Names of resampling filters, at the numbers that Pillow and transformers give them."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training pictures, per channel: what most families' weights expect."""

CLASSES_AND_PICTURES = ("label_names", "id2label", "label2id", "num_classes", "pretrained_cfg")
"""Keys of another library's config.json that a card holds in fields of its own."""

FORMAT = 1
"""Version of the part of `config.json` under `"vitrail"`."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes the network's input."""

    input_size: tuple[int, int] = (224, 224)
    """Rows and columns of the network's input, in pixels."""

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Per channel, subtracted from values in 0..1."""

    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Per channel, divided by after the mean was subtracted."""

    interpolation: str = "bicubic"
    """Filter of the resizing, always antialiased; one of INTERPOLATIONS."""

    crop_pct: float = 0.9
    """Share of the resized picture's side that the crop keeps, in (0, 1]."""

    crop_mode: str = "center"
    """`center`: resize the short side to size / crop_pct, crop the middle. `squash`: resize both sides to
    size / crop_pct without keeping the shape, crop the middle. `border`: fit the long side and pad. `fit`: keep
    the shape and crop nothing; the short side becomes the smaller number of input_size unless the long side
    would become more than the larger, so that every picture has its own size (DETR's way)."""

    in_chans: int = 3
    """Channels of the network's input."""

    def __post_init__(self) -> None:
        if len(self.input_size) != 2 or any(side < 1 for side in self.input_size):
            raise WeightsError(
                f"input_size must be (rows, columns), at least 1 pixel, got {self.input_size}."
            )
        if self.crop_mode not in CROP_MODES:
            raise WeightsError(f"crop_mode must be one of {', '.join(CROP_MODES)}, got {self.crop_mode!r}.")
        if self.interpolation not in INTERPOLATIONS:
            raise WeightsError(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}."
            )
        if not 0 < self.crop_pct <= 1:
            raise WeightsError(f"crop_pct must lie in (0, 1], got {self.crop_pct}.")
        if self.in_chans < 1:
            raise WeightsError(f"in_chans must be at least 1, got {self.in_chans}.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.in_chans) or not all(math.isfinite(value) for value in values):
                raise WeightsError(f"{name} must hold {self.in_chans} finite numbers (or one), got {values}.")
        if any(value <= 0 for value in self.std):
            raise WeightsError(f"std must be above 0, got {self.std}.")

    @property
    def resize(self) -> tuple[int, int]:
        """Rows and columns that the crop is taken from: input size / crop_pct, rounded down."""
        rows, columns = self.input_size
        return math.floor(rows / self.crop_pct), math.floor(columns / self.crop_pct)


@dataclass(frozen=True, kw_only=True)
class Card:
    """Everything that must be known of a set of weights besides the numbers."""

    architecture: str
    """Name for `create_model`; empty where a foreign folder does not tell it."""

    task: str = "image-classification"
    """`image-classification`, `object-detection` or `image-segmentation`."""

    labels: tuple[str, ...] | None = None
    """Class names in the order of the logits; None where nobody wrote them down."""

    folders: tuple[str, ...] = ()
    """What the training data called the classes, where that is no name for people (ImageNet's n01440764): data under
    these names is understood."""

    ids: tuple[int, ...] = ()
    """The classes' ids in the training data, where it numbers them itself (COCO's `category_id`)."""

    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    """What the network wants to see."""

    preprocessing_told: bool = True
    """Whether anybody said so: a folder with neither `pretrained_cfg` nor preprocessor_config.json tells no more than
    the size, and `preprocessing` is then no answer."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """The family's Config as plain data."""

    foreign: Mapping[str, Any] = field(default_factory=dict)
    """What another library's config.json says, in its own words, besides classes and preprocessing; never written."""

    layout: str = ""
    """Name of the key layout in which `model.safetensors` is written; empty where unknown."""

    licence: str = ""
    """Licence of the weights, as an SPDX name where there is one."""

    source: str = ""
    """Where the weights come from: an address, a file name, or "trained here"."""

    sha256: str = ""
    """Hash of the weight file; filled in when a folder is saved, checked when it is loaded."""

    scores: Mapping[str, float] = field(default_factory=dict)
    """Measured or published results by name, in 0..1 (`acc1`, `acc5`)."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    """How the weights were trained, as plain data."""

    data: str = ""
    """What the weights were trained on."""

    notes: str = ""
    """Anything that a user must know."""

    @property
    def num_classes(self) -> int | None:
        """Number of logits, as far as the card tells it."""
        if "num_classes" in self.config:
            return int(self.config["num_classes"])
        return None if self.labels is None else len(self.labels)

    @property
    def names(self) -> dict[str, str]:
        """A class's name for people by what the training data called it; empty where the two are the same."""
        return dict(zip(self.folders, self.labels or (), strict=False))

    def with_classes(self, count: int) -> Card:
        """The card of the same network for other classes, which nobody has named yet."""
        config = {**self.config, "num_classes": count}
        return replace(self, labels=None, folders=(), ids=(), config=config)

    def to_json(self, library: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The content of `config.json`: timm's and transformers' keys, and `"vitrail"` for the rest.

        library: keys in another library's own words, such as timm's `architecture` and `model_args`. With
            transformers' `model_type` the keys that would make transformers think of timm stay inside.
        """
        view: dict[str, Any] = {"architecture": self.architecture}
        if self.num_classes is not None:
            view["num_classes"] = self.num_classes
        if self.labels is not None:
            view["label_names"] = list(self.labels)
            view["id2label"] = {str(index): label for index, label in enumerate(self.labels)}
            view["label2id"] = {label: index for index, label in enumerate(self.labels)}
        own: dict[str, Any] = {
            "format": FORMAT,
            "architecture": self.architecture,
            "task": self.task,
            "config": dict(self.config),
            "layout": self.layout,
            "licence": self.licence,
            "folders": list(self.folders),
            "ids": list(self.ids),
            "source": self.source,
            "sha256": self.sha256,
            "scores": dict(self.scores),
            "recipe": dict(self.recipe),
            "data": self.data,
            "notes": self.notes,
        }
        native = "model_type" in (library or {})
        (own if native else view)["pretrained_cfg"] = self._pretrained_cfg()
        if native:
            del view["architecture"]
        return {**view, **(library or {}), "vitrail": own}

    def _pretrained_cfg(self) -> dict[str, Any]:
        wanted = self.preprocessing
        view: dict[str, Any] = {
            "input_size": [wanted.in_chans, *wanted.input_size],
            "interpolation": wanted.interpolation,
            "crop_pct": wanted.crop_pct,
            "crop_mode": wanted.crop_mode,
            "mean": list(wanted.mean),
            "std": list(wanted.std),
        }
        if self.num_classes is not None:
            view["num_classes"] = self.num_classes
        if self.labels is not None:
            view["label_names"] = list(self.labels)
        if self.licence:
            view["license"] = self.licence
        return view

    def preprocessor_json(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`, in transformers' words.

        transformers has no word for cropping to a size that is not square, nor for `border`; there the
        nearest words are written, and `config.json` holds the truth.
        """
        wanted = self.preprocessing
        rows, columns = wanted.resize
        short = wanted.crop_mode != "squash"
        size = {"shortest_edge": min(rows, columns)} if short else {"height": rows, "width": columns}
        if wanted.crop_mode == "fit":
            size = {"shortest_edge": min(wanted.input_size), "longest_edge": max(wanted.input_size)}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": wanted.in_chans == 3,
            "do_resize": True,
            "size": size,
            "resample": INTERPOLATIONS.index(wanted.interpolation),
            "do_center_crop": wanted.crop_mode != "fit",
            "crop_size": {"height": wanted.input_size[0], "width": wanted.input_size[1]},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(wanted.mean),
            "image_std": list(wanted.std),
        }

    @classmethod
    def from_json(cls, view: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Card:
        """A card from `config.json` as vitrail, timm or transformers write it.

        Args:
            view: content of `config.json`.
            preprocessor: content of `preprocessor_config.json`, for a `view` without `pretrained_cfg`.

        Raises:
            WeightsError: a value has the wrong type or lies outside its range.
        """
        own = view.get("vitrail") or {}
        if not isinstance(own, Mapping):
            raise WeightsError(f"config.json must hold an object under 'vitrail', got {own!r}.")
        if own.get("format", FORMAT) != FORMAT:
            raise WeightsError(
                f"config.json has vitrail format {own['format']}, this version reads {FORMAT}: update vitrail"
                " or save the folder again."
            )
        try:
            config = dict(own.get("config") or {})
            if not own and "num_classes" in view:
                config["num_classes"] = int(view["num_classes"])
            return cls(
                architecture=str(own.get("architecture") or view.get("architecture") or ""),
                task=own.get("task", "image-classification"),
                labels=_labels(view),
                folders=tuple(str(name) for name in own.get("folders") or ()),
                ids=tuple(int(number) for number in own.get("ids") or ()),
                preprocessing=_preprocessing({**own, **view}, preprocessor or {}),
                preprocessing_told=bool(preprocessor) or _by_timm({**own, **view}) is not None,
                config=config,
                foreign={}
                if own
                else {key: value for key, value in view.items() if key not in CLASSES_AND_PICTURES},
                layout=own.get("layout", ""),
                licence=own.get("licence") or (view.get("pretrained_cfg") or {}).get("license") or "",
                source=own.get("source", ""),
                sha256=own.get("sha256", ""),
                scores=dict(own.get("scores") or {}),
                recipe=dict(own.get("recipe") or {}),
                data=own.get("data", ""),
                notes=own.get("notes", ""),
            )
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise WeightsError(f"config.json holds a value of the wrong kind: {error}.") from error


def _labels(view: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names in the order of the logits, from whichever key holds them."""
    names = view.get("label_names") or (view.get("pretrained_cfg") or {}).get("label_names")
    if names:
        return tuple(str(name) for name in names)
    by_number = view.get("id2label")
    if not by_number:
        return None
    numbers = sorted(int(number) for number in by_number)
    if numbers != list(range(len(numbers))):
        return None  # detection models leave holes in their numbering; a tuple cannot say that
    return tuple(str(by_number.get(str(number), by_number.get(number))) for number in numbers)


def _by_timm(view: Mapping[str, Any]) -> Any:
    """The object in which timm tells the preprocessing, if there is one."""
    wanted = view.get("pretrained_cfg")
    if wanted is None and "architecture" in view and "mean" in view:
        return view  # timm's oldest files hold everything in one dict
    return wanted


def _preprocessing(view: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Preprocessing:
    wanted = _by_timm(view)
    if wanted is not None:
        channels, rows, columns = wanted.get("input_size", (3, 224, 224))
        return Preprocessing(
            input_size=(int(rows), int(columns)),
            mean=tuple(float(value) for value in wanted.get("mean", IMAGENET_MEAN)),
            std=tuple(float(value) for value in wanted.get("std", IMAGENET_STD)),
            interpolation=wanted.get("interpolation", "bicubic"),
            crop_pct=float(wanted.get("crop_pct", 0.875)),
            crop_mode=wanted.get("crop_mode", "center"),
            in_chans=int(channels),
        )
    return _from_transformers(view, preprocessor)


def _from_transformers(view: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Preprocessing:
    """transformers resizes straight to the input, or to a short edge and crops, or to a short and a long edge."""
    side = view.get("image_size", 224)
    size = preprocessor.get("size")
    cropped = preprocessor.get("do_center_crop", False) and preprocessor.get("crop_size") is not None
    edges = None if cropped else _edges(size, preprocessor.get("max_size"))
    resized = _sides(size, side) if edges is None else edges
    wanted = _sides(preprocessor["crop_size"], side) if cropped else resized
    short = isinstance(size, Mapping) and "shortest_edge" in size
    return Preprocessing(
        input_size=wanted,
        mean=tuple(float(value) for value in preprocessor.get("image_mean", (0.5, 0.5, 0.5))),
        std=tuple(float(value) for value in preprocessor.get("image_std", (0.5, 0.5, 0.5))),
        interpolation=INTERPOLATIONS[int(preprocessor.get("resample", 2))],
        crop_pct=min(1.0, min(wanted) / min(resized)),
        crop_mode="fit" if edges is not None else "center" if short else "squash",
        in_chans=int(view.get("num_channels", 3)),
    )


def _edges(size: Any, most: Any) -> tuple[int, int] | None:
    """The short edge and the most of the long one, where a size is told by both (`most` is the older way)."""
    if isinstance(size, Mapping):
        short, most = size.get("shortest_edge"), size.get("longest_edge", most)
    else:
        short = size if isinstance(size, int) else None
    return None if short is None or most is None else (int(short), int(most))


def _sides(size: Any, default: Any) -> tuple[int, int]:
    """Rows and columns from the three ways in which transformers writes a size."""
    size = default if size is None else size
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
        return int(size["height"]), int(size["width"])
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[1])
    return int(size), int(size)
