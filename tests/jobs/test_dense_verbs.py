"""Boxes and masks through the verbs: data in, a run folder out, the same scores again, drawings, and clear refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail import config
from vitrail.data.dense import open_boxes
from vitrail.errors import UserError
from vitrail.jobs.data_check import data_check
from vitrail.jobs.evaluate import evaluate
from vitrail.jobs.evaluate_dense import open_for
from vitrail.jobs.predict import coco_form, predict
from vitrail.jobs.train import TrainResult, train
from vitrail.jobs.training_data import open_data
from vitrail.jobs.training_parts import build_model, class_weights
from vitrail.models import detr, quick_detr, setr
from vitrail.models.registry import from_config, from_pretrained
from vitrail.runs import DataCheckRun, EvaluateRun, PredictRun, TrainRun
from vitrail.tasks.draw_dense import draw_boxes, draw_mask
from vitrail.train.log import Note, Progress, Record
from vitrail.weights.card import Card

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from dense_worlds import Tree, packed, voc, xml
from dense_worlds import masks as mask_files

SIDE = 48


@pytest.fixture(scope="module", autouse=True)
def tiny_networks() -> Iterator[None]:
    """The families' tiny configurations under names of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for family, name, like in (
            (setr, "setr_tiny", "setr_pup_nano"),
            (quick_detr, "quick_tiny", "quick_detr_nano"),
        ):
            patch.setitem(family.VARIANTS, name, family.TINY)
            patch.setitem(family.CARDS, name, dataclasses.replace(family.CARDS[like], architecture=name))
        yield


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("vitrail.jobs.train.draw_curves", lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scene(index: int) -> tuple[np.ndarray[Any, Any], tuple[int, int, int, int]]:
    """A dark picture with one coloured rectangle: red where the index is even, else blue."""
    pixels = np.full((SIDE, SIDE, 3), 40, dtype=np.uint8)
    left, top = 4 + 3 * (index % 5), 6 + 2 * (index % 7)
    box = (left, top, left + 20, top + 20)
    pixels[top : top + 20, left : left + 20] = (230, 40, 40) if index % 2 == 0 else (40, 40, 230)
    return pixels, box


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def mask_tree() -> Tree:
    """Twelve training pictures and four to validate; 0 ground, 1 red, 2 blue, 11 along the upper edge."""
    tree: Tree = {}
    for index in range(16):
        pixels, (left, top, right, bottom) = scene(index)
        numbers = np.zeros((SIDE, SIDE), dtype=np.uint8)
        numbers[top:bottom, left:right] = 1 + index % 2
        numbers[:2] = 11
        split = "train" if index < 12 else "val"
        tree[f"images/{split}/{index}.png"], tree[f"masks/{split}/{index}.png"] = png(pixels), png(numbers)
    return tree


def box_tree() -> Tree:
    names = [str(index) for index in range(16)]
    annotations = {
        name: xml((("red", "blue")[int(name) % 2], *scene(int(name))[1]), size=(SIDE, SIDE)) for name in names
    }
    tree = voc(annotations, {"train": names[:12], "val": names[12:]})
    return tree | {f"VOC/JPEGImages/{name}.png": png(scene(int(name))[0]) for name in names}


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> str:
    return packed(mask_tree(), tmp_path_factory.mktemp("masks"), as_zip=True)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return packed(box_tree(), tmp_path_factory.mktemp("boxes"), as_zip=True)


def record(place: str, output: Path, **changes: Any) -> TrainRun:
    run = TrainRun(
        data=(place,), output=str(output), model="setr_tiny", classes=("ground", "red", "blue"), ignore=(11,),
        epochs=4, batch_size=4, lr=3e-3, workers=0, device="cpu", precision="fp32", color_jitter=0.0,
        eval_every=2.0,
    )  # fmt: skip
    return config.replace(run, **changes)


def of_boxes(place: str, output: Path, **changes: Any) -> TrainRun:
    return record(place, output, **{"model": "quick_tiny", "classes": (), "ignore": (), **changes})


def go(run: TrainRun) -> tuple[TrainResult, list[Record]]:
    said: list[Record] = []
    return train(run, said.append), said


def notes(said: list[Record]) -> str:
    return "\n".join(record.text for record in said if isinstance(record, Note))


@pytest.fixture(scope="module")
def segmenter(masks: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, list[Record]]:
    return go(record(masks, tmp_path_factory.mktemp("runs") / "masks", epochs=12, eval_every=6.0))


@pytest.fixture(scope="module")
def detector(boxes: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, list[Record]]:
    return go(of_boxes(boxes, tmp_path_factory.mktemp("runs") / "boxes", epochs=3))


def test_masks_are_learned_and_the_card_says_how_well(segmenter: tuple[TrainResult, list[Record]]) -> None:
    result, said = segmenter
    progress = [record for record in said if isinstance(record, Progress)]
    assert progress[-1].loss < 0.8 * progress[0].loss and result.scores["val"]["miou"] > 0.25
    card = from_pretrained(result.model).card
    assert card.task == "image-segmentation" and card.labels == ("ground", "red", "blue")
    assert card.scores["val_miou"] == result.scores["val"]["miou"]
    assert "4.2% of the pixels are ignored" in notes(said)


def test_evaluate_scores_masks_as_training_said(
    segmenter: tuple[TrainResult, list[Record]], masks: str, tmp_path: Path
) -> None:
    found = evaluate(
        EvaluateRun(
            model=str(segmenter[0].folder),
            data=(masks,),
            output=str(tmp_path),
            device="cpu",
            precision="fp32",
        )
    )
    assert found.split == "val" and found.scores["miou"] == segmenter[0].scores["val"]["miou"]
    assert [row["label"] for row in found.classes] == ["ground", "red", "blue"]
    assert any("11 ignored, as in training" in note for note in found.notes)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["confusion"]) == 3 and 0 <= report["worst"][0]["score"] <= report["worst"][-1]["score"]
    assert (tmp_path / "worst.png").stat().st_size > 0


