"""PiT: published counts and costs, the authors' numbers, timm's logits, any image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity import counted, difference, shaken
from rebuild import agree, apart, built

from vitrail.errors import ModelError
from vitrail.models import loading, pit, registry
from vitrail.models.registry import create_model
from vitrail.nn.shapes import ClassOutput
from vitrail.weights import adapter

PUBLISHED = {
    # parameters, and multiply-adds in 10^9
    "pit_ti_224": (4_847_272, 0.699),
    "pit_xs_224": (10_618_888, 1.395),
    "pit_s_224": (23_461_912, 2.871),
    "pit_b_224": (73_764_840, 12.402),
    "pit_ti_distilled_224": (5_104_336, 0.705),
    "pit_xs_distilled_224": (11_003_984, 1.407),
    "pit_s_distilled_224": (24_039_056, 2.897),
    "pit_b_distilled_224": (74_790_096, 12.482),
}


QUICK = ("pit_ti_224", "pit_s_distilled_224")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_has_the_published_size_and_cost(name: str) -> None:
    parameters, cost = PUBLISHED[name]
    found = counted(name)
    assert found.parameters == parameters
    assert found.gflops == pytest.approx(cost, rel=0.01)


@pytest.mark.parametrize(
    ("file", "name", "place"),
    [
        ("pit_ti", "pit_ti_224", 0),
        ("pit_ti", "pit_ti_224", 1),
        pytest.param("pit_s_distilled", "pit_s_distilled_224", 0, marks=pytest.mark.slow),
        ("pit_s_distilled", "pit_s_distilled_224", 1),
    ],
)
def test_gives_the_authors_numbers(
    file: str, name: str, place: int, golden: Callable[[str], dict[str, Any]], fill: ModuleType
) -> None:
    numbers = golden(file)
    case = numbers["cases"][place]
    changes = {"img_size": case["build"]["image_size"]} if place else {}
    assert agree(built(name, numbers, case, fill, **changes), case, fill) < 1e-6


@pytest.mark.parametrize(
    ("name", "size"),
    [("pit_ti_224", (224, 224)), ("pit_s_distilled_224", (96, 128)), ("pit_xs_224", (97, 70))],
)
def test_parity_with_timm(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, img_size=size)
    rows, columns = registry.variant(name, img_size=size).grid
    assert theirs.pos_embed.shape[2:] == (rows, columns)
    assert difference(theirs, name, tmp_path, size, img_size=size) < 1e-5


def tiny(**changes: Any) -> Any:
    return registry.changed(pit.TINY, **changes)


def test_positions_are_resampled_when_loaded_at_another_size(tmp_path: Path) -> None:
    model = shaken(registry.from_config("pit_s_distilled_224", tiny()))
    model.save_pretrained(tmp_path / "model")
    wide = create_model("pit_s_distilled_224", tmp_path / "model", **{**vars(tiny()), "img_size": (40, 64)})
    assert "from 7x7 to 9x15" in wide.receipt.made[0].story
    images = torch.randn(1, 3, 40, 64)
    with torch.inference_mode():
        assert apart(wide.eval()(images), model(images)) < 1e-5


@pytest.mark.parametrize("layout", pit.RENAMES, ids=lambda layout: layout.name)
@pytest.mark.parametrize("distilled", [False, True])
def test_every_layout_gives_back_the_same_bits(layout: adapter.Layout, distilled: bool) -> None:
    model = registry.from_config("pit_ti_224", tiny(distilled=distilled, img_size=(32, 48)))
    known = loading.context(pit, model.config)
    written = adapter.write(model.state_dict(), layout, known)
    assert written["pos_embed"].shape == (1, 8, 7, 11)
    assert written["cls_token"].shape == (1, 1 + distilled, 8)
    read, receipt = adapter.read(written, pit.RENAMES, loading.shapes(model), known)
    assert receipt.layout == layout.name
    assert all(torch.equal(read[key], value) for key, value in model.state_dict().items())


def test_the_pooled_token_does_not_see_the_map_and_a_channel_sees_one_channel() -> None:
    pool = registry.from_config("pit_ti_224", tiny()).backbone.stages[1].entry
    map, token = torch.randn(1, 8, 7, 7), torch.randn(1, 1, 8)
    pooled, prefix = pool(map, token)
    changed = map.clone()
    changed[:, 3] += 1
    other, same = pool(changed, token)
    assert torch.equal(prefix, same)
    moved = (pooled - other).abs().amax(dim=(0, 2, 3)) > 0
    assert moved.nonzero().flatten().tolist() == [6, 7]


def test_a_distilled_model_trains_two_heads_and_answers_their_mean() -> None:
    model = registry.from_config("pit_s_distilled_224", tiny())
    model.set_distilled_training(True)
    images = torch.randn(2, 3, 32, 32)
    pair = model.train()(images)
    assert isinstance(pair, ClassOutput)
    assert torch.allclose(model.eval()(images), (pair.logits + pair.distilled) / 2, atol=1e-6)


def test_drop_path_never_reaches_its_full_rate() -> None:
    model = create_model("pit_ti_224", drop_path_rate=0.1)
    rates = [block.drop_path.rate for stage in model.backbone.stages for block in stage.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.1 * 11 / 12)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"heads": (2, 3)}, "multiple of those before"),
        ({"heads": (2,)}, "heads must hold"),
        ({"img_size": (4, 32)}, "at least the patch"),
        ({"attn_drop_rate": -0.1}, "must lie in"),
        ({"stride": 0}, "at least 1"),
    ],
)
def test_illegal_configurations_say_what_is_legal(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        tiny(**changes)


def test_a_picture_smaller_than_a_patch_is_told() -> None:
    model = create_model("pit_ti_224", num_classes=2).eval()
    with pytest.raises(
        ModelError, match=r"A patch of 16 pixels needs a map of 16 x 16 at least; got 12 x 12"
    ):
        model(torch.zeros(1, 3, 12, 12))
