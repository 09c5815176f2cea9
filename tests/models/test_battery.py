"""The same battery for every family, on its TINY configuration."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.errors import UnsupportedError
from vitrail.models import registry
from vitrail.models.registry import FAMILIES
from vitrail.nn.shapes import Grid
from vitrail.nn.trunk import leave_out


def families() -> list[str]:
    found = []
    for family, path in FAMILIES.items():
        if hasattr(importlib.import_module(path), "TINY"):
            found.append(family)
    return found


def module(family: str) -> Any:
    return importlib.import_module(FAMILIES[family])


def tiny(family: str, **changes: Any) -> Any:
    """The family's small model, with weights that are not zero anywhere (zero-started heads and scales hide faults)."""
    torch.manual_seed(0)
    built = module(family)
    config = registry.changed(built.TINY, **changes)
    model = registry.from_config(next(iter(built.VARIANTS)), config)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.abs().max() < 1e-3:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def picture(family: str, batch: int = 2, size: tuple[int, int] | None = None) -> torch.Tensor:
    config = module(family).TINY
    torch.manual_seed(1)
    return torch.randn(batch, config.in_chans, *(size or config.img_size))


def is_classifier(family: str) -> bool:
    return "Classifier" in type(tiny(family)).__name__


classifiers = pytest.mark.parametrize("family", [family for family in families() if is_classifier(family)])


@classifiers
def test_gives_one_logit_a_class_and_levels_that_are_true(family: str) -> None:
    model, images = tiny(family), picture(family)
    assert model(images).shape == (2, module(family).TINY.num_classes)
    features = model.features(images)
    assert len(features.maps) == len(model.levels)
    for map, level in zip(features.maps, model.levels, strict=True):
        assert map.shape[1] == level.channels
        for cells, pixels in zip(map.shape[2:], images.shape[2:], strict=True):
            assert abs(cells - pixels / level.stride) <= 1
    for coarser, finer in zip(model.levels[1:], model.levels[:-1], strict=True):
        assert coarser.stride >= finer.stride


@classifiers
def test_takes_a_picture_of_another_shape(family: str) -> None:
    config = module(family).TINY
    rows, columns = config.img_size
    model, images = tiny(family), picture(family, size=(rows * 2, columns))
    logits = model(images)
    assert logits.shape == (2, config.num_classes)
    assert torch.isfinite(logits).all()
    assert torch.equal(model.forward_head(model.forward_features(images)), logits)


@classifiers
def test_a_picture_alone_and_in_a_batch_gets_the_same_logits(family: str) -> None:
    model, images = tiny(family), picture(family, batch=5)
    with torch.inference_mode():
        assert torch.allclose(model(images)[2:3], model(images[2:3]), atol=1e-5, rtol=1e-5)


@classifiers
def test_the_gradient_reaches_every_parameter(family: str) -> None:
    model = tiny(family).train()
    model(picture(family, batch=4)).square().sum().backward()
    dead = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or parameter.grad.abs().max() == 0)
    ]
    # softmax does not see what is added to all keys alike: these two biases are dead in the original too
    assert [name for name in dead if not name.endswith(("before.bias", "key.bias"))] == []


@classifiers
def test_bfloat16_stays_close_to_float32(family: str) -> None:
    model, images = tiny(family), picture(family)
    with torch.inference_mode():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            near = model(images).float()
    assert (near - exact).norm() <= 0.1 * exact.norm()


@classifiers
def test_saved_and_loaded_it_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    model, images = tiny(family), picture(family)
    model.card = dataclasses.replace(model.card, labels=tuple(f"class {i}" for i in range(model.num_classes)))
    model.save_pretrained(tmp_path / "model")
    loaded = registry.from_pretrained(tmp_path / "model")
    assert type(loaded.config) is type(model.config) and loaded.config == model.config
    assert loaded.card.labels == model.card.labels and loaded.card.preprocessing == model.card.preprocessing
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))


@classifiers
def test_traces_whole_without_a_graph_break(family: str, unchecked: None) -> None:
    model, images = tiny(family), picture(family)
    torch._dynamo.reset()  # families share one class: what was traced of another is not this one's
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert torch.allclose(compiled(images), model(images), atol=1e-5)


@classifiers
def test_takes_other_classes(family: str) -> None:
    model = registry.from_config(next(iter(module(family).VARIANTS)), module(family).TINY)
    started = model.get_classifier().weight.std().item()
    model.reset_classifier(700)
    assert model(picture(family)).shape == (2, 700)
    assert model.num_classes == 700
    weight = model.get_classifier().weight  # started as in a model that was built with so many classes
    assert weight.std().item() == pytest.approx(started, rel=0.2)


@classifiers
def test_attention_written_down_gives_the_same_tokens(family: str) -> None:

    seen = []

    def record(mixer: Any, inputs: tuple[torch.Tensor, Grid], output: torch.Tensor) -> None:
        seen.append((mixer, inputs, output))

    model = tiny(family)
    mixers = [part for part in model.modules() if hasattr(part, "weights") and hasattr(part, "mix")]
    hooks = [mixer.register_forward_hook(record) for mixer in mixers]
    with torch.inference_mode():
        model(picture(family))
        for hook in hooks:
            hook.remove()
        for mixer, inputs, output in seen:
            weights = mixer.weights(*inputs)
            assert torch.allclose(mixer.mix(weights, *inputs), output, atol=1e-4, rtol=1e-4)


BLIND = ("deit", "performer", "pit", "t2t", "vit")
"""Families whose last blocks look at no positions."""


@classifiers
def test_patches_are_left_out_while_training_or_refused(family: str) -> None:
    model, images = tiny(family), picture(family)
    if family not in BLIND:
        with pytest.raises(UnsupportedError, match="do not: take one of those"):
            model.set_patch_drop(0.5)
        return
    whole = model(images)
    model.set_patch_drop(0.75)
    assert torch.equal(model(images), whole)
    front = model.forward_features(images).shape[1] - model.grid.size
    tokens, grid = model.train().backbone.tokens(images)
    assert grid.size == round(model.grid.size / 4) and tokens.shape[1] == front + grid.size
    model(images).sum().backward()
    model.set_patch_drop(0.0)
    assert model.forward_features(images).shape[1] == front + model.grid.size


def test_what_is_left_of_a_picture_is_some_of_its_patches_each_once() -> None:
    tokens = torch.arange(2.0 * 13).reshape(2, 13, 1).expand(2, 13, 3)
    found, grid = leave_out(tokens, Grid(3, 4), 0.5)
    assert grid == Grid(1, 6) and torch.equal(found[:, 0], tokens[:, 0])
    for row, kept in zip(tokens, found, strict=True):
        numbers = kept[1:, 0].tolist()
        assert len(set(numbers)) == 6 and set(numbers) <= set(row[1:, 0].tolist())
    assert leave_out(tokens, Grid(3, 4), 0.99)[1].size == 1
