"""Performer ViTs: ViT's counts, ViT's and DeiT's weights, closeness to softmax attention, and training that resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rebuild import apart, parameters
from safetensors.torch import save_file

from vitrail.errors import ModelError
from vitrail.models import performer, registry
from vitrail.models.registry import create_model
from vitrail.train.average import Average


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("performer_tiny_patch16_224", 5_717_416),
        ("performer_small_patch16_224", 22_050_664),
        ("performer_base_patch16_224", 86_567_656),
    ],
)
def test_has_the_parameters_of_the_vit(name: str, count: int) -> None:
    assert parameters(name) == count


def test_a_vits_weights_load_and_more_features_come_closer_to_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    softmax = create_model("deit_tiny_patch16_224", depth=3, img_size=96).eval()
    softmax.save_pretrained(tmp_path / "deit")
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        exact = softmax.forward_features(images)
        errors = []
        for features in (16, 64, 256, 2048):
            model = create_model(
                "performer_tiny_patch16_224",
                pretrained=tmp_path / "deit",
                depth=3,
                img_size=96,
                features=features,
            ).eval()
            errors.append(apart(model.forward_features(images), exact))
    assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2] > 0 and errors[3] < errors[2]
    assert errors[3] < 0.02
    assert [name.rpartition(".")[2] for name in model.receipt.fresh].count("projection") == 3


def test_timms_and_googles_files_load(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", depth=2)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    model = create_model("performer_tiny_patch16_224", pretrained=tmp_path / "w.safetensors", depth=2)
    assert torch.equal(model.backbone.stages[0].blocks[1].mixer.qkv.weight, theirs.blocks[1].attn.qkv.weight)


def test_saved_features_come_back_with_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("performer_nano_patch4_32", depth=2, redraw_every=2).train()
    for _ in range(3):
        model(torch.randn(2, 3, 32, 32))
    model.eval().save_pretrained(tmp_path / "saved")
    again = registry.from_pretrained(tmp_path / "saved")
    for name, buffer in model.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), model(images))
    model.train(), again.train()
    assert torch.equal(again(images), model(images))  # the fourth forward, at which features are redrawn
    assert torch.equal(again.backbone.stages[0].blocks[0].mixer.projection,
                       model.backbone.stages[0].blocks[0].mixer.projection)  # fmt: skip


def test_recomputed_activations_do_not_count_as_forwards() -> None:
    torch.manual_seed(0)
    model = create_model("performer_nano_patch4_32", depth=2, redraw_every=1).train()
    images = torch.randn(2, 3, 32, 32)
    results = []
    for recompute in (False, True):
        other = create_model("performer_nano_patch4_32", depth=2, redraw_every=1).train()
        other.load_state_dict(model.state_dict())
        other.set_grad_checkpointing(recompute)
        other(images).square().sum().backward()
        assert int(other.backbone.stages[0].entry.redraw.calls) == 1
        results.append([parameter.grad for parameter in other.parameters()])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*results, strict=True))


def test_an_average_of_the_weights_keeps_the_features_of_the_day() -> None:
    torch.manual_seed(0)
    model = create_model("performer_nano_patch4_32", depth=1, redraw_every=1).train()
    average, mixer = Average(model, 0.9), model.backbone.stages[0].blocks[0].mixer
    model(torch.randn(1, 3, 32, 32))
    average.update(0)
    drawn = mixer.projection.clone()
    with average.applied():
        assert torch.equal(mixer.projection, drawn)


@pytest.mark.parametrize("kernel", ["softmax", "relu", "none"])
def test_every_kernel_learns(kernel: str) -> None:
    torch.manual_seed(0)
    model = registry.from_config("performer_nano_patch4_32", registry.changed(performer.TINY, kernel=kernel))
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(images), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": 0}, "at least 1"),
        ({"redraw_every": -1}, r"0 \(never\) or more"),
        ({"feature_epsilon": -1e-3}, "0 or more"),
        ({"heads": 3}, "multiple of the heads"),
        ({"img_size": (30, 32)}, "nearest legal"),
    ],
)
def test_refuses_what_means_nothing(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        registry.changed(performer.TINY, **changes)
