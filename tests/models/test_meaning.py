"""Weights of a network that computes something else with the same tensors are refused, or followed where asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import shaken
from rebuild import apart

from vitrail.config import to_dict
from vitrail.errors import WeightsError
from vitrail.models import meaning
from vitrail.models.registry import create_model, from_pretrained, variant
from vitrail.weights.card import Card, Preprocessing

SMALL: dict[str, Any] = {"img_size": 32, "width": 48, "depth": 2, "hidden": 96}
NAME = "vit_tiny_patch16_224"


def own_card(name: str, **changes: Any) -> Card:
    return Card(architecture=name, config=to_dict(variant(name, **changes)))


def silent(name: str, card: Card, **changes: Any) -> bool:
    """Whether nobody objects to the card's weights in a model of these fields."""
    try:
        meaning.check(name, variant(name, **changes), card, "FOLDER")
    except WeightsError:
        return False
    return True


def saved(folder: Path, **changes: Any) -> Any:
    model = shaken(create_model(NAME, num_classes=5, **SMALL, **changes))
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("heads", 6),
        ("gelu", "tanh"),
        ("pool", "mean"),
        ("position", "sincos1d"),
        ("eps", 1e-3),
        ("norm_order", "post"),
    ],
)
def test_a_folder_of_ours_fills_no_network_that_computes_something_else(
    field: str, value: Any, tmp_path: Path
) -> None:
    changes = {field: value} | ({"position": "none"} if field == "norm_order" else {})
    model = saved(tmp_path, **changes)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        wanted = model(images)
    with pytest.raises(WeightsError):
        create_model(NAME, tmp_path, **SMALL)
    for again in (create_model(NAME, tmp_path, **SMALL, **changes).eval(), from_pretrained(tmp_path)):
        with torch.inference_mode():
            assert torch.equal(again(images), wanted)


def test_the_refusal_names_the_fields_both_values_and_the_cure(tmp_path: Path) -> None:
    saved(tmp_path, heads=6, gelu="tanh")
    with pytest.raises(WeightsError) as refusal:
        create_model(NAME, tmp_path, **SMALL)
    told = str(refusal.value)
    assert "heads=6, gelu='tanh'" in told and "heads=3, gelu='exact'" in told
    assert f"create_model('{NAME}', pretrained='{tmp_path}', heads=6, gelu='tanh')" in told
    assert f"from_pretrained('{tmp_path}')" in told


def test_a_change_that_was_asked_for_may_differ_from_the_folder(tmp_path: Path) -> None:
    saved(tmp_path)
    assert create_model(NAME, tmp_path, **SMALL, gelu="tanh", pool="mean").config.gelu == "tanh"


def test_a_value_asked_for_by_name_may_be_the_variants_own(tmp_path: Path) -> None:
    saved(tmp_path, gelu="tanh", heads=6)
    assert create_model(NAME, tmp_path, **SMALL, gelu="exact", heads=3).config.gelu == "exact"
    with pytest.raises(WeightsError, match="made with heads=6 and"):
        create_model(NAME, tmp_path, **SMALL, gelu="exact")


def test_sizes_classes_and_what_only_training_sees_may_differ(tmp_path: Path) -> None:
    saved(tmp_path, representation=24)
    changes = {**SMALL, "img_size": 48}
    model = create_model(NAME, tmp_path, num_classes=7, drop_path_rate=0.1, init="timm", **changes)
    assert model.config.num_classes == 7 and model.config.representation == 0


