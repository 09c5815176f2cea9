"""The story of one image: the right steps with the right shapes, for every family, as poster and page."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

import vitrail
from vitrail.errors import UnsupportedError
from vitrail.explain import trace_poster as poster_module
from vitrail.explain.places import Placement
from vitrail.explain.rollout import rollout
from vitrail.explain.trace import Trace, trace
from vitrail.explain.trace_page import page
from vitrail.explain.trace_poster import contrasted, poster
from vitrail.models import registry
from vitrail.tasks.classify import Classify


def story(network: Any, seed: int = 0, **options: Any) -> Trace:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(
        0, 256, (network.config.in_chans, *network.config.img_size), dtype=torch.uint8, generator=generator
    )
    labels = [f"class {index}" for index in range(network.num_classes)]
    return trace(network, pixels, network.card.preprocessing, Classify(labels), **options)


def small(**changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "img_size": 32,
        "patch_size": 8,
        "width": 32,
        "depth": 2,
        "heads": 2,
        "hidden": 64,
        "num_classes": 7,
    }
    return vitrail.create_model("vit_tiny_patch16_224", **{**settings, "init": "timm", **changes})


def shapes(found: Trace) -> dict[str, tuple[int, ...]]:
    return {step.name: step.shape for step in found.steps}


def test_the_textbook_example_has_the_textbook_shapes() -> None:
    network = small(img_size=224, patch_size=16, width=512, depth=1, heads=8, hidden=64, num_classes=10)
    found = story(network, original=(500, 400))
    assert shapes(found) == {
        "picture": (500, 400, 3),
        "image": (224, 224, 3),
        "normalised": (3, 224, 224),
        "grid": (14, 14),
        "flattened patches": (196, 768),
        "projection": (196, 512),
        "[CLS]": (197, 512),
        "positions": (197, 512),
        "block 1": (197, 512),
        "[CLS] vector": (512,),
        "logits": (10,),
        "probabilities": (10,),
        "prediction": (),
    }
    assert [step.size for step in found.steps][3] == "14 × 14"
    assert "196 patches of 16 × 16" in found.steps[3].note
    json.dumps(found.to_dict())


def test_the_story_ends_as_the_network_does() -> None:
    network = small().eval()
    found = story(network)
    mean, std = (torch.tensor(values)[:, None, None] for values in
                 (network.card.preprocessing.mean, network.card.preprocessing.std))  # fmt: skip
    with torch.no_grad():
        scores = network((found.pixels[None] / 255 - mean) / std)[0].softmax(dim=0)
    assert found.prediction.index == int(scores.argmax())
    assert found.prediction.score == pytest.approx(float(scores.max()), rel=1e-4)


def test_positions_without_class_token_come_right_after_the_projection() -> None:
    names = list(shapes(story(small(class_token=False, pool="mean"))))
    assert "[CLS]" not in names
    assert names[names.index("projection") + 1] == "positions"
    assert "mean vector" in names


def test_registers_are_named_and_a_resampled_table_is_said() -> None:
    found = story(small(registers=2, position_on_prefix=False))
    assert found.stages[0].prefix == ("[CLS]", "[REG]", "[REG]")
    network = small()
    resampled = trace(
        network, torch.zeros(3, 64, 48, dtype=torch.uint8), network.card.preprocessing, Classify(["a"] * 7)
    )
    assert shapes(resampled)["grid"] == (8, 6)
    note = next(step.note for step in resampled.steps if step.name == "positions")
    assert "from 4 × 4 to 8 × 6" in note


def test_similarity_of_positions_is_one_with_themselves() -> None:
    stage = story(small()).stages[0]
    assert stage.similarity is not None and stage.similarity.shape == (16, 4, 4)
    for map_, (row, column) in zip(stage.similarity, stage.references, strict=True):
        assert float(map_[row, column]) == pytest.approx(1.0, abs=1e-5)
    assert stage.least_similarity == float(stage.similarity.min())
    assert story(small(position="none")).stages[0].similarity is None


@pytest.mark.parametrize(
    ("name", "stage"), [("t2t_nano_32", "stage 3"), ("pit_nano_32", "stage 1"), ("swin_nano_patch2_32", None)]
)
def test_positions_are_shown_where_they_are_added(name: str, stage: str | None, drawn: list[Any]) -> None:
    """T2T-ViT adds them in its third stage; nobody may read that there are none."""
    torch.manual_seed(0)
    found = story(vitrail.create_model(name))
    assert (found.placed and found.placed.name) == stage
    assert any("positions" in step.name for step in found.steps) == (stage is not None)
    poster(found)
    told, text = written(drawn[0]), page(found)
    data = check_page(text, found)
    for words in (told, text):
        assert ("Each token knows its place" in words) == (stage is not None)
        assert ("No positions are added" in words) == (stage is None)
    assert (
        ("before positions" in told) == (stage is not None) == ("before positions" in data["words"]["when"])
    )
    assert ("stage 3: a tile for each place" in told) == (stage == "stage 3")


def test_the_flattened_patch_is_the_one_with_most_contrast() -> None:
    network = small(img_size=(32, 48))
    pixels = torch.full((3, 32, 48), 128, dtype=torch.uint8)
    pixels[:, 17, 41] = 255  # row 2, column 5 of the 4 x 6 grid
    found = trace(network, pixels, network.card.preprocessing, Classify(["a"] * 7))
    assert contrasted(found) == (2, 5)


@pytest.mark.parametrize("family", sorted(registry.families()))
def test_every_family_has_a_story_and_a_page(family: str) -> None:
    module = registry.module_of(family)
    torch.manual_seed(0)
    network = registry.from_config(next(iter(module.VARIANTS)), module.TINY)
    found = story(network, note="random weights")
    assert sum("block" in step.name for step in found.steps) == network.depth
    assert network.training
    check_page(page(found), found)


@pytest.mark.parametrize("name", ["resnet20_32", "se_resnet20_32", "nonlocal_resnet20_32"])
def test_a_convolutional_network_tells_its_own_steps(name: str) -> None:
    torch.manual_seed(0)
    network = vitrail.create_model(name)
    found = story(network)
    assert found.convolutional
    steps = {step.name: step for step in found.steps}
    assert steps["stage 1: stem"].shape == (32, 32, 32)
    assert steps["stage 1: stem"].note == "3 × 3 convolution"
    assert steps["stage 3: block 3"].shape == (8, 8, 128)
    assert ("squeeze-and-excitation" in steps["stage 1: block 1"].note) == name.startswith("se_")
    assert ("non-local" in steps["stage 2: block 2"].note) == name.startswith("nonlocal")
    assert steps["mean vector"].shape == (128,) and "cells" in steps["mean vector"].note
    gazes = {layer.name: layer.gaze for stage in found.stages for layer in stage.layers}
    looking = [block for block, seen in gazes.items() if seen is not None and seen.kind == "attention"]
    wanted = ["stage 2 block 2", "stage 3 block 2"] if name.startswith("nonlocal") else []
    assert looking == wanted
    for seen in gazes.values():
        assert seen is not None and float(seen.maps.sum()) == pytest.approx(1.0, abs=1e-4)
    data = check_page(page(found), found)
    assert data["words"]["piece"] == "cell"


@pytest.mark.parametrize(("stem", "alone"), [("patch", True), ("conv", False)])
def test_pixels_are_called_the_projections_input_only_where_they_are(stem: str, alone: bool) -> None:
    torch.manual_seed(0)
    network = vitrail.create_model("vit_nano_patch4_32", stem=stem).eval()
    pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
    found = trace(network, pixels, network.card.preprocessing, Classify(["a"] * 10))
    data = check_page(page(found), found)
    assert ("projection reads" in data["words"]["read"]) == alone
    assert (data["patch"] == data["step"] == [4, 4]) == alone


def test_the_strength_of_a_block_is_where_its_map_is_large() -> None:
    torch.manual_seed(0)
    network = vitrail.create_model("resnet20_32").eval()
    pixels = torch.full((3, 32, 32), 120, dtype=torch.uint8)
    pixels[:, 20:26, 4:10] = torch.randint(0, 256, (3, 6, 6), dtype=torch.uint8)
    found = trace(network, pixels, network.card.preprocessing, Classify(["a"] * 10))
    gaze = found.stages[0].layers[0].gaze
    assert gaze is not None
    row, column = divmod(int(gaze.maps[0, 2:-2, 2:-2].argmax()), 28)
    assert 17 <= row + 2 <= 28 and 1 <= column + 2 <= 12


def check_page(text: str, found: Trace) -> dict[str, Any]:
    """The page is whole, reaches for nothing outside, and holds the data that it draws."""
    assert not re.search(
        r"""(src|href)\s*=|https?://|@import|url\(""", text.replace("image.src = data.image", "")
    )
    assert "default-src 'none'" in text
    assert "<!--" not in text
    held = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert held is not None
    data: dict[str, Any] = json.loads(held[1])
    assert len(data["layers"]) == sum(len(stage.layers) for stage in found.stages)
    with Image.open(io.BytesIO(base64.b64decode(data["image"].partition(",")[2]))) as image:
        assert image.size == (found.pixels.shape[2], found.pixels.shape[1])
    for layer in data["layers"]:
        rows, columns = layer["gaze"]["grid"]
        assert len(base64.b64decode(layer["gaze"]["data"])) == layer["gaze"]["heads"] * rows * columns
    return data


