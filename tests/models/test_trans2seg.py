"""Trans2Seg: the authors' numbers, what of their files enters a result, any size and any class count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity import counted
from parity_table import measured
from rebuild import apart, parameters
from torch import nn

from vitrail.errors import ModelError, WeightsError
from vitrail.models import loading, registry, trans2seg
from vitrail.models.registry import create_model
from vitrail.nn.class_queries import ClassLayer, GridMlp
from vitrail.nn.shapes import Grid
from vitrail.tasks.segment import Segment
from vitrail.weights import adapter

slow = pytest.mark.slow

PUBLISHED = {
    # all parameters, those that never get a gradient, and 10^9 multiply-adds at 512 x 512, as the fact sheet has them
    "trans2seg_small": (32_721_333, 2_197_864, 41.07),
    "trans2seg_medium": (58_550_721, 21_797_096, 50.99),
    "trans2seg_large": (330_562_521, 81_361_128, 241.13),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_size_without_what_nothing_reads(name: str) -> None:
    whole, dead, _ = PUBLISHED[name]
    assert parameters(name) == whole - dead


@slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_cost_without_what_nothing_reads(name: str) -> None:
    config, places = registry.variant(name), 32 * 32
    # The maps of all layers but the last, each through an MLP, and the last layer's tokens.
    maps = config.num_classes * config.heads * (config.depth - 1)
    skipped = maps * 6 * places**2 + places * 2 * config.mlp_ratio * config.width**2
    assert counted(name).gflops + skipped / 1e9 == pytest.approx(PUBLISHED[name][2], rel=0.005)


def test_has_the_published_size_with_150_classes() -> None:
    with torch.device("meta"):
        model = create_model("trans2seg_medium", num_classes=150)
    assert sum(parameter.numel() for parameter in model.parameters()) == 58_586_049 - 21_797_096


@slow
@pytest.mark.timeout(1200)
def test_gives_the_authors_numbers(golden: Callable[[str], dict[str, Any]], fill: ModuleType) -> None:
    numbers = golden("trans2seg_medium")
    state = fill.fill({key: tuple(shape) for key, shape in numbers["state_dict"]})
    model = create_model("trans2seg_medium")
    ours, receipt = adapter.read(
        {key: torch.from_numpy(value) for key, value in state.items()},
        trans2seg.RENAMES, loading.shapes(model), loading.context(trans2seg, model.config),
    )  # fmt: skip
    dropped = [key for key, _ in receipt.dropped]
    assert len(dropped) == 34 and sum(state[key].size for key in dropped) == 21_797_096
    model.load_state_dict(ours, strict=False)
    model.double().eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(fill.picture(2, 3, 512, 512)).double()).logits
    told = numbers["outputs_float64"]["logits"]
    flat = logits.flatten()
    found = max(
        apart(flat[:16], told["first16"]),
        apart(flat[torch.arange(16) * flat.numel() // 16], told["spread16"]),
        apart(flat.norm(), told["l2"]),
    )
    assert measured(found, model, "the authors' code", (512, 512)) < 1e-6
    assert (
        apart(logits.argmax(1).double().norm(), numbers["outputs_float64"]["argmax class map"]["l2"]) < 1e-6
    )


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    return registry.from_config("trans2seg_medium", registry.changed(trans2seg.TINY, **changes))


def filled(**changes: Any) -> Any:
    """The small network with every number moved, in evaluation mode."""
    model = tiny(**changes)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def test_published_queries_are_cut_without_exchanging_heads_and_classes() -> None:
    """With 3 classes, 2 heads of width 2: head 0 gets the flat elements [0, 1], [2, 3], [4, 5] (fact sheet)."""
    for numerics, wanted in (
        ("published", [[0, 1], [2, 3], [4, 5]]),
        ("clean", [[0, 1], [4, 5], [8, 9]]),
    ):
        layer = ClassLayer(4, 2, 8, numerics, True, 1e-5)  # type: ignore[arg-type]
        flat = torch.arange(12.0).view(1, 3, 4)
        layer.query_norm, layer.query, layer.token_norm = nn.Identity(), nn.Identity(), nn.Identity()
        with torch.no_grad():  # keys of head 0 pick out one number each
            layer.key_value.weight.zero_()
            layer.key_value.weight[:4] = torch.eye(4)
        tokens = torch.eye(4)[None, :2]  # token t has a one at place t: key t of head 0
        scores = layer(flat, tokens)[2] / layer.scale  # [1, H, K, N]
        assert scores[0, 0].tolist() == wanted


def test_a_map_of_another_size_goes_through_the_published_grid_and_back() -> None:
    torch.manual_seed(0)
    part = GridMlp(Grid(4, 4), 1e-5)
    maps = torch.randn(1, 3, 2, 16)
    added = part.mlp(part.norm((2 * maps).flatten(1, 2))).view_as(maps)
    assert torch.allclose(part(maps, Grid(4, 4)), 2 * maps + added)
    # what varies from row to row alone looks the same in a grid of more columns
    rows = torch.randn(1, 1, 1, 4, 1).expand(1, 1, 1, 4, 9)
    wide = part(rows.flatten(3), Grid(4, 9)).unflatten(3, (4, 9))
    narrow = part(rows[..., :4].flatten(3), Grid(4, 4)).unflatten(3, (4, 4))
    assert torch.allclose(wide[..., [0, -1]], narrow[..., [0, -1]], atol=1e-5)


KINDS: dict[str, dict[str, Any]] = {
    "published": {},
    "clean": {"numerics": "clean"},
    "one layer": {"depth": 1},
    "pyramid": {
        "backbone": "pvt_v2_b0",
        "backbone_changes": {"widths": [8, 16, 24, 32], "heads": [1, 2, 3, 4]},
    },
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_takes_any_size_and_every_parameter_gets_a_gradient(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    output = model(torch.randn(2, 3, 72, 90))
    assert output.logits.shape == (2, 5, 72, 90) and output.auxiliary == ()
    Segment("abcde").loss(output, torch.randint(0, 5, (2, 72, 90)))["loss"].backward()
    dead = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or parameter.grad.abs().max() == 0)
    ]
    # a number added to every class's logit changes no softmax
    assert [name for name in dead if name != "head.score.bias"] == []


@pytest.mark.parametrize("numerics", ["published", "clean"])
def test_saved_and_loaded_it_gives_the_same_bits(numerics: str, tmp_path: Path) -> None:
    model = filled(numerics=numerics)
    model.card = dataclasses.replace(model.card, labels=tuple("abcde"))
    model.save_pretrained(tmp_path / "model")
    loaded = registry.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and loaded.card.labels == tuple("abcde")
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(images).logits, model(images).logits)
    other = "clean" if numerics == "published" else "published"
    with pytest.raises(WeightsError, match="numerics"):
        create_model("trans2seg_medium", tmp_path / "model", **{**vars(trans2seg.TINY), "numerics": other})


def test_a_file_of_the_released_code_is_refused_by_the_clean_network() -> None:
    model = tiny()
    context = loading.context(trans2seg, model.config)
    theirs = adapter.write(model.state_dict(), trans2seg.RENAMES[0], context)
    clean = tiny(numerics="clean")
    with pytest.raises(WeightsError, match="take trans2seg_medium"):
        adapter.read(
            theirs, trans2seg.RENAMES, loading.shapes(clean), loading.context(trans2seg, clean.config)
        )


def test_a_file_of_another_size_has_its_positions_resampled() -> None:
    model = tiny()
    theirs = adapter.write(model.state_dict(), trans2seg.RENAMES[0], loading.context(trans2seg, model.config))
    larger = tiny(img_size=(96, 64), numerics="published")
    expected = {**loading.shapes(larger)}
    grid = {name: shape for name, shape in loading.shapes(model).items() if "grid_mlp" in name}
    with pytest.raises(WeightsError, match=r"grid_mlp|norm4"):  # the MLP along the map has one size
        adapter.read(theirs, trans2seg.RENAMES, expected, loading.context(trans2seg, larger.config))
    _, receipt = adapter.read(
        theirs, trans2seg.RENAMES, expected | grid, loading.context(trans2seg, larger.config)
    )
    assert "positions resampled from 4x4 to 6x4 (bilinear-corners)" in [story for _, story in receipt.made]


def test_classes_in_parts_give_the_same_logits() -> None:
    model = filled(num_classes=7)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        whole = model(images).logits
        model.head.together = 3
        assert torch.allclose(model(images).logits, whole, atol=1e-5)


def test_classes_may_be_exchanged_in_the_clean_network_alone() -> None:
    images, order = torch.randn(1, 3, 64, 64), [3, 0, 4, 1, 2]
    for numerics, same in (("clean", True), ("published", False)):
        model = filled(numerics=numerics)
        with torch.inference_mode():
            before = model(images).logits
            model.head.queries.copy_(model.head.queries[:, order])
            assert torch.allclose(model(images).logits, before[:, order], atol=1e-5) == same


def test_takes_other_classes_and_keeps_the_rest(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    other = create_model("trans2seg_medium", tmp_path / "model", **{**vars(trans2seg.TINY), "num_classes": 3})
    assert other(torch.randn(2, 3, 64, 64)).logits.shape[1] == 3
    assert other.receipt.fresh == ("head.queries",)
    assert torch.equal(other.head.score.weight, model.head.score.weight)
    model.reset_classifier(9)
    assert model(torch.randn(2, 3, 64, 64)).logits.shape[1] == model.num_classes == 9


def test_an_illegal_combination_says_what_is_legal() -> None:
    for changes, says in (
        ({"heads": 3}, "multiple of the heads"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"backbone_changes": {"dilate": 1}}, "has no dilate"),
        ({"numerics": "clear"}, "one of published, clean"),
    ):
        with pytest.raises(ModelError, match=says):
            tiny(**changes)


@slow
def test_traces_whole_without_a_graph_break(unchecked: None) -> None:
    model, images = filled(), torch.randn(1, 3, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert torch.allclose(compiled(images).logits, model(images).logits, atol=1e-5)
