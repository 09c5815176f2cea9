"""The card travels as JSON that timm and transformers read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vitrail.errors import WeightsError
from vitrail.weights.card import Card, Preprocessing

CARD = Card(
    architecture="vit_tiny_patch16_224",
    labels=("tench", "goldfish", "kö"),
    preprocessing=Preprocessing(
        input_size=(96, 128), mean=(0.485, 0.456, 0.406), std=(0.2, 0.3, 0.4), interpolation="bilinear",
        crop_pct=0.875, crop_mode="squash",
    ),
    config={"num_classes": 3, "width": 192, "img_size": [96, 128]},
    layout="timm", licence="apache-2.0", source="trained here", sha256="00ff", scores={"acc1": 0.5},
    recipe={"lr": 0.001}, data="imagenette", notes="none",
)  # fmt: skip


@pytest.mark.parametrize(
    "library", [None, {"architecture": "vit_base"}, {"model_type": "vit", "image_size": 96}]
)
def test_a_card_survives_json(library: dict[str, Any] | None) -> None:
    view = json.loads(json.dumps(CARD.to_json(library)))
    assert Card.from_json(view) == CARD
    assert (
        view["id2label"] == {"0": "tench", "1": "goldfish", "2": "kö"} and view["label2id"]["goldfish"] == 1
    )
    assert ("pretrained_cfg" in view) == ("model_type" not in view)
    assert view["vitrail"]["architecture"] == "vit_tiny_patch16_224"


def test_the_smallest_card_survives_json() -> None:
    card = Card(architecture="x")
    assert Card.from_json(json.loads(json.dumps(card.to_json()))) == card
    assert Card.from_json({}).architecture == ""


def test_timms_config_is_read() -> None:
    view = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 2,
        "label_names": ["a", "b"],
        "pretrained_cfg": {
            "input_size": [3, 224, 224], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic",
            "crop_pct": 0.9, "license": "apache-2.0", "first_conv": "patch_embed.proj",
        },
    }  # fmt: skip
    card = Card.from_json(view)
    assert card.labels == ("a", "b") and card.num_classes == 2 and card.licence == "apache-2.0"
    assert card.preprocessing == Preprocessing()


@pytest.mark.parametrize(
    ("preprocessor", "want"),
    [
        (
            {
                "size": {"height": 224, "width": 192},
                "resample": 2,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            },
            {"input_size": (224, 192), "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
        ),
        (
            {"size": 384, "resample": 3},
            {"input_size": (384, 384), "crop_mode": "squash", "interpolation": "bicubic"},
        ),
        (
            {
                "size": {"shortest_edge": 256},
                "crop_size": {"height": 224, "width": 224},
                "do_center_crop": True,
            },
            {"input_size": (224, 224), "crop_pct": 0.875, "crop_mode": "center"},
        ),
        ({}, {"input_size": (240, 240), "crop_mode": "squash"}),
    ],
)
def test_transformers_preprocessing_is_read(preprocessor: dict[str, Any], want: dict[str, Any]) -> None:
    view = {"model_type": "vit", "image_size": 240, "id2label": {"0": "a", "1": "b"}, "num_channels": 3}
    card = Card.from_json(view, preprocessor)
    assert {name: getattr(card.preprocessing, name) for name in want} == want
    assert card.labels == ("a", "b") and card.architecture == ""


@pytest.mark.parametrize(
    "size",
    [
        {"size": {"shortest_edge": 800, "longest_edge": 1333}},
        {"size": 800, "max_size": 1333},
        {"size": {"shortest_edge": 800}, "max_size": 1333},
    ],
)
def test_a_detectors_resizing_is_read_as_it_is_published(size: dict[str, Any]) -> None:
    preprocessor = {"do_resize": True, "do_normalize": True, "resample": 2, "image_mean": [0.485, 0.456, 0.406],
                    "image_std": [0.229, 0.224, 0.225], "format": "coco_detection"} | size  # fmt: skip
    wanted = Preprocessing(
        input_size=(800, 1333), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear",
        crop_pct=1.0, crop_mode="fit",
    )  # fmt: skip
    assert Card.from_json({"model_type": "detr"}, preprocessor).preprocessing == wanted
    written = Card(architecture="detr_resnet50", preprocessing=wanted)
    assert Card.from_json({"model_type": "detr"}, written.preprocessor_json()).preprocessing == wanted


def test_a_folder_without_preprocessing_is_known_to_lack_it() -> None:
    foreign = {"model_type": "deit", "image_size": 224, "num_attention_heads": 3}
    assert not Card.from_json(foreign).preprocessing_told
    assert not Card.from_json({}).preprocessing_told
    assert Card.from_json(foreign, {"size": 224, "image_mean": [0.5] * 3}).preprocessing_told
    assert Card.from_json({"architecture": "vit", "pretrained_cfg": {"mean": [0.5] * 3}}).preprocessing_told
    assert Card.from_json(CARD.to_json({"model_type": "vit"})).preprocessing_told


def test_another_librarys_words_are_kept_for_reading_and_never_written() -> None:
    view = {"model_type": "vit", "num_attention_heads": 6, "id2label": {"0": "a"}, "pretrained_cfg": {}}
    card = Card.from_json(view)
    assert card.foreign == {"model_type": "vit", "num_attention_heads": 6}
    assert Card.from_json(card.to_json()).foreign == {} == Card.from_json(CARD.to_json()).foreign


def test_preprocessing_in_transformers_words() -> None:
    view = Card(architecture="x", preprocessing=Preprocessing(crop_pct=0.875)).preprocessor_json()
    assert view["size"] == {"shortest_edge": 256} and view["crop_size"] == {"height": 224, "width": 224}
    assert view["resample"] == 3 and view["image_mean"] == [0.5, 0.5, 0.5]
    assert CARD.preprocessor_json()["size"] == {"height": 109, "width": 146}


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_pct": 0.0}, {"crop_pct": 1.5}, {"crop_mode": "middle"}, {"interpolation": "cubic"}, {"std": (0.0,) * 3},
        {"mean": (float("nan"),) * 3}, {"mean": (0.5, 0.5)}, {"in_chans": 0}, {"input_size": (0, 224)},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=next(iter(wrong))):
        Preprocessing(**wrong)


@pytest.mark.parametrize(
    "view",
    [
        {"pretrained_cfg": {"input_size": 224}}, {"pretrained_cfg": []}, {"num_classes": "many"}, {"vitrail": 3},
        {"vitrail": {"format": 99}}, {"id2label": {"a": "b"}}, {"vitrail": {"scores": 3}},
    ],
)  # fmt: skip
def test_a_config_of_wrong_kinds_is_an_error_of_ours(view: dict[str, Any]) -> None:
    with pytest.raises(WeightsError):
        Card.from_json(view)
