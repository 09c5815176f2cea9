"""`vitrail export`: the artefact, the proof beside it and inside it, and what becomes of a spoiled one."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export.worlds import LABELS, colour_model, pictures, untyped

from vitrail.engines import open_engine
from vitrail.engines.artefact import format_of
from vitrail.engines.pytorch import TorchEngine
from vitrail.errors import ConfigError, ModelError, ProofError, WeightsError
from vitrail.export import openvino, triton, wrap
from vitrail.export.manifest import Sizes
from vitrail.export.onnx import description, read_manifest
from vitrail.export.program import Program
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


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that begins to work fails."""

    def began(*_: Any, **__: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr("vitrail.jobs.export.TorchEngine", began)


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
    manifest = read_manifest(onnx.artefact)
    assert manifest.proof["logits_max"] == kept["logits_max"]
    assert manifest.card.labels == LABELS and manifest.card.preprocessing.mean == (0.4, 0.5, 0.6)
    assert [path.name for path in sorted(onnx.artefact.parent.iterdir())] == [
        "colours.onnx",
        "colours.onnx.proof.json",
    ]


def test_batch_height_and_width_are_free(onnx: Exported, model: Path) -> None:
    assert onnx.manifest.free_size
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


def test_a_spoiled_export_is_refused_and_leaves_only_its_numbers(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what happens elsewhere when somebody forgets the model's own mean
    monkeypatch.setattr(wrap, "constants", lambda preprocessing: ([1 / 127.5] * 3, [-1.0] * 3))
    with pytest.raises(ProofError, match="logits differ") as caught:
        exported(model, data, "torch", tmp_path / "spoiled.pt2")
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled.pt2.refused.json"]
    kept = json.loads((tmp_path / "spoiled.pt2.refused.json").read_text())
    assert kept["passed"] is False and kept["failures"]


def test_a_refused_export_leaves_the_one_before_and_its_proof(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "colours.pt2"
    before = exported(model, data, "torch", target).proof_file.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(wrap, "constants", lambda preprocessing: ([1 / 127.5] * 3, [-1.0] * 3))
        with pytest.raises(ProofError, match=r"colours\.pt2\.refused\.json"):
            exported(model, data, "torch", target)
    assert (tmp_path / "colours.pt2.proof.json").read_text() == before
    assert open_engine(target).card.labels == LABELS
    exported(model, data, "torch", target)
    assert not (tmp_path / "colours.pt2.refused.json").exists()


def test_an_openvino_folder_is_opened_from_within(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    exported(model, data, "openvino", tmp_path / "m")
    monkeypatch.chdir(tmp_path / "m")
    for name in (".", "model.xml"):  # neither has a name to look for a proof by
        assert open_engine(name).card.labels == LABELS
    (tmp_path / "m" / "model.bin").unlink()
    with pytest.raises(WeightsError, match=r"its weights .* lost since"):
        open_engine(".")


@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch"])
def test_a_file_that_changed_after_its_proof_is_refused(
    model: Path, data: Path, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("onnxruntime")
    if kind == "openvino":
        pytest.importorskip("openvino")
    target = tmp_path / {"onnx": "m.onnx", "openvino": "m", "torch": "m.pt2"}[kind]
    found = exported(model, data, kind, target)
    assert open_engine(target).card.labels == LABELS
    weights = target / "model.bin" if kind == "openvino" else target
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 0x40  # one bit of one weight
    weights.write_bytes(raw)
    with pytest.raises(WeightsError, match=r"proof\.json is about .* damaged, replaced or lost"):
        open_engine(target)
    found.proof_file.write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        open_engine(target)


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
    dense = DensePictures(run, engine)
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


def older_export(folder: Path, format: str, onnx: Exported) -> None:
    """The ONNX file of these tests as a folder of another format, without another export."""
    pytest.importorskip("openvino")
    if format == "openvino":
        openvino.write_openvino(openvino.from_onnx(onnx.artefact), folder, onnx.manifest)
    else:
        triton.write_triton(onnx.artefact, folder, onnx.manifest)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("format", ["openvino", "triton"])
def test_a_folder_that_holds_more_than_an_export_is_not_replaced(
    format: Any, onnx: Exported, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "user"
    older_export(folder, format, onnx)
    run = ExportRun(model=str(model), format=format, output=str(folder))
    with pytest.raises(AssertionError, match="work began"):
        export(run)
    (folder / "notes.txt").write_text("mine")
    for place in ("sub", "2") if format == "openvino" else ("sub", "2", "1/other"):
        (folder / place).mkdir()
        (folder / place / "model.onnx").write_text("mine")
    before = everything(folder)
    named = r"2/, notes\.txt, sub/" if format == "openvino" else r"1/other/, 2/, notes\.txt, sub/"
    with pytest.raises(ConfigError, match=f"holds more than an export.*: {named} would go") as caught:
        export(run)
    assert caught.value.exit_code == 2 and everything(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["user"]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("format", "files"),
    [
        ("openvino", {"model.xml": "<net/>", "model.bin": ""}),
        ("triton", {"config.pbtxt": "", "1/model.onnx": ""}),
        ("triton", {"config.pbtxt": "", "1/model.onnx": "", "vitrail.json": "[]"}),
    ],
)
def test_a_folder_without_our_card_is_not_replaced(
    format: Any, files: dict[str, str], model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    folder = tmp_path / "theirs"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = everything(folder)
    with pytest.raises(ConfigError, match="is no export of vitrail that can be read"):
        export(ExportRun(model=str(model), format=format, output=str(folder)))
    assert everything(folder) == before


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("format", ["openvino", "triton"])
@pytest.mark.parametrize("name", ["model.xml", "new.onnx", "new.pt2", "there"])
def test_a_folder_format_asks_for_a_folder_before_any_work(
    format: Any, name: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.xml").write_text("theirs")
    (tmp_path / "there").write_text("theirs")
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match=f"name a folder, such as --output .*-{format}"):
        export(ExportRun(model=str(model), format=format, output=str(tmp_path / name)))
    assert everything(tmp_path) == before


def test_sizes_that_the_network_refuses_are_refused_by_the_file_too(onnx: Exported, model: Path) -> None:
    assert onnx.manifest.rows == onnx.manifest.columns == Sizes(least=16, step=8)
    assert onnx.to_dict()["rows"] == {"least": 16, "step": 8, "most": None}
    network, engine = TorchEngine(model, precision="fp32"), open_engine(onnx.artefact)
    for size in ((17, 16), (16, 20), (4, 8), (1, 1)):
        images = torch.zeros(1, 3, *size, dtype=torch.uint8)
        with pytest.raises(ModelError):
            network(images)
        with pytest.raises(
            ConfigError, match=f"height of 16 or more in steps of 8 .*; got {size[0]}×{size[1]}"
        ):
            engine(images)
    assert engine(torch.zeros(1, 3, 16, 24, dtype=torch.uint8)).shape == (1, 3)


@pytest.mark.parametrize(
    ("sizes", "words", "taken"),
    [
        (Sizes(), "1 or more", [1, 2, 3, 4, 5, 6, 7]),
        (Sizes(2, 2, 6), "2 to 6 in steps of 2", [2, 4, 6]),
        (Sizes(5, 1, 5), "5", [5]),
    ],
)
def test_sizes_say_what_they_take(sizes: Sizes, words: str, taken: list[int]) -> None:
    assert str(sizes) == words and [pixels for pixels in range(8) if sizes.take(pixels)] == taken


def test_the_file_describes_itself(onnx: Exported) -> None:
    session: Any = pytest.importorskip("onnxruntime").InferenceSession(str(onnx.artefact))
    assert session.get_modelmeta().description.startswith(
        "Takes images: uint8 0..255, RGB, [N, 3, h, w], h 16 or more in steps of 8, w 16 or more in steps of 8 pixels"
        " (the model's own: 16 x 16); normalisation is inside, resizing is not. Gives logits, probabilities."
    )
    shape = {"exported": None, "example": (), "inputs": ("images", "padding"), "outputs": ("logits", "boxes")}
    grey = dataclasses.replace(
        onnx.manifest.card.preprocessing, in_chans=1, mean=(0.5,), std=(0.5,), input_size=(32, 48)
    )
    manifest = dataclasses.replace(
        onnx.manifest, card=dataclasses.replace(onnx.manifest.card, preprocessing=grey)
    )
    assert (
        "one channel, [N, 1, h, w], 32 x 48 pixels, and padding: bool [N, h, w], true where there is no"
        " picture; normalisation is inside, resizing is not. Gives logits, boxes."
    ) in description(Program(free_size=False, **shape), manifest)


def test_what_the_file_reached_stands_with_the_number_of_pictures(onnx: Exported) -> None:
    scores = read_manifest(onnx.artefact).card.scores
    assert scores["exported_acc1"] == 1 and scores["exported_images"] == 12


def test_a_model_with_fewer_names_than_classes_is_refused_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((copy / "config.json").read_text())
    del config["label_names"][2], config["id2label"]["2"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="2 class names for 3 classes"):
        export(ExportRun(model=str(copy), output=str(tmp_path / "out" / "m.onnx")))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_openvino_folder_and_a_triton_repository(
    onnx: Exported, model: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    wanted = TorchEngine(model, precision="fp32")(images)
    for format in ("openvino", "triton"):
        older_export(tmp_path / format, format, onnx)  # which is replaced
        found = exported(model, data, format, tmp_path / format)
        assert any("INFERENCE_PRECISION_HINT" in note for note in found.notes) is (format == "openvino")
        assert format_of(found.artefact) == format
        engine = open_engine(found.artefact)
        assert engine.card.labels == LABELS
        assert (engine(images) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    config = (tmp_path / "triton" / "config.pbtxt").read_text()
    assert "TYPE_UINT8" in config and "dynamic_batching" in config
    assert not config.startswith("name:")  # Triton takes the folder's, which may be renamed
    manifest = read_manifest(tmp_path / "triton" / "1" / "model.onnx")
    assert manifest.card.scores["exported_acc1"] == 1 and manifest.card.scores["exported_images"] == 12
    assert (tmp_path / "triton" / "labels.txt").read_text().split() == list(LABELS)


@pytest.mark.slow
def test_int8_keeps_the_answers_and_says_what_it_kept(model: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    found = exported(model, data, "openvino", tmp_path / "int8", int8=True, calibrate=(str(data),))
    assert found.proof.passed and found.manifest.precision == "int8"
    assert found.manifest.quantisation["int8_products"] > 0
    assert open_engine(found.artefact).precision == "int8"
    assert open_engine(model, precision="int8").precision == "int8"  # a copy lies with the model


def test_a_full_disk_ends_an_export_in_one_line(model: Path, data: Path, tmp_path: Path) -> None:
    """torch's own writer of archives ends the whole process there."""

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [
        sys.executable,
        "-m",
        "vitrail",
        "export",
        str(model),
        "--format",
        "torch",
        "--data",
        str(data),
    ]
    ended = subprocess.run(
        [*command, "--output", str(tmp_path / "out" / "model.pt2")],
        capture_output=True,
        text=True,
        preexec_fn=little,
    )
    assert ended.returncode == 2 and "Make room" in ended.stderr.splitlines()[-1]
    assert not any((tmp_path / "out").iterdir())
