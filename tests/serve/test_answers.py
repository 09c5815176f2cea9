"""What the service answers is what `vitrail predict` and `vitrail explain` answer."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tests.serve.service import LABELS, Running, picture, running, save_model
from vitrail.jobs.serve import _end_alone
from vitrail.predict import Predictor

KINDS = [("PNG", {}), ("JPEG", {"quality": 90}), ("WEBP", {"quality": 80})]


@pytest.fixture(scope="module")
def offline(folders: tuple[Path, Path]) -> tuple[Predictor, Predictor]:
    return Predictor(folders[0], device="cpu"), Predictor(folders[1], device="cpu")


@pytest.fixture(scope="module")
def exactly(folders: tuple[Path, Path]) -> Predictor:
    """Explanations and stories are computed in float32, whatever predictions are."""
    return Predictor(folders[0], "torch", "fp32", device="cpu")


def alone(predictor: Predictor, data: bytes, top_k: int = 5) -> list[dict[str, Any]]:
    return [guess.__dict__ for guess in predictor(data, top_k=top_k)[0].top]


def form(pictures: list[bytes], names: list[str] | None = None) -> tuple[bytes, str]:
    parts = []
    for place, data in enumerate(pictures):
        name = f'; filename="{names[place]}"' if names else ""
        parts.append(
            b"--sill\r\nContent-Disposition: form-data; name=image"
            + name.encode()
            + b"\r\n\r\n"
            + data
            + b"\r\n"
        )
    return b"".join(parts) + b"--sill--\r\n", "multipart/form-data; boundary=sill"


def test_one_picture_is_answered_as_offline(service: Running, offline: tuple[Predictor, Predictor]) -> None:
    for seed, (kind, options) in enumerate(KINDS):
        data = picture(seed, kind=kind, **options)
        answer = service.predict(data, "?top_k=3")
        assert answer.status == 200
        assert answer.json["results"][0]["predictions"] == alone(offline[0], data, 3)
        assert answer.json["model"] == answer.headers["x-model"] == "first"


def every_mode() -> dict[str, bytes]:
    """Files of every kind that a picture comes in (check 16 of the reliability sheet)."""
    whole = Image.open(io.BytesIO(picture(7)))
    alpha = Image.linear_gradient("L").resize(whole.size)
    clear = whole.quantize(16)
    found: dict[str, bytes] = {}

    def save(name: str, image: Image.Image, kind: str = "PNG", **options: Any) -> None:
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        found[name] = buffer.getvalue()

    for mode in ("1", "L", "P"):
        save(mode, whole.convert(mode))
    save("LA", Image.merge("LA", (whole.convert("L"), alpha)))
    save("RGBA", Image.merge("RGBA", (*whole.split(), alpha)))
    save("RGBA in WebP", Image.merge("RGBA", (*whole.split(), alpha)), "WEBP", lossless=True)
    save("palette with a transparent colour", clear, transparency=3)
    save("grey with a transparent value", whole.convert("L"), transparency=90)
    save("16 bits", Image.fromarray(np.asarray(whole.convert("L"), dtype=np.uint16) * 257))
    save("CMYK", whole.convert("CMYK"), "JPEG")
    save("grey JPEG", whole.convert("L"), "JPEG")
    save("progressive", whole, "JPEG", progressive=True)
    save("interlaced or not", whole, "PNG", optimize=True)
    save(
        "with a profile",
        whole,
        "JPEG",
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    )
    for turned in range(1, 9):
        exif = Image.Exif()
        exif[274] = turned
        save(f"turned {turned}", whole, "JPEG", exif=exif)
    return found


def test_every_mode_is_answered_as_offline(service: Running, offline: tuple[Predictor, Predictor]) -> None:
    files = every_mode()
    body, kind = form(list(files.values()), [f"{name}.x" for name in files])
    records = service.predict(body, content_type=kind).json["results"]
    for (name, data), record in zip(files.items(), records, strict=True):
        assert record["error"] is None, name
        assert record["predictions"] == alone(offline[0], data), name
    tops = [str(record["predictions"]) for record in records[-8:]]
    assert len(set(tops)) == 8  # each turn is another picture


def test_answers_have_the_same_bits_in_any_company(
    service: Running, offline: tuple[Predictor, Predictor]
) -> None:
    pictures = [picture(seed, (20 + seed % 40, 30), kind="PNG") for seed in range(48)]
    before = service.count("batch_images_count"), service.count("batch_images_sum")
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(service.predict, pictures))
    for data, answer in zip(pictures, answers, strict=True):
        assert answer.json["results"][0]["predictions"] == alone(offline[0], data)
    assert service.count("batch_images_sum") - before[1] == len(pictures)


def test_what_is_one_vector_a_picture_goes_through_linear_layers_alone() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(192, 1000))
    vectors, tokens = torch.randn(8, 192), torch.randn(8, 5, 192)
    alone = torch.cat([network(vectors[row : row + 1]) for row in range(8)])
    together = network(tokens)
    _end_alone(network)
    assert torch.equal(network(vectors), alone)
    assert torch.equal(network(tokens), together)


def test_a_form_holds_several_pictures_and_a_bad_one_spoils_only_itself(
    service: Running, offline: tuple[Predictor, Predictor]
) -> None:
    pictures = [picture(1), b"\x89PNG\r\n\x1a\nno", picture(2), b"GIF89a"]
    body, kind = form(pictures, ["one.png", "../../two.png", "thr\u00e9e.png", "four"])
    found = service.predict(body, "?model=second", content_type=kind).json["results"]
    assert [record["source"] for record in found] == ["one.png", "two.png", "thr\u00e9e.png", "four"]
    assert [record.get("code") for record in found] == [None, "undecodable", None, "wrong_format"]
    assert found[0]["predictions"] == alone(offline[1], pictures[0])
    assert found[2]["predictions"] == alone(offline[1], pictures[2])


def test_other_fields_of_a_form_are_no_pictures(service: Running) -> None:
    """What `curl -F note=hello -F image=@x.png` sends, and a field with a file's bytes but no file's name."""
    data = picture(1)
    parts = (b'name="note"', b"hello"), (b'name="image"; filename="x.png"', data), (b'name="image"', data)
    parts += ((b"name=f; filename*=UTF-8''%C3%A9.png", data),)  # type: ignore[assignment]
    body = b"".join(
        b"--sill\r\nContent-Disposition: form-data; " + names + b"\r\n\r\n" + value + b"\r\n"
        for names, value in parts
    )
    answer = service.predict(body + b"--sill--\r\n", content_type="multipart/form-data; boundary=sill")
    assert [record["source"] for record in answer.json["results"]] == ["x.png", "image 1", "\u00e9.png"]
    assert [record["error"] for record in answer.json["results"]] == [None] * 3


def test_what_is_asked_for_with_head_is_answered_as_with_get_but_for_the_body(service: Running) -> None:
    for path in (
        "/",
        "/health",
        "/health/live",
        "/health/ready",
        "/page/page.js",
        "/docs",
        "/models",
        "/openapi.json",
    ):
        got, head = service.ask("GET", path), service.ask("HEAD", path)
        assert (head.status, head.body) == (200, b"") and got.body
        for name in ("content-type", "content-length", "content-security-policy"):
            assert head.headers[name] == got.headers[name], (path, name)
    assert service.ask("HEAD", "/nothing").status == 404


def test_the_list_of_routes_says_how_many_pictures_each_takes(service: Running) -> None:
    routes = service.ask("GET", "/openapi.json").json["paths"]
    form = b"".join(
        b'--sill\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + picture(seed) + b"\r\n"
        for seed in (1, 2)
    )
    for path, most in (("/predict", None), ("/explain", 1), ("/story", 1)):
        told = routes[path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert told["properties"]["image"].get("maxItems") == most
        found = service.ask(
            "POST", path, form + b"--sill--\r\n", content_type="multipart/form-data; boundary=sill"
        )
        assert found.status == (200 if most is None else 413)


def test_classes_whose_names_are_numbers_are_explained_by_number_or_name(tmp_path: Path) -> None:
    """The page asks by `index`: `class=2` is the class called 2, which may be another one."""
    folder = save_model(tmp_path / "model", num_classes=4)
    told = json.loads((folder / "config.json").read_text())
    told["label_names"] = ["1", "2", "3", "4"]
    (folder / "config.json").write_text(json.dumps(told))
    data = picture(3)
    with running(str(folder), page=False) as service:

        def asked(query: str) -> tuple[str, int]:
            found = service.ask("POST", f"/explain?{query}", data).json
            return found["label"], found["index"]

        for guess in service.predict(data).json["results"][0]["predictions"]:
            assert asked(f"index={guess['index']}") == (guess["label"], guess["index"])
            assert asked(f"class={guess['label']}") == (guess["label"], guess["index"])
        assert asked("class=2") == ("2", 1) and asked("index=2") == ("3", 2)
        assert asked("class=0") == ("1", 0)  # no class is called so


def test_models_are_told_without_paths(service: Running, folders: tuple[Path, Path]) -> None:
    answer = service.ask("GET", "/models")
    models = answer.json["models"]
    assert [model["name"] for model in models] == ["first", "second"]
    assert models[0]["labels"] == list(LABELS)
    assert models[0]["version"] != models[1]["version"]
    assert models[0]["batch_sizes"][0] == 1
    assert str(folders[0].parent) not in answer.body.decode()


def test_an_explanation_comes_with_its_picture_map_and_score(service: Running) -> None:
    data = picture(3, (60, 90))
    found = service.ask("POST", "/explain?method=relevance&class=cat&score=true", data).json
    assert (found["label"], found["index"], found["method"]) == ("cat", 2, "relevance")
    overlay = Image.open(io.BytesIO(base64.b64decode(found["overlay"])))
    assert overlay.size == (90, 60)
    numbers = np.frombuffer(base64.b64decode(found["map"]["float32"]), "<f4")
    assert numbers.size == found["map"]["rows"] * found["map"]["columns"] == 16
    assert set(found["faithfulness"]) == set(found["controls"]) != set()


def test_explanations_see_the_pixels_that_predictions_see(service: Running, exactly: Predictor) -> None:
    data = picture(4, (900, 1000), kind="JPEG")  # larger than what is drawn on
    found = service.ask("POST", "/explain?class=0", data)
    assert found.status == 200
    score = next(guess["score"] for guess in alone(exactly, data) if guess["index"] == 0)
    assert found.json["score"] == pytest.approx(score, abs=1e-6)


def test_the_story_follows_the_picture_to_its_class(service: Running, exactly: Predictor) -> None:
    data = picture(5)
    told = service.ask("POST", "/story?top_k=2", data).json
    best = alone(exactly, data)[0]
    assert told["trace"]["top"][0]["label"] == best["label"]
    assert told["trace"]["top"][0]["score"] == pytest.approx(best["score"], abs=1e-6)
    assert len(told["attention"]) == 2 and told["attention"][0]["heads"] == 3
    assert told["steps"][-1]["step"] == "prediction"


def test_the_open_protocol_answers_in_json(service: Running, offline: tuple[Predictor, Predictor]) -> None:
    data = picture(6)
    assert service.ask("GET", "/v2/health/ready").status == 200
    assert service.ask("GET", "/v2/models/second/ready").json == {"name": "second", "ready": True}
    tensors = service.ask("GET", "/v2/models/second").json
    assert tensors["inputs"][1] == {"name": "pixels", "datatype": "UINT8", "shape": [-1, 3, 32, 32]}
    asked = {
        "id": "7",
        "inputs": [
            {"name": "pictures", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(data).decode()]}
        ],
    }
    path = f"/v2/models/second/versions/{tensors['versions'][0]}/infer"
    found = service.ask("POST", path, json.dumps(asked)).json
    outputs = {output["name"]: output["data"] for output in found["outputs"]}
    best = alone(offline[1], data)[0]
    assert (found["id"], outputs["label"], outputs["index"]) == ("7", [best["label"]], [best["index"]])
    assert max(outputs["probabilities"]) == best["score"]
    pixels = offline[1].prepare(data)
    asked["inputs"] = [
        {"name": "pixels", "datatype": "UINT8", "shape": [1, 3, 32, 32], "data": pixels[None].tolist()}
    ]
    again = service.ask("POST", "/v2/models/second/infer", json.dumps(asked)).json
    assert {output["name"]: output["data"] for output in again["outputs"]} == outputs


@pytest.mark.slow
def test_tritons_client_is_content(service: Running, offline: tuple[Predictor, Predictor]) -> None:
    """A client that we did not write, in its binary form, in a process of its own (it brings gevent along)."""
    pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    import subprocess
    import sys

    files = [picture(seed) for seed in range(3)]
    script = Path(__file__).with_name("asks_with_triton.py")
    texts = [base64.b64encode(data).decode() for data in files]
    ran = subprocess.run(
        [sys.executable, str(script), f"127.0.0.1:{service.port}", "first", *texts],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    best = [alone(offline[0], data)[0] for data in files]
    assert found["label"] == [guess["label"] for guess in best]
    assert found["score"] == [guess["score"] for guess in best]
    assert found["pixels"] == offline[0].prepare(files[0]).shape[0] * 32 * 32
