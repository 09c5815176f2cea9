"""The proof: what it measures, and that it catches the hand-overs that go wrong in the field."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from export.worlds import colour_model
from torch import Tensor
from torch.nn import functional

from vitrail.data.sample import photographs
from vitrail.data.transforms import Preprocess
from vitrail.engines.pytorch import TorchEngine
from vitrail.errors import DataError
from vitrail.export.parity import BOUNDS, Bounds, Proof, compared, prove
from vitrail.export.proof_file import write_proof


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    return TorchEngine(colour_model(tmp_path_factory.mktemp("model")), device="cpu", precision="fp32")


def answer(engine: Any) -> Any:
    preprocess = Preprocess(engine.card.preprocessing)
    return lambda pictures: engine(torch.stack([preprocess(picture) for picture in pictures]))


def proof_of(reference: TorchEngine, candidate: Any, precision: str = "fp32") -> Proof:
    return prove(
        answer(reference), candidate, [(photographs(8), None)], precision=precision, pictures="photographs"
    )


def test_the_same_network_passes(engine: TorchEngine) -> None:
    proof = proof_of(engine, answer(engine))
    assert proof.passed and proof.agreement == 1 and proof.logits_max == 0 and proof.images == 8


def test_a_wrong_mean_is_caught(engine: TorchEngine) -> None:
    other = TorchEngine(engine.network, device="cpu", precision="fp32")
    wrong = dataclasses.replace(engine.card.preprocessing, mean=(0.5, 0.5, 0.5))
    other.card = dataclasses.replace(engine.card, preprocessing=wrong)
    proof = proof_of(engine, answer(other))
    assert not proof.passed and proof.logits_max > 0.01


def test_resizing_without_antialiasing_is_caught(engine: TorchEngine) -> None:
    def careless(pictures: Sequence[Tensor]) -> Tensor:
        small = [
            functional.interpolate(picture[None].float(), size=(16, 16), mode="bicubic").clamp(0, 255)
            for picture in pictures
        ]
        return engine(torch.cat(small).round().to(torch.uint8))

    proof = proof_of(engine, careless)
    assert not proof.passed and "logits differ" in proof.failures[0]


def test_logits_that_are_not_numbers_are_caught(engine: TorchEngine) -> None:
    proof = proof_of(engine, lambda pictures: torch.full((len(pictures), 3), float("nan")))
    assert not proof.passed
    json.dumps(proof.to_dict(), allow_nan=False)


def logits(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_int8_may_move_logits_but_not_decisions_nor_accuracy() -> None:
    before = logits([[2.0, 0.0]] * 100)
    near, three_turned = before + 0.2, before.clone()
    three_turned[:3] = logits([[0.0, 2.0]])

    def judged(after: Tensor) -> Proof:
        return compared(before, after, [0] * 100, BOUNDS["int8"], precision="int8", pictures="")

    assert judged(near).passed
    assert judged(three_turned).agreement == pytest.approx(0.97)
    assert len(judged(three_turned).failures) == 2  # agreement, and three points of accuracy
    assert judged(three_turned).accuracy_after == pytest.approx(0.97)


def test_one_picture_of_a_few_is_forgiven() -> None:
    before = logits([[2.0, 0.0]] * 100)
    after = before.clone()
    after[0] = logits([[0.0, 2.0]])
    assert compared(before, after, [0] * 100, BOUNDS["int8"], precision="int8", pictures="").passed


def test_a_decision_that_rounding_makes_is_not_held_against_float32() -> None:
    before, after = logits([[1.0, 1.00001, 0.0]]), logits([[1.00001, 1.0, 0.0]])
    proof = compared(before, after, [-1], Bounds(logits=1e-4), precision="fp32", pictures="")
    assert proof.agreement == 0 and proof.passed


def test_no_picture_proves_nothing(engine: TorchEngine) -> None:
    with pytest.raises(DataError, match="no picture"):
        prove(answer(engine), answer(engine), [], precision="fp32", pictures="")


def test_the_proof_is_kept_as_json(engine: TorchEngine, tmp_path: Path) -> None:
    proof = proof_of(engine, answer(engine))
    write_proof(tmp_path / "proof.json", proof, {"artefact": "model.onnx"})
    kept = json.loads((tmp_path / "proof.json").read_text())
    assert kept["artefact"] == "model.onnx" and kept["passed"] is True
    assert Proof.from_dict(kept) == proof
