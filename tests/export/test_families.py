"""Every family that classifies goes to ONNX and OpenVINO with a free batch, and with a free size where it can."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from export.worlds import pictures

from vitrail.engines.onnx import OnnxEngine
from vitrail.engines.openvino import OpenVinoEngine
from vitrail.export.manifest import Manifest
from vitrail.export.onnx import adds_next_to_nothing, write_onnx
from vitrail.export.program import Program, capture
from vitrail.export.wrap import Deployed
from vitrail.jobs.export import export
from vitrail.models import registry
from vitrail.models.classifier import Classifier
from vitrail.predict import Predictor
from vitrail.runs import ExportRun
from vitrail.weights.card import Card


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "colours")


FIXED = {"swin"}
"""Families whose height and width are fixed when they are exported: shapes follow the number of windows."""


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    module = importlib.import_module(registry.FAMILIES[family])
    with torch.random.fork_rng():
        model = registry.from_config(next(iter(module.VARIANTS)), module.TINY)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.abs().max() < 1e-3:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Guarded(torch.nn.Module):
    """A quotient whose divisor may be 0 but for its guard."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        sums = images.float().sum(dim=(2, 3))
        return sums / (sums + 1e-8)


def test_a_summand_of_a_hundred_millionth_is_not_left_out(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    exported = torch.export.export(Guarded(), (images,))
    assert adds_next_to_nothing(exported)
    program = Program(
        exported=exported, example=(images,), inputs=("images",), outputs=("logits",), free_size=False
    )
    write_onnx(program, tmp_path / "model.onnx", Manifest(card=Card(architecture="none")))
    (found,) = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"images": images.numpy()})
    assert (found == 0).all()  # without the guard 0 / 0


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_the_guard_of_t2t_is_not_left_out(tmp_path: Path) -> None:
    """T2T-ViT divides by sums + 1e-8, which torch's ONNX optimiser takes for sums + 0. Small sums show it."""
    pytest.importorskip("onnxruntime")
    model = tiny("t2t")
    assert model.config.tokens == "performer"
    with torch.no_grad():
        # Long queries and keys: some sums come out as 0.
        model.backbone.stages[0].blocks[0].norm1.weight.mul_(10)
    deployed = Deployed(model)
    program = capture(deployed, free_size=False)
    write_onnx(program, tmp_path / "model.onnx", Manifest(card=model.card))
    images = torch.randint(0, 256, (2, 3, *model.config.img_size), dtype=torch.uint8)
    with torch.inference_mode():
        wanted = deployed(images)[0]
    away = (OnnxEngine(tmp_path / "model.onnx")(images) - wanted).abs().max() / wanted.abs().max()
    assert away <= 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("family", ["t2t", "pit"])
def test_a_torch_program_takes_a_single_picture(family: str, data: Path, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path / "model")
    export(
        ExportRun(
            model=str(tmp_path / "model"),
            format="torch",
            data=(str(data),),
            output=str(tmp_path / "model.pt2"),
        )
    )
    (one,) = Predictor(tmp_path / "model.pt2", batch_size=1)(next(data.rglob("*.png")))
    assert one.error is None and one.top


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("family", registry.families())
def test_a_family_answers_the_same_in_onnx_runtime_and_openvino(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    model = tiny(family)
    assert isinstance(model, Classifier)
    deployed = Deployed(model)
    program = capture(deployed)
    assert program.free_size is (family not in FIXED)
    path = tmp_path / "model.onnx"
    write_onnx(
        program,
        path,
        Manifest(card=model.card, free_size=program.free_size, rows=program.rows, columns=program.columns),
    )
    rows, columns = model.config.img_size
    sizes = [(rows, columns)]
    if program.free_size:
        sizes += [(2 * rows, columns), (program.rows.least, program.columns.least)]
    engines = [OnnxEngine(path), OpenVinoEngine(path)]
    for batch in (1, 3):
        for size in sizes:
            images = torch.randint(0, 256, (batch, model.config.in_chans, *size), dtype=torch.uint8)
            with torch.inference_mode():
                wanted = deployed(images)[0]
            for engine in engines:
                away = (engine(images) - wanted).abs().max() / wanted.abs().max()
                assert away <= 1e-4, f"{engine.name}, {batch} of {size}: {away:.1e}"
