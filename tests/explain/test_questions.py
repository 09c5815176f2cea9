"""Boxes and masks explained: the question follows the object, the answer is a probability, the map finds the cause."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli.main import main
from vitrail.errors import ConfigError, UnsupportedError
from vitrail.explain.attention import mixers_of
from vitrail.explain.explainer import Explainer
from vitrail.explain.explorer import explorable, layers
from vitrail.explain.questions import Asked, BoxQuestion
from vitrail.models import registry

DENSE = registry.families("object-detection") + registry.families("image-segmentation")


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    module = importlib.import_module(registry.FAMILIES[family])
    return registry.from_config(next(iter(module.VARIANTS)), module.TINY).eval()


def picture() -> Any:
    return np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize("family", DENSE)
def test_every_dense_family_is_explained_and_left_as_it_was(family: str) -> None:
    model = tiny(family)
    explainer = Explainer(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for method in (
        explainer.methods if family == "fpn" else set(explainer.methods) - {"occlusion"}
    ):  # it is slow
        steps = {"steps": 2} if method == "integrated_gradients" else {}
        found = explainer(picture(), method=method, score=method == "gradcam", **steps)
        assert found.on_picture().shape == (70, 90)
        assert 0 <= found.score <= 1 and found.label in explainer.labels
        assert bool(torch.isfinite(found.heat.values).all())
        assert (found.corners is not None) == (family in registry.families("object-detection"))
    assert "gradcam" in explainer.methods and "relevance" not in explainer.methods
    with pytest.raises(UnsupportedError, match="gradcam, integrated_gradients, occlusion"):
        explainer(picture(), method="relevance")
    assert all(bool(torch.equal(value, before[name])) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_detr_shows_what_the_query_of_a_box_attends_to() -> None:
    model = tiny("detr")
    explainer = Explainer(model)
    found = explainer(picture(), method="attention", box=1)
    assert found.heat.elsewhere is not None
    assert float(found.heat.values.sum() + found.heat.elsewhere[0]) == pytest.approx(1.0, abs=1e-5)
    first = explainer(picture(), method="attention", box=0)
    assert first.heat.where != found.heat.where or first.corners != found.corners


def test_a_box_is_asked_for_what_it_is_by_its_overlap() -> None:
    model = tiny("detr")
    explainer = Explainer(model)
    asked = explainer.network
    assert isinstance(asked, Asked)
    images = torch.randn(1, 3, *model.config.img_size)
    with torch.no_grad():
        output = model(images)
    x, y, width, height = output.boxes[0, 3].tolist()
    asked.question = BoxQuestion(torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2]))
    answer = asked.answer(output)[0].exp()  # [K + 1]
    own = output.logits[0, 3].softmax(dim=0)[:-1]
    assert bool((answer[:-1] * 1.001 + 1e-6 >= own * min(1.0, 1 / float(answer[:-1].sum() + 1e-9))).all())
    assert float(answer.sum()) == pytest.approx(1.0, abs=1e-3)
    asked.question = BoxQuestion(torch.tensor([5.0, 5.0, 6.0, 6.0]))  # nowhere near
    assert float(asked.answer(output)[0, -1].exp()) == pytest.approx(1.0, abs=1e-3)


def test_a_region_is_the_pixels_of_the_class_and_its_cause_is_found() -> None:
    """A segmenter that calls bright pixels 1 and dark ones 0: occlusion of the bright square is what counts for 1."""
    model = tiny("fpn")

    class Bright(torch.nn.Module):
        levels = model.levels
        card = model.card
        num_classes = model.config.num_classes

        def __init__(self) -> None:
            super().__init__()
            self.anything = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images: torch.Tensor) -> Any:
            from vitrail.nn.shapes import MaskOutput

            bright = 4 * images.mean(dim=1)
            rest = [torch.full_like(bright, -20)] * (self.num_classes - 2)
            return MaskOutput(torch.stack([-bright, bright, *rest], dim=1))

    explainer = Explainer(Bright())
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[16:32, 32:48] = 255
    found = explainer(pixels, 1, "occlusion")
    values = found.on_picture()
    assert float(values[16:32, 32:48].mean()) > 10 * abs(float(values[40:, :24].mean())) + 0.01
    line = (found.overlay() == 255).all(axis=2)  # white, round what is asked about
    assert line[14:34, 30:50].any() and not line[18:30, 34:46].any() and not line[40:].any()
    with pytest.raises(ConfigError, match="No pixel is called"):
        explainer(pixels, 2, "occlusion")


def test_the_page_is_for_attention_between_places_of_the_picture() -> None:
    """A segmenter's backbone has it; in DETR queries look at a map, and have no place themselves."""
    explainer = Explainer(tiny("setr"))
    assert explorable(explainer.network)
    found = explainer(picture(), method="gradcam")
    assert len(layers(explainer, found)) == len(mixers_of(explainer.network))
    assert not explorable(Explainer(tiny("detr")).network)


def test_the_command_writes_a_page_of_the_maps_of_a_box(tmp_path: Path) -> None:
    tiny("fcos").save_pretrained(tmp_path / "model")
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    told = [
        "explain",
        str(tmp_path / "model"),
        str(tmp_path / "photo.png"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(told) == 0
    text = (tmp_path / "out" / "explain.html").read_text(encoding="utf-8")
    assert '"layers":[]' in text and '"outline":"data:image/png' in text
    assert "in the box" in text


def test_what_is_not_there_is_refused_with_what_is() -> None:
    explainer = Explainer(tiny("detr"))
    with pytest.raises(ConfigError, match="box must be 0 to"):
        explainer(picture(), box=10_000)
    with pytest.raises(ConfigError, match="gives every pixel a class"):
        Explainer(tiny("fpn"))(picture(), box=1)
