"""Semantic FPN: the paper's sizes, any backbone, any picture, save and load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rebuild import parameters

from vitrail.models import fpn, registry
from vitrail.models.backbones import load_backbone
from vitrail.models.registry import create_model
from vitrail.nn.feature_pyramid import FeaturePyramid
from vitrail.nn.masks import FpnHead
from vitrail.nn.shapes import Level
from vitrail.tasks.segment import Segment

PUBLISHED = {
    # millions of parameters in PVT's table of semantic segmentation
    "fpn_pvt_tiny": 17.0,
    "fpn_pvt_small": 28.2,
    "fpn_pvt_medium": 48.0,
    "fpn_pvt_large": 65.1,
    "fpn_resnet50": 28.5,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_size(name: str) -> None:
    assert round(parameters(name) / 1e6, 1) == PUBLISHED[name]


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    return registry.from_config("fpn_pvt_tiny", registry.changed(fpn.TINY, **changes))


BACKBONES: dict[str, dict[str, Any]] = {
    "pvt": {},
    "swin": {
        "backbone": "swin_tiny_patch4_window7_224", "norm_maps": True,
        "backbone_changes": {"width": 8, "depths": [1, 1, 1, 1], "heads": [1, 2, 4, 8]},
    },
    "resnet": {"backbone": "resnet18", "backbone_changes": {"width": 8, "depths": [1, 1, 1, 1]}},
    "dilated": {"backbone": "resnet18", "backbone_changes": {"width": 8, "depths": [1, 1, 1, 1], "dilated": 2}},
    "vit": {
        "backbone": "vit_tiny_patch16_224",
        "backbone_changes": {"width": 16, "depth": 1, "heads": 2, "hidden": 32, "img_size": [64, 64]},
    },
    "t2t": {"backbone": "t2t_vit_7", "backbone_changes": {"depth": 1}},
    "pit": {"backbone": "pit_ti_224", "backbone_changes": {}},
}  # fmt: skip


@pytest.mark.parametrize("changes", BACKBONES.values(), ids=BACKBONES)
def test_stands_on_any_backbone_and_takes_any_size(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    output = model(torch.randn(2, 3, 72, 100))
    assert output.logits.shape == (2, 5, 72, 100) and output.auxiliary == ()
    Segment("abcde").loss(output, torch.randint(0, 5, (2, 72, 100)))["loss"].backward()
    dead = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or parameter.grad.abs().max() == 0)
    ]
    # class tokens that no map shows; biases that all keys share
    assert [name for name in dead if not name.startswith("backbone.stages")] == []


def test_sums_levels_from_the_coarsest_up() -> None:
    torch.manual_seed(0)
    part = FeaturePyramid([Level(3, 4), Level(5, 8)], 4)
    fine, coarse = torch.randn(1, 3, 6, 4), torch.randn(1, 5, 3, 2)
    one, other = part((fine, coarse))
    deep = part.lateral[1](coarse)
    assert torch.allclose(other, part.smooth[1](deep))
    repeated = deep.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(one, part.smooth[0](part.lateral[0](fine) + repeated), atol=1e-6)


def test_every_level_grows_by_twos_to_the_finest() -> None:
    head = FpnHead([Level(4, stride) for stride in (4, 8, 16, 32)], 3, 6)
    assert [len(branch) for branch in head.branches] == [1, 1, 2, 3] and head.growth == [1, 2, 2, 2]
    maps = tuple(torch.randn(1, 4, 32 // factor, 16 // factor) for factor in (1, 2, 4, 8))
    head.eval()
    logits = head(maps, (64, 32))
    alone = F.relu(head.branches[0][0](maps[0]))
    silent = head(tuple(map if place == 0 else map * 0 for place, map in enumerate(maps)), (64, 32))
    assert logits.shape == (1, 3, 64, 32) and alone.shape == (1, 6, 32, 16)
    assert not torch.allclose(silent, logits)


@pytest.mark.parametrize("kind", ["pvt", "swin"])
def test_saved_and_loaded_it_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    model = tiny(**BACKBONES[kind]).eval()
    model.card = dataclasses.replace(model.card, labels=tuple("abcde"))
    model.save_pretrained(tmp_path / "model")
    loaded = registry.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and loaded.card.labels == tuple("abcde")
    assert loaded.card.task == "image-segmentation"
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(images).logits, model(images).logits)
    other = create_model("fpn_pvt_tiny", tmp_path / "model", **{**vars(model.config), "num_classes": 3})
    assert other(images).logits.shape[1] == 3 and "head.linear.weight" in other.receipt.fresh


def test_a_classifiers_folder_becomes_the_backbone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    classifier = create_model("pvt_v2_b0", num_classes=4, **fpn.TINY.backbone_changes)
    classifier.save_pretrained(tmp_path / "pvt")
    model = tiny()
    receipt = load_backbone(model, tmp_path / "pvt")
    assert any("head" in key for key, _ in receipt.dropped)
    theirs, ours = classifier.backbone.state_dict(), model.backbone.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_traces_whole_without_a_graph_break(unchecked: None) -> None:
    model, images = tiny().eval(), torch.randn(1, 3, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert torch.allclose(compiled(images).logits, model(images).logits, atol=1e-5)
