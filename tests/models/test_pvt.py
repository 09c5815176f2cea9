"""PVT and PVT v2: published counts and costs, the authors' numbers, timm's and transformers' logits, any image."""

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
from vitrail.models import loading, pvt, registry
from vitrail.models.registry import create_model
from vitrail.weights import adapter

PUBLISHED = {
    # parameters, and multiply-adds in 10^9
    "pvt_tiny": (13_229_288, 1.933),
    "pvt_small": (24_485_864, 3.816),
    "pvt_medium": (44_208_104, 6.659),
    "pvt_large": (61_369_320, 9.814),
    "pvt_huge_v2": (304_945_512, 50.49),
    "pvt_v2_b0": (3_666_760, 0.566),
    "pvt_v2_b1": (14_009_000, 2.108),
    "pvt_v2_b2": (25_362_856, 4.027),
    "pvt_v2_b2_li": (22_553_512, 3.889),
    "pvt_v2_b3": (45_238_696, 6.897),
    "pvt_v2_b4": (62_556_072, 10.10),
    "pvt_v2_b5": (81_956_008, 11.72),
}

slow = pytest.mark.slow
QUICK = ("pvt_tiny", "pvt_v2_b0", "pvt_v2_b2_li")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=slow) for name in PUBLISHED]
)
def test_has_the_published_size_and_cost(name: str) -> None:
    parameters, cost = PUBLISHED[name]
    found = counted(name)
    assert found.parameters == parameters
    assert found.gflops == pytest.approx(cost, rel=0.01)


