"""Saved folders of pyramids and residual networks open in timm, with the arguments that their config.json gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import shaken
from rebuild import apart

from vitrail.models.registry import create_model

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "img_size": (96, 128)}),
        ("swinv2_tiny_window8_256", {"depths": (1, 1, 1, 1), "trained_windows": (12, 12, 12, 6)}),
        ("pit_ti_distilled_224", {"img_size": (96, 128)}),
        ("resnet18", {}),
        pytest.param("legacy_seresnet50", {}, marks=slow),
        pytest.param("seresnet50", {}, marks=slow),
    ],
)
def test_a_saved_folder_opens_in_timm(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    ours = shaken(create_model(name, num_classes=7, **changes))
    ours.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    images = torch.randn(1, 3, *ours.config.img_size)  # type: ignore[union-attr, misc]
    with torch.inference_mode():
        assert apart(ours(images), theirs(images)) < 1e-5
