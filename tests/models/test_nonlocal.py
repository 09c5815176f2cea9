"""Non-local ResNets: published counts and places, a start from a plain ResNet, and files mistaken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import counted, shaken
from rebuild import apart

from vitrail.errors import ModelError, WeightsError
from vitrail.models import loading, nonlocal_net, registry, resnet
from vitrail.models.registry import create_model
from vitrail.nn.gates import NonLocal
from vitrail.weights import adapter

PUBLISHED = {
    # with Kinetics' 400 classes, without frames
    "nonlocal_resnet50_1": 26_429_392,
    "nonlocal_resnet50_5": 31_686_096,
    "nonlocal_resnet50_10": 39_044_560,
    "nonlocal_resnet101_5": 50_678_224,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_size(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=400)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_blocks_stand_where_the_paper_puts_them() -> None:
    told = {
        "nonlocal_resnet50_1": ["2.4"],
        "nonlocal_resnet50_5": ["1.1", "1.3", "2.1", "2.3", "2.5"],
        "nonlocal_resnet101_5": ["1.1", "1.3", "2.6", "2.13", "2.20"],
    }
    for name, expected in told.items():
        with torch.device("meta"):
            model = create_model(name)
        found = [place.split(".") for place, part in model.named_modules() if isinstance(part, NonLocal)]
        assert [f"{place[2]}.{place[4]}" for place in found] == expected
    for depth in (50, 101):
        with torch.device("meta"):
            model = create_model(f"nonlocal_resnet{depth}_10")
        assert sum(isinstance(part, NonLocal) for part in model.modules()) == 10


def test_a_block_costs_what_the_sheet_says() -> None:
    added = counted("nonlocal_resnet50_1").multiply_adds - counted("resnet50").multiply_adds
    # 1024 channels on 14 x 14: three projections and one back, and two products with 49 places
    cells, inner = 196, 512
    assert added == 4 * cells * 1024 * inner + 2 * cells * 49 * inner


def tiny(**changes: Any) -> Any:
    return registry.changed(nonlocal_net.TINY, **changes)


@pytest.mark.parametrize("form", ["gaussian", "embedded", "dot", "concatenation"])
@pytest.mark.parametrize("block_norm", [True, False])
def test_starts_as_the_plain_resnet_whose_weights_it_takes(
    form: str, block_norm: bool, tmp_path: Path
) -> None:
    plain = shaken(registry.from_config("resnet50", resnet.TINY))
    plain.save_pretrained(tmp_path / "plain")
    config = {**vars(tiny()), "form": form, "block_norm": block_norm}
    model = create_model("nonlocal_resnet50_1", tmp_path / "plain", **config).eval()
    assert all(".after." in name for name in model.receipt.fresh) and model.receipt.fresh
    images = torch.randn(2, 3, 32, 40)
    with torch.inference_mode():
        assert apart(model(images), plain(images)) < 1e-6


@pytest.mark.parametrize("form", ["gaussian", "embedded", "dot", "concatenation"])
@pytest.mark.parametrize("subsample", ["none", "after", "before"])
def test_every_form_trains_on_any_image(form: str, subsample: str) -> None:
    model = registry.from_config("nonlocal_resnet50_1", tiny(form=form, subsample=subsample)).train()
    assert model(torch.randn(2, 3, 33, 47)).shape == (2, 5)


AUTHORS = {"scaled": True, "subsample": "before", "pool": "floor"}


@pytest.mark.parametrize("layout", nonlocal_net.RENAMES, ids=lambda layout: layout.name)
def test_every_layout_gives_back_the_same_bits(layout: adapter.Layout) -> None:
    model = shaken(registry.from_config("nonlocal_resnet50_1", tiny(**AUTHORS)))
    known = loading.context(nonlocal_net, model.config)
    written = adapter.write(model.state_dict(), layout, known)
    read, receipt = adapter.read(written, nonlocal_net.RENAMES, loading.shapes(model), known)
    assert receipt.layout == layout.name
    assert all(torch.equal(read[key], value) for key, value in model.state_dict().items())


def test_the_authors_blobs_are_read_and_belong_to_what_their_code_computes() -> None:
    model = shaken(registry.from_config("nonlocal_resnet50_1", tiny(**AUTHORS)))
    written = adapter.write(model.state_dict(), nonlocal_net.RENAMES[1], {})
    blobs = {key: value for key, value in written.items() if not key.endswith("_batches")}
    blobs |= {"lr": torch.zeros(1), "conv1_w_momentum": torch.zeros(1)}
    assert written["nonlocal_conv3_0_theta_w"].shape == (32, 64, 1, 1, 1)
    assert {"res2_0_branch2b_bn_riv", "res3_0_branch1_w", "pred_w"} <= set(blobs)
    read, receipt = adapter.read(
        blobs, nonlocal_net.RENAMES, loading.shapes(model), loading.context(nonlocal_net, model.config)
    )
    assert set(dict(receipt.dropped)) == {"lr", "conv1_w_momentum"}
    assert torch.equal(
        read["backbone.stages.1.blocks.0.after.theta.weight"],
        model.backbone.stages[1].blocks[0].after.theta.weight,
    )
    with pytest.raises(WeightsError, match="scaled=True, subsample='before', pool='floor'"):
        adapter.read(
            blobs, nonlocal_net.RENAMES, loading.shapes(model), loading.context(nonlocal_net, tiny())
        )


def test_a_folder_tells_what_its_tensors_compute(tmp_path: Path) -> None:
    registry.from_config("nonlocal_resnet50_1", tiny(form="dot")).save_pretrained(tmp_path / "model")
    with pytest.raises(WeightsError, match=r"form='dot'.* has form='embedded'"):
        create_model("nonlocal_resnet50_1", tmp_path / "model", **vars(tiny()))
    loaded = registry.from_pretrained(tmp_path / "model")
    assert loaded.config.form == "dot" and loaded.config.places == ((), (0,))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"places": ((), (2,))}, "places must name"),
        ({"places": ((0,),)}, "places must name"),
        ({"form": "dot", "scaled": True}, "goes with form='embedded'"),
        ({"form": "cosine"}, "form takes one of"),
    ],
)
def test_illegal_configurations_say_what_is_legal(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        tiny(**changes)


def test_a_map_too_small_to_subsample_is_told() -> None:
    model = create_model("nonlocal_resnet50_1", num_classes=2).eval()
    with pytest.raises(ModelError, match=r"map of 2 x 2 at least; got 1 x 1: give larger pictures"):
        model(torch.zeros(1, 3, 16, 16))
