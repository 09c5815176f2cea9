"""A saved model is a folder that loses nothing when a save is cut short, and notices when it was changed."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vitrail.errors import WeightsError
from vitrail.models.registry import create_model
from vitrail.weights import files, folder
from vitrail.weights.card import Card

STATE = {"head.weight": torch.arange(6.0).reshape(2, 3)}
OTHER = {"head.weight": torch.ones(2, 3)}
CARD = Card(
    architecture="vit_tiny_patch16_224",
    labels=("cat", "dog"),
    layout="timm",
    scores={"acc1": 0.75, "images": 2949.0},
)


def same(read: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> bool:
    return read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def test_a_folder_holds_four_files_and_comes_back(tmp_path: Path) -> None:
    card = folder.save(tmp_path / "deep" / "model", STATE, CARD)
    place = tmp_path / "deep" / "model"
    assert sorted(path.name for path in place.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    assert card.sha256 == files.sha256(place / "model.safetensors")
    state, read = folder.load(place)
    assert same(state, STATE) and read == card
    assert folder.read_card(place) == card
    text = (place / "README.md").read_text()
    assert "2: cat, dog" in text and "acc1 0.7500, images 2,949" in text and card.sha256 in text


def test_a_changed_weight_file_is_noticed(tmp_path: Path) -> None:
    folder.save(tmp_path, STATE, CARD)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="was changed or damaged"):
        folder.load(tmp_path)


def test_every_flipped_byte_of_the_payload_is_caught(tmp_path: Path) -> None:
    folder.save(tmp_path, STATE, CARD)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 0x10
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(WeightsError):
            folder.load(tmp_path)


@pytest.mark.parametrize("nth", range(6))
def test_a_disk_that_fills_up_leaves_the_folder_as_it_was(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = folder.save(tmp_path, STATE, CARD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = 0
    real = os.fsync

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == nth + 1:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    if nth < 5:  # weights, three texts, the pending card; the sixth is the folder itself, which may fail
        with pytest.raises(WeightsError, match="No space left"):
            folder.save(tmp_path, OTHER, CARD)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        state, read = folder.load(tmp_path)
        assert same(state, STATE) and read == card
    else:
        folder.save(tmp_path, OTHER, CARD)
        assert same(folder.load(tmp_path)[0], OTHER)


@pytest.mark.parametrize("nth", range(7))
def test_a_save_that_is_killed_at_any_rename_leaves_one_of_the_two_models(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save(tmp_path, STATE, CARD)
    calls = 0
    real, keep = os.replace, Path.unlink

    def killed(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == nth + 1:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        # A killed process cleans up nothing.
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with contextlib.suppress(KeyboardInterrupt):
            folder.save(tmp_path, OTHER, Card(architecture="vit_tiny_patch16_224", notes="new"))
    assert Path.unlink is keep
    state, card = folder.load(tmp_path)
    assert same(state, OTHER) if card.notes == "new" else same(state, STATE)
    folder.save(tmp_path, STATE, CARD)
    assert same(folder.load(tmp_path)[0], STATE)


def test_what_a_killed_save_left_is_swept_up_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".model.safetensors.0123abcd.partial").write_bytes(b"half")
    (tmp_path / ".mine.partial").write_bytes(b"mine")
    folder.save(tmp_path, STATE, CARD)
    assert [path.name for path in tmp_path.glob(".*")] == [".mine.partial"]


def test_a_folder_that_may_not_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsError, match="cannot be written"):
        folder.save(tmp_path / "file" / "model", STATE, CARD)


def test_other_files_and_an_edited_readme_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    folder.save(tmp_path, STATE, CARD)
    (tmp_path / "README.md").write_text("my own words")
    folder.save(tmp_path, OTHER, CARD)
    assert (tmp_path / "README.md").read_text() == "my own words" and (
        tmp_path / "notes.txt"
    ).read_text() == "mine"


def test_a_run_folder_stands_for_its_model(tmp_path: Path) -> None:
    folder.save(tmp_path / "model", STATE, CARD)
    assert same(folder.load(tmp_path)[0], STATE)


def test_a_folder_of_another_library_is_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    state, card = folder.load(tmp_path)
    assert same(state, STATE) and card.architecture == "" and card.sha256
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "id2label": {"0": "a"}}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 384, "resample": 2}))
    assert folder.load(tmp_path)[1].preprocessing.input_size == (384, 384)


def test_a_run_without_a_model_says_that_it_has_not_ended(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(
        WeightsError, match="has not written its model yet: wait until it has ended, or stop it"
    ):
        folder.load(tmp_path)


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is no folder"):
        folder.load(tmp_path / "none")
    with pytest.raises(WeightsError, match=r"is no folder.*download it"):
        folder.load("google/vit-base-patch16-224")
    with pytest.raises(WeightsError, match=r"holds no model\.safetensors"):
        folder.load(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsError, match="is a file"):
        folder.save(tmp_path / "file", STATE, CARD)
    folder.save(tmp_path, STATE, CARD)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="is no JSON"):
        folder.load(tmp_path)


def test_weights_with_numbers_that_are_not_finite_are_refused_when_asked(tmp_path: Path) -> None:
    folder.save(tmp_path, {"a": torch.tensor([float("inf")])}, CARD)
    folder.load(tmp_path)
    with pytest.raises(WeightsError, match="not finite"):
        folder.load(tmp_path, finite=True)


def test_others_may_read_a_saved_folder_as_they_may_read_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").write_text("")
    create_model("vit_nano_patch4_32", depth=1).save_pretrained(tmp_path / "model")
    usual = (tmp_path / "any").stat().st_mode
    assert {
        path.name: path.stat().st_mode
        for path in (tmp_path / "model").iterdir()
        if path.stat().st_mode != usual
    } == {}