def test_the_page_holds_hostile_names_as_text() -> None:
    network = small()
    labels = ["</script><script>alert(1)</script>", "<!--DATA-->", *"abcde"]
    found = trace(
        network,
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        network.card.preprocessing,
        Classify(labels),
        source="<img onerror=x>.jpg",
        top_k=7,
    )
    text = page(found)
    assert "<script>alert" not in text and "<img" not in text
    data = check_page(text, found)
    assert {guess["label"] for guess in data["top"]} == set(labels)


@pytest.mark.parametrize(
    "changes", [{}, {"img_size": (32, 48), "in_chans": 1, "class_token": False, "pool": "mean"}]
)
def test_the_poster_is_a_picture(changes: dict[str, Any]) -> None:
    with Image.open(io.BytesIO(poster(story(small(**changes), note="random weights")))) as image:
        assert image.format == "PNG" and image.size[0] == 1540


def test_the_poster_of_a_convolutional_network_is_a_picture() -> None:
    torch.manual_seed(0)
    with Image.open(io.BytesIO(poster(story(vitrail.create_model("nonlocal_resnet20_32"))))) as image:
        assert image.format == "PNG" and image.size[0] == 1540


def test_a_network_without_stages_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="Linear is not made of stages"):
        trace(
            torch.nn.Linear(2, 2),
            torch.zeros(3, 8, 8, dtype=torch.uint8),
            small().card.preprocessing,
            Classify(["a", "b"]),
        )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures of posters, as they are about to become files."""
    kept: list[Any] = []
    monkeypatch.setattr(poster_module, "png_of", lambda figure, metadata: kept.append(figure) or b"")
    return kept


def written(figure: Any) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_attention_is_drawn_where_the_cells_behind_a_stem_lie(drawn: list[Any]) -> None:
    """The middle of a cell is that of the pixels that reach it, on the poster, on the page, and in `explain`."""
    network = small(stem="conv").eval()
    found = story(network)
    poster(found)
    images = torch.zeros(1, 3, 32, 32)
    assert found.placement == rollout(network, images).placement == Placement(8, 8, -3.5, -3.5)
    assert {layer.placement for layer in found.stages[0].layers} == {found.placement}
    meshes = [mesh for mesh in drawn[0].findobj(QuadMesh) if mesh.get_coordinates().shape == (5, 5, 2)]
    assert len(meshes) == len(found.stages[0].layers)
    for mesh in meshes:
        places = mesh.get_coordinates() + 0.5  # pixels count from their middles
        assert places[:, 0, 1].tolist() == places[0, :, 0].tolist() == [0, 4.5, 12.5, 20.5, 32]
    data = check_page(page(found), found)
    assert data["place"] == data["layers"][0]["place"] == [8, 8, -3.5, -3.5]


def test_windows_that_overlap_are_counted_and_marked_as_they_are(drawn: list[Any]) -> None:
    torch.manual_seed(0)
    network = vitrail.create_model("pit_nano_32").eval()
    pixels = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    pixels[:, 30, 31] = 255  # in the last window of each axis alone, which begins at 28
    found = trace(network, pixels, network.card.preprocessing, Classify(["a"] * 10))
    assert contrasted(found) == (14, 14)
    assert found.window(14, 14) == (slice(28, 32), slice(28, 32))
    poster(found)
    assert "15 × 15 windows of 4 × 4,\none every 2 pixels" in written(drawn[0])
    assert "4 · 4 · 3 = 48 numbers" in written(drawn[0])
    frames = [patch for patch in drawn[0].findobj(Rectangle) if patch.get_linewidth() == 2.2]
    assert (frames[0].get_xy(), frames[0].get_width()) == ((27.5, 27.5), 4)
    lines = [line for line in drawn[0].findobj(Line2D) if line.get_color() == "white"]
    assert len(lines) == 2 * 16
    data = check_page(page(found), found)
    assert (data["patch"], data["step"], data["corner"]) == ([4, 4], [2, 2], [0, 0])


def test_windows_that_hang_over_are_flattened_only_where_there_are_no_others(drawn: list[Any]) -> None:
    network = small(stem="conv").eval()  # windows of 15, which begin 7 pixels above and left of the image
    pixels = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    pixels[:, 0, 0] = 255
    pixels[:, 20, 12] = 200
    found = trace(network, pixels, network.card.preprocessing, Classify(["a"] * 7))
    assert contrasted(found) in ((2, 1), (2, 2), (3, 1), (3, 2))
    alone = story(small(stem="conv", img_size=8).eval())
    assert alone.window(*contrasted(alone)) == (slice(0, 8), slice(0, 8))
    poster(alone)
    assert "15 · 15 · 3 = 675 numbers, 483 of them beyond the border" in written(drawn[0])


def test_no_note_is_cut_off(drawn: list[Any]) -> None:
    found = story(vitrail.create_model("pit_nano_32"))
    poster(found)
    text = written(drawn[0]).replace("\n", " ")
    for step in found.steps:
        assert step.note in text
