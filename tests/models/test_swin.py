"""Swin and Swin v2: published counts and costs, the authors' numbers, three libraries' logits, any image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity import counted, difference, shaken
from rebuild import agree, apart, built

from vitrail.errors import ModelError, WeightsError
from vitrail.models import loading, registry, swin
from vitrail.models.registry import create_model
from vitrail.weights import adapter

PUBLISHED = {
    # parameters, and multiply-adds in 10^9 as the authors count them: v2 without its bias networks
    "swin_tiny_patch4_window7_224": (28_288_354, 4.5),
    "swin_small_patch4_window7_224": (49_606_258, 8.7),
    "swin_base_patch4_window7_224": (87_768_224, 15.4),
    "swin_base_patch4_window12_384": (87_903_584, 47.1),
    "swin_large_patch4_window7_224": (196_532_476, 34.5),
    "swin_large_patch4_window12_384": (196_735_516, 103.9),
    "swin_tiny_c24_patch4_window8_256": (28_306_432, 5.9),
    "swinv2_tiny_window8_256": (28_347_154, 5.9),
    "swinv2_tiny_window16_256": (28_347_154, 6.6),
    "swinv2_small_window8_256": (49_728_418, 11.5),
    "swinv2_small_window16_256": (49_728_418, 12.6),
    "swinv2_base_window8_256": (87_918_816, 20.3),
    "swinv2_base_window16_256": (87_918_816, 21.8),
    "swinv2_base_window12to16_192to256": (87_918_816, 21.8),
    "swinv2_base_window12to24_192to384": (87_918_816, 54.7),
    "swinv2_large_window12to16_192to256": (196_739_932, 47.5),
    "swinv2_large_window12to24_192to384": (196_739_932, 115.4),
}

slow = pytest.mark.slow
QUICK = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window16_256")


def bias_networks(config: swin.Config) -> int:
    """Multiply-adds of the networks that make v2's relative biases."""
    if config.version == 1:
        return 0
    total = 0
    for window, depth, heads in zip(config.stage_windows, config.depths, config.heads, strict=True):
        total += depth * (2 * window.rows - 1) * (2 * window.columns - 1) * 512 * (2 + heads)
    return total


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=slow) for name in PUBLISHED]
)
def test_has_the_published_size_and_cost(name: str) -> None:
    parameters, cost = PUBLISHED[name]
    found = counted(name)
    assert found.parameters == parameters
    assert found.gflops - bias_networks(registry.variant(name)) / 1e9 == pytest.approx(cost, rel=0.01)


@pytest.mark.parametrize(
    "name", ["swin_base_patch4_window7_224", "swinv2_base_window12_192", "swinv2_large_window12_192"]
)
def test_has_the_published_size_with_22k_classes(name: str) -> None:
    expected = {
        "swin_base_patch4_window7_224": 109_130_249,
        "swinv2_base_window12_192": 109_280_841,
        "swinv2_large_window12_192": 228_772_549,
    }
    with torch.device("meta"):
        model = create_model(name, num_classes=21_841)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected[name]


@pytest.mark.parametrize("name", ["swin_s3_tiny_224", "swin_s3_small_224", "swin_s3_base_224"])
def test_searched_windows_have_timms_tensors(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), create_model(name)
        written = adapter.write(ours.state_dict(), swin.RENAMES[0], loading.context(swin, ours.config))
    assert {key: tuple(value.shape) for key, value in written.items()} == {
        key: tuple(value.shape) for key, value in theirs.state_dict().items()
    }


