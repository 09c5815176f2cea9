"""The models that ship: by name in every verb, as their cards say, and nothing of them written to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vitrail.cli.main import main
from vitrail.errors import ModelError
from vitrail.models.registry import create_model, from_pretrained, list_models
from vitrail.weights import folder, shipped

NAMES = shipped.names()


def test_some_ship() -> None:
    assert "vit_nano_patch4_32.cifar10" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_complete_model_folder_of_at_most_twelve_megabytes(name: str) -> None:
    card = folder.read_card(name)
    assert name.partition(".")[0] == card.architecture
    assert card.labels and card.data and card.notes and card.licence and 0.5 < card.scores["acc1"] < 1
    assert sum(path.stat().st_size for path in (shipped.ASSETS / name).iterdir()) < 12.5e6
    assert from_pretrained(name).card.labels == card.labels


@pytest.mark.parametrize("name", NAMES)
def test_create_model_takes_its_weights(name: str) -> None:
    kept = from_pretrained(name)
    for asked in (name, name.partition(".")[0]):
        model = create_model(asked, pretrained=True).eval()
        assert model.config == kept.config and model.card.labels == kept.card.labels
        images = torch.randn(1, 3, *kept.config.img_size)
        with torch.no_grad():
            assert torch.equal(model(images), kept(images))
    assert create_model(name, pretrained=True, num_classes=3).num_classes == 3


def test_a_full_name_means_that_network_without_its_weights_too() -> None:
    name = "vit_tiny_patch16_224.imagenette"
    kept = from_pretrained(name)
    assert create_model(name).config == create_model(name, shipped.ASSETS / name).config == kept.config
    # timm's tags say nothing here.
    assert create_model("vit_tiny_patch16_224.augreg_in21k", depth=1).num_classes == 1000
    assert list_models("*.imagenette", pretrained=True) == [
        known for known in NAMES if known.endswith("imagenette")
    ]


def test_what_does_not_ship_is_named() -> None:
    with pytest.raises(ModelError, match=r"No weights of vit_huge_patch14_224 ship.*cifar10"):
        create_model("vit_huge_patch14_224", pretrained=True)


def test_the_cat_is_a_cat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image brings the photograph")
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(data.chelsea()).save("cat.png")
    assert main(["predict", "vit_nano_patch4_32.cifar10", "cat.png", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["label"] == "cat"
