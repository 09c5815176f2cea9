"""SE networks: published counts and costs, the ported Caffe network's numbers, timm's logits, and files mistaken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity import counted, difference, shaken
from parity_table import measured
from rebuild import apart

from vitrail.errors import WeightsError
from vitrail.models import loading, registry, senet
from vitrail.models.registry import create_model
from vitrail.weights import adapter

PUBLISHED = {
    # parameters, and multiply-adds in 10^9
    "legacy_seresnet50": (28_088_024, 3.860),
    "legacy_seresnet101": (49_326_872, 7.575),
    "legacy_seresnet152": (66_821_848, 11.289),
    "legacy_seresnext50_32x4d": (27_559_896, 4.233),
    "legacy_seresnext101_32x4d": (48_955_416, 7.975),
    "legacy_senet154": (115_088_984, 20.688),
    "seresnet50": (28_088_024, 4.092),
    "seresnext50_32x4d": (27_559_896, 4.233),
    "senet154": (115_088_984, 20.688),
}

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow) if cost > 5 else name for name, (_, cost) in PUBLISHED.items()]
)
def test_has_the_published_size_and_cost(name: str) -> None:
    parameters, cost = PUBLISHED[name]
    found = counted(name)
    assert found.parameters == parameters
    assert found.gflops == pytest.approx(cost, rel=0.01)


def test_gates_add_the_published_parameters() -> None:
    with torch.device("meta"):
        model = create_model("seresnet50")
    added = sum(value.numel() for name, value in model.named_parameters() if ".gate." in name)
    assert added == 2_530_992


def test_gives_the_numbers_of_the_ported_caffe_network(
    golden: Callable[[str], dict[str, Any]], fill: ModuleType
) -> None:
    told = golden("legacy_seresnet50")
    values = fill.fill({name: tuple(shape) for name, shape in told["state_dict"]})
    state = {name: torch.from_numpy(value) for name, value in values.items()}
    model = create_model("legacy_seresnet50")
    ours, receipt = adapter.read(
        state, senet.RENAMES, loading.shapes(model), loading.context(senet, model.config)
    )
    assert receipt.layout == "legacy" and len(receipt.used) == len(state)
    model.load_state_dict(ours)
    model.double().eval()
    images = torch.from_numpy(fill.picture(2, 3, 224, 224)).double()
    with torch.inference_mode():
        logits, maps = model(images), model.features(images).maps
    expected = told["outputs_float64"]["logits"]
    found = max(apart(logits.flatten()[:16], expected["first16"]), apart(logits.norm(), expected["l2"]))
    assert measured(found, model, "ported Caffe net", (224, 224)) < 1e-6
    for map, name in zip(maps, ("layer1", "layer2", "layer3", "layer4"), strict=True):
        assert apart(map.norm(), told["checkpoints_float64"][name]["l2"]) < 1e-6


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("legacy_seresnet50", (97, 128)),
        pytest.param("legacy_seresnext50_32x4d", (96, 97), marks=slow),
        pytest.param("legacy_senet154", (64, 65), marks=slow),
        ("seresnet50", (97, 64)),
        pytest.param("seresnext50_32x4d", (64, 64), marks=slow),
        pytest.param("senet154", (64, 65), marks=slow),
    ],
)
def test_parity_with_timm(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    assert difference(timm.create_model(name, num_classes=10), name, tmp_path, size) < 1e-5


def tiny(**changes: Any) -> Any:
    return registry.changed(senet.TINY, **changes)


CAFFE = {"pool": "ceil", "stride_in": "first"}


@pytest.mark.parametrize("layout", senet.RENAMES, ids=lambda layout: layout.name)
@pytest.mark.parametrize("stem", ["7x7", "deep"])
def test_every_layout_gives_back_the_same_bits(layout: adapter.Layout, stem: str) -> None:
    caffe = layout.name == "legacy"
    if stem == "deep" and layout.name == "mmpretrain":
        return
    model = shaken(registry.from_config("seresnet50", tiny(stem=stem, **(CAFFE if caffe else {}))))
    known = loading.context(senet, model.config)
    written = adapter.write(model.state_dict(), layout, known)
    read, receipt = adapter.read(written, senet.RENAMES, loading.shapes(model), known)
    assert receipt.layout == layout.name
    assert all(torch.equal(read[key], value) for key, value in model.state_dict().items())


def test_a_caffe_file_is_refused_by_a_network_that_strides_elsewhere_and_the_other_way(
    tmp_path: Path,
) -> None:
    for mine, others, told in ((CAFFE, {}, "take legacy_seresnet50"), ({}, CAFFE, "take seresnet50")):
        source = registry.from_config("seresnet50", tiny(**mine))
        target = registry.from_config("seresnet50", tiny(**others))
        source.save_pretrained(tmp_path / "model")
        assert source.card.layout == ("legacy" if mine else "timm")
        state, _, _ = loading.read(tmp_path / "model" / "model.safetensors")
        with pytest.raises(WeightsError, match=told):
            adapter.read(state, senet.RENAMES, loading.shapes(target), loading.context(senet, target.config))


def test_a_folder_tells_what_its_tensors_compute(tmp_path: Path) -> None:
    registry.from_config("seresnet50", tiny(**CAFFE)).save_pretrained(tmp_path / "model")
    with pytest.raises(WeightsError, match="pool='ceil', stride_in='first' and seresnet50 has pool='pad'"):
        create_model("seresnet50", tmp_path / "model", **vars(tiny()))
    create_model("seresnet50", tmp_path / "model", **vars(tiny(**CAFFE)))


def test_where_the_stride_stands_matters() -> None:
    torch.manual_seed(0)
    first, middle = (
        registry.from_config("seresnet50", tiny(stride_in=place)) for place in ("first", "middle")
    )
    middle.load_state_dict(first.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(first.eval()(images), middle.eval()(images), rtol=1e-2)