def build_of(case: dict[str, Any]) -> dict[str, Any]:
    told = case["build"]
    changes: dict[str, Any] = {}
    if "window_size" in told:
        changes["windows"] = (told["window_size"],) * 4
    if "pretrained_window_sizes" in told:
        changes["trained_windows"] = tuple(told["pretrained_window_sizes"])
    return changes


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("swin_tiny_patch4_window7_224", 0),
        pytest.param("swin_tiny_patch4_window7_224", 1, marks=slow),
        pytest.param("swinv2_tiny_window8_256", 0, marks=slow),
        ("swinv2_tiny_window8_256", 1),
        ("swinv2_tiny_window8_256", 2),
    ],
)
def test_gives_the_authors_numbers(
    name: str, place: int, golden: Callable[[str], dict[str, Any]], fill: ModuleType
) -> None:
    numbers = golden(name)
    case = numbers["cases"][place]
    assert agree(built(name, numbers, case, fill, **build_of(case)), case, fill) < 1e-6


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("swin_tiny_patch4_window7_224", (224, 224)),
        pytest.param("swin_small_patch4_window7_224", (224, 112), marks=slow),
        pytest.param("swin_s3_tiny_224", (224, 224), marks=slow),
        ("swinv2_tiny_window8_256", (256, 128)),
        pytest.param("swinv2_tiny_window16_256", (256, 256), marks=slow),
        pytest.param("swinv2_base_window12to16_192to256", (256, 256), marks=slow),
    ],
)
def test_parity_with_timm(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, img_size=size, num_classes=10)
    assert difference(theirs, name, tmp_path, size, img_size=size) < 1e-5


SMALL = {
    "width": 16,
    "depths": (2, 2),
    "heads": (2, 4),
    "windows": (4, 4),
    "trained_windows": (0, 0),
    "mlp_ratio": 4,
}


def theirs_small(version: int, size: int) -> Any:
    transformers = pytest.importorskip("transformers")
    told = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 5}
    if version == 1:
        return transformers.SwinForImageClassification(transformers.SwinConfig(image_size=size, **told))
    return transformers.Swinv2ForImageClassification(transformers.Swinv2Config(image_size=size, **told))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(64, 64), (72, 92)], ids=["whole windows", "padded windows"])
def test_parity_with_transformers(version: int, size: tuple[int, int], tmp_path: Path) -> None:
    theirs = theirs_small(version, 64)
    name = "swin_tiny_patch4_window7_224"
    apart_by = difference(
        theirs, name, tmp_path, size, lambda out: out.logits, version=version, img_size=(64, 64), **SMALL
    )
    assert apart_by < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [("swin_tiny_patch4_window7_224", "swin_t"), ("swinv2_tiny_window8_256", "swin_v2_t")]
)
def test_parity_with_torchvision(name: str, kind: str, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    theirs = getattr(models, kind)(num_classes=10)
    size = registry.variant(name).img_size
    assert difference(theirs, name, tmp_path, size) < 1e-5


def small(version: int = 1, **changes: Any) -> Any:
    return registry.changed(swin.TINY, version=version, **changes)


@pytest.mark.parametrize("layout", swin.RENAMES, ids=lambda layout: layout.name)
@pytest.mark.parametrize("version", [1, 2])
def test_every_layout_gives_back_the_same_bits(layout: adapter.Layout, version: int) -> None:
    model = shaken(registry.from_config("swin_tiny_patch4_window7_224", small(version)))
    known = loading.context(swin, model.config)
    if layout.name == ("transformers" if version == 2 else "transformers-v2"):
        with pytest.raises(WeightsError, match="has no place for"):
            adapter.write(model.state_dict(), layout, known)
        return
    written = adapter.write(model.state_dict(), layout, known)
    written["layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    read, receipt = adapter.read(written, swin.RENAMES, loading.shapes(model), known)
    assert receipt.layout == layout.name
    assert receipt.dropped == (("layers.0.blocks.1.attn_mask", "computed from the grid"),)
    assert all(torch.equal(read[key], value) for key, value in model.state_dict().items())


def test_mmpretrain_merges_channel_by_channel() -> None:
    model = registry.from_config("swin_tiny_patch4_window7_224", small())
    merge = model.backbone.stages[1].entry
    written = adapter.write(model.state_dict(), adapter.by_name(swin.RENAMES, "mmpretrain"), {"v2": False})
    weight = written["backbone.stages.0.downsample.reduction.weight"]
    map = torch.randn(1, 16, 4, 6)
    # Each cell's values lie by channel, then row, then column.
    unfolded = torch.nn.functional.unfold(map, 2, stride=2).transpose(1, 2)
    theirs = (torch.nn.functional.layer_norm(unfolded, (64,), eps=1e-5) @ weight.T).transpose(1, 2)
    assert torch.allclose(merge(map, None)[0].flatten(2), theirs, atol=1e-5)


def test_tables_are_resampled_to_another_window(tmp_path: Path) -> None:
    registry.from_config("swin_tiny_patch4_window7_224", small()).save_pretrained(tmp_path / "model")
    changes = {**vars(small()), "windows": (4, 4)}
    wider = create_model("swin_tiny_patch4_window7_224", tmp_path / "model", **changes)
    assert {story for _, story in wider.receipt.made} == {
        "relative table resampled from window 3x3 to 4x4 (bicubic-plain)"
    }


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(32, 32), (31, 57), (4, 9), (80, 24)])
def test_takes_any_image(version: int, size: tuple[int, int]) -> None:
    model = registry.from_config("swin_tiny_patch4_window7_224", small(version)).eval()
    logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 5) and torch.isfinite(logits).all()


