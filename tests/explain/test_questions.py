"""Boxes and masks explained: the question follows the object, the answer is a probability, the map finds the cause."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.explain.test_places import shaken, support
from vitrail.cli.main import main
from vitrail.errors import ConfigError, UnsupportedError
from vitrail.explain.attention import mixers_of
from vitrail.explain.capture import stages_of
from vitrail.explain.explainer import Explainer
from vitrail.explain.explorer_page import attention_data, explorable
from vitrail.explain.places import Placement
from vitrail.explain.questions import (
    Asked,
    BoxQuestion,
    NothingThere,
    backbone_maps,
    question_gradcam,
    region_question,
)
from vitrail.jobs.trace_dense import _heat
from vitrail.models import registry
from vitrail.nn.shapes import Grid

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
    slow = set() if family == "fpn" else {"occlusion"}
    for method in set(explainer.methods) - slow:
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
    found = explainer(picture(), method="occlusion")
    # What is left for "nothing" is not shared out among the classes.
    assert found.prediction.top[0].score == pytest.approx(found.score)
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
    assert len(attention_data(explainer, found)) == len(mixers_of(explainer.network))
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


@pytest.mark.parametrize(
    ("name", "changes"),
    [("fcos_nano", {}), ("fcos_nano", {"frozen_norm": True}), ("fcos_pvt_nano", {}), ("setr_pup_nano", {})],
)
def test_the_maps_of_a_backbone_lie_over_the_middle_of_what_reaches_them(
    name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution and its frozen norm are computed at once, and followed all the same."""
    monkeypatch.setattr(torch.nn.functional, "max_pool2d", torch.nn.functional.avg_pool2d)
    torch.manual_seed(0)
    backbone = registry.create_model(name, **changes).eval().backbone
    stages = stages_of(backbone)
    shaken(backbone)
    image = torch.rand(1, 3, 192, 256).requires_grad_()
    with backbone_maps(backbone) as seen:
        maps = backbone(image).maps
    assert [grid for grid, _ in seen] == [Grid(*map.shape[2:]) for map in maps]
    if stages:
        maps = entered(stages, image)  # blocks of attention let every pixel reach every cell
    for map, (_, placement) in zip(maps, seen, strict=False):
        row, column = map.shape[2] // 2, map.shape[3] // 2
        for (first, last), number, size, scale, shift in zip(
            support(image, map[:, :, row, column]), (row, column), (192, 256), placement[:2], placement[2:],
            strict=True,
        ):  # fmt: skip
            if first > 0 and last < size - 1:
                assert (number + 0.5) * scale + shift == pytest.approx((first + last + 1) / 2, abs=0.51)


def entered(stages: dict[str, Any], image: torch.Tensor) -> list[torch.Tensor]:
    """The maps of stages whose blocks do nothing."""
    map, prefix, maps = image, None, []
    for stage in stages.values():
        map, prefix = stage.entry(map, prefix)
        maps.append(map)
    return maps


def test_maps_of_all_levels_meet_at_one_place_before_they_are_added() -> None:
    """A score that hangs on one cell of each level, all over one place: the sum is strongest there."""
    torch.manual_seed(0)
    model = registry.create_model("fcos_nano").eval()
    images = torch.randn(1, 3, 192, 256)
    with backbone_maps(model.backbone) as seen, torch.no_grad():
        maps = model.backbone(images).maps
    cells = [(96 // level.stride, 128 // level.stride) for level in model.levels]  # middles at 96.5, 128.5

    def answer(_images: torch.Tensor) -> torch.Tensor:
        found = model.backbone(images).maps
        total = sum(map[0, :, row, column].sum() for map, (row, column) in zip(found, cells, strict=True))
        return total.view(1, 1)

    asked: Any = torch.nn.Module()
    asked.network, asked.forward = model, answer
    heat = question_gradcam(asked, images, [0])
    assert heat.placement == seen[0][1] and heat.values.shape[1:] == maps[0].shape[2:]
    ys, xs = heat.placement.middles(seen[0][0])
    row, column = divmod(int(heat.values[0].argmax()), heat.values.shape[2])
    assert (float(ys[row]), float(xs[column])) == (96.5, 128.5)
    values = heat.values[0]
    assert torch.allclose(
        values[row - 3 : row], values[row + 1 : row + 4].flip(0), atol=1e-5 * float(values.max())
    )


def test_the_last_map_of_detr_is_laid_where_its_cells_lie() -> None:
    torch.manual_seed(0)
    found = Explainer(registry.create_model("detr_nano").eval())(picture(), method="attention")
    assert found.heat.placement == Placement(16, 16, -7.5, -7.5)


def test_a_trace_draws_a_cell_of_each_map_over_its_own_pixels() -> None:
    from vitrail.data.transforms import Geometry

    map = torch.zeros(4, 3, 3)
    map[:, 1, 1] = 1
    drawn = _heat(map, Placement(16, 16, -7.5, -7.5), Geometry((96, 96), (48, 48), 2.0, 2.0, 0.0, 0.0))
    warm = torch.nonzero(torch.as_tensor(drawn[:, :, 0].astype("int32")) > 200)
    assert warm.min(0).values.tolist() == [17, 17] and warm.max(0).values.tolist() == [48, 48]


def test_a_picture_without_the_class_does_not_end_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("fpn").save_pretrained(tmp_path / "model")
    for name in ("one.png", "two.png"):
        Image.fromarray(picture()).save(tmp_path / name)

    def question(asked: Asked, output: Any, wanted: Any, labels: Any, ask: Any = region_question) -> Any:
        if next(turns):
            raise NothingThere("No pixel is called that here.")
        return ask(asked, output, wanted, labels)

    monkeypatch.setattr("vitrail.explain.explainer.region_question", question)
    told = [
        "explain",
        str(tmp_path / "model"),
        "--format",
        "json",
        "--no-page",
        "--output",
        str(tmp_path / "out"),
    ]
    turns = iter([True, False])
    assert main([*told, str(tmp_path / "one.png"), str(tmp_path / "two.png")]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert "No pixel" in first["error"] and second["error"] is None
    turns = iter([True])
    assert main([*told, str(tmp_path / "one.png")]) == 2  # what was asked of one picture can be fixed