def test_masks_that_number_the_classes_otherwise_are_matched_by_name(
    segmenter: tuple[TrainResult, list[Record]], tmp_path: Path
) -> None:
    tree: Tree = {"classes.txt": b"blue\nred\nground\n"}
    for name, content in mask_tree().items():
        if name.startswith("masks/"):
            numbers = np.asarray(Image.open(io.BytesIO(content)))
            content = png(np.where(numbers < 3, 2 - numbers, numbers).astype(np.uint8))
        tree[name] = content
    ask = EvaluateRun(
        model=str(segmenter[0].folder), data=(packed(tree, tmp_path),), output=str(tmp_path), precision="fp32"
    )
    found = evaluate(ask)
    assert found.scores["miou"] == segmenter[0].scores["val"]["miou"]
    assert any("another order" in note for note in found.notes)


@pytest.mark.slow
def test_an_interrupted_run_of_masks_goes_on_to_the_same_bits(masks: str, tmp_path: Path) -> None:
    whole, _ = go(record(masks, tmp_path / "whole", deterministic=True, hflip=0.5))

    def interrupt(record: Record) -> None:
        if isinstance(record, Progress) and record.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    first = train(record(masks, tmp_path / "cut", deterministic=True, hflip=0.5), interrupt)
    assert first.reason == "interrupted"
    second, said = go(record(masks, tmp_path / "cut", deterministic=True, hflip=0.5))
    assert "Going on from" in notes(said) and second.reason == "done"
    assert (whole.model / "model.safetensors").read_bytes() == (
        second.model / "model.safetensors"
    ).read_bytes()