@pytest.mark.parametrize("version", [1, 2])
def test_a_model_built_small_and_one_run_small_agree_where_the_window_fits(version: int) -> None:
    torch.manual_seed(0)
    big = shaken(registry.from_config("swin_tiny_patch4_window7_224", small(version, img_size=(64, 64))))
    less = registry.from_config("swin_tiny_patch4_window7_224", small(version, img_size=(32, 48)))
    less.load_state_dict(big.state_dict())
    images = torch.randn(1, 3, 32, 48)
    with torch.inference_mode():
        assert apart(less.eval()(images), big(images)) < 1e-6


def test_the_last_feature_map_stands_before_the_classifiers_norm() -> None:
    model = registry.from_config("swin_tiny_patch4_window7_224", small()).eval()
    images = torch.randn(1, 3, 32, 32)
    features = model.features(images)
    assert [tuple(map.shape) for map in features.maps] == [(1, 16, 8, 8), (1, 32, 4, 4)]
    coarse = features.maps[-1].flatten(2).transpose(1, 2)
    normed = model.backbone.stages[-1].norm(coarse)
    assert torch.allclose(model.forward_features(images), normed, atol=1e-6)


def test_fresh_blocks_of_v2_are_the_identity_and_the_temperature_is_ten() -> None:
    model = registry.from_config("swin_tiny_patch4_window7_224", small(2)).eval()
    stage = model.backbone.stages[0]
    tokens = torch.randn(1, 64, 16)
    from vitrail.nn.shapes import Grid

    assert torch.equal(stage.blocks[0](tokens, Grid(8, 8)), tokens)
    assert torch.allclose(stage.blocks[0].mixer.logit_scale.exp(), torch.tensor(10.0))


def test_decay_leaves_relative_biases_and_temperatures_alone() -> None:
    for version, expected in ((1, "relative_bias.table"), (2, "relative_bias.fc2.weight")):
        model = registry.from_config("swin_tiny_patch4_window7_224", small(version))
        assert f"backbone.stages.0.blocks.0.mixer.{expected}" in model.no_weight_decay()
        scales = {name for name, _ in model.named_parameters() if name.endswith("logit_scale")}
        assert scales <= model.no_weight_decay() and bool(scales) == (version == 2)
        assert not any("qkv" in name for name in model.no_weight_decay())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"windows": (3,)}, "windows must hold"),
        ({"trained_windows": (3, 3)}, "belongs to version=2"),
        ({"heads": (3, 4)}, "multiple of its heads"),
        ({"drop_path_rate": 1.5}, "must lie in"),
    ],
)
def test_illegal_configurations_say_what_is_legal(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        small(**changes)
