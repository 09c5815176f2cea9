"""`vitrail export`: the artefact, the proof beside it and inside it, and what becomes of a spoiled one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export.worlds import LABELS, colour_model, pictures, untyped

from vitrail.engines import open_engine
from vitrail.engines.artefact import format_of
from vitrail.engines.pytorch import TorchEngine
from vitrail.errors import ConfigError, ProofError
from vitrail.export import wrap
from vitrail.export.onnx import read_label
from vitrail.jobs.evaluate import evaluate
from vitrail.jobs.export import Exported, Pictures, export
from vitrail.jobs.export_dense import DensePictures
from vitrail.jobs.predict import predict
from vitrail.runs import EvaluateRun, ExportRun, PredictRun


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_model(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "colours")


def exported(model: Path, data: Path, format: Any, output: Path, **more: Any) -> Exported:
    pytest.importorskip({"onnx": "onnxruntime", "triton": "onnxruntime"}.get(format, format))
    if format != "torch":
        pytest.importorskip("onnxscript")
    with untyped():
        return export(
            ExportRun(model=str(model), format=format, data=(str(data),), output=str(output), **more)
        )


@pytest.fixture(scope="module")
def onnx(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(model, data, "onnx", tmp_path_factory.mktemp("out") / "colours.onnx")


def test_the_proof_stands_beside_the_file_and_in_it(onnx: Exported) -> None:
    kept = json.loads(onnx.proof_file.read_text())
    assert kept["passed"] and kept["images"] == 12 and kept["agreement"] == 1
    assert kept["accuracy_before"] == kept["accuracy_after"] == 1
    assert kept["logits_max"] <= 1e-4
    label = read_label(onnx.artefact)
    assert label.proof["logits_max"] == kept["logits_max"]
    assert label.card.labels == LABELS and label.card.preprocessing.mean == (0.4, 0.5, 0.6)
    assert [path.name for path in sorted(onnx.artefact.parent.iterdir())] == [
        "colours.onnx",
        "colours.onnx.proof.json",
    ]


def test_batch_height_and_width_are_free(onnx: Exported, model: Path) -> None:
    assert onnx.label.free_size
    network, engine = TorchEngine(model, precision="fp32"), open_engine(onnx.artefact)
    for shape in ((1, 3, 16, 16), (5, 3, 32, 24)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        wanted = network(images)
        assert (engine(images) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_evaluate_and_predict_take_the_file_for_the_model(onnx: Exported, data: Path, tmp_path: Path) -> None:
    found = evaluate(EvaluateRun(model=str(onnx.artefact), data=(str(data),), output=str(tmp_path)))
    assert found.scores["acc1"] == 1 and found.scores["images"] == 12
    assert [row["label"] for row in found.classes] == list(LABELS)
    record = next(iter(predict(PredictRun(model=str(onnx.artefact), images=(str(data / "val" / "green"),)))))
    assert record.label == "green"


def test_openvino_reads_the_same_file(onnx: Exported, model: Path) -> None:
    pytest.importorskip("openvino")
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    wanted = TorchEngine(model, precision="fp32")(images)
    engine = open_engine(onnx.artefact, "openvino")
    assert engine.card.labels == LABELS
    assert (engine(images) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_an_engine_or_precision_that_the_file_does_not_have_is_refused(onnx: Exported) -> None:
    with pytest.raises(ConfigError, match="opened by onnxruntime or openvino"):
        open_engine(onnx.artefact, "compiled")
    with pytest.raises(ConfigError, match="exported in fp32"):
        open_engine(onnx.artefact, precision="int8")


def test_a_spoiled_export_is_refused_and_leaves_only_its_proof(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what happens elsewhere when somebody forgets the model's own mean
    monkeypatch.setattr(wrap, "constants", lambda preprocessing: ([1 / 127.5] * 3, [-1.0] * 3))
    with pytest.raises(ProofError, match="logits differ") as caught:
        exported(model, data, "torch", tmp_path / "spoiled.pt2")
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled.pt2.proof.json"]
    kept = json.loads((tmp_path / "spoiled.pt2.proof.json").read_text())
    assert kept["passed"] is False and kept["failures"]


@pytest.mark.slow
def test_without_data_two_photographs_do(model: Path, tmp_path: Path) -> None:
    with untyped():
        found = export(ExportRun(model=str(model), format="torch", output=str(tmp_path / "model.pt2")))
    assert found.proof.passed and found.proof.accuracy_before is None and found.proof.images == 32
    assert open_engine(found.artefact).card.labels == LABELS


def test_pictures_without_classes_will_do_for_the_proof(data: Path, model: Path) -> None:
    """Of a classifier and of a detector alike: nothing but the score needs to know what is in them."""
    engine: Any = TorchEngine(model, precision="fp32")
    loose = data / "val" / "red"
    run = ExportRun(model=str(model), data=(str(loose),))
    plain = Pictures(run, engine)
    assert len(plain) == len(list(loose.iterdir())) and "not measured" in plain.notes[0]
    assert next(iter(plain))[1] is None
    engine.card = dataclasses.replace(engine.card, task="object-detection")
    dense = DensePictures(run, engine, lambda source, count, seed: source)
    assert len(dense) == len(plain) and "no score is measured" in dense.notes[0]
    assert next(iter(dense))[2] is None


def test_int8_asks_for_pictures(model: Path) -> None:
    with pytest.raises(ConfigError, match="calibrate"):
        export(ExportRun(model=str(model), format="openvino", int8=True))
    with pytest.raises(ConfigError, match="openvino"):
        export(ExportRun(model=str(model), format="onnx", int8=True, calibrate=("digits",)))


def test_nothing_but_an_older_export_is_replaced(model: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in model.iterdir())
    with pytest.raises(ConfigError, match="is not replaced"):
        export(ExportRun(model=str(model), format="openvino", output=str(model)))
    with pytest.raises(ConfigError, match="file of the format onnx"):
        export(ExportRun(model=str(model), output=str(tmp_path / "model.bin")))
    assert sorted(path.name for path in model.iterdir()) == before and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_openvino_folder_and_a_triton_repository(model: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    wanted = TorchEngine(model, precision="fp32")(images)
    for format in ("openvino", "triton"):
        found = exported(model, data, format, tmp_path / format)
        assert format_of(found.artefact) == format
        engine = open_engine(found.artefact)
        assert engine.card.labels == LABELS
        assert (engine(images) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    config = (tmp_path / "triton" / "config.pbtxt").read_text()
    assert 'name: "triton"' in config and "TYPE_UINT8" in config and "dynamic_batching" in config
    assert (tmp_path / "triton" / "labels.txt").read_text().split() == list(LABELS)


@pytest.mark.slow
def test_int8_keeps_the_answers_and_says_what_it_kept(model: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    found = exported(model, data, "openvino", tmp_path / "int8", int8=True, calibrate=(str(data),))
    assert found.proof.passed and found.label.precision == "int8"
    assert found.label.quantisation["int8_products"] > 0
    assert open_engine(found.artefact).precision == "int8"
    assert open_engine(model, precision="int8").precision == "int8"  # a copy lies with the model
