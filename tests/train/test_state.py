"""A checkpoint is whole or not there: torn, damaged, interrupted and refused writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.errors import TrainingError
from vitrail.train import state
from vitrail.train.state import Place, newest, prune, read, save

TENSORS = {"model": {"weight": torch.arange(6.0).reshape(2, 3)}, "average": {"weight": torch.ones(2)}}


def put(folder: Path, step: int, prefix: str = "step") -> Path:
    return save(folder, Place(step=step, epoch=1, best=0.5), TENSORS, {"config": {"lr": 0.1}}, prefix)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = put(tmp_path, 12)
    assert path.name == "step-00000012"
    found = newest(tmp_path)
    assert found is not None
    assert found.place == Place(step=12, epoch=1, best=0.5)
    assert found.facts == {"config": {"lr": 0.1}}
    assert torch.equal(found.tensors["model"]["weight"], TENSORS["model"]["weight"])
    assert set(found.tensors) == {"model", "average"}


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    put(tmp_path, 3)
    save(tmp_path, Place(step=3), {"model": {"weight": torch.zeros(1)}}, {})
    found = newest(tmp_path)
    assert found is not None and found.tensors["model"]["weight"].tolist() == [0.0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("damage", ["flip", "short", "no manifest", "no file", "empty"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, 1)
    bad = put(tmp_path, 2)
    target = bad / "model.safetensors"
    data = bytearray(target.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        target.write_bytes(data)
    elif damage == "short":
        target.write_bytes(data[:-4])
    elif damage == "no manifest":
        (bad / state.MANIFEST).unlink()
    elif damage == "no file":
        target.unlink()
    else:
        for file in bad.iterdir():
            file.unlink()
    found = newest(tmp_path)
    assert found is not None and found.place.step == 1
    assert "passed over" in caplog.text
    with pytest.raises(TrainingError):
        read(bad)


def test_every_byte_of_a_small_checkpoint_is_guarded(tmp_path: Path) -> None:
    path = save(tmp_path, Place(step=1), {"model": {"w": torch.ones(1)}}, {})
    for file in (path / "model.safetensors", path / state.FACTS):
        data = file.read_bytes()
        for place in range(0, len(data), 7):
            file.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
            with pytest.raises(TrainingError):
                read(path)
        file.write_bytes(data)
    assert read(path).place.step == 1


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "mkdir"])
def test_a_write_that_fails_anywhere_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The k-th file operation fails with a full disk, for every k until the save goes through."""
    put(tmp_path, 1)
    before = {file.name: file.read_bytes() for file in (tmp_path / "step-00000001").iterdir()}
    module: Any = state if call == "open" else os
    real = open if call == "open" else getattr(os, call)
    for failing in range(100):
        count = 0

        def broken(*arguments: Any, failing: int = failing, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count - 1 == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **named)

        monkeypatch.setattr(module, call, broken, raising=False)
        try:
            put(tmp_path, 2)
        except TrainingError as error:
            assert "No space left" in str(error) and "step-00000001" in str(error)
        finally:
            monkeypatch.undo()
        after = {file.name: file.read_bytes() for file in (tmp_path / "step-00000001").iterdir()}
        assert after == before
        found = newest(tmp_path)
        assert found is not None
        assert not list(tmp_path.glob(f"{state.UNFINISHED}*"))
        if count <= failing:
            assert found.place.step == 2
            break
        # What stands under the final name is whole, whether or not the last sync was refused.
        for path in state.names(tmp_path):
            read(path)
    else:
        pytest.fail("the save never went through")


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        put(tmp_path, step)
    put(tmp_path, 1, "best")
    put(tmp_path, 3, "best")
    (tmp_path / f"{state.UNFINISHED}step-00000009").mkdir()
    prune(tmp_path, keep=1, best=[3])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best-00000003",
        "step-00000003",
        "step-00000004",
    ]


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "absent") is None
