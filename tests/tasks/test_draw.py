"""Pictures of results: they can be opened, and grow with what they show."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.tasks.draw import Tile, confusion_picture, contact_sheet
from vitrail.tasks.draw_dense import draw_mask, index_png


@pytest.mark.parametrize("classes", [2, 12, 60])
def test_a_confusion_matrix_is_drawn_for_few_and_many_classes(classes: int) -> None:
    counts = torch.eye(classes, dtype=torch.int64) * 5
    counts[0, 1] = 3
    with Image.open(
        io.BytesIO(confusion_picture(counts, [f"a long name {i}" for i in range(classes)]))
    ) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400


@pytest.mark.slow
def test_every_name_of_two_hundred_classes_has_room() -> None:
    counts = torch.eye(200, dtype=torch.int64)
    with Image.open(io.BytesIO(confusion_picture(counts, [f"name {i}" for i in range(200)]))) as image:
        assert image.size[1] > 200 * 12  # pixels a row: a line of six-point text


def test_rows_without_images_and_unequal_pictures_are_drawn() -> None:
    assert confusion_picture(torch.zeros(3, 3, dtype=torch.int64), ["a", "b", "c"])
    tiles = [
        Tile(torch.zeros(3, 32, 32, dtype=torch.uint8), ("said cat", "is dog")),
        Tile(torch.zeros(1, 200, 90, dtype=torch.uint8), ("said dog", "is cat")),
    ]
    with Image.open(io.BytesIO(contact_sheet(tiles, "Mistakes"))) as image:
        assert image.format == "PNG"


def test_a_picture_without_any_segment_is_drawn_as_it_is() -> None:
    pixels, nothing = np.full((8, 9, 3), 70, dtype=np.uint8), np.full((8, 9), 255, dtype=np.uint8)
    drawn = np.asarray(draw_mask(pixels, nothing, []).convert("RGB"))
    assert (drawn == 70).all(axis=2).mean() > 0.3
    with Image.open(io.BytesIO(index_png(nothing, 0))) as mask:
        assert (np.asarray(mask) == 255).all()
