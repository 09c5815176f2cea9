"""Boxes and masks: the service answers what `vitrail predict` answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from tests.serve.service import Running, picture, running
from vitrail.explain.explainer import explain
from vitrail.predict import Predictor


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    place = tmp_path_factory.mktemp("dense")
    for name in ("quick_detr_nano", "setr_naive_nano"):
        torch.manual_seed(0)
        vitrail.create_model(name, num_classes=3, img_size=(64, 64)).save_pretrained(place / name)
    with running(*(str(folder) for folder in sorted(place.iterdir()))) as service:
        yield service, place


@pytest.mark.parametrize("name", ["quick_detr_nano", "setr_naive_nano"])
def test_dense_answers_are_the_offline_ones(dense: tuple[Running, Path], name: str) -> None:
    service, place = dense
    data = picture(1, (70, 90), "JPEG")
    offline = Predictor(place / name, device="cpu")(data)[0]
    found = service.predict(data, f"?model={name}&mask=true").json["results"][0]
    mask = found.pop("mask", None)
    assert found == json.loads(json.dumps(offline.to_dict()))
    assert (mask is not None) == name.startswith("setr")
    if mask is not None:
        numbers = np.asarray(Image.open(io.BytesIO(base64.b64decode(mask))))
        assert np.array_equal(numbers, offline.mask.numpy())


def test_a_region_is_explained_and_no_story_is_told_of_it(dense: tuple[Running, Path]) -> None:
    service, place = dense
    data = picture(1, (70, 90), "PNG")
    found = service.ask("POST", "/explain?model=setr_naive_nano&method=gradcam", data).json
    offline = explain(place / "setr_naive_nano", data, method="gradcam")
    assert (found["label"], found["method"]) == (offline.label, "gradcam")
    numbers = np.frombuffer(base64.b64decode(found["map"]["float32"]), "<f4")
    assert np.allclose(numbers, np.asarray(offline.values).ravel(), atol=1e-5)
    answer = service.ask("POST", "/story?model=setr_naive_nano", data)
    assert (answer.status, answer.json["code"]) == (422, "cannot_explain")
    assert service.ask("POST", "/explain?model=quick_detr_nano&box=0&method=gradcam", data).json["box"]


def test_dense_models_say_what_they_are(dense: tuple[Running, Path]) -> None:
    service, _ = dense
    tasks = {model["name"]: model for model in service.ask("GET", "/models").json["models"]}
    assert tasks["quick_detr_nano"]["task"] == "object-detection"
    assert len(tasks["setr_naive_nano"]["colours"]) == 3 and not tasks["setr_naive_nano"]["explain"]["story"]
    told = service.ask("GET", "/v2/models/quick_detr_nano").json
    assert [entry["name"] for entry in told["outputs"]] == ["records"]
    asked = {
        "inputs": [
            {
                "name": "pictures",
                "datatype": "BYTES",
                "shape": [1],
                "data": [base64.b64encode(picture()).decode()],
            }
        ]
    }
    found = service.ask("POST", "/v2/models/quick_detr_nano/infer", json.dumps(asked)).json
    assert "detections" in json.loads(found["outputs"][0]["data"][0])
