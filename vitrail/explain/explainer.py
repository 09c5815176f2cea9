"""One call for every family: a picture in, a map out, with what it means and how far to trust it."""

from __future__ import annotations

import dataclasses
import operator
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from vitrail.data.finding import some
from vitrail.data.image import decode
from vitrail.data.transforms import Geometry, Preprocess, normalise
from vitrail.engines.pytorch import TorchEngine
from vitrail.errors import ConfigError, suggestion
from vitrail.explain.faithfulness import CONTROLS, Fill, Score, centre_map, fills_for, random_map, score_maps
from vitrail.explain.heat import Heat
from vitrail.explain.methods import (
    METHODS,
    Options,
    check_options,
    choose,
    default_method,
    heat_of,
    methods_for,
)
from vitrail.explain.occlusion import finest_stride, region_grid
from vitrail.explain.overlay import Pixels, contoured, on_picture, outlined, overlay
from vitrail.explain.places import PIXELS
from vitrail.explain.questions import Asked, box_question, region_question
from vitrail.explain.still import held_still
from vitrail.models.registry import name_of
from vitrail.tasks.classify import Classify, Prediction
from vitrail.tasks.detect import Detect
from vitrail.tasks.registry import make_task

if TYPE_CHECKING:
    from PIL import Image

    Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any] | Tensor

STEPS = 10
"""Steps of the deletion and insertion curves."""

CHANCES = 3
"""Random maps that a single picture's score is set beside."""


NOTHING = {"random": "a random map", "centre": "pointing at the middle"}
"""What the controls are called among people."""