def test_a_model_that_refuses_stays_as_it_was(tmp_path: Path) -> None:
    from vitrail.models.loading import load_pretrained

    saved(tmp_path, heads=6)
    model = create_model(NAME, num_classes=5, **SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match="heads=6"):
        load_pretrained(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_windows_of_the_first_training_count_where_windows_change() -> None:
    first = own_card("swinv2_base_window12_192")
    assert silent("swinv2_base_window12to16_192to256", first)
    assert silent("swinv2_base_window12_192", first, img_size=256)
    assert not silent("swinv2_base_window16_256", first)
    assert silent("swinv2_base_window16_256", first, trained_windows=(12, 12, 12, 6))
    assert silent("swin_base_patch4_window12_384", own_card("swin_base_patch4_window7_224"))


def test_detectors_are_compared_with_their_backbones() -> None:
    card = own_card("detr_resnet50")
    assert silent("detr_resnet50", card) and not silent("detr_resnet50_dc5", card)
    assert not silent("detr_resnet50", own_card("detr_resnet50", norm_order="pre"))
    changed = own_card("setr_pup_large", backbone_changes={"gelu": "tanh"})
    with pytest.raises(WeightsError, match=r"backbone\.gelu='tanh'.*backbone_changes=\{'gelu': 'tanh'\}"):
        meaning.check("setr_pup_large", variant("setr_pup_large"), changed, "FOLDER")
    assert silent("setr_pup_large", changed, backbone_changes={"gelu": "tanh"})
    assert silent(
        "detr_resnet50", own_card("detr_resnet50", frozen_norm=False, drop_rate=0.0, frozen_stages=0)
    )


def test_what_a_family_cannot_vary_is_told_without_a_cure_that_fails() -> None:
    with pytest.raises(WeightsError, match=r"gelu='tanh' and performer_small.* computes nothing else"):
        name = "performer_small_patch16_224"
        meaning.check(name, variant(name), own_card("vit_small_patch16_224", gelu="tanh"), "FOLDER")


def of_library(preprocessing: Preprocessing, architecture: str = "", **words: Any) -> Card:
    told = {"architecture": architecture} | words if architecture else words
    return Card(architecture=architecture, foreign=told, preprocessing=preprocessing)


@pytest.mark.parametrize(
    ("name", "words", "fits"),
    [
        (NAME, {"num_attention_heads": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-12}, True),
        (NAME, {"num_attention_heads": 6}, False),
        (NAME, {"hidden_act": "gelu_pytorch_tanh"}, False),
        (NAME, {"hidden_act": "quick_gelu"}, False),
        (NAME, {"layer_norm_eps": 1e-3}, False),
        ("deit_tiny_patch16_224", {"hidden_act": "gelu_new"}, False),
        ("swin_tiny_patch4_window7_224", {"num_heads": [3, 6, 12, 24], "window_size": 7}, True),
        ("swin_tiny_patch4_window7_224", {"num_heads": [6, 6, 12, 24]}, False),
        ("swinv2_tiny_window8_256", {"window_size": 8, "pretrained_window_sizes": [0, 0, 0, 0]}, True),
        ("swinv2_tiny_window8_256", {"window_size": 8, "pretrained_window_sizes": [12, 12, 12, 6]}, False),
        ("swinv2_tiny_window8_256", {"window_size": 16, "pretrained_window_sizes": [0, 0, 0, 0]}, False),
        ("pvt_v2_b0", {"num_attention_heads": [1, 2, 5, 8]}, True),
        ("pvt_v2_b0", {"num_attention_heads": [1, 2, 4, 8]}, False),
        ("resnet50", {"hidden_act": "relu"}, True),
        ("detr_resnet50", {"model_type": "detr", "encoder_attention_heads": 8, "decoder_attention_heads": 8,
                           "dilation": False, "position_embedding_type": "sine", "activation_function": "relu"}, True),
        ("detr_resnet50", {"model_type": "detr", "dilation": True}, False),
        ("detr_resnet50_dc5", {"model_type": "detr", "dilation": True}, True),
        ("detr_resnet50", {"model_type": "detr", "encoder_attention_heads": 8, "decoder_attention_heads": 4}, False),
        ("detr_resnet50", {"model_type": "detr", "activation_function": "gelu"}, False),
    ],
)  # fmt: skip
def test_transformers_words_are_understood(name: str, words: dict[str, Any], fits: bool) -> None:
    size = Preprocessing(input_size=variant(name).img_size)
    assert silent(name, of_library(size, **{"model_type": "any"} | words)) == fits


@pytest.mark.parametrize(
    ("name", "architecture", "words", "fits"),
    [
        (NAME, NAME, {"model_args": {"num_heads": 3}, "global_pool": "token"}, True),
        (NAME, NAME, {"model_args": {"num_heads": 6}}, False),
        (NAME, NAME, {"model_args": {"act_layer": "gelu_tanh"}}, False),
        (NAME, NAME, {"global_pool": "avg"}, False),
        (NAME, "vit_of_another_day", {"model_args": {"num_heads": 6}}, False),
        (NAME, "vit_tiny_patch16_384", {}, True),
        ("deit_tiny_patch16_224", "deit_tiny_patch16_224", {"global_pool": "avg"}, False),
        ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", {"global_pool": "avg"}, True),
        ("swinv2_base_window16_256", "swinv2_base_window12to16_192to256", {}, False),
        ("swinv2_base_window12to16_192to256", "swinv2_base_window12to16_192to256",
         {"model_args": {"window_size": 16, "pretrained_window_sizes": [12, 12, 12, 6]}}, True),
        ("pit_ti_224", "pit_ti_224", {"model_args": {"heads": [2, 4, 8], "stride": 8}, "global_pool": "token"}, True),
        ("pit_ti_224", "pit_ti_224", {"model_args": {"heads": [4, 8, 16]}}, False),
        ("seresnet50", "seresnet50", {"global_pool": "avg"}, True),
    ],
)  # fmt: skip
def test_timms_words_are_understood(name: str, architecture: str, words: dict[str, Any], fits: bool) -> None:
    size = Preprocessing(input_size=variant(name).img_size)
    assert silent(name, of_library(size, architecture, **words)) == fits


def test_every_published_variant_is_silent_about_itself() -> None:
    from vitrail.models.registry import list_models

    for name in list_models():
        assert not meaning.differences(name, variant(name), own_card(name)), name


@pytest.mark.parametrize("words", [{"num_attention_heads": 6}, {"hidden_act": "gelu_pytorch_tanh"}])
def test_a_folder_of_transformers_gives_its_logits_or_none(words: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**{
        "image_size": 32, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 96, "num_labels": 5, "layer_norm_eps": 1e-6,
    } | words)  # fmt: skip
    theirs = shaken(transformers.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(WeightsError, match="was made with"):
        create_model(NAME, tmp_path, **SMALL)
    changes = {"heads": 6} if "num_attention_heads" in words else {"gelu": "tanh"}
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert (
            apart(create_model(NAME, tmp_path, **SMALL, **changes).eval()(images), theirs(images).logits)
            < 1e-5
        )


def test_a_folder_of_timm_gives_its_logits_or_none(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    hub = pytest.importorskip("timm.models._hub")
    arguments = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 6, "mlp_ratio": 2}
    theirs = shaken(timm.create_model(NAME, num_classes=5, **arguments))
    hub.save_for_hf(theirs, tmp_path, model_args=arguments)
    with pytest.raises(WeightsError, match="heads=6"):
        create_model(NAME, tmp_path, **SMALL)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert apart(create_model(NAME, tmp_path, **SMALL, heads=6).eval()(images), theirs(images)) < 1e-5


def test_a_card_of_another_version_is_compared_as_far_as_it_goes() -> None:
    card = own_card(NAME, heads=6)
    older = dataclasses.replace(card, config={**card.config, "gone": 1})
    assert not silent(NAME, older) and silent(NAME, dataclasses.replace(older, config={"num_classes": 3}))
