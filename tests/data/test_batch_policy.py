"""Operations on whole batches are torchvision's, picture by picture; every picture has a strength of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

from vitrail.data import batch_policy as ours

FILL = (10.0, 20.0, 30.0)
PLAIN: dict[str, Any] = {"interpolation": InterpolationMode.NEAREST, "fill": list(FILL)}


def affine(picture: Tensor, **changes: Any) -> Tensor:
    still: dict[str, Any] = {"angle": 0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return V.affine(picture, **(still | changes), **PLAIN)


THEIRS: dict[str, tuple[list[float], Callable[[Tensor, float], Tensor]]] = {
    "translate_x": ([7.4, -11.9], lambda picture, s: affine(picture, translate=[int(s), 0])),
    "translate_y": ([7.4, -11.9], lambda picture, s: affine(picture, translate=[0, int(s)])),
    "rotate": ([20.0, -135.0], lambda picture, s: V.rotate(picture, s, **PLAIN)),
    "brightness": ([0.5, -0.9], lambda picture, s: V.adjust_brightness(picture, 1 + s)),
    "saturation": ([0.5, -0.9], lambda picture, s: V.adjust_saturation(picture, 1 + s)),
    "contrast": ([0.5, -0.9], lambda picture, s: V.adjust_contrast(picture, 1 + s)),
    "sharpness": ([0.5, -0.9], lambda picture, s: V.adjust_sharpness(picture, 1 + s)),
    "posterize": ([2.0, 4.0], lambda picture, s: V.posterize(picture, 8 - int(s))),
    "solarize": ([100.0, 200.0], lambda picture, s: V.solarize(picture, 255.0 - s)),
    "auto_contrast": ([0.0, 0.0], lambda picture, s: V.autocontrast(picture)),
    "equalize": ([0.0, 0.0], lambda picture, s: V.equalize(picture)),
}


def pictures(count: int = 2, side: int = 40) -> Tensor:
    """Smooth pictures with a little noise, none using all levels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    return (20 + 200 * smooth + 8 * torch.rand(smooth.shape, generator=generator)).to(torch.uint8)


@pytest.mark.parametrize("name", THEIRS)
def test_an_operation_is_torchvisions(name: str) -> None:
    before, (strengths, theirs) = pictures(), THEIRS[name]
    after = getattr(ours, name)(before, torch.tensor(strengths), FILL)
    for picture, found, strength in zip(before, after, strengths, strict=True):
        difference = (found.int() - theirs(picture, strength).int()).abs()
        assert (difference <= 1).float().mean() > 0.999  # one step of rounding; a border pixel may fall over


@pytest.mark.parametrize("name", ["shear_x", "shear_y"])
def test_shear_moves_a_line_by_its_share_of_the_distance(name: str) -> None:
    picture = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    picture[..., 20] = 255  # a column
    sheared = getattr(ours, name)(
        picture if name == "shear_x" else picture.mT, torch.tensor([0.5]), (0, 0, 0)
    )
    line = (sheared if name == "shear_x" else sheared.mT)[0, 0].argmax(dim=1)
    assert [int(line[row]) for row in (0, 10, 30)] == [20, 25, 35]


def test_rand_augment_applies_its_layers_and_leaves_some_pictures_alone() -> None:
    before = pictures(256, 16)
    generator = torch.Generator().manual_seed(0)
    after = ours.rand(before, generator, FILL, layers=1)
    same = (after == before).flatten(1).all(dim=1).float().mean()
    assert 0.02 < same < 0.2 and after.shape == before.shape and after.dtype == torch.uint8
    assert torch.equal(ours.rand(before, generator, FILL, layers=0), before)


def test_trivial_augment_draws_every_operation_at_many_strengths() -> None:
    before = pictures(1, 16).expand(2000, -1, -1, -1)
    after = ours.trivial(before, torch.Generator().manual_seed(0), FILL)
    # 9 signed and 2 one-sided operations at 31 strengths, 2 without a strength, and nothing: some hundred outcomes.
    assert len(after.flatten(1).unique(dim=0)) > 9 * 31
    assert math.isclose(
        float((after == before).flatten(1).all(dim=1).float().mean()), 1 / 14 + 12 / 14 / 31, abs_tol=0.06
    )
