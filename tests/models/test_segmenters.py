"""The battery of the segmenting families, on their TINY configurations."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from vitrail.models import registry

FAMILIES = registry.families("image-segmentation")
families = pytest.mark.parametrize("family", FAMILIES)


def tiny(family: str) -> Any:
    """The family's small model, every number moved, in evaluation mode."""
    torch.manual_seed(0)
    module = importlib.import_module(registry.FAMILIES[family])
    model = registry.from_config(next(iter(module.VARIANTS)), module.TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def pictures(model: Any, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, model.config.in_chans, *model.config.img_size, generator=generator)


def test_all_segmenters_are_here() -> None:
    assert set(FAMILIES) == {"setr", "trans2seg", "fpn"}


@families
def test_a_picture_alone_and_in_a_batch_gets_the_same_logits(family: str) -> None:
    model = tiny(family)
    images = pictures(model, 3)
    with torch.inference_mode():
        assert torch.allclose(model(images).logits[1:2], model(images[1:2]).logits, atol=1e-5, rtol=1e-4)


@families
def test_bfloat16_stays_close_to_float32(family: str) -> None:
    model = tiny(family)
    with torch.inference_mode():
        exact = model(pictures(model)).logits
        with torch.autocast("cpu", torch.bfloat16):
            near = model(pictures(model)).logits.float()
    assert (near - exact).norm() <= 0.1 * exact.norm()


@families
def test_recomputing_activations_changes_no_gradient_and_no_statistics(family: str) -> None:
    found, buffers = [], []
    for on in (False, True):
        torch.manual_seed(0)
        model = tiny(family).train()
        model.set_grad_checkpointing(on)
        model(pictures(model)).logits.square().mean().backward()
        found.append(
            {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        )
        buffers.append(dict(model.named_buffers()))
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


@families
def test_depth_rises_from_the_stem_to_the_heads(family: str) -> None:
    model = tiny(family)
    depths = {name: model.depth_of(name) for name, _ in model.named_parameters()}
    assert (
        min(depths.values()) == 0
        and depths[next(name for name in depths if name.startswith("head."))] == model.depth + 1
    )
    assert set(range(1, model.depth + 1)) <= set(depths.values())


@pytest.mark.slow
@families
def test_exported_with_a_free_batch_it_gives_the_same_logits(family: str, unchecked: None) -> None:
    model = tiny(family)
    images = pictures(model)
    program = torch.export.export(
        model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},)
    )
    more = pictures(model, 3)
    with torch.inference_mode():
        assert torch.allclose(program.module()(more).logits, model(more).logits, atol=1e-4)
