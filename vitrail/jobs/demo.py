"""`vitrail demo`: the records of a tour through the verbs, on digits that come with scikit-learn, then on a photograph
of a cat that comes with scikit-image and a model that ships."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from vitrail.config import from_dict, read_toml
from vitrail.data.image import decode
from vitrail.data.sources import Source, open_splits
from vitrail.jobs.plan import find_recipe
from vitrail.runs import DemoRun, EvaluateRun, PredictRun, TraceRun, TrainRun

PICTURES = 5
SHIPPED = "vit_nano_patch4_32.cifar10"

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """One verb of the tour."""

    line: str
    """What a person would type for it."""
    record: TrainRun | EvaluateRun | PredictRun | TraceRun


def demo(run: DemoRun) -> list[Step]:
    """Write a few test digits as pictures, and say what to do with them, in order.

    A demo that was stopped goes on where it stood, as every training does.
    """
    place = Path(run.output)
    folder, model, pictures = str(place / "run"), str(place / "run" / "model"), place / "pictures"
    test = open_splits(("digits",)).test
    assert test is not None  # the digits' own split
    written = _write(test, pictures)
    first = written[0]
    recipe = from_dict(TrainRun, {**read_toml(find_recipe("digits")), "output": folder}, where="digits")
    return [
        Step(f"vitrail train --recipe digits --output {folder}", recipe),
        Step(
            f"vitrail evaluate {model} digits --split test --output {place / 'evaluation'}",
            EvaluateRun(model=model, data=("digits",), split="test", output=str(place / "evaluation")),
        ),
        Step(
            f"vitrail predict {model} {pictures} --top-k 3",
            PredictRun(model=model, images=(str(pictures),), top_k=3),
        ),
        Step(
            f"vitrail trace {model} {first} --output {place / 'trace'}",
            TraceRun(model=model, image=str(first), output=str(place / "trace")),
        ),
        *_cat(place),
    ]


def _cat(place: Path) -> list[Step]:
    """What a model that ships says of a photograph; nothing where scikit-image is not installed, which is said."""
    try:
        from skimage import data as photographs
    except ImportError:
        logger.warning(
            "scikit-image is not installed, so the cat is left out; pip install 'vitrail[demo]' brings it."
        )
        return []
    from PIL import Image

    photograph: Any = photographs.chelsea  # it states no types
    cat = place / "photograph" / "cat.png"
    cat.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photograph()).save(cat)
    return [
        Step(
            f"vitrail predict {SHIPPED} {cat} --top-k 3",
            PredictRun(model=SHIPPED, images=(str(cat),), top_k=3),
        ),
        Step(
            f"vitrail trace {SHIPPED} {cat} --output {place / 'trace-cat'}",
            TraceRun(model=SHIPPED, image=str(cat), output=str(place / "trace-cat")),
        ),
    ]


def _write(source: Source, folder: Path) -> list[Path]:
    """The first test digits of different classes as PNG files, named by what they show."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    chosen: dict[int, int] = {}
    for index, label in enumerate(source.labels.tolist()):
        chosen.setdefault(label, index)
    paths = []
    for label in sorted(chosen)[:PICTURES]:
        pixels = source.read(chosen[label])
        path = folder / f"a-{source.classes[label]}.png"
        shown = (
            pixels
            if not isinstance(pixels, bytes)
            else decode(pixels, name=path.name).permute(1, 2, 0).numpy()
        )
        Image.fromarray(shown).save(path)
        paths.append(path)
    return paths
