"""Boxes and masks handed over: what the exported graph answers, the proof, and the verbs on the exported file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export.worlds import untyped
from PIL import Image
from torch import Tensor

from vitrail.data.transforms import normalise
from vitrail.engines import open_engine
from vitrail.engines.pytorch import TorchEngine
from vitrail.errors import ConfigError, ProofError
from vitrail.export import wrap
from vitrail.export.manifest import Sizes
from vitrail.export.parity_dense import Bounds, prove_dense
from vitrail.export.program import capture
from vitrail.export.wrap import Deployed, answer_of
from vitrail.jobs.export import export
from vitrail.jobs.predict import predict
from vitrail.models import detr, fcos, fpn, quick_detr, setr, trans2seg
from vitrail.models.registry import from_config
from vitrail.nn.shapes import DenseBoxOutput, MaskOutput
from vitrail.runs import ExportRun, PredictRun
from vitrail.tasks.detect import Detect
from vitrail.tasks.segment import Segment

FAMILIES = {
    "detr_nano": detr,
    "quick_detr_nano": quick_detr,
    "fcos_nano": fcos,
    "setr_pup_nano": setr,
    "trans2seg_nano": trans2seg,
    "fpn_pvt_v2_nano": fpn,
}


def tiny(name: str, **changes: Any) -> Any:
    """A family's tiny network, moved away from its even start, so that answers differ from place to place."""
    torch.manual_seed(0)
    model: Any = from_config(name, FAMILIES[name].TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        if name.startswith("quick_detr"):
            # Its classes start at 1 %: no box would be told, and none compared.
            model.head.linear.bias.add_(3.0)
    preprocessing = dataclasses.replace(model.card.preprocessing, input_size=(64, 64), **changes)
    labels = tuple("abcde")
    model.card = dataclasses.replace(model.card, labels=labels, preprocessing=preprocessing)
    return model.eval()


def photographs(place: Path, sizes: Any = ((50, 70), (90, 60))) -> list[str]:
    generator = np.random.default_rng(0)
    place.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC).save(place / f"{number}.png")
    return [str(path) for path in sorted(place.glob("*.png"))]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_deployed_graph_answers_as_the_network_does(name: str) -> None:
    model = tiny(name)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    deployed = Deployed(model)
    with torch.no_grad():
        found = dict(zip(deployed.outputs, deployed(images), strict=True))
        wanted = model(normalise(images, model.card.preprocessing))
    record = answer_of(found, model.card.task)
    assert type(record) is type(wanted)
    for mine, theirs in zip(record, wanted, strict=True):
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    if isinstance(wanted, MaskOutput):
        assert found["classes"].dtype == torch.uint8 and found["classes"].shape == (2, 64, 64)
        return
    scores = found["scores"]
    assert (
        scores.shape == (*wanted.boxes.shape[:2], 5) and 0 <= float(scores.min()) <= float(scores.max()) <= 1
    )
    best = Detect(tuple("abcde")).detections(wanted, most=1)
    for own, (score, index, _) in zip(scores, best, strict=True):
        if isinstance(wanted, DenseBoxOutput) and not len(score):
            continue
        assert float(own.max()) == pytest.approx(float(score[0]), abs=1e-5)
        assert int(own.flatten().argmax()) % 5 == int(index[0])


def test_a_detector_that_keeps_the_pictures_shape_is_told_of_padding() -> None:
    model = tiny("detr_nano", crop_mode="fit")
    deployed = Deployed(model)
    assert deployed.inputs == ("images", "padding")
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    padding[:, :, 40:] = True
    with torch.no_grad():
        found = dict(zip(deployed.outputs, deployed(images, padding), strict=True))
        wanted = model(normalise(images, model.card.preprocessing, padding=padding), padding)
    torch.testing.assert_close(found["boxes"], wanted.boxes, rtol=1e-4, atol=1e-5)


def masks(logits: Tensor) -> Any:
    return lambda images, padding: MaskOutput(logits[: len(images)])


def test_the_proof_of_masks_counts_pixels_and_forgives_ties() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 8, 8)
    images = [(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), None, None)]
    task = Segment(["a", "b", "c"])
    same = prove_dense(masks(logits), masks(logits), images, task, precision="fp32", pictures="none")
    assert same.passed and same.agreement == 1 and same.compared == 128 and same.logits_max == 0
    tied = logits.clone()
    tied[0, :, 0, 0] = torch.tensor([1.0, 1.0, 0.0])
    other = tied.clone()
    other[0, 1, 0, 0] += 1e-6
    near = prove_dense(masks(tied), masks(other), images, task, precision="fp32", pictures="none")
    assert near.passed and near.agreement < 1 and near.agreement_clear == 1
    spoiled = prove_dense(
        masks(logits), masks(logits.flip(1)), images, task, precision="fp32", pictures="none"
    )
    assert len(spoiled.failures) == 2 and "pixels are the same" in spoiled.failures[1]
    with pytest.raises(Exception, match="no picture"):
        prove_dense(masks(logits), masks(logits), [], task, precision="fp32", pictures="none")


