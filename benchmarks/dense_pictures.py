"""Detections and masks on validation pictures, truth beside what a model found: docs/pictures/{detections,masks}.png.

    python benchmarks/dense_pictures.py --detector RUN --boxes ../shared/data/bccd/trainval.zip \\
        --segmenter RUN --masks ../shared/data/camvid/trainval.zip [--pictures 3] [--output docs/pictures]

The models are run folders, such as recipes bccd-quick-detr and camvid-setr-pup leave them. The pictures are spread
evenly over the validation split, so nobody chose them.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from vitrail.data.image import decode
from vitrail.disk import write_atomically
from vitrail.jobs.dense_data import kind_for, open_kind
from vitrail.jobs.evaluate_dense import draw_pair
from vitrail.predict import Predictor
from vitrail.tasks.draw_dense import as_png, side_by_side

WIDTH = 900
"""Pixels across a sheet."""


def sheet(model: str, data: str, pictures: int, threshold: float) -> bytes:
    """Truth and findings on a few pictures of the validation split, as PNG."""
    predictor = Predictor(model, precision="fp32", threshold=threshold, batch_size=1)
    card: Any = predictor.engine.card
    kind = kind_for(card.task, [data], model)
    options = (
        {"classes": card.labels, "ignore": tuple(card.recipe.get("ignore") or ())} if kind == "masks" else {}
    )
    splits = open_kind(kind, [data], **options)
    source: Any = (splits.val or splits.everything).relabel(card.labels)
    rows = []
    for place in range(pictures):
        index = (2 * place + 1) * len(source) // (2 * pictures)
        name = Path(source.name(index)).name
        picture = decode(source.read(index), name)
        size = (int(picture.shape[1]), int(picture.shape[2]))
        (record,) = predictor.answer([predictor.preprocess(picture)], [size], [name])
        seen = picture.permute(1, 2, 0).numpy()
        rows.append(draw_pair(seen, source.target(index), record, card.labels, f"truth, {name}", "found"))
    caption = f"{card.architecture}, validation pictures; left: truth, right: what was found"
    drawn = side_by_side(rows, "Boxes" if kind == "boxes" else "Masks", caption)
    drawn.thumbnail((WIDTH, 20 * WIDTH))
    return as_png(drawn)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--detector")
    reader.add_argument("--boxes")
    reader.add_argument("--segmenter")
    reader.add_argument("--masks")
    reader.add_argument("--pictures", type=int, default=3)
    reader.add_argument("--threshold", type=float, default=0.5)
    reader.add_argument("--output", type=Path, default=Path("docs/pictures"))
    told = reader.parse_args()
    jobs = (("detections.png", told.detector, told.boxes), ("masks.png", told.segmenter, told.masks))
    for name, model, data in jobs:
        if model and data:
            write_atomically(told.output / name, sheet(model, data, told.pictures, told.threshold))
            logging.info("written: %s", told.output / name)


if __name__ == "__main__":
    main()
