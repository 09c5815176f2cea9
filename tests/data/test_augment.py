"""Training transforms: legal pixels, seeded, and each doing what its name says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import noise

from vitrail.data.augment import CROPS, POLICIES, Augmentation, TrainTransform, sample_seed, seeded
from vitrail.errors import ConfigError
from vitrail.weights.card import Preprocessing

SMALL = Preprocessing(input_size=(32, 32), crop_pct=1.0)
PLAIN = {"crop": "none", "hflip": 0.0}


def picture(height: int = 40, width: int = 56) -> torch.Tensor:
    return torch.from_numpy(noise(height, width)).permute(2, 0, 1)


@pytest.mark.parametrize("aa", POLICIES)
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_seed_alone_decides(crop: str, aa: str, channels: int) -> None:
    record = Preprocessing(
        input_size=(24, 32), in_chans=channels, mean=(0.5,) * channels, std=(0.5,) * channels
    )
    augmentation = Augmentation(crop=crop, aa=aa, color_jitter=0.3, reprob=0.5)
    first, second = TrainTransform(record, augmentation), TrainTransform(record, augmentation)
    seen = []
    for seed in range(6):
        one = first(picture(), seed)
        torch.rand(seed)  # other uses of torch's generator change nothing
        assert torch.equal(one, second(picture(), seed))
        assert one.shape == (channels, 24, 32)
        assert one.dtype == torch.uint8
        assert one.is_contiguous()
        seen.append(one)
    assert not all(torch.equal(seen[0], other) for other in seen[1:])


def test_torchs_own_generator_is_left_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    TrainTransform(SMALL, Augmentation(aa="rand"))(picture(), 9)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (3, 5)])
@pytest.mark.parametrize("crop", CROPS)
def test_odd_pictures_are_cropped_too(size: tuple[int, int], crop: str) -> None:
    for seed in range(3):
        assert TrainTransform(SMALL, Augmentation(crop=crop))(picture(*size), seed).shape == (3, 32, 32)


def test_resized_crops_lie_in_the_picture_and_cover_it_over_time() -> None:
    rows = torch.arange(200, dtype=torch.uint8)[None, :, None].expand(3, 200, 200)
    transform = TrainTransform(SMALL, Augmentation(scale=(0.2, 0.5), hflip=0.0))
    shares, tops, bottoms = [], [], []
    for seed in range(200):
        seen = transform(rows, seed)[0, :, 0].int()
        tops.append(int(seen[0]))
        bottoms.append(int(seen[-1]))
        shares.append((int(seen[-1]) - int(seen[0])) / 200)
    assert min(tops) < 10
    assert max(bottoms) > 190
    assert 0.3 < min(shares) < max(shares) < 0.9


def test_a_pad_crop_moves_by_at_most_the_pad_and_mirrors() -> None:
    columns = torch.arange(32, dtype=torch.uint8)[None, None].expand(3, 32, 32) * 8
    transform = TrainTransform(SMALL, Augmentation(crop="pad", hflip=0.0))
    starts = set()
    for seed in range(200):
        line = (transform(columns, seed)[0, 0].int() // 8).tolist()
        start = line[16] - 16
        assert -4 <= start <= 4
        mirrored = [abs(x) if x < 32 else 62 - x for x in range(start, start + 32)]
        assert line == mirrored
        starts.add(start)
    assert starts == set(range(-4, 5))


def test_half_of_the_pictures_are_flipped() -> None:
    transform = TrainTransform(SMALL, Augmentation(crop="none", hflip=0.5))
    image = picture(32, 32)
    flipped = sum(torch.equal(transform(image, seed), image.flip(-1)) for seed in range(400))
    assert 160 < flipped < 240


def test_three_augment_does_exactly_one_of_three() -> None:
    transform = TrainTransform(SMALL, Augmentation(aa="three", **PLAIN))
    image = picture(32, 32)
    kinds = {"grey": 0, "solarised": 0, "blurred": 0}
    for seed in range(150):
        seen = transform(image, seed)
        if torch.equal(seen[0], seen[1]):
            kinds["grey"] += 1
        elif torch.equal(seen, torch.where(image >= 128, 255 - image, image)):
            kinds["solarised"] += 1
        else:
            assert (seen.int() - image.int()).abs().float().mean() < 40
            kinds["blurred"] += 1
    assert min(kinds.values()) > 30


def test_erasing_fills_one_box_with_noise_of_the_datas_statistics() -> None:
    record = Preprocessing(input_size=(64, 64), crop_pct=1.0, mean=(0.2, 0.5, 0.7), std=(0.1, 0.1, 0.1))
    transform = TrainTransform(record, Augmentation(reprob=1.0, **PLAIN))
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    for seed in range(20):
        seen = transform(image, seed)
        hit = seen[2] != 0
        rows, columns = hit.any(dim=1).nonzero(), hit.any(dim=0).nonzero()
        area = len(rows) * len(columns)
        assert area == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert 0.015 < area / 64**2 < 0.36
        means = seen[:, hit].float().mean(dim=1) / 255
        assert torch.allclose(means, torch.tensor([0.2, 0.5, 0.7]), atol=0.05)
    assert torch.equal(image, torch.zeros_like(image))


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": "random"},
        {"aa": "auto"},
        {"hflip": 1.5},
        {"reprob": float("nan")},
        {"scale": (0.5, 0.1)},
        {"ratio": (0.0, 1.0)},
        {"magnitude": 31},
        {"color_jitter": -1.0},
    ],
)
def test_illegal_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Augmentation(**wrong)


def test_sample_seeds_differ_and_stay() -> None:
    seeds = {
        sample_seed(seed, epoch, index) for seed in range(3) for epoch in range(10) for index in range(300)
    }
    assert len(seeds) == 9000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 2, 3, 0) == sample_seed(1, 2, 3, 0) != sample_seed(1, 2, 3, 1)
    with seeded(sample_seed(0, 0, 0)):
        assert np.isfinite(float(torch.rand(())))
