"""On a GPU: every family's float32 answers and gradients are the processor's, bfloat16 is near, pictures agree."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.data.test_resident import noise
from tests.models.test_battery import families, is_classifier, picture, tiny
from vitrail.data.augment import Augmentation
from vitrail.data.resident import Resident
from vitrail.data.sources import open_splits
from vitrail.runtime import open_runtime
from vitrail.weights.card import Preprocessing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

CLASSIFIERS = [family for family in families() if is_classifier(family)]


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, whatever its shape."""
    if isinstance(output, Tensor):
        return [output]
    parts = output if isinstance(output, tuple | list) else []
    return [tensor for part in parts for tensor in tensors(part)]


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the largest number."""
    return float((ours.cpu().float() - theirs.cpu().float()).abs().max() / theirs.abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("family", families())
def test_float32_on_the_gpu_is_the_processors(family: str) -> None:
    runtime = open_runtime("cuda", "fp32")
    model, images = tiny(family), picture(family)
    there = copy.deepcopy(model).to(runtime.device)
    with torch.inference_mode():
        pairs = zip(tensors(there(images.cuda())), tensors(model(images)), strict=True)
        assert max(apart(ours, theirs) for ours, theirs in pairs) < 2e-5


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_gradients_on_the_gpu_are_the_processors(family: str) -> None:
    runtime = open_runtime("cuda", "fp32")
    model, images = tiny(family), picture(family)
    there = copy.deepcopy(model).to(runtime.device)
    model(images).square().sum().backward()
    there(images.cuda()).square().sum().backward()
    for (name, ours), theirs in zip(there.named_parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None and apart(ours.grad, theirs.grad) < 1e-3, name


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_bfloat16_training_is_near(family: str) -> None:
    runtime = open_runtime("cuda", "bf16")
    model, images = tiny(family), picture(family)
    there = copy.deepcopy(model).to(runtime.device)
    with runtime.autocast():
        logits = there(images.cuda())
        logits.float().square().sum().backward()
    assert apart(logits.detach(), model(images).detach()) < 0.1
    assert all(
        bool(torch.isfinite(weight.grad).all()) for weight in there.parameters() if weight.grad is not None
    )


def test_pictures_are_augmented_there_as_here(tmp_path: Path) -> None:
    for number, pixels in enumerate(noise(16, 24)):
        place = tmp_path / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{number}.png")
    source = open_splits((str(tmp_path),), val_share=0.0).train
    assert source is not None
    for aa in ("rand", "trivial", "three"):
        augmentation = Augmentation(crop="resized", aa=aa, color_jitter=0.3)
        here, there = (
            Resident(source, Preprocessing(input_size=(16, 16)), augmentation, 16, device=torch.device(name))
            for name in ("cpu", "cuda")
        )
        ours, theirs = next(iter(there)).images.cpu().int(), next(iter(here)).images.int()
        # A number on the edge between two levels, or a place between two pixels, may fall to either side.
        assert ((ours - theirs).abs() <= 1).float().mean() > 0.98