@pytest.mark.parametrize(
    ("file", "place"),
    [
        pytest.param("pvt_tiny", 0, marks=slow),
        ("pvt_tiny", 1),
        ("pvt_v2_b0", 0),
        pytest.param("pvt_v2_b0", 1, marks=slow),
        ("pvt_v2_b0", 2),
        pytest.param("pvt_v2_b2_li", 0, marks=slow),
        pytest.param("pvt_v2_b2_li", 1, marks=slow),
        ("pvt_v2_b2_li", 2),
    ],
)
def test_gives_the_authors_numbers(
    file: str, place: int, golden: Callable[[str], dict[str, Any]], fill: ModuleType
) -> None:
    numbers = golden(file)
    case = numbers["cases"][place]
    assert agree(built(file, numbers, case, fill), case, fill) < 1e-6


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("pvt_v2_b0", (224, 224)),
        ("pvt_v2_b2_li", (96, 128)),
        pytest.param("pvt_v2_b1", (97, 160), marks=slow),
    ],
)
def test_parity_with_timm(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    assert difference(timm.create_model(name), name, tmp_path, size) < 1e-5


@pytest.mark.parametrize(
    ("name", "depths"), [("pvt_tiny", [2, 2, 2, 2]), pytest.param("pvt_small", [3, 4, 6, 3], marks=slow)]
)
def test_parity_with_transformers(name: str, depths: list[int], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PvtForImageClassification(transformers.PvtConfig(depths=depths, num_labels=10))
    apart_by = difference(theirs, name, tmp_path, (224, 224), lambda out: out.logits, entry_eps=1e-6)
    assert apart_by < 1e-5


@pytest.mark.parametrize("linear", [False, True])
def test_parity_with_transformers_pvt_v2(linear: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.PvtV2Config(linear_attention=linear, num_labels=7)
    theirs = transformers.PvtV2ForImageClassification(config)
    assert (
        difference(
            theirs, "pvt_v2_b0", tmp_path, (64, 96), lambda out: out.logits, linear=linear, entry_eps=1e-6
        )
        < 1e-5
    )


def small(**changes: Any) -> Any:
    return registry.changed(pvt.TINY, **changes)


FIRST = {"version": 1, "reductions": (4, 1)}


def test_positions_of_each_stage_are_resampled_when_loaded_at_another_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shaken(registry.from_config("pvt_tiny", small(**FIRST)))
    model.save_pretrained(tmp_path / "model")
    wide = create_model(
        "pvt_tiny", tmp_path / "model", **{**vars(small(**FIRST)), "img_size": (48, 64)}
    ).eval()
    assert [table.name for table in wide.receipt.made] == [
        f"backbone.stages.{stage}.entry.positions.table" for stage in (0, 1)
    ]
    images = torch.randn(1, 3, 48, 64)
    with torch.inference_mode():
        assert apart(wide(images), model(images)) < 1e-5


def test_pvt_v1_is_saved_under_the_authors_names_and_v2_under_timms(tmp_path: Path) -> None:
    for name, changes, layout in (("pvt_tiny", FIRST, "original"), ("pvt_v2_b0", {}, "timm")):
        model = registry.from_config(name, small(**changes))
        model.save_pretrained(tmp_path / name)
        assert model.card.layout == layout


@pytest.mark.parametrize("layout", pvt.RENAMES, ids=lambda layout: layout.name)
@pytest.mark.parametrize("changes", [FIRST, {}, {"linear": True}], ids=["v1", "v2", "linear"])
def test_every_layout_gives_back_the_same_bits(layout: adapter.Layout, changes: dict[str, Any]) -> None:
    model = registry.from_config("pvt_v2_b0", small(**changes))
    known = loading.context(pvt, model.config)
    has_v1 = layout.name in ("original", "transformers")
    if ("version" in changes and not has_v1) or ("version" not in changes and layout.name == "transformers"):
        with pytest.raises(WeightsError, match="has no place for"):
            adapter.write(model.state_dict(), layout, known)
        return
    written = adapter.write(model.state_dict(), layout, known)
    read, receipt = adapter.read(written, pvt.RENAMES, loading.shapes(model), known)
    assert receipt.layout == layout.name
    assert all(torch.equal(read[key], value) for key, value in model.state_dict().items())


def test_a_file_of_the_other_version_is_refused_with_what_it_lacks() -> None:
    first, second = (registry.from_config("pvt_v2_b0", small(**changes)) for changes in (FIRST, {}))
    written = adapter.write(second.state_dict(), pvt.RENAMES[1], loading.context(pvt, second.config))
    with pytest.raises(WeightsError, match=r"positions\.table"):
        adapter.read(written, pvt.RENAMES, loading.shapes(first), loading.context(pvt, first.config))


@pytest.mark.parametrize("changes", [FIRST, {}, {"linear": True}], ids=["v1", "v2", "linear"])
def test_takes_any_image(changes: dict[str, Any]) -> None:
    model = registry.from_config("pvt_v2_b0", small(**changes)).eval()
    for size in ((32, 32), (33, 57), (64, 40)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)


def test_feature_maps_of_v1_stand_before_the_last_norm_and_those_of_v2_after_theirs() -> None:
    images = torch.randn(1, 3, 32, 32)
    for changes, normed in ((FIRST, False), ({}, True)):
        model = registry.from_config("pvt_v2_b0", small(**changes)).eval()
        coarse = model.features(images).maps[-1].flatten(2).transpose(1, 2)
        tokens = model.forward_features(images)[:, -coarse.shape[1] :]
        assert torch.allclose(coarse, tokens, atol=1e-6) is normed


def test_a_map_smaller_than_its_reduction_is_named() -> None:
    model = registry.from_config("pvt_v2_b0", small())
    with pytest.raises(ModelError, match="smaller than its reduction by 4"):
        model(torch.randn(1, 3, 8, 32))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"depths": (1,)}, "depths must hold"),
        ({"version": 1, "linear": True}, "belongs to version=2"),
        ({"version": 1}, "whose reduction must be 1"),
        ({"heads": (3, 2)}, "multiple of its heads"),
        ({"drop_rate": 1.0}, "must lie in"),
        ({"version": 3}, "takes one of 1, 2"),
        ({"img_size": (2, 32), **FIRST}, "at least 8"),
    ],
)
def test_illegal_configurations_say_what_is_legal(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        small(**changes)


def test_convolutions_start_as_in_the_authors_code() -> None:
    torch.manual_seed(0)
    model = create_model(
        "pvt_v2_b0", widths=(64, 128), depths=(1, 1), heads=(1, 2), mlp_ratios=(4, 4), reductions=(8, 4)
    )
    patches = model.backbone.stages[1].entry.patches.proj.weight
    assert patches.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    depthwise = model.backbone.stages[0].blocks[0].mlp.conv.weight
    assert depthwise.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
