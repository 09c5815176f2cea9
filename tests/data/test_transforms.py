"""The reference preprocessing, its exact inverse, normalising."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise
from PIL import Image
from torchvision.transforms import v2

from vitrail.data.transforms import Preprocess, constants, normalise, resize
from vitrail.errors import ConfigError
from vitrail.weights.card import CROP_MODES, Preprocessing


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(300, 500), (500, 300), (224, 224), (100, 90), (225, 1000)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_centre_crops_are_torchvisions(size: tuple[int, int], interpolation: str) -> None:
    picture = tensor(noise(*size))
    kind = v2.InterpolationMode(interpolation)
    theirs = v2.Compose([v2.Resize(248, kind, antialias=True), v2.CenterCrop(224)])
    ours = Preprocess(Preprocessing(interpolation=interpolation))(picture)
    assert torch.equal(ours, theirs(picture))
    assert ours.is_contiguous()


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"])
def test_every_filter_is_close_to_pillows(interpolation: str) -> None:
    picture = noise(90, 130)
    kind = Image.Resampling[interpolation.upper()]
    theirs = np.array(Image.fromarray(picture).resize((40, 50), kind)).astype(int)
    ours = resize(tensor(picture), (50, 40), interpolation).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - theirs).max() <= 2


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    crop_pct=st.floats(0.5, 1.0),
    mode=st.sampled_from(CROP_MODES),
)
def test_any_picture_comes_out_at_the_models_size_with_an_inverse_map(
    height: int, width: int, rows: int, columns: int, crop_pct: float, mode: str
) -> None:
    record = Preprocessing(
        input_size=(rows, columns), crop_pct=crop_pct, crop_mode=mode, interpolation="nearest"
    )
    preprocess = Preprocess(record)
    place = torch.arange(height * width, dtype=torch.int32).reshape(height, width)
    picture = torch.stack([place % 251, place // 251 % 251, place // 63_001]).to(torch.uint8)
    seen = preprocess(picture)
    if mode == "fit":  # a size of its own: the shape is kept
        assert seen.shape[1:] == preprocess.plan(height, width).size
        rows, columns = seen.shape[1:]
    assert seen.shape == (3, rows, columns)
    geometry = preprocess.geometry(height, width)
    for row, column in ((0, 0), (rows // 2, columns // 2), (rows - 1, columns - 1)):
        y, x = geometry.to_picture(row + 0.5, column + 0.5)
        back = geometry.to_output(y, x)
        assert back == pytest.approx((row + 0.5, column + 0.5))
        clear = min(abs(y - round(y)), abs(x - round(x))) > 1e-3  # not just between two pixels
        if clear and 0 <= y < height and 0 <= x < width:
            assert torch.equal(seen[:, row, column], picture[:, int(y), int(x)])


def test_the_window_tells_what_the_network_sees() -> None:
    centre = Preprocess(Preprocessing(crop_pct=1.0)).geometry(448, 896)
    assert centre.window == (0.0, 224.0, 448.0, 672.0)
    border = Preprocess(Preprocessing(crop_pct=1.0, crop_mode="border")).geometry(448, 896)
    assert border.window == (-224.0, 0.0, 672.0, 896.0)


def test_a_border_has_the_mean_colour() -> None:
    record = Preprocessing(input_size=(8, 8), crop_pct=1.0, crop_mode="border", mean=(0.1, 0.5, 1.0))
    seen = Preprocess(record)(torch.zeros(3, 4, 8, dtype=torch.uint8))
    assert seen[:, 0, 0].tolist() == [26, 128, 255]
    assert seen[:, 4].sum() == 0
    assert normalise(seen[None], record)[0, :, 0, 0].abs().max() < 0.01


def test_a_long_strip_needs_no_long_memory() -> None:
    preprocess = Preprocess(Preprocessing())
    assert max(preprocess.plan(1, 16_384).size) <= 248 * 8
    assert preprocess(torch.zeros(3, 16_384, 1, dtype=torch.uint8)).shape == (3, 224, 224)
    assert preprocess(torch.zeros(3, 1, 1, dtype=torch.uint8)).shape == (3, 224, 224)


def test_grey_is_pillows() -> None:
    picture = noise(30, 30)
    record = Preprocessing(input_size=(30, 30), crop_pct=1.0, in_chans=1, mean=(0.5,), std=(0.5,))
    assert np.array_equal(
        Preprocess(record)(tensor(picture))[0].numpy(), Image.fromarray(picture).convert("L")
    )


def test_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 or 3 channels, the model wants 4"):
        Preprocess(Preprocessing(in_chans=4, mean=(0.5,), std=(0.5,)))


def test_normalising_is_the_formula() -> None:
    record = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    batch = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (record.mean, record.std)
    )
    expected = (batch.double() / 255 - mean) / std
    assert torch.allclose(normalise(batch, record).double(), expected, atol=5e-7, rtol=1e-6)
    assert normalise(batch, record, torch.bfloat16).dtype == torch.bfloat16
    factor, summand = constants(record)
    assert factor[0] == pytest.approx(1 / 255 / 0.229)
    assert summand[2] == pytest.approx(-0.406 / 0.225)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((300, 900), (444, 1332)),
        ((500, 500), (800, 800)),
        ((2, 9000), (1, 1334)),
    ],
)
def test_fit_gives_every_picture_detrs_size(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    preprocess = Preprocess(Preprocessing(input_size=(800, 1333), crop_mode="fit"))
    assert preprocess.plan(*size).size == fitted
    geometry = preprocess.geometry(*size)
    assert geometry.output == fitted and geometry.window == pytest.approx((0, 0, *size))
