"""ResNet and ResNeXt: published counts and costs, torchvision's logits, dilation and frozen norms for detection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import counted, difference, shaken
from torch import nn

from vitrail.errors import ModelError
from vitrail.models import loading, registry, resnet
from vitrail.models.registry import create_model
from vitrail.weights import adapter

PUBLISHED = {
    # parameters, and multiply-adds in 10^9, as torchvision's pages give them
    "resnet18": (11_689_512, 1.81),
    "resnet34": (21_797_672, 3.66),
    "resnet50": (25_557_032, 4.09),
    "resnet101": (44_549_160, 7.80),
    "resnet152": (60_192_808, 11.51),
    "resnext50_32x4d": (25_028_904, 4.23),
    "resnext101_32x8d": (88_791_336, 16.41),
    "resnext101_64x4d": (83_455_272, 15.46),
}

slow = pytest.mark.slow


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_size_and_cost(name: str) -> None:
    parameters, cost = PUBLISHED[name]
    found = counted(name)
    assert found.parameters == parameters
    assert found.gflops == pytest.approx(cost, rel=0.01)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", (224, 224)),
        ("resnet50", (97, 130)),
        pytest.param("resnet34", (64, 64), marks=slow),
        pytest.param("resnext50_32x4d", (96, 128), marks=slow),
        pytest.param("resnet101", (64, 64), marks=slow),
    ],
)
def test_parity_with_torchvision(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    assert difference(getattr(models, name)(num_classes=10), name, tmp_path, size) < 1e-5


@pytest.mark.parametrize(("dilated", "strides"), [(1, [4, 8, 16, 16]), (2, [4, 8, 8, 8])])
def test_dilated_stages_are_torchvisions(dilated: int, strides: list[int], tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    theirs = models.resnet50(num_classes=3, replace_stride_with_dilation=[False, dilated > 1, True])
    assert difference(theirs, "resnet50", tmp_path, (64, 96), dilated=dilated) < 1e-5
    with torch.device("meta"):
        assert [level.stride for level in create_model("resnet50", dilated=dilated).levels] == strides


def test_frozen_norms_compute_what_norms_do_in_evaluation_and_never_learn(tmp_path: Path) -> None:
    free = shaken(registry.from_config("resnet50", resnet.TINY))
    free.save_pretrained(tmp_path / "model")
    frozen = create_model("resnet50", tmp_path / "model", **{**vars(resnet.TINY), "norm": "frozen"}).train()
    assert {reason for _, reason in frozen.receipt.dropped} == {"frozen norms count nothing"}
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(frozen(images), free(images), rtol=1e-4, atol=1e-5)
    assert not any("norm" in name for name, _ in frozen.named_parameters())


def test_detrs_backbone_has_the_published_buffers() -> None:
    with torch.device("meta"):
        backbone = create_model("resnet50", norm="frozen", num_classes=0).backbone
    assert sum(buffer.numel() for buffer in backbone.buffers()) == 106_240


@pytest.mark.parametrize("layout", resnet.RENAMES, ids=lambda layout: layout.name)
def test_every_layout_gives_back_the_same_bits(layout: adapter.Layout) -> None:
    model = shaken(registry.from_config("resnet50", resnet.TINY))
    known = loading.context(resnet, model.config)
    written = adapter.write(model.state_dict(), layout, known)
    read, receipt = adapter.read(written, resnet.RENAMES, loading.shapes(model), known)
    assert receipt.layout == layout.name
    assert all(torch.equal(read[key], value) for key, value in model.state_dict().items())


def test_a_backbone_answers_four_maps_and_blocks_know_their_depth() -> None:
    model = create_model("resnet18", num_classes=4)
    maps = model.eval().features(torch.randn(1, 3, 64, 96)).maps
    assert [tuple(map.shape[1:]) for map in maps] == [(64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]
    assert model.depth == 8
    assert model.depth_of("backbone.stem.layers.0.conv.weight") == 0
    assert model.depth_of("backbone.stages.1.blocks.0.layers.0.conv.weight") == 3
    assert model.depth_of("head.linear.weight") == 9


def test_recomputed_activations_give_the_same_gradient_and_statistics() -> None:
    images = torch.randn(2, 3, 32, 32)
    gradients, buffers = [], []
    for on in (False, True):
        torch.manual_seed(0)
        model = registry.from_config("resnet50", resnet.TINY).train()
        model.set_grad_checkpointing(on)
        model(images).sum().backward()
        gradients.append(model.backbone.stem.layers[0].conv.weight.grad)
        buffers.append(dict(model.named_buffers()))
    assert torch.allclose(*gradients)
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])
    assert buffers[1]["backbone.stages.0.blocks.0.layers.0.norm.num_batches_tracked"] == 1


def test_convolutions_start_as_he_did_and_drop_path_rises() -> None:
    model = create_model("resnet18", drop_path_rate=0.2)
    weight = model.backbone.stages[3].blocks[1].layers[1].conv.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    rates = [block.drop_path.rate for stage in model.backbone.stages for block in stage.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2) and sorted(rates) == rates
    assert isinstance(model.get_classifier(), nn.Linear)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"depths": ()}, "depths must hold"),
        ({"groups": 0}, "at least 1"),
        ({"norm": "none"}, "norm takes one of"),
    ],
)
def test_illegal_configurations_say_what_is_legal(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        registry.changed(resnet.TINY, **changes)
