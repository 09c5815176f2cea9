"""Mixup and CutMix: targets follow the pixels, and the number given decides."""

from __future__ import annotations

import pytest
import torch

from vitrail.data.mix import Mix
from vitrail.errors import ConfigError


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures whose every pixel is their own number, one class each."""
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, 20, 30)
    return images.clone(), torch.arange(count)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_are_the_shares_of_the_pixels(kind: str) -> None:
    mix = Mix(num_classes=6, **{"mixup": 0.0, "cutmix": 0.0, kind: 1.0})
    images, targets = batch()
    shares = set()
    for seed in range(30):
        mixed, soft = mix(images, targets, seed)
        mean = mixed.mean(dim=(1, 2, 3))
        assert torch.allclose(mean, soft @ torch.arange(6.0), atol=1e-4)
        assert torch.allclose(soft.sum(dim=1), torch.ones(6))
        assert int((soft[0] > 0).sum()) <= 2
        shares.add(round(float(soft[0, 0]), 4))
    assert len(shares) > 20
    assert torch.equal(images, batch()[0])


def test_one_number_one_result_on_any_generator() -> None:
    mix = Mix(num_classes=6, smoothing=0.1)
    images, targets = batch()
    first, second = mix(images, targets, 7), mix(images, targets, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(4):
        assert torch.equal(mix(images, targets, one)[0], mix(images, targets, other)[0])


def test_both_take_turns_and_can_be_left_out() -> None:
    mix = Mix(num_classes=6, probability=0.75)
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for seed in range(400):
        choice = mix.choose(32, 32, seed)
        kinds["cutmix" if choice.box else "none" if choice.share == 1 else "mixup"] += 1
    assert 60 < kinds["none"] < 140
    assert 110 < kinds["mixup"] < 190
    assert 110 < kinds["cutmix"] < 190
    off = Mix(num_classes=6, mixup=0.0, cutmix=0.0)
    images, targets = batch()
    mixed, soft = off(images, targets, 0)
    assert torch.equal(mixed, images)
    assert torch.equal(soft, torch.eye(6))


def test_smoothing_is_deits() -> None:
    soft = Mix(num_classes=4, smoothing=0.2).soften(torch.tensor([2]))
    assert torch.allclose(soft, torch.tensor([[0.05, 0.05, 0.85, 0.05]]))


def test_odd_batches_and_single_pictures_work() -> None:
    mix = Mix(num_classes=6)
    for count in (1, 3):
        mixed, soft = mix(*batch(count), 1)
        assert mixed.shape == (count, 3, 20, 30)
        assert torch.allclose(soft.sum(dim=1), torch.ones(count))


def test_bytes_and_illegal_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="uint8"):
        Mix(num_classes=2)(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), 0)
    for wrong in ({"mixup": -1.0}, {"cutmix": float("nan")}, {"probability": 2.0}, {"smoothing": -0.1}):
        with pytest.raises(ConfigError):
            Mix(num_classes=2, **wrong)
