"""What comes along with weights, and which numbers are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import shaken
from safetensors.torch import load_file, save_file

from vitrail.errors import WeightsError
from vitrail.models import loading, registry
from vitrail.models.registry import create_model, default_card, from_pretrained, variant

NANO = "vit_nano_patch4_32"
VIT: dict[str, Any] = {"img_size": 32, "width": 48, "depth": 1, "hidden": 96, "num_classes": 5}


def usual(name: str) -> Any:
    """How a variant's pictures are prepared, whatever their size."""
    found = default_card(name, variant(name)).preprocessing
    return found.mean, found.std, found.interpolation, found.crop_pct, found.crop_mode


def of(model: Any) -> Any:
    seen = model.card.preprocessing
    return seen.mean, seen.std, seen.interpolation, seen.crop_pct, seen.crop_mode


def test_a_folder_of_transformers_without_preprocessing_keeps_the_variants(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeiTConfig(
        image_size=32,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=96,
        num_labels=5,
    )
    theirs = transformers.DeiTForImageClassificationWithTeacher(config)
    theirs.save_pretrained(tmp_path)
    name = "deit_tiny_distilled_patch16_224"
    ours = create_model(name, tmp_path, **VIT, heads=3)
    assert of(ours) == usual(name) and ours.card.preprocessing.mean[0] == 0.485
    transformers.ViTImageProcessor(size=32, image_mean=[0.1] * 3).save_pretrained(tmp_path)
    told = create_model(name, tmp_path, **VIT, heads=3).card.preprocessing
    assert told.mean == (0.1, 0.1, 0.1) and told.crop_mode == "squash"


def test_weights_alone_in_a_folder_are_prepared_for_as_the_file_is(tmp_path: Path) -> None:
    name = "deit_tiny_patch16_224"
    model = create_model(name, **VIT)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    for place in (tmp_path, tmp_path / "model.safetensors"):
        assert of(create_model(name, place, **VIT)) == usual(name)


def test_torchvisions_file_of_a_vit_is_prepared_for_as_torchvision_does(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=5
    )
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = create_model("vit_tiny_patch16_224", tmp_path / "vit.pth", **VIT)
    wanted = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    seen = ours.card.preprocessing
    assert list(seen.mean) == wanted.mean and list(seen.std) == wanted.std
    assert seen.interpolation == wanted.interpolation.value and seen.crop_mode == "center"
    assert seen.crop_pct == wanted.crop_size[0] / wanted.resize_size[0] and seen.input_size == (32, 32)
    save_file(dict(create_model("vit_tiny_patch16_224", **VIT).state_dict()), tmp_path / "own.safetensors")
    assert of(create_model("vit_tiny_patch16_224", tmp_path / "own.safetensors", **VIT)) == usual(
        "vit_tiny_patch16_224"
    )


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_folder_of_another_precision_is_a_network_that_runs(kind: torch.dtype, tmp_path: Path) -> None:
    model = shaken(create_model(NANO)).to(kind)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert again(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    create_model(NANO).save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


def test_weights_that_are_not_finite_are_refused_and_named(tmp_path: Path) -> None:
    tensors = stored(tmp_path)
    tensors["blocks.1.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    model = create_model(NANO)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"mlp\.fc1\.weight.*not finite"):
        loading.load_pretrained(model, tmp_path / "nan.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_quantised_weights_are_refused_and_named(tmp_path: Path) -> None:
    tensors = stored(tmp_path)
    tensors["head.weight"] = tensors["head.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "int8.safetensors")
    with pytest.raises(WeightsError, match=r"head\.linear\.weight holds int8"):
        create_model(NANO, tmp_path / "int8.safetensors")


def test_a_grid_that_no_folder_tells_is_told_from_the_table(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    hub = pytest.importorskip("timm.models._hub")
    arguments = {"img_size": 48, "embed_dim": 48, "depth": 1, "num_heads": 3, "mlp_ratio": 2}
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments)
    hub.save_for_hf(theirs, tmp_path, model_args=arguments)
    ours = create_model("vit_tiny_patch16_224", tmp_path, **{**VIT, "img_size": 48})
    assert torch.equal(ours.backbone.stages[0].entry.positions.table, theirs.pos_embed)  # type: ignore[union-attr]


def test_classes_are_counted_in_the_weights_that_are_taken(tmp_path: Path) -> None:
    module, config = registry.family_of("t2t_vit_7"), variant("t2t_vit_7")
    plain, averaged = ({"head.bias": torch.zeros(count)} for count in (3, 4))
    torch.save({"state_dict": plain, "state_dict_ema": averaged}, tmp_path / "t2t.pth")
    assert loading.classes_in(module, config, tmp_path / "t2t.pth") == 4


@pytest.mark.parametrize(("eps", "opens"), [(1e-6, True), (1e-12, True), (1e-3, False)])
def test_a_folder_whose_epsilon_timm_cannot_have_does_not_open_in_timm(
    eps: float, opens: bool, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    create_model(name, **VIT, eps=eps).save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).config.eps == eps
    if opens:
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    else:
        with pytest.raises(TypeError, match="eps"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
