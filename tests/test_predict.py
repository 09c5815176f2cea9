"""The predictor: any form of picture, one type of record, and the bytes that evaluation sees."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vitrail
from vitrail.data.loader import Loader
from vitrail.data.sources import open_splits
from vitrail.data.transforms import Preprocess
from vitrail.errors import ConfigError, DataError
from vitrail.jobs.predict import free_name
from vitrail.predict import Predictor, expand

LABELS = ("cat", "dog", "eel")


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    model: Any = vitrail.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, width=32, depth=2, heads=2, hidden=64, num_classes=3,
        init="timm",
    )  # fmt: skip
    model.card = dataclasses.replace(model.card, labels=LABELS)
    return model.eval()


@pytest.fixture(scope="module")
def predictor(network: Any) -> Predictor:
    return Predictor(network, precision="fp32", device="cpu", batch_size=3)


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., list[Path]]:
    def make(count: int, folder: str = "pictures", seed: int = 0) -> list[Path]:
        generator = np.random.default_rng(seed)
        place = tmp_path / folder
        place.mkdir(parents=True, exist_ok=True)
        paths = []
        for number in range(count):
            pixels = generator.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
            paths.append(place / f"{number}.png")
            Image.fromarray(pixels).save(paths[-1])
        return paths

    return make


def test_hidden_files_of_a_folder_are_passed_over(pictures: Callable[..., Any], tmp_path: Path) -> None:
    seen = pictures(1)
    for hidden in ("pictures/.thumbs", "pictures/__MACOSX"):
        pictures(1, hidden)
    assert expand([str(tmp_path / "pictures")]) == [str(seen[0])]


def test_names_of_drawings_meet_no_other(tmp_path: Path) -> None:
    taken: set[str] = set()
    names = [free_name(stem, taken, ("-mask",)) for stem in ("a", "a-mask", "A", "a-2", "b")]
    files = [f"{name}{ending}".lower() for name in names for ending in ("", "-mask")]
    assert names[0] == "a" and names[-1] == "b" and len(set(files)) == len(files)


def test_every_form_of_a_picture_gives_the_same_record(
    predictor: Predictor, pictures: Callable[..., Any]
) -> None:
    path = pictures(1)[0]
    array = np.asarray(Image.open(path))
    forms = [
        str(path),
        path,
        path.read_bytes(),
        Image.open(path),
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ]
    records = [predictor(form) for form in forms]
    assert all(len(found) == 1 for found in records)
    assert len({found[0].top for found in records}) == 1
    together = predictor(forms)
    assert all(record.score == pytest.approx(records[0][0].score, rel=1e-5) for record in together)
    assert records[0][0].source == str(path)


def test_a_bad_picture_gets_its_own_record_and_the_rest_are_done(
    predictor: Predictor, pictures: Callable[..., Any], tmp_path: Path
) -> None:
    good = pictures(7)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff not a picture")
    mixed: list[Any] = [
        *good[:3],
        broken,
        tmp_path / "absent.png",
        *good[3:],
        np.zeros((4, 4), dtype=np.float32),
    ]
    records = predictor(mixed)
    assert [record.source for record in records[:-1]] == [str(item) for item in mixed[:-1]]
    failed = [number for number, record in enumerate(records) if record.error]
    assert failed == [3, 4, 9]
    assert "broken.jpg" in str(records[3].error) and "no such file" in str(records[4].error)
    assert "uint8" in str(records[9].error) and records[9].source == "image 9"
    assert all(len(record.top) == 3 for number, record in enumerate(records) if number not in failed)


def test_records_do_not_depend_on_the_batch(network: Any, pictures: Callable[..., Any]) -> None:
    paths = pictures(5)
    alone = Predictor(network, precision="fp32", device="cpu", batch_size=1)(paths)
    together = Predictor(network, precision="fp32", device="cpu", batch_size=5)(paths)
    for one, other in zip(alone, together, strict=True):
        assert one.label == other.label
        assert one.score == pytest.approx(other.score, rel=1e-5)


def test_a_batch_in_one_array_is_taken_apart(predictor: Predictor) -> None:
    batch = np.random.default_rng(1).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    together, alone = predictor(batch), [predictor(picture)[0] for picture in batch]
    assert [record.label for record in together] == [record.label for record in alone]
    assert [record.score for record in together] == pytest.approx(
        [record.score for record in alone], rel=1e-5
    )


def test_forward_takes_uint8_batches_and_gives_the_networks_logits(
    network: Any, predictor: Predictor
) -> None:
    batch = np.random.default_rng(2).integers(0, 256, (2, 3, 32, 48), dtype=np.uint8)
    logits = predictor.forward(batch)
    assert logits.shape == (2, 3) and logits.dtype == torch.float32 and not logits.requires_grad
    mean, std = network.card.preprocessing.mean, network.card.preprocessing.std
    images = (torch.from_numpy(batch) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    with torch.no_grad():
        torch.testing.assert_close(logits, network(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="uint8"):
        predictor.forward(batch.astype(np.float32))
    with pytest.raises(ConfigError, match=r"\[B, 3, 32, 48\]"):
        predictor.forward(batch[0])


def test_prediction_and_evaluation_show_the_network_the_same_bytes(
    predictor: Predictor, network: Any, pictures: Callable[..., Any], tmp_path: Path
) -> None:
    pictures(3, "set/cat", seed=1)
    pictures(3, "set/dog", seed=2)
    source = open_splits([str(tmp_path / "set")]).everything
    seen: dict[str, Tensor] = {}
    for batch in Loader(source, Preprocess(network.card.preprocessing), 4):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            seen[source.name(index)] = image
    assert len(seen) == 6
    for name, image in seen.items():
        assert torch.equal(predictor.prepare(name), image)


def test_a_network_in_training_mode_is_left_in_it(network: Any, pictures: Callable[..., Any]) -> None:
    network.train()
    try:
        Predictor(network, precision="fp32", device="cpu")(pictures(1))
        assert network.training
    finally:
        network.eval()


def test_a_saved_folder_predicts_as_the_network_did(
    network: Any, predictor: Predictor, pictures: Callable[..., Any], tmp_path: Path
) -> None:
    network.save_pretrained(tmp_path / "run" / "model")
    paths = pictures(2)
    for folder in (tmp_path / "run" / "model", tmp_path / "run"):
        again = vitrail.Predictor(folder, precision="fp32", device="cpu", batch_size=3)
        assert again.labels == LABELS
        assert again(paths) == predictor(paths)


def test_only_some_classes_are_asked_for(predictor: Predictor, pictures: Callable[..., Any]) -> None:
    assert len(predictor(pictures(1), top_k=2)[0].top) == 2
    with pytest.raises(ConfigError, match="top_k"):
        predictor(pictures(1), top_k=0)


def test_a_stream_that_is_left_early_reads_no_more_than_it_must(
    predictor: Predictor, pictures: Callable[..., Any]
) -> None:
    (path,) = pictures(1)
    asked: list[Path] = []

    def endless() -> Any:
        while True:
            asked.append(path)
            yield path

    stream = predictor.stream(endless())
    assert next(stream).error is None
    stream.close()  # type: ignore[attr-defined]
    assert len(asked) <= 2 * predictor.batch_size


def test_files_folders_and_patterns_become_paths(pictures: Callable[..., Any], tmp_path: Path) -> None:
    paths = [str(path) for path in pictures(3)]
    (tmp_path / "pictures" / "notes.txt").write_text("not a picture")
    folder = str(tmp_path / "pictures")
    assert expand([folder]) == paths
    assert expand([f"{folder}/[01].png", paths[0]]) == paths[:2]
    assert expand(["absent.png"]) == ["absent.png"]
    (tmp_path / "a [1].png").write_bytes(b"")
    assert expand([str(tmp_path / "a [1].png")]) == [str(tmp_path / "a [1].png")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        expand([str(tmp_path / "empty")])
    with pytest.raises(DataError, match="No file matches"):
        expand([f"{folder}/*.webp"])


def test_an_unknown_engine_says_which_there_are(network: Any) -> None:
    with pytest.raises(ConfigError, match="torch"):
        Predictor(network, engine="tensorflow")


def test_predicting_bytes_names_the_picture_by_its_place(predictor: Predictor) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    assert [record.source for record in predictor([buffer.getvalue(), buffer.getvalue()])] == [
        "image 0",
        "image 1",
    ]
