"""A model's anatomy on networks whose habits are known beforehand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from matplotlib.text import Text

import vitrail
from tests.explain.families import pictures, tiny
from vitrail.explain import anatomy_figures
from vitrail.explain.anatomy import Anatomy, Head, Norms, anatomy
from vitrail.nn.gates import SqueezeExcite


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Figures by the words behind the model's name, as they are about to become files."""
    kept: dict[str, Any] = {}

    def keep(figure: Any, **options: Any) -> bytes:
        kept[figure.get_suptitle().partition(": ")[2]] = figure
        return b""

    monkeypatch.setattr(anatomy_figures, "png_of", keep)
    return kept


PATCH, SIDE = 8, 4


def vit(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": PATCH * SIDE, "patch_size": PATCH, "width": 16, "depth": 2, "heads": 2, "hidden": 32}
    return vitrail.create_model("vit_tiny_patch16_224", **sizes, num_classes=3, **changes)


def noise(count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(count, 3, PATCH * SIDE, PATCH * SIDE, generator=torch.Generator().manual_seed(1))]


def test_heads_that_look_everywhere_alike_are_dead_and_look_half_across_the_picture() -> None:
    network = vit()
    with torch.no_grad():
        network.backbone.stages[0].blocks[1].mixer.qkv.weight.zero_()
        network.backbone.stages[0].blocks[1].mixer.qkv.bias.zero_()
    found = anatomy(network, noise())
    assert [(head.layer, head.number) for head in found.heads] == [
        ("block 1", 0), ("block 1", 1), ("block 2", 0), ("block 2", 1),
    ]  # fmt: skip
    places = [(row * PATCH, column * PATCH) for row in range(SIDE) for column in range(SIDE)]
    apart = [((a - c) ** 2 + (b - d) ** 2) ** 0.5 for a, b in places for c, d in places]
    for head in found.heads[2:]:
        assert head.dead == "looks everywhere alike"
        assert head.distance == pytest.approx(sum(apart) / len(apart), rel=1e-5)
        assert head.entropy == pytest.approx(1.0)
    assert dict(found.findings())["dead heads"].startswith("2 of 4: block 2 head 0")


def test_heads_that_always_look_at_one_token_are_dead() -> None:
    network = vit()
    mixer = network.backbone.stages[0].blocks[0].mixer
    with torch.no_grad():  # every query asks for the first channel, which only [CLS] has
        network.backbone.stages[0].blocks[0].norm1 = torch.nn.Identity()
        mixer.qkv.weight.zero_()
        mixer.qkv.bias.zero_()
        mixer.qkv.bias[[0, 8]] = 1.0
        mixer.qkv.weight[[16, 24], 0] = 1.0
        positions = network.backbone.stages[0].entry.positions.table
        positions.zero_()
        positions[0, 0, 0] = 40.0
    heads = [head for head in anatomy(network, noise()).heads if head.layer == "block 1"]
    assert [head.dead for head in heads] == ["looks at one token whatever is asked"] * 2


def test_a_token_of_outlying_norm_is_a_sink() -> None:
    network = vit()
    with torch.no_grad():
        network.backbone.stages[0].entry.positions.table[0, 5] = 1000.0
    found = anatomy(network, noise())
    assert [norms.layer for norms in found.norms] == ["block 1", "block 2"]
    assert found.norms[0].outlying == pytest.approx(1 / SIDE**2)
    assert "block" in dict(found.findings())["attention sinks"]


def test_layers_of_several_stages_are_named_with_them() -> None:
    network = vitrail.create_model("pvt_v2_nano_32", num_classes=3)
    found = anatomy(network, [torch.randn(2, 3, 32, 32)])
    assert found.heads[0].layer.startswith("stage 1 block 1")
    assert len({head.layer for head in found.heads}) == sum(len(s.blocks) for s in network.backbone.stages)


@pytest.mark.parametrize(
    "name", ["detr_nano", "quick_detr_nano", "fcos_nano", "setr_pup_nano", "trans2seg_nano", "fpn_swin_nano"]
)
def test_detectors_and_segmenters_have_an_anatomy(name: str) -> None:
    """Object queries look too, but from no place: their attention is left out."""
    torch.manual_seed(0)
    network = vitrail.create_model(name, num_classes=3).eval()
    found = anatomy(network, [torch.randn(1, 3, *network.config.img_size)])
    assert found.pictures == 1 and found.filters is not None
    assert all(head.placed for head in found.heads)


def test_tokens_over_a_residual_backbone_look_as_far_in_pixels_as_cells_lie_apart() -> None:
    torch.manual_seed(0)
    network = vitrail.create_model("trans2seg_nano", num_classes=3).eval()
    found = anatomy(network, [torch.randn(1, 3, 192, 256)])
    rows, columns = torch.meshgrid(torch.arange(192) + 0.5, torch.arange(256) + 0.5, indexing="ij")
    places = torch.stack([rows, columns], dim=2)[8::16, 8::16].flatten(0, 1)  # cells at stride 16
    evenly = float(torch.cdist(places, places).mean())
    assert all(head.distance == pytest.approx(evenly, rel=0.05) for head in found.heads)  # weights are random


def test_gates_are_told_by_their_factors() -> None:
    """Channels come to a gate with either sign, so what goes out by what comes in is no way to them."""
    network = tiny("senet")
    images = pictures(network, count=3)
    found = anatomy(network, [images])
    kept: list[torch.Tensor] = []
    gates = [module for module in network.modules() if isinstance(module, SqueezeExcite)]
    for gate in gates:
        gate.fc2.register_forward_hook(lambda module, given, out: kept.append(out.double().sigmoid()))
    with torch.no_grad():
        network(images)
    assert len(found.gates) == len(gates) == len(kept)
    for (mean, spread, change), factors in zip(found.gates.values(), kept, strict=True):
        assert mean == pytest.approx(float(factors.mean()), rel=1e-5)
        assert spread == pytest.approx(float(factors.mean(dim=0).std()), rel=1e-4)
        assert change == pytest.approx(float(factors.std(dim=0).mean()), rel=1e-3, abs=1e-6)


def test_class_attention_has_no_distance_and_says_none() -> None:
    network = tiny("cait")
    found = anatomy(network, [pictures(network)])
    assert any(math.isnan(head.distance) for head in found.heads)
    told = dict(found.findings())
    assert not any("nan" in text for text in told.values())
    assert sum(name.endswith("look") for name in told) == 2


def test_dead_heads_are_named_or_counted() -> None:
    heads = [Head(layer="block 1", number=n, distance=5.0, entropy=1.0, one_key=0.1) for n in range(9)]
    told = dict(Anatomy(model="m", pictures=1, heads=heads).findings())["dead heads"]
    assert told.startswith("9 of 9: ") and told.endswith(" and 4 more")


def test_no_dot_and_no_name_is_cut_off_or_covered(drawn: dict[str, Any]) -> None:
    heads = [
        Head(layer=f"block {n}", number=0, distance=67.0 + n / 10, entropy=0.5, one_key=0.1) for n in range(3)
    ]
    norms = [Norms(layer=f"block {n}", median=10.0, largest=10.1, outlying=0.0) for n in range(3)]
    scales = {f"block {n}": (0.1, 0.1) for n in range(3)}
    anatomy_figures.figures(Anatomy(model="m", pictures=1, heads=heads, norms=norms, scales=scales))
    (axes,) = drawn["how far heads look, mean over 1 pictures"].axes
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1.05 * 67.2
    for title, names in (
        ("lengths of patch tokens after each block", "longest median"),
        ("layer scale", "largest mean"),
    ):
        figure = drawn[title]
        figure.draw_without_rendering()
        upper, lower = (
            next(text for text in figure.findobj(Text) if text.get_text().strip() == name).get_window_extent()
            for name in names.split()
        )
        assert upper.y0 >= lower.y1 - 0.5