def test_the_proof_of_boxes_asks_for_class_place_and_score() -> None:
    model, task = tiny("quick_detr_nano"), Detect(tuple("abcde"))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        output = model(normalise(images, model.card.preprocessing))
    output = output._replace(logits=2 * torch.randn_like(output.logits))
    batches = [(images, None, None)]

    def judged(**changes: Any) -> Any:
        other = output._replace(**changes)
        return prove_dense(
            lambda *_: output, lambda *_: other, batches, task, precision="fp32", pictures="none",
            bounds=Bounds(logits=10.0, agreement=0.99),
        )  # fmt: skip

    assert judged().passed and judged().compared > 20
    assert judged(boxes=output.boxes + 1e-5).passed
    assert judged(boxes=output.boxes + 0.05).agreement < 0.5
    assert judged(logits=output.logits.roll(1, dims=-1)).agreement < 0.5
    assert not judged(logits=output.logits - 1).passed


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "rows"),
    [("setr_pup_nano", Sizes(16, 8)), ("fcos_nano", Sizes(33, 1, 64)), ("trans2seg_nano", None)],
)
def test_free_sizes_are_those_that_the_graph_was_traced_for(name: str, rows: Sizes | None) -> None:
    """The networks take more, by other ways: they fill pictures up, or skip a level of one cell."""
    program = capture(Deployed(tiny(name)))
    assert program.free_size is (rows is not None)
    if rows is not None:
        assert program.rows == program.columns == rows


def test_what_is_for_classes_alone_is_refused(tmp_path: Path) -> None:
    tiny("setr_pup_nano").save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="int8 is for models that classify"):
        export(ExportRun(model=str(tmp_path / "model"), format="openvino", int8=True, calibrate=("x",)))
    with pytest.raises(ConfigError, match="take --format onnx"):
        export(ExportRun(model=str(tmp_path / "model"), format="triton", output=str(tmp_path / "t")))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch", "openvino"])
@pytest.mark.parametrize("name", FAMILIES)
def test_exported_files_predict_as_their_folder(name: str, format: Any, tmp_path: Path) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(format, format))
    model, paths = tmp_path / "model", photographs(tmp_path / "pictures")
    tiny(name).save_pretrained(model)
    target = tmp_path / {"onnx": "m.onnx", "torch": "m.pt2", "openvino": "m-ov"}[format]
    with untyped():
        found = export(ExportRun(model=str(model), format=format, output=str(target)))
    assert found.proof.passed and found.manifest.outputs[0] == "logits"
    assert json.loads(found.proof_file.read_text())["compared"] > 0
    records = []
    for place in (model, target):
        run = PredictRun(
            model=str(place), images=tuple(paths), precision="fp32", draw=str(tmp_path / "drawn")
        )
        records.append(list(predict(dataclasses.replace(run, threshold=0.1))))
    for mine, theirs in zip(*records, strict=True):
        if hasattr(mine, "mask"):
            assert float((mine.mask == theirs.mask).float().mean()) > 0.999
            continue
        assert [box.index for box in mine.boxes] == [box.index for box in theirs.boxes]
        for one, other in zip(mine.boxes, theirs.boxes, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-3)
            assert one.corners == pytest.approx(other.corners, abs=0.05)


@pytest.mark.slow
def test_shapes_that_pictures_keep_go_through_an_exported_detector(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = tmp_path / "model"
    tiny("detr_nano", crop_mode="fit").save_pretrained(model)
    with untyped():
        found = export(ExportRun(model=str(model), output=str(tmp_path / "m.onnx")))
    assert found.manifest.free_size
    images = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    padding = torch.zeros(2, 48, 64, dtype=torch.bool)
    padding[1, :, 32:] = True
    ours: Any = TorchEngine(str(model), device="cpu", precision="fp32")
    theirs: Any = open_engine(str(tmp_path / "m.onnx"))
    for told in (None, padding):
        torch.testing.assert_close(theirs(images, told).boxes, ours(images, told).boxes, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_spoiled_segmenter_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    tiny("setr_pup_nano").save_pretrained(tmp_path / "model")
    plain = wrap.told

    def spoiled(output: Any, classes: int) -> dict[str, Tensor]:
        found = plain(output, classes)
        return {**found, "logits": found["logits"].flip(1)}

    monkeypatch.setattr(wrap, "told", spoiled)
    with untyped(), pytest.raises(ProofError, match="pixels are the same"):
        export(ExportRun(model=str(tmp_path / "model"), output=str(tmp_path / "m.onnx")))
    assert not (tmp_path / "m.onnx").exists() and (tmp_path / "m.onnx.refused.json").exists()