def test_predict_writes_index_masks_and_drawings(
    segmenter: tuple[TrainResult, list[Record]], tmp_path: Path
) -> None:
    for name, index in (("a/1.png", 1), ("b/1.png", 2)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(png(scene(index)[0]))
    (tmp_path / "b" / "bad.png").write_bytes(b"nothing")
    run = PredictRun(
        model=str(segmenter[0].folder), images=(str(tmp_path / "a"), str(tmp_path / "b")), device="cpu",
        draw=str(tmp_path / "out"),
    )  # fmt: skip
    found = list(predict(run))
    assert [one.error is None for one in found] == [True, True, False]
    drawn = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert drawn == ["1-2-mask.png", "1-2.png", "1-mask.png", "1.png"]
    assert found[0].to_dict()["mask_file"] == str(tmp_path / "out" / "1-mask.png")
    with Image.open(tmp_path / "out" / "1-mask.png") as mask:
        assert mask.mode == "P" and mask.size == (SIDE, SIDE)
        assert np.array_equal(np.asarray(mask), found[0].mask.numpy())


def test_boxes_are_trained_scored_and_drawn(
    detector: tuple[TrainResult, list[Record]], boxes: str, tmp_path: Path
) -> None:
    result, said = detector
    progress = [record for record in said if isinstance(record, Progress)]
    assert progress[-1].loss < progress[0].loss
    assert from_pretrained(result.model).card.labels == ("blue", "red")
    found = evaluate(
        EvaluateRun(
            model=str(result.folder),
            data=(boxes,),
            output=str(tmp_path / "e"),
            device="cpu",
            precision="fp32",
        )
    )
    assert found.scores["ap"] == pytest.approx(result.scores["val"]["ap"], abs=1e-9)
    assert [row["support"] for row in found.classes] == [2, 2]
    (tmp_path / "1.png").write_bytes(png(scene(1)[0]))
    run = PredictRun(
        model=str(result.folder), images=(str(tmp_path / "1.png"),), device="cpu", threshold=0.0, format="coco",
        draw=str(tmp_path / "out"),
    )  # fmt: skip
    predictions = predict(run)
    records = list(predictions)
    table = coco_form(records, predictions.labels)
    assert coco_form(records, predictions.labels, (7, 90))["annotations"][0]["category_id"] in (7, 90)
    assert (tmp_path / "out" / "1.png").exists() and len(table["annotations"]) == len(records[0].boxes) == 20
    assert table["categories"] == [{"id": 1, "name": "blue"}, {"id": 2, "name": "red"}]
    # COCO's form is data again: what one network found can be looked at, or taught to another.
    table["images"][0]["file_name"] = "1.png"
    for item in table["annotations"]:
        item["bbox"] = [0, 0, 9, 9]
    (tmp_path / "instances_found.json").write_text(json.dumps(table))
    assert len(open_boxes([str(tmp_path / "instances_found.json")]).everything) == 1


def test_an_ap_of_nothing_says_why(boxes: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = vitrail.create_model("quick_tiny", num_classes=2)
    model.card = dataclasses.replace(model.card, labels=("blue", "red"))
    model.save_pretrained(tmp_path / "model")
    found = evaluate(
        EvaluateRun(model=str(tmp_path / "model"), data=(boxes,), output=str(tmp_path / "e"), device="cpu")
    )
    assert (found.scores["ap50"] >= 0.001) != any(
        "AP is 0: none of the 80 boxes" in note for note in found.notes
    )
    other = packed({**box_tree(), **{
        f"VOC/Annotations/{n}.xml": xml((("red", "green")[n % 2], *scene(n)[1]), size=(SIDE, SIDE)) for n in range(16)
    }}, tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="green, which the model does not know; it knows blue, red"):
        evaluate(EvaluateRun(model=str(tmp_path / "model"), data=(other,), device="cpu"))


def test_a_backbone_comes_from_a_classifiers_folder_with_a_receipt(masks: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    fields = dict(setr.TINY.backbone_changes)
    model: Any = vitrail.create_model(setr.TINY.backbone, img_size=32, num_classes=4, **fields)
    model.save_pretrained(tmp_path / "classifier")
    run = record(
        masks, tmp_path / "run", backbone=str(tmp_path / "classifier"), steps=1, epochs=None, lr=1e-9
    )
    result, said = go(run)
    assert "backbone: " in notes(said)
    own, theirs = from_pretrained(result.model).state_dict(), model.state_dict()
    name = "backbone.stages.0.blocks.1.mixer.qkv.weight"
    assert torch.allclose(own[name], theirs[name], atol=1e-6)
    told = from_pretrained(result.model).card.preprocessing
    assert told.mean == model.card.preprocessing.mean  # colours as the backbone has learned them
    with pytest.raises(UserError, match="backbone is for networks of boxes and masks"):
        go(record(masks, tmp_path / "b", model="vit_nano_patch4_32", backbone=str(tmp_path / "classifier"),
                  data=("digits",), classes=(), ignore=()))  # fmt: skip


@pytest.mark.parametrize(
    "name", ["fcos_nano", "quick_detr_nano", "detr_nano", "fpn_swin_nano", "trans2seg_nano"]
)
def test_every_dense_network_takes_a_vit_of_another_make(
    name: str, boxes: str, masks: str, tmp_path: Path
) -> None:
    """A ViT has one map and no batch norms, and this one differs from its variant as the one that ships does."""
    small: dict[str, Any] = {"stem": "conv", "width": 32, "depth": 2, "heads": 2, "hidden": 64}
    model: Any = vitrail.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, **small)
    model.save_pretrained(tmp_path)
    given: dict[str, Any] = {"model": name, "backbone": str(tmp_path), "img_size": (128, 128)}
    of_kind = (of_boxes, boxes) if "detr" in name or "fcos" in name else (record, masks)
    run = of_kind[0](of_kind[1], tmp_path / "run", **given)
    built = build_model(run, open_data(run, lambda _: None), lambda _: None).eval()
    key = "stages.0.blocks.1.mixer.qkv.weight"
    assert torch.equal(built.backbone.state_dict()[key], model.backbone.state_dict()[key])
    assert built(torch.randn(1, 3, 128, 128)).logits.isfinite().all()


def config_fields(record: Any) -> dict[str, Any]:
    """A configuration as a card keeps it."""
    found: dict[str, Any] = config.to_dict(record)
    return found


def panoptic(folder: Path) -> Path:
    """A tiny panoptic DETR that is sure of something in every picture: two things, then stuff."""
    torch.manual_seed(0)
    chosen = dataclasses.replace(detr.TINY, masks=True, things=2, num_classes=3)
    model: Any = from_config("detr_resnet50_panoptic", chosen).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.head.linear.weight.mul_(40)
        model.head.linear.bias[-1] = -50.0
    card = dataclasses.replace(
        model.card, labels=("red", "blue", "ground"), config=config_fields(chosen),
        preprocessing=dataclasses.replace(model.card.preprocessing, input_size=(64, 64)),
    )  # fmt: skip
    model.card = card
    model.save_pretrained(folder)
    return folder


def test_a_panoptic_networks_segments_are_told_and_drawn(boxes: str, tmp_path: Path) -> None:
    folder, place = panoptic(tmp_path / "model"), tmp_path / "pictures"
    place.mkdir()
    for number, size in enumerate(((48, 48), (30, 60))):  # of two shapes: one batch, padded
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)).save(
            place / f"{number}.png"
        )
    run = PredictRun(model=str(folder), images=(str(place),), draw=str(tmp_path / "drawn"), device="cpu")
    both = list(predict(run))
    (alone,) = predict(config.replace(run, images=(str(place / "1.png"),)))
    for record, size in zip(both, ((48, 48), (30, 60)), strict=True):
        told = record.to_dict()
        assert told["segments_info"] and record.segments.map.shape == size
        assert sum(segment["area"] for segment in told["segments_info"]) == size[0] * size[1]
        assert all(segment["isthing"] == (segment["index"] < 2) for segment in told["segments_info"])
        name = Path(record.source).stem
        numbers = np.asarray(Image.open(tmp_path / "drawn" / f"{name}-mask.png"))
        assert numbers.shape == size and set(np.unique(numbers)) == {s["id"] for s in told["segments_info"]}
        assert (tmp_path / "drawn" / f"{name}-segments.png").exists()
    assert [s.label for s in alone.segments.segments] == [s.label for s in both[1].segments.segments]
    with pytest.raises(UserError, match="reads no panoptic annotations yet: train detr_resnet50 on boxes"):
        go(of_boxes(boxes, tmp_path / "run", model="detr_resnet50_panoptic"))


