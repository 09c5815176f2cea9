"""Folders in transformers' layout open in transformers as its own network with equal logits, or are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import shaken
from rebuild import apart

from vitrail.errors import WeightsError
from vitrail.jobs.convert import convert
from vitrail.models.registry import create_model, from_pretrained
from vitrail.runs import ConvertRun

SWIN = {"width": 16, "depths": (2, 2), "heads": (2, 4), "windows": (4, 4), "trained_windows": (0, 0)}
PVT = {"widths": (16, 32), "depths": (1, 2), "heads": (1, 2), "mlp_ratios": (2, 2), "reductions": (4, 1)}

SWINS: dict[str, dict[str, Any]] = {
    "square": {"img_size": 64},
    "the last map is one window": {"img_size": 32},
    "oblong": {"img_size": (64, 96)},
    "padded": {"img_size": 72},
    "one channel": {"img_size": 64, "in_chans": 1},
    "no head": {"img_size": 64, "num_classes": 0},
}
LARGER: dict[str, dict[str, Any]] = {
    "larger than the last map": {"img_size": 32, "windows": (8, 8)},
    "trained with another window": {"img_size": 64, "trained_windows": (3, 2)},
}
SWIN_V1, SWIN_V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"

OPENING: list[Any] = [
    *(pytest.param(SWIN_V1, {**SWIN, **told}, "Swin", id=f"swin, {word}") for word, told in SWINS.items()),
    *(
        pytest.param(SWIN_V2, {**SWIN, **told}, "Swinv2", id=f"swin v2, {word}")
        for word, told in {**SWINS, **LARGER}.items()
        if word != "padded"
    ),
    pytest.param("pvt_tiny", {**PVT, "img_size": 64}, "Pvt", id="pvt"),
    pytest.param("pvt_tiny", {**PVT, "img_size": 52, "entry_eps": 1e-6}, "Pvt", id="pvt, a remainder"),
    pytest.param("pvt_v2_b0", {**PVT, "img_size": (64, 96)}, "PvtV2", id="pvt v2"),
    pytest.param("pvt_v2_nano_32", {**PVT, "patch_size": 2}, "PvtV2", id="pvt v2, patches of 2"),
    pytest.param("pvt_v2_b2_li", {**PVT, "entry_eps": 1e-6}, "PvtV2", id="pvt v2, linear"),
]


def converted(name: str, changes: dict[str, Any], folder: Path) -> Any:
    """Our network; its folder in transformers' layout is `out`."""
    model: Any = shaken(create_model(name, **{"num_classes": 5, **changes}))
    model.save_pretrained(folder / "in")
    layout = "transformers-v2" if model.config.version == 2 else "transformers"
    convert(ConvertRun(source=str(folder / "in"), target=str(folder / "out"), layout=layout))
    return model


@pytest.mark.parametrize(("name", "changes", "kind"), OPENING)
def test_opens_in_transformers_with_equal_logits(
    name: str, changes: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers comes with the extra `peers`")
    ours = converted(name, changes, tmp_path)
    theirs, told = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(theirs).__name__ == f"{kind}ForImageClassification"
    assert not told["missing_keys"] and not told["unexpected_keys"]
    images = torch.randn(2, ours.config.in_chans, *ours.config.img_size)
    with torch.inference_mode():
        logits = ours(images)
        assert apart(theirs.eval()(images).logits, logits) < 1e-5
        assert torch.equal(from_pretrained(tmp_path / "out")(images), logits)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        (SWIN_V1, {**SWIN, "windows": (4, 8)}, "one square window .* has windows 4x4, 8x8 at 224x224 pixels"),
        (SWIN_V1, {**SWIN, "img_size": 32, "windows": (8, 8)}, "has windows 8x8, 4x4 at 32x32"),
        (SWIN_V1, {**SWIN, "img_size": (32, 64)}, "moves it along both axes or along none"),
        (SWIN_V2, {**SWIN, "img_size": (32, 64)}, "moves it along both axes or along none"),
        (SWIN_V1, {**SWIN, "eps": 1e-6}, "has eps=1e-05 .* this model has 1e-06"),
        ("pvt_tiny", {**PVT, "img_size": (64, 96)}, "has square images, pvt_tiny has not.* 'original'"),
        ("pvt_tiny", {**PVT, "patch_size": 2}, "has patches of 4 pixels"),
        ("pvt_v2_b2_li", PVT, "has one eps for all norms"),
    ],
)
def test_what_transformers_computes_otherwise_is_refused_and_not_written(
    name: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=says):
        converted(name, changes, tmp_path)
    assert not (tmp_path / "out").exists()


def test_that_transformers_pvt_has_one_eps_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        converted("pvt_v2_b0", PVT, tmp_path)
    assert "one eps for all norms, 1e-06, and pvt_v2_b0 has 1e-05" in caplog.text