class Subject(NamedTuple):
    """What is explained: a class, its probability, and the whole answer."""

    number: int
    score: float
    prediction: Prediction
    outline: tuple[float, float, float, float] | None = None
    region: Bool[Tensor, "I J"] | None = None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why one class, for one picture, by one method."""

    source: str
    model: str
    method: str
    target: int
    """Number of the class that is explained."""
    label: str
    score: float
    """The model's probability of that class, 0..1."""
    prediction: Prediction
    class_specific: bool
    """Whether the map is about this class; if not, it must not be read as the reason for it."""
    heat: Heat
    picture: UInt8[Tensor, "3 H W"]
    """The upright picture."""
    pixels: UInt8[Tensor, "C I J"]
    """What the network saw of it."""
    geometry: Geometry
    regions: tuple[int, int]
    """Regions, rows and columns, that the map is scored on."""
    faithfulness: dict[str, Score] = field(default_factory=dict)
    """Deletion and insertion for each fill; empty unless asked for."""
    controls: dict[str, dict[str, Score]] = field(default_factory=dict)
    """The same for maps that know nothing: by fill, then random and centre."""
    outline: tuple[float, float, float, float] | None = None
    """The box that is explained, x1, y1, x2, y2 in shares of what the network saw; None where none is."""
    region: Bool[Tensor, "I J"] | None = None
    """The pixels of what the network saw that are explained; None where none are."""

    @property
    def values(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The raw map, [h, w], over the cells of `heat.placement`."""
        return self.heat.values[0].float().numpy()

    def on_picture(self) -> Float[Tensor, "H W"]:
        """The map at every pixel of the upright picture, NaN where the network did not look."""
        return on_picture(self.shown, self.geometry)

    def overlay(self) -> Pixels:
        """The map over the picture, uint8 [H, W, 3] at its size, with an outline of the box or region explained."""
        drawn = overlay(self.picture, self.on_picture())
        if self.region is not None:
            asked = Heat(values=self.region[None].float().cpu(), placement=PIXELS, units="")
            return contoured(drawn, on_picture(asked, self.geometry, smooth=False) > 0)
        return drawn if self.corners is None else outlined(drawn, self.corners)

    @property
    def corners(self) -> tuple[float, float, float, float] | None:
        """The box that is explained, x1, y1, x2, y2 in pixels of the upright picture."""
        if self.outline is None:
            return None
        (rows, columns), place = self.geometry.output, self.geometry
        x1, y1, x2, y2 = self.outline
        return (
            x1 * columns * place.scale_x + place.shift_x, y1 * rows * place.scale_y + place.shift_y,
            x2 * columns * place.scale_x + place.shift_x, y2 * rows * place.scale_y + place.shift_y,
        )  # fmt: skip

    @property
    def shown(self) -> Heat:
        """The map as it is drawn and scored: one of single pixels is averaged over `regions`."""
        return self.heat.shown(self.geometry.output, self.regions)

    @property
    def caution(self) -> str:
        """What must be said aloud beside the map; empty where there is nothing."""
        return "; ".join(self.cautions)

    @property
    def cautions(self) -> list[str]:
        """The same, one by one."""
        said = []
        if float(self.heat.values.max()) == float(self.heat.values.min()):
            said.append("the map is the same everywhere: the method found nothing to tell places apart by")
        if not self.class_specific:
            said.append(f"does not know classes: it shows where the model looks, not why {self.label}")
        beaten: dict[str, list[str]] = {}  # what knows nothing -> the fills under which it is as good
        for fill, score in self.faithfulness.items():
            worse = [
                NOTHING[name] for name, control in self.controls[fill].items() if score.gap <= control.gap
            ]
            if worse:
                beaten.setdefault(" and ".join(worse), []).append(fill)
        for worse_than, fills in beaten.items():
            said.append(f"by deletion and insertion ({', '.join(fills)}) no better than {worse_than}")
        return said

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the pictures."""
        placement, elsewhere = self.heat.placement, self.heat.elsewhere
        return {
            "source": self.source,
            "model": self.model,
            "precision": "fp32",
            "method": self.method,
            "class_specific": self.class_specific,
            "label": self.label,
            "index": self.target,
            "score": self.score,
            "predicted": self.prediction.label,
            "box": None if self.corners is None else [round(corner, 2) for corner in self.corners],
            "region": None if self.region is None else round(float(self.region.float().mean()), 6),
            "units": self.heat.units,
            "where": self.heat.where,
            "elsewhere": None if elsewhere is None else round(float(elsewhere[0]), 6),
            "cells": list(self.heat.values.shape[1:]),
            "drawn_cells": list(self.shown.values.shape[1:]),
            "cell": {  # place (y, x) in cells lies at (y * scale_y + shift_y, x * scale_x + shift_x) in the picture
                "scale_y": placement.scale_y * self.geometry.scale_y,
                "scale_x": placement.scale_x * self.geometry.scale_x,
                "shift_y": placement.shift_y * self.geometry.scale_y + self.geometry.shift_y,
                "shift_x": placement.shift_x * self.geometry.scale_x + self.geometry.shift_x,
            },
            "faithfulness": {fill: score.to_dict() for fill, score in self.faithfulness.items()},
            "controls": {
                fill: {name: score.to_dict() for name, score in found.items()}
                for fill, found in self.controls.items()
            },
            "caution": self.caution,
        }


def cautions(explanations: Sequence[Explanation]) -> list[str]:
    """What must be said aloud beside several methods' maps of one picture: each thing once, with whom it concerns."""
    said: dict[str, list[str]] = {}
    for found in explanations:
        for caution in found.cautions:
            said.setdefault(caution, []).append(found.method)
    return [f"{', '.join(methods)}: {caution}" for caution, methods in said.items()]


class Explainer:
    """A model that answers where it looked. One call at a time; calls from several threads wait for each other.

    Args:
        model: a model folder, a run folder, or a network that is already built.
        device: auto, cpu, cuda, cuda:N or mps. Explanations are computed in float32.

    Example:
        explainer = Explainer("runs/flowers/model")
        found = explainer("rose.jpg", target="rose", method="relevance", score=True)
        Image.fromarray(found.overlay()).save("rose-explained.png")
    """

    @torch.inference_mode(False)  # weights that are loaded in it would never take part in a gradient
    def __init__(self, model: str | Path | nn.Module, *, device: str = "auto") -> None:
        self.engine = TorchEngine(model, device=device, precision="fp32")
        self.network: nn.Module = self.engine.network
        """The network that methods look into: a detector or segmenter is asked about one box or region."""
        self.labels = self.engine.card.labels or tuple(
            f"class {index}" for index in range(self.engine.classes)
        )
        task = self.engine.card.task
        if task != "image-classification":
            self.network = Asked(self.network, make_task(task, self.labels))
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return name_of(self.network)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that are defined for this model."""
        return methods_for(self.network)

    @property
    def default(self) -> str:
        """The method that `auto` takes."""
        return default_method(self.network)

    @cached_property
    def preprocess(self) -> Preprocess:
        """The model's preprocessing."""
        return Preprocess(self.engine.card.preprocessing)

    @cached_property
    def regions(self) -> tuple[int, int]:
        """Regions, rows and columns, on which maps are compared: whole cells of the first grid, at most 16 a side."""
        return region_grid(self.engine.card.preprocessing.input_size, finest_stride(self.network))

    @property
    def device(self) -> torch.device:
        return self.engine.runtime.device

    def class_number(self, target: str | int) -> int:
        """The number of a class by name or number. Raises ConfigError with near matches, or for a name of several."""
        named = [number for number, label in enumerate(self.labels) if label == target]
        if len(named) > 1:
            raise ConfigError(
                f"{target!r} is the name of {len(named)} classes, {some(named)}: give the number."
            )
        if named:
            return named[0]
        if isinstance(target, str):
            number = int(target) if target.isdecimal() else -1
        else:
            number = operator.index(target) if hasattr(target, "__index__") else -1
        if not 0 <= number < len(self.labels):
            near = suggestion(str(target), self.labels)
            near = near or f" It knows {some(self.labels)}, by number 0 to {len(self.labels) - 1}."
            raise ConfigError(f"{target!r} is no class of this model.{near}")
        return number

    @torch.inference_mode(False)  # methods need gradients, wherever they are called from
    def __call__(
        self,
        image: Picture,
        target: str | int | None = None,
        method: str = "auto",
        *,
        score: bool = False,
        seed: int = 0,
        name: str = "",
        pixels: Tensor | None = None,
        layer: int | None = None,
        head: int | None = None,
        token: str = "",
        steps: int = 32,
        box: int | None = None,
    ) -> Explanation:
        """Explain one picture: its class, one of its boxes, or the region of one of its classes.

        Args:
            image: a path, the bytes of an image file, a PIL image, a uint8 array [H, W, 3] or tensor [3, H, W].
            target: the class, by name or number; the predicted one by default, and in masks the largest.
            method: auto, or one of `methods`.
            score: measure deletion and insertion, beside a random map's and the centre's.
            seed: of the random maps that the score is set beside.
            name: what the picture is called in the result.
            pixels: what the network sees, [C, h, w], where it has been prepared already; `image` is then only drawn
                on, and may be smaller than the picture that was prepared.
            layer, head, token, steps: see `methods.Options`.
            box: of a detector, which box, counted from the surest (of the target, if there is one): 0 by default.

        Raises:
            ImageError: the picture cannot be read. ConfigError: an unknown class, method, layer, head or token.
            UnsupportedError: the method is not defined for this model.
        """
        options = Options(layer=layer, head=head, token=token, steps=steps, grid=self.regions)
        method = choose(self.network, method)
        check_options([method], options)
        name = name or (os.fspath(image) if isinstance(image, str | os.PathLike) else "image")
        picture = decode(_array(image), name=name)
        pixels = self.preprocess(picture) if pixels is None else pixels
        with self._lock:
            images = normalise(pixels[None].to(self.device), self.engine.card.preprocessing)
            subject = self._subject(images, target, box, name)
            number = subject.number
            heat = heat_of(self.network, images, [number], method, options)
            faithfulness, controls = self._scores(images, heat, number, seed) if score else ({}, {})
        return Explanation(
            source=name,
            model=self.name,
            method=method,
            target=number,
            label=self.labels[number],
            score=subject.score,
            prediction=subject.prediction,
            class_specific=METHODS[method].class_specific,
            heat=heat,
            picture=picture,
            pixels=pixels,
            geometry=self.preprocess.geometry(int(picture.shape[1]), int(picture.shape[2])),
            regions=self.regions,
            faithfulness=faithfulness,
            controls=controls,
            outline=subject.outline,
            region=subject.region,
        )

    def _subject(self, images: Tensor, target: str | int | None, box: int | None, name: str) -> Subject:
        """What is explained about one image: a class of the whole, a box, or the region of a class."""
        wanted = None if target is None else self.class_number(target)
        if isinstance(self.network, Asked):
            return self._asked(self.network, images, wanted, box, name)
        if box is not None:
            raise ConfigError("box goes with detectors; this model gives no boxes. Leave it out.")
        with held_still(self.network), torch.no_grad():
            logits = self.network(images)
        return self._answered(logits, wanted, name)

    def _answered(self, logits: Tensor, wanted: int | None, name: str) -> Subject:
        prediction = Classify(self.labels).decode(logits, top_k=5, sources=[name])[0]
        number = int(logits[0].argmax()) if wanted is None else wanted
        return Subject(number, float(logits[0].float().softmax(dim=0)[number]), prediction)

    def _asked(self, asked: Asked, images: Tensor, wanted: int | None, box: int | None, name: str) -> Subject:
        """The question about a detector's box or a segmenter's region, and the answer to it."""
        with held_still(asked), torch.no_grad():
            output = asked.network(images)
        outline, region = None, None
        if isinstance(asked.task, Detect):
            number, outline = box_question(asked, output, wanted, box or 0, self.labels)
            wanted = number
        elif box is not None:
            raise ConfigError("box goes with detectors; this model gives every pixel a class. Leave it out.")
        else:
            wanted, region = region_question(asked, output, wanted, self.labels)
        answer = asked.answer(output)[:, : len(self.labels)]
        rest = self._answered(answer, wanted, name)
        # As they are: "nothing there" has the rest, which no softmax may share out.
        shares = answer[0].exp().tolist()
        top = tuple(dataclasses.replace(guess, score=shares[guess.index]) for guess in rest.prediction.top)
        prediction = dataclasses.replace(rest.prediction, top=top)
        return Subject(wanted, shares[wanted], prediction, outline, region)

    def _scores(
        self, images: Tensor, heat: Heat, target: int, seed: int
    ) -> tuple[dict[str, Score], dict[str, dict[str, Score]]]:
        """The map's scores, and those of the centre and of the mean of some random maps."""
        size = (images.shape[2], images.shape[3])
        chances = [random_map(self.regions, seed + number) for number in range(CHANCES)]
        controlled = [centre_map(self.regions), *chances]
        faithfulness: dict[str, Score] = {}
        controls: dict[str, dict[str, Score]] = {}
        for fill in fills_for(self.network):
            maps = torch.stack([scored(heat, size, self.regions, fill), *controlled])
            mine, centre, *random = score_maps(self.network, images[0], target, maps, fill=fill, steps=STEPS)
            chance = Score(
                deletion=sum(found.deletion for found in random) / len(random),
                insertion=sum(found.insertion for found in random) / len(random),
            )
            faithfulness[fill] = mine
            controls[fill] = dict(zip(CONTROLS, (chance, centre), strict=True))
        return faithfulness, controls


def scored(heat: Heat, size: tuple[int, int], regions: tuple[int, int], fill: Fill) -> Float[Tensor, "r c"]:
    """The first map of a batch as one fill ranks it: means over regions of pixels, or one value a token removed."""
    return (heat.ranked if fill == "removal" else heat.regions)(size, regions)[0]


def _array(image: Any) -> Any:
    """What `decode` takes: a tensor [3, H, W] as an array [H, W, 3], everything else as it is."""
    return image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) else image


def explain(
    model: str | Path | nn.Module | Explainer,
    image: Picture,
    target: str | int | None = None,
    method: str = "auto",
    **options: Any,
) -> Explanation:
    """Explain one picture with one call; see `Explainer`, which is quicker for many."""
    explainer = model if isinstance(model, Explainer) else Explainer(model)
    return explainer(image, target, method, **options)
