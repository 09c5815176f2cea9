"""Make one of the models that ship: halve a trained model, score the halved weights once, and write its card.

    python benchmarks/ship.py RUN vitrail/assets/NAME.TAG DATA --about "..." [--names tench,springer,...]

The score on the card is that of the folder as it ships, on data that no choice was made by; `vitrail evaluate`
gives it again. Precision float32, so that every machine does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from vitrail.jobs.convert import convert
from vitrail.jobs.evaluate import evaluate
from vitrail.runs import ConvertRun, EvaluateRun
from vitrail.weights import folder
from vitrail.weights.card import Card


def write(place: Path, card: Card) -> None:
    """Save the folder again under another card; the weights stay."""
    tensors, old = folder.load(place)
    library = {
        key: value
        for key, value in json.loads((place / folder.CONFIG).read_text()).items()
        if key not in old.to_json() or key == "architecture"
    }
    folder.save(place, tensors, card, library)


def bare(value: object) -> object:
    """Paths of the machine that trained, as names alone: a card that ships tells nothing of it."""
    if isinstance(value, list | tuple):
        return [bare(part) for part in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def sized(card: Card, side: int | None, crop: float | None) -> Card:
    """The card with another input size and crop; for networks whose weights do not depend on the size."""
    preprocessing, config = card.preprocessing, dict(card.config)
    if side is not None:
        preprocessing, config["img_size"] = replace(preprocessing, input_size=(side, side)), [side, side]
    if crop is not None:
        preprocessing = replace(preprocessing, crop_pct=crop)
    return replace(card, preprocessing=preprocessing, config=config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder, or model folder")
    parser.add_argument("target", type=Path, help="folder of the model that ships")
    parser.add_argument("data", nargs="+", help="labelled pictures that chose nothing")
    parser.add_argument("--split", default="test")
    parser.add_argument("--about", required=True, help="what the card says of the data")
    parser.add_argument("--notes", default="", help="what a user must know")
    parser.add_argument(
        "--img-size", type=int, help="input size, where training pictures say another is better"
    )
    parser.add_argument("--crop-pct", type=float, help="share of the resized side that the crop keeps")
    parser.add_argument("--names", default="", help="class names for people, in the order of the logits")
    arguments = parser.parse_args()

    print(
        "\n".join(convert(ConvertRun(source=arguments.run, target=str(arguments.target), half=True)).lines())
    )
    card = folder.read_card(arguments.target)
    labels, called = tuple(filter(None, arguments.names.split(","))), card.labels or ()
    if labels:
        if len(labels) != len(called):
            parser.error(f"--names needs {len(called)} names ({', '.join(called)}); got {len(labels)}")
        card = replace(card, labels=labels, folders=called)
    card = replace(
        card, data=arguments.about, notes=arguments.notes, source="trained with vitrail, from random weights"
    )
    card = replace(card, recipe={name: bare(value) for name, value in card.recipe.items()})
    write(arguments.target, sized(card, arguments.img_size, arguments.crop_pct))
    with tempfile.TemporaryDirectory() as scratch:
        run = EvaluateRun(
            model=str(arguments.target), data=tuple(arguments.data), split=arguments.split, precision="fp32",
            engine="torch", output=scratch,
        )  # fmt: skip
        scores = evaluate(run).scores
    kept = {name: round(scores[name], 6) for name in ("acc1", "acc5", "loss", "images")}
    write(arguments.target, replace(folder.read_card(arguments.target), scores=kept, licence="Apache-2.0"))
    print(kept)


if __name__ == "__main__":
    main()
