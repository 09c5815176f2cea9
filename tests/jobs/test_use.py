"""The jobs behind evaluate, predict and trace: from a saved folder and files on disk to numbers and pictures."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.errors import DataError, ImageError, ModelError, WeightsError
from vitrail.jobs.evaluate import evaluate
from vitrail.jobs.predict import predict
from vitrail.jobs.trace import trace
from vitrail.predict import Predictor
from vitrail.runs import EvaluateRun, PredictRun, TraceRun

LABELS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model tells red, green and blue pictures apart, made by hand: the head reads mean colours."""
    torch.manual_seed(0)
    model: Any = vitrail.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, width=12, depth=1, heads=2, hidden=16, num_classes=3,
        class_token=False, pool="mean", position="none", norm_order="post",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for channel in range(3):
            model.backbone.stages[0].entry.patches.proj.weight[channel, channel] = 1 / 64
        model.backbone.stages[0].blocks[0].norm1.weight.fill_(1)
        model.backbone.stages[0].blocks[0].norm2.weight.fill_(1)
        model.head.linear.weight[:, :3] = torch.eye(3) * 2
    model.card = dataclasses.replace(model.card, labels=LABELS)
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """val/COLOUR/N.png, twelve pictures, one of them in the wrong folder; the folders sort as blue, green, red."""
    place = tmp_path / "colours"
    generator = np.random.default_rng(0)
    for index, label in enumerate(LABELS):
        folder = place / "val" / label
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 60, (20, 24, 3), dtype=np.uint8)
            shown = 0 if (label, number) == ("blue", 3) else index
            pixels[..., shown] += 180
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return place


def test_classes_are_matched_by_name_and_files_are_written(
    run_folder: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO, logger="vitrail"):
        result = evaluate(
            EvaluateRun(
                model=str(run_folder),
                data=(str(data),),
                output=str(tmp_path / "out"),
                batch_size=5,
                precision="fp32",
            ),
            lambda done, total: seen.append((done, total)),
        )
    assert result.scores["acc1"] == pytest.approx(11 / 12)
    assert [row["label"] for row in result.classes] == list(LABELS)
    assert result.split == "val" and any("another order" in note for note in result.notes)
    assert "another order" in caplog.text
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert [path.name for path in result.files] == ["report.json", "confusion.png", "mistakes.png"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["confusion"] == [[4, 0, 0], [0, 4, 0], [1, 0, 3]]
    assert [mistake["predicted"] for mistake in report["mistakes"]] == ["red"]
    assert report["mistakes"][0]["image"].endswith("3.png")
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.format == "PNG"


def test_results_lie_in_the_models_run_by_default(run_folder: Path, data: Path) -> None:
    result = evaluate(EvaluateRun(model=str(run_folder / "model"), data=(str(data),), precision="fp32"))
    assert result.files[0] == run_folder / "evaluation" / "report.json"


def test_data_with_an_unknown_class_is_refused_by_name(run_folder: Path, data: Path) -> None:
    (data / "val" / "green").rename(data / "val" / "grean")
    with pytest.raises(DataError, match=r"grean.*Did you mean green"):
        evaluate(EvaluateRun(model=str(run_folder), data=(str(data),)))


def test_absent_classes_and_unreadable_images_are_said_and_the_rest_is_scored(
    run_folder: Path, data: Path, tmp_path: Path
) -> None:
    for path in (data / "val" / "blue").iterdir():
        path.unlink()
    (data / "val" / "blue").rmdir()
    (data / "val" / "red" / "0.png").write_bytes(b"\x89PNG broken")
    result = evaluate(EvaluateRun(model=str(run_folder), data=(str(data),), output=str(tmp_path / "out")))
    assert result.scores["images"] == 7 and result.scores["acc1"] == 1.0
    assert any("1 of the model's 3 classes" in note for note in result.notes)
    assert len(result.skipped) == 1 and "0.png" in result.skipped[0]
    assert "mistakes.png" not in [path.name for path in result.files]


def test_a_model_without_names_takes_the_datas_and_says_so(
    run_folder: Path, data: Path, tmp_path: Path
) -> None:
    model: Any = vitrail.from_pretrained(run_folder / "model")
    model.card = dataclasses.replace(model.card, labels=None)
    model.save_pretrained(tmp_path / "nameless")
    result = evaluate(
        EvaluateRun(model=str(tmp_path / "nameless"), data=(str(data),), output=str(tmp_path / "out"))
    )
    assert any("no class names" in note for note in result.notes)
    assert [row["label"] for row in result.classes] == ["blue", "green", "red"]


def test_predictions_come_one_by_one_in_order(run_folder: Path, data: Path) -> None:
    bad = data / "val" / "red" / "0.png"
    bad.write_bytes(b"")
    found = predict(
        PredictRun(model=str(run_folder), images=(str(data / "val" / "red"),), batch_size=2, top_k=1)
    )
    assert found.total == 4 and found.labels == LABELS
    records = list(found)
    assert [Path(record.source).name for record in records] == ["0.png", "1.png", "2.png", "3.png"]
    assert "empty" in str(records[0].error) and [record.label for record in records[1:]] == ["red"] * 3


def test_prediction_and_evaluation_agree_on_every_image(run_folder: Path, data: Path, tmp_path: Path) -> None:
    result = evaluate(EvaluateRun(model=str(run_folder), data=(str(data),), output=str(tmp_path / "out")))
    images = sorted((data / "val").rglob("*.png"))
    records = Predictor(run_folder)(images)
    right = sum(record.label == path.parent.name for record, path in zip(records, images, strict=True))
    assert right / len(images) == result.scores["acc1"]


def test_a_trace_is_written_beside_what_it_tells(run_folder: Path, data: Path, tmp_path: Path) -> None:
    image = data / "val" / "green" / "1.png"
    traced = trace(TraceRun(model=str(run_folder), image=str(image), output=str(tmp_path / "story"), top_k=2))
    assert traced.trace.prediction.label == "green" and traced.trace.original == (20, 24)
    assert traced.page.read_text(encoding="utf-8").startswith("<!doctype html>")
    with Image.open(traced.picture) as picture:
        assert picture.format == "PNG"
    view = json.loads(json.dumps(traced.to_dict()))
    assert view["label"] == "green" and len(view["steps"]) == len(traced.trace.steps)
    assert sorted(path.name for path in (tmp_path / "story").iterdir()) == ["trace.html", "trace.png"]


def test_a_network_by_name_is_traced_with_random_weights_and_says_so(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = str(data / "val" / "green" / "1.png")
    state = torch.get_rng_state()
    traced = trace(
        TraceRun(model="vit_tiny_patch16_224", image=image, output=str(tmp_path / "story"), device="cpu")
    )
    assert "random weights" in traced.trace.note and "random" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_no_model_or_no_picture_is_said(run_folder: Path, data: Path, tmp_path: Path) -> None:
    image = str(data / "val" / "green" / "1.png")
    with pytest.raises(ModelError, match="neither a folder nor the name"):
        trace(TraceRun(model="vit_tny", image=image))
    with pytest.raises(ImageError, match="no such file"):
        trace(TraceRun(model=str(run_folder), image="absent.png"))
    with pytest.raises(WeightsError):
        predict(PredictRun(model=str(tmp_path), images=(image,)))
