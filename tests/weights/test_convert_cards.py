"""Conversion follows what a folder says of its network and its pictures, or refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitrail.errors import ModelError, WeightsError
from vitrail.jobs.convert import convert
from vitrail.models.registry import create_model, default_card, from_pretrained, variant
from vitrail.runs import ConvertRun

NAME = "vit_tiny_patch16_224"
SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "intermediate_size": 768,
    "num_labels": 3,
}


def run(source: Path, target: Path, model: str | None = NAME) -> Any:
    convert(ConvertRun(source=str(source), target=str(target), model=model))
    return from_pretrained(target)


def theirs(folder: Path, **words: Any) -> Any:
    """A folder of transformers with a ViT-Tiny for pictures of 32 pixels."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**{"image_size": 32, "num_attention_heads": 3, **SIZES} | words)
    model = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    return model


def apart(ours: Tensor, other: Tensor) -> float:
    return float((ours - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(
    "words", [{"num_attention_heads": 6}, {"hidden_act": "gelu_pytorch_tanh"}, {"layer_norm_eps": 1e-3}]
)
def test_a_folder_of_transformers_computes_the_same_after_conversion(
    words: dict[str, Any], tmp_path: Path
) -> None:
    model = theirs(tmp_path / "theirs", **words)
    ours = run(tmp_path / "theirs", tmp_path / "ours")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert apart(ours(images), model(images).logits) < 1e-4
    if "num_attention_heads" in words:
        assert ours.config.heads == 6


def test_what_our_network_cannot_compute_is_refused(tmp_path: Path) -> None:
    theirs(tmp_path / "theirs", hidden_act="relu")
    with pytest.raises((ModelError, WeightsError), match=r"gelu.*relu"):
        run(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_folder_of_ours_under_another_name_is_not_given_another_meaning(tmp_path: Path) -> None:
    create_model(NAME, num_classes=3, img_size=32, heads=6).save_pretrained(tmp_path / "six")
    assert run(tmp_path / "six", tmp_path / "same").config.heads == 6
    with pytest.raises(WeightsError, match="heads=6"):
        run(tmp_path / "six", tmp_path / "other", "vit_tiny_patch16_384")


def test_a_folder_that_tells_no_preprocessing_gets_the_variants(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    name = "deit_tiny_distilled_patch16_224"
    config = transformers.DeiTConfig(image_size=32, num_attention_heads=3, **SIZES)
    transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "theirs")
    card = run(tmp_path / "theirs", tmp_path / "ours", name).card
    usual = default_card(name, variant(name)).preprocessing
    assert card.preprocessing == dataclasses.replace(usual, input_size=(32, 32))
    assert card.preprocessing_told and not card.foreign


def test_a_file_of_torchvision_gets_torchvisions_preprocessing(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=3
    )
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    seen = run(tmp_path / "vit.pth", tmp_path / "ours").card.preprocessing
    assert seen.mean == (0.485, 0.456, 0.406) and seen.interpolation == "bilinear" and seen.crop_pct == 0.875
