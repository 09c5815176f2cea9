"""Conversion changes no bit, finds the network by itself, and refuses what it cannot keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.errors import WeightsError
from vitrail.jobs.convert import convert
from vitrail.models.registry import create_model, from_config, from_pretrained, variant
from vitrail.models.vit import RENAMES, context
from vitrail.runs import ConvertRun
from vitrail.weights import adapter, files

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as Google would have written it: Ti/16 with 10 classes, trained at 96 pixels."""
    torch.manual_seed(0)
    model = from_config(NAME, variant(NAME, num_classes=10, img_size=96))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    path = tmp_path_factory.mktemp("google") / "Ti_16.npz"
    files.write_tensors(
        path, adapter.write(model.state_dict(), adapter.by_name(RENAMES, "google"), context(model.config))
    )
    return path


def run(source: Path, target: Path, layout: str, model: str | None = NAME) -> str:
    return convert(ConvertRun(source=str(source), target=str(target), layout=layout, model=model)).sha256


def test_google_to_ours_to_timm_to_ours_and_back_changes_no_bit(npz: Path, tmp_path: Path) -> None:
    run(npz, tmp_path / "ours", "vitrail")
    run(tmp_path / "ours", tmp_path / "timm.safetensors", "timm")
    run(tmp_path / "timm.safetensors", tmp_path / "again", "vitrail")
    first, second = from_pretrained(tmp_path / "ours"), from_pretrained(tmp_path / "again")
    assert (
        first.config == second.config and first.config.num_classes == 10 and first.config.img_size == (96, 96)
    )
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    run(tmp_path / "again", tmp_path / "back.npz", "google")
    assert files.sha256(npz) == files.sha256(tmp_path / "back.npz")


@pytest.mark.parametrize("layout", [layout.name for layout in RENAMES if "big_vision" not in layout.name])
def test_every_layout_and_back_changes_no_bit(layout: str, npz: Path, tmp_path: Path) -> None:
    target = tmp_path / ("w.npz" if layout == "google" else "w.safetensors")
    run(npz, target, layout)
    run(target, tmp_path / "back.npz", "google")
    assert files.sha256(npz) == files.sha256(tmp_path / "back.npz")
    run(npz, tmp_path / "folder", layout)
    assert create_model(NAME, tmp_path / "folder", img_size=96).num_classes == 10


def test_a_folder_in_transformers_layout_is_transformers_own(npz: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers comes with the extra `peers`")
    run(npz, tmp_path / "folder", "transformers")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["model_type"] == "vit"
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "folder").eval()
    assert type(theirs).__name__ == "ViTForImageClassification"
    ours = from_pretrained(tmp_path / "folder")
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        want, got = theirs(images).logits, ours(images)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder", backend="pil")
    pixels = processor(torch.randint(0, 255, (3, 120, 130), dtype=torch.uint8), return_tensors="pt")[
        "pixel_values"
    ]
    assert pixels.shape == (1, 3, 96, 96)


def test_half_precision_is_kept_on_disk_and_widened_in_memory(npz: Path, tmp_path: Path) -> None:
    halves = {key: tensor.to(torch.bfloat16) for key, tensor in files.read_tensors(npz).items()}
    files.write_tensors(tmp_path / "half.npz", halves)
    run(tmp_path / "half.npz", tmp_path / "ours", "vitrail")
    stored = files.read_tensors(tmp_path / "ours")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model = from_pretrained(tmp_path / "ours")
    assert model(torch.zeros(1, 3, 96, 96)).dtype == torch.float32


@pytest.mark.parametrize("stem", ["conv", "pool", "residual"])
def test_a_stem_of_ours_is_kept(stem: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = create_model("vit_nano_patch4_32", stem=stem, depth=1)
    model.save_pretrained(tmp_path / "model")
    convert(ConvertRun(source=str(tmp_path / "model"), target=str(tmp_path / "again")))
    again, images = from_pretrained(tmp_path / "again"), torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_a_trunk_without_a_head_stays_one(npz: Path, tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in files.read_tensors(npz).items() if not key.startswith("head/")}
    files.write_tensors(tmp_path / "trunk.npz", state)
    run(tmp_path / "trunk.npz", tmp_path / "ours", "vitrail")
    assert from_pretrained(tmp_path / "ours").num_classes == 0


@pytest.mark.slow
def test_the_network_is_found_by_content(tmp_path: Path) -> None:
    model = from_config("vit_small_patch32_224", variant("vit_small_patch32_224"))
    known = adapter.write(model.state_dict(), adapter.by_name(RENAMES, "google"), context(model.config))
    files.write_tensors(tmp_path / "vit.npz", known)
    run(tmp_path / "vit.npz", tmp_path / "ours", "vitrail", model=None)
    assert from_pretrained(tmp_path / "ours").name == "vit_small_patch32_224"


def test_what_cannot_be_kept_is_refused_and_nothing_is_written(npz: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"There is no layout 'tim' .* Did you mean timm"):
        run(npz, tmp_path / "out", "tim")
    with pytest.raises(WeightsError, match="has no positions for prefix tokens"):
        run(npz, tmp_path / "out.npz", "big_vision")
    with pytest.raises(WeightsError, match="pickles are never written"):
        run(npz, tmp_path / "out.pth", "timm")
    with pytest.raises(WeightsError, match="does not fit the model"):
        run(npz, tmp_path / "out", "vitrail", model="vit_small_patch16_224")
    broken = files.read_tensors(npz)
    broken["head/bias"][0] = float("nan")
    files.write_tensors(tmp_path / "broken.npz", broken)
    with pytest.raises(WeightsError, match="not finite"):
        run(tmp_path / "broken.npz", tmp_path / "out", "vitrail")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.npz"]


def test_a_grid_that_is_not_square_must_be_told(tmp_path: Path) -> None:
    model = from_config(NAME, variant(NAME, img_size=(32, 48), num_classes=2))
    model.save_pretrained(tmp_path / "told")
    run(tmp_path / "told", tmp_path / "vit.npz", "google", model=None)
    with pytest.raises(WeightsError, match="nothing says for which image or patch size"):
        run(tmp_path / "vit.npz", tmp_path / "ours", "vitrail")