def test_scores_in_bf16_are_the_same_again_to_the_last_digit(masks: str, tmp_path: Path) -> None:
    trained, _ = go(record(masks, tmp_path / "run", epochs=2, precision="bf16"))
    run = EvaluateRun(model=str(trained.model), data=(masks,), ignore=(11,), engine="torch", precision="bf16")
    again = evaluate(run)
    assert again.scores == trained.scores["val"] and 0 < again.scores["miou"] < 1
    assert len(again.notes) == len(set(again.notes))


def test_balance_weighs_pixels_of_rare_classes_by_how_rare_they_are(masks: str, tmp_path: Path) -> None:
    run = record(masks, tmp_path)
    data = open_data(run, lambda _: None)
    numbers = np.concatenate([data.train.target(index) for index in range(12)], axis=None)
    counts = np.bincount(numbers[numbers < 3], minlength=3)
    assert class_weights(run, data) is None
    assert class_weights(config.replace(run, balance=1.0), data) == pytest.approx(np.median(counts) / counts)
    half = class_weights(config.replace(run, balance=0.5), data)
    assert half == pytest.approx((np.median(counts) / counts) ** 0.5)


def test_balance_is_refused_where_there_are_no_masks(boxes: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"balance weighs the classes of masks; this data has boxes"):
        go(of_boxes(boxes, tmp_path / "run", balance=1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "vit_nano_patch4_32"},
            r"holds pictures with index masks.*classifies whole pictures.*setr",
        ),
        ({"model": "quick_tiny"}, r"index masks.*quick_tiny finds objects as boxes"),
        ({"data": ("digits",)}, r"digits holds pictures in class folders.*gives every pixel a class"),
        ({"ignore": ()}, r"hold the values 11 .*--ignore 11"),
        ({"mixup": 0.2}, "mixup: made for classes of whole pictures"),
        ({"crop": "pad"}, "crop: made for classes"),
        ({"scale": (0.01, 1.0)}, "scale of boxes and masks"),
        ({"teacher": "somewhere"}, "teacher: made for classes"),
        ({"balance": -1.0}, "balance must be 0 or more"),
        (
            {"model": None, "data": ("digits",), "classes": ("a",), "ignore": ()},
            "classes is for boxes and masks",
        ),
        (
            {"model": None, "data": ("digits",), "classes": ()},
            "ignore and reduce_zero speak of values in masks",
        ),
    ],
)
def test_what_does_not_go_together_is_named_before_anything_is_trained(
    masks: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        go(record(masks, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_model_is_not_scored_on_data_of_another_kind(
    segmenter: tuple[TrainResult, list[Record]], boxes: str
) -> None:
    with pytest.raises(UserError, match=r"holds pictures with boxes.*gives every pixel a class"):
        evaluate(EvaluateRun(model=str(segmenter[0].folder), data=(boxes,), device="cpu"))
    with pytest.raises(UserError, match="The form coco lists boxes"):
        predict(PredictRun(model=str(segmenter[0].folder), images=(__file__,), format="coco", device="cpu"))


def test_without_a_model_the_data_decides(masks: str, boxes: str, tmp_path: Path) -> None:
    # The plan has chosen, nothing is trained.
    with pytest.raises(UserError, match="One step takes 64 images"):
        go(record(masks, tmp_path / "a", model=None, batch_size=64))
    said: list[Record] = []
    with pytest.raises(UserError, match="One step takes 64 images"):
        train(of_boxes(boxes, tmp_path / "b", model=None, batch_size=64), said.append)
    assert "--model quick_detr_nano: a small network for boxes" in notes(said)


def test_data_check_finds_what_was_planted_among_boxes(tmp_path: Path) -> None:
    tree = box_tree()
    tree["VOC/Annotations/1.xml"] = xml(("blue", 5, 5, 5, 9), ("blue", *scene(1)[1]), size=(SIDE, SIDE))
    tree["VOC/Annotations/2.xml"] = xml(("red", *scene(2)[1]), size=(SIDE, SIDE + 4))
    tree["VOC/Annotations/3.xml"] = xml(size=(SIDE, SIDE))
    report = data_check(DataCheckRun(data=(packed(tree, tmp_path),), output=str(tmp_path / "out"), workers=1))
    assert report.counted == "boxes" and report.classes["blue"] == {"train": 5, "val": 2}
    assert report.listed["without area"] == ["VOC/JPEGImages/1.png: blue (5, 5, 5, 9)"]
    reason = report.unreadable[0]["reason"]
    assert "its annotation 48×52" in reason and "turned" not in reason
    assert any("1 × without area" in sentence for sentence in report.problems)
    assert any("1 of 16 pictures have no box" in note for note in report.notes)
    with Image.open(tmp_path / "out" / "overlays.png") as sheet:
        assert sheet.height > 5 * 640


def test_data_check_of_masks_counts_pixels(masks: str, tmp_path: Path) -> None:
    run = DataCheckRun(data=(masks,), output=str(tmp_path), ignore=(11,), classes=("ground", "red", "blue"))
    report = data_check(run)
    assert report.counted == "pixels" and report.classes["red"]["train"] == 6 * 400 and not report.problems
    assert [Path(path).name for path in report.files] == ["report.json", "overlays.png"]


def test_drawings_show_things_in_the_colours_of_their_classes() -> None:
    from vitrail.tasks.draw_dense import Drawn, colour_of, index_png, palette

    pixels = np.zeros((320, 640, 3), dtype=np.uint8)
    drawing = np.asarray(draw_boxes(pixels, [Drawn(1, (100, 50, 200, 150), 0.87)], ("a", "b")))
    assert tuple(drawing[100, 100]) == colour_of(1) and tuple(drawing[100, 150]) == (0, 0, 0)
    assert drawing.shape[0] > 320 and (drawing[320:] == colour_of(1)).all(axis=2).any(), "a legend below"
    mask = np.zeros((320, 640), dtype=np.uint8)
    mask[:, 320:] = 255
    drawing = np.asarray(draw_mask(pixels, mask, ("a", "b"), strength=1.0))
    assert tuple(drawing[10, 10]) == colour_of(0) and tuple(drawing[10, 600]) == (0, 0, 0)
    assert len({colour_of(index) for index in range(40)}) == 40 and (palette(2)[2:] == 0).all()
    with Image.open(io.BytesIO(index_png(mask, 2))) as found:
        assert np.array_equal(np.asarray(found), mask)


def test_what_training_ignored_is_not_ignored_where_the_masks_are_numbered_otherwise(tmp_path: Path) -> None:
    """Trained with 2 ignored; asked about masks whose 0 is no class, so that 2 is one."""
    card = Card(
        architecture="setr_tiny", task="image-segmentation", labels=("a", "b", "c"),
        recipe={"ignore": [2], "classes": ["a", "b", "c"]},
    )  # fmt: skip
    engine = SimpleNamespace(card=card, classes=3)
    place = packed(mask_files(train_a=[[0, 1], [2, 3]], train_b=[[1, 2], [3, 0]]), tmp_path)
    splits, notes = open_for(engine, [place], "model", reduce_zero=True, whole=True)
    assert sorted(set(splits.everything.target(0).ravel().tolist())) == [0, 1, 2, 255]
    assert any("not those of training, which ignored 2" in note for note in notes)


def test_data_whose_masks_all_have_another_size_is_looked_through_to_the_end(tmp_path: Path) -> None:
    place = packed(mask_files(train_a=[[0, 1], [1, 0]], train_b=[[1, 1], [0, 0]]), tmp_path, as_zip=False)
    for path in (Path(place) / "masks").rglob("*.png"):
        Image.open(path).resize((8, 8), Image.Resampling.NEAREST).save(path)
    report = data_check(DataCheckRun(data=(place,), output=str(tmp_path / "out"), workers=1))
    assert "2 of 2 pictures cannot be read." in report.problems
    assert not (tmp_path / "out" / "overlays.png").exists()
