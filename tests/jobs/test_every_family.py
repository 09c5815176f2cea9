"""The promise: one model folder, every verb takes it, every verb gives the same numbers. For every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitrail.jobs.bench import bench
from vitrail.jobs.compare import SMALL
from vitrail.jobs.convert import convert
from vitrail.jobs.evaluate import evaluate
from vitrail.jobs.explain import explain
from vitrail.jobs.export import export
from vitrail.jobs.info import info
from vitrail.jobs.inspect import inspect
from vitrail.jobs.predict import predict
from vitrail.jobs.trace import trace
from vitrail.jobs.train import train
from vitrail.models import registry
from vitrail.runs import (
    BenchRun,
    ConvertRun,
    EvaluateRun,
    ExplainRun,
    ExportRun,
    InfoRun,
    InspectRun,
    PredictRun,
    TraceRun,
    TrainRun,
)
from vitrail.tasks.classify import Prediction

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SPLIT/COLOUR/N.png: pictures that are mostly red, green or blue, of sizes that are not the networks'."""
    place = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for channel, label in enumerate(("red", "green", "blue")):
            folder = place / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (40 + number, 36, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return place


def records(model: Path, pictures: list[str], **settings: Any) -> list[Prediction]:
    run = PredictRun(
        model=str(model), images=tuple(pictures), engine="torch", **{"precision": "fp32", **settings}
    )
    found = list(predict(run))
    assert all(isinstance(record, Prediction) and record.error is None for record in found)
    return found  # type: ignore[return-value]


def probabilities(found: list[Prediction]) -> list[dict[str, float]]:
    return [{guess.label: guess.score for guess in record.top} for record in found]


@pytest.mark.parametrize("name", SMALL)
def test_every_verb_takes_the_folder_and_says_the_same(name: str, data: Path, tmp_path: Path) -> None:
    trained = train(
        TrainRun(
            data=(str(data),),
            model=name,
            img_size=(32,),
            epochs=2,
            batch_size=8,
            opt="adamw",
            lr=1e-3,
            workers=0,
            output=str(tmp_path / "run"),
            device="cpu",
            precision="fp32",
        )
    )
    model = str(trained.model)
    pictures = sorted(str(path) for path in (data / "val").rglob("*.png"))

    scored = evaluate(
        EvaluateRun(model=model, data=(str(data),), engine="torch", output=str(tmp_path / "scores"))
    )
    assert scored.scores["acc1"] == pytest.approx(trained.scores["val"]["acc1"], abs=1e-9)

    told = records(trained.model, pictures)
    right = sum(record.label == Path(record.source).parent.name for record in told)
    assert right / len(told) == pytest.approx(scored.scores["acc1"], abs=1e-9)

    story = trace(TraceRun(model=model, image=pictures[0], output=str(tmp_path / "trace")))
    assert story.picture.stat().st_size > 10_000 and story.page.is_file()
    assert story.trace.prediction.label == told[0].label
    assert story.trace.prediction.score == pytest.approx(told[0].score, abs=1e-5)

    reasons = next(
        iter(explain(ExplainRun(model=model, images=(pictures[0],), output=str(tmp_path / "why"))))
    )
    assert reasons.explanations[0].label == told[0].label
    assert reasons.explanations[0].score == pytest.approx(told[0].score, abs=1e-5)
    assert reasons.explanations[0].on_picture().shape == reasons.explanations[0].picture.shape[1:]

    anatomy = inspect(
        InspectRun(model=model, images=(str(data / "val"),), samples=4, output=str(tmp_path / "in"))
    )
    assert anatomy.findings and all(path.is_file() for path in anatomy.files)

    copied = convert(ConvertRun(source=model, target=str(tmp_path / "copy")))
    assert copied.architecture == name
    assert probabilities(records(tmp_path / "copy", pictures)) == probabilities(told)

    card = info(InfoRun(model=model))
    assert card.model == name and card.card is not None and card.card.labels == ("blue", "green", "red")
    assert card.family == registry.family_name(registry.family_of(name))

    handed = export(ExportRun(model=model, data=(str(data),), output=str(tmp_path / "model.onnx")))
    assert handed.proof.passed
    through = list(predict(PredictRun(model=str(handed.artefact), images=tuple(pictures))))
    for here, there in zip(probabilities(told), probabilities(through), strict=True):  # type: ignore[arg-type]
        assert there == pytest.approx(here, abs=1e-4)

    speed = bench(BenchRun(model=model, mode="inference", batch_size=2, repeats=1, peers=False, device="cpu"))
    assert speed.speeds[0].best > 0
