"""Weight files are read without executing anything, and refused when they are not what they say."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from vitrail.errors import WeightsError
from vitrail.weights import files

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.5, -0.0])}
CONTENT = bytes(save(STATE))
HEADER = CONTENT[: 8 + int.from_bytes(CONTENT[:8], "little")]


class Exploit:
    """What a forged checkpoint does: unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def same(read: dict[str, torch.Tensor]) -> bool:
    return read.keys() == STATE.keys() and all(torch.equal(read[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_what_is_written_is_read(suffix: str, tmp_path: Path) -> None:
    dtypes = [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
    ]
    state = {f"x/{dtype}": torch.ones(2, 3).to(dtype) for dtype in dtypes} | {"scalar": torch.tensor(3.0)}
    state["turned"] = torch.arange(6.0).reshape(2, 3).t()
    digest = files.write_tensors(tmp_path / f"w{suffix}", state)
    read = files.read_tensors(tmp_path / f"w{suffix}")
    assert read.keys() == state.keys()
    assert all(
        read[name].dtype == state[name].dtype and torch.equal(read[name], state[name]) for name in state
    )
    assert digest == files.sha256(tmp_path / f"w{suffix}")
    assert files.write_tensors(tmp_path / f"again{suffix}", state) == digest
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_arrays_of_other_orders_are_read(tmp_path: Path) -> None:
    np.savez_compressed(
        tmp_path / "w.npz", f=np.asfortranarray(np.arange(6.0).reshape(2, 3)), b=np.arange(3, dtype=">f4")
    )
    read = files.read_tensors(tmp_path / "w.npz")
    assert read["f"].tolist() == [[0, 1, 2], [3, 4, 5]] and read["b"].tolist() == [0, 1, 2]


def test_averaged_weights_beside_the_last_ones_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": STATE, "model_ema": {"a.weight": torch.zeros(1)}}, tmp_path / "c.pth")
    files.read_tensors(tmp_path / "c.pth")
    assert "holds model and, averaged over training, model_ema; the first is taken" in caplog.text


@pytest.mark.parametrize(
    ("content", "averaged"),
    [
        (STATE, False),
        ({"model": STATE, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, False),
        ({"state_dict": STATE, "best": 0.5}, False),
        ({"model": {"state_dict": STATE}}, False),
        ({"model_ema": STATE}, False),
        ({"model": {"a.weight": torch.zeros(1)}, "model_ema": STATE}, True),
        ({"model": STATE, "model_ema": {"a.weight": torch.zeros(1)}}, False),
        ({name: torch.nn.Parameter(tensor) for name, tensor in STATE.items()}, False),
    ],
)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_training_checkpoints_are_unwrapped(content: Any, averaged: bool, old: bool, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=not old)
    read = files.read_tensors(tmp_path / "c.pth", averaged=averaged)
    assert same(read) and not any(tensor.requires_grad for tensor in read.values())


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".tar"])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(old: bool, suffix: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / f"evil{suffix}"
    torch.save({"model": STATE, "evil": Exploit(canary)}, path, _use_new_zipfile_serialization=not old)
    start = time.monotonic()
    with pytest.raises(WeightsError, match=r"system, which is never executed"):
        files.read_tensors(path)
    assert not canary.exists() and time.monotonic() - start < 1
    with pytest.raises(WeightsError):
        files.read_tensors(tmp_path / path.name, averaged=True)
    assert not canary.exists()


def test_other_ways_to_hide_code_are_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Exploit(canary)))
    with zipfile.ZipFile(tmp_path / "nested.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": Exploit(canary)}))
        archive.writestr("archive/version", "3")
    with tarfile.open(tmp_path / "legacy.tar", "w") as archive_tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Exploit(canary))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive_tar.addfile(member, io.BytesIO(content))
    np.save(tmp_path / "o.npy", np.array([Exploit(canary)], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "objects.npz", "w") as archive:
        archive.write(tmp_path / "o.npy", "a.npy")
    for name in ("bare.pth", "nested.pth", "legacy.tar", "objects.npz"):
        with pytest.raises(WeightsError):
            files.read_tensors(tmp_path / name)
    assert not canary.exists()


def test_a_compiled_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("script/constants.pkl", pickle.dumps(()))
        archive.writestr("script/data.pkl", b"\x80\x02c__torch__\nNet\nq\x00.")
        archive.writestr("script/code/__torch__.py", "class Net: ...")
    with pytest.raises(WeightsError):
        files.read_tensors(path)


def test_no_path_of_the_library_reads_pickles_unsafely() -> None:
    root = Path(files.__file__).parents[1]
    for file in root.rglob("*.py"):
        text = file.read_text()
        for call in ("weights_only=False", "pickle.load", "allow_pickle=True", "joblib.load", "jit.load("):
            assert call not in text, f"{file} has {call}"


def test_archives_that_unpack_to_too_much_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "FREE", 1 << 20)
    size = 1 << 25
    for name in ("bomb.npz", "bomb.pth"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("archive/data.pkl" if name.endswith("pth") else "a.npy", "w") as stream:
                for _ in range(size >> 24):
                    stream.write(bytes(1 << 24))
                stream.write(b"x")
        start = time.monotonic()
        with pytest.raises(WeightsError, match="would unpack to"):
            files.read_tensors(tmp_path / name)
        assert time.monotonic() - start < 1


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "wide.pth")
    with pytest.raises(WeightsError, match="more than the file holds"):
        files.read_tensors(tmp_path / "wide.pth")
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"
    with zipfile.ZipFile(tmp_path / "wide.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(16))
    with pytest.raises(WeightsError, match="not the size of what follows"):
        files.read_tensors(tmp_path / "wide.npz")


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.pth", "old.pth"])
def test_a_file_cut_anywhere_is_an_error_of_ours(name: str, tmp_path: Path) -> None:
    whole = tmp_path / name
    if name.endswith("pth"):
        torch.save(STATE, whole, _use_new_zipfile_serialization=name != "old.pth")
    else:
        files.write_tensors(whole, STATE)
    content = whole.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 60)):
        whole.write_bytes(content[:length])
        with pytest.raises(WeightsError):
            files.read_tensors(whole)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_safetensors_header_with_a_wrong_byte_is_read_whole_or_refused(data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(HEADER) - 1))
    byte = data.draw(st.integers(0, 255))
    content = bytearray(CONTENT)
    content[place] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        path.write_bytes(content)
        try:
            read = files.read_tensors(path)
        except WeightsError:
            return
        assert sum(tensor.nbytes for tensor in read.values()) <= len(content)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_the_safe_reader_does_not_know_is_refused_without_unsafe_advice(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pth", pickle_protocol=4)
    (tmp_path / "torn.pth").write_bytes(pickle.dumps({"a": 1}, protocol=2)[:-3])
    for name in ("w.pth", "torn.pth"):
        with pytest.raises(WeightsError) as refusal:
            files.read_tensors(tmp_path / name)
        told = str(refusal.value)
        assert "weights_only" not in told and "torch.load" not in told
    torch.save(STATE, tmp_path / "w.pth", pickle_protocol=4)
    with pytest.raises(WeightsError, match="save its state dict again"):
        files.read_tensors(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "name", ["google/vit-base-patch16-224", "https://somewhere/w.pth", "hf-hub:timm/vit_tiny"]
)
def test_names_of_a_hub_and_addresses_are_told_to_be_downloaded(name: str) -> None:
    with pytest.raises(WeightsError, match=r"does not exist.*download it"):
        files.read_tensors(name)


def test_a_path_that_is_none_of_a_hub_is_not_told_so(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as refusal:
        files.read_tensors(tmp_path / "none.pth")
    assert "download" not in str(refusal.value)


def test_what_is_no_weight_file_is_refused(tmp_path: Path) -> None:
    for name, content in (("w.txt", b"x"), ("w.pth", b""), ("w.npz", b"PK"), ("w.safetensors", b"\xff" * 64)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError):
            files.read_tensors(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(WeightsError, match="not a regular file"):
        files.read_tensors(tmp_path / "pipe.pth")
    with pytest.raises(WeightsError, match="does not exist"):
        files.read_tensors(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list"):
        files.read_tensors(tmp_path / "list.pth")
    torch.save({"a": 3}, tmp_path / "numbers.pth")
    with pytest.raises(WeightsError, match="holds no tensors"):
        files.read_tensors(tmp_path / "numbers.pth")
    with pytest.raises(WeightsError, match="never written"):
        files.write_tensors(tmp_path / "w.pth", STATE)


def test_sharded_folders_are_read_and_indexes_stay_in_their_folder(tmp_path: Path) -> None:
    names = {"a.weight": "model-00001-of-00002.safetensors", "a.bias": "model-00002-of-00002.safetensors"}
    for key, name in names.items():
        save_file({key: STATE[key]}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert same(files.read_tensors(tmp_path))
    outside = tmp_path.parent / "outside.safetensors"
    save_file(STATE, outside)
    for wrong in ("../outside.safetensors", str(outside), "..", "sub/../../outside.safetensors", "", 3, None):
        index.write_text(json.dumps({"weight_map": {"a": wrong}}))
        with pytest.raises(WeightsError, match="its own folder only"):
            files.read_tensors(tmp_path)
    for broken in ("{", "[]", '{"weight_map": []}', "[" * 100_000):
        index.write_text(broken)
        with pytest.raises(WeightsError):
            files.read_tensors(tmp_path)


def test_a_folder_with_one_weight_file_of_any_name_is_read(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no model\.safetensors"):
        files.read_tensors(tmp_path)
    save_file(STATE, tmp_path / "mine.safetensors")
    assert same(files.read_tensors(tmp_path))
    save_file(STATE, tmp_path / "yours.safetensors")
    with pytest.raises(WeightsError, match=r"mine\.safetensors, yours\.safetensors: name one"):
        files.read_tensors(tmp_path)


def test_numbers_that_are_not_finite_are_refused_when_asked(tmp_path: Path) -> None:
    files.write_tensors(tmp_path / "w.safetensors", {**STATE, "bad": torch.tensor([1.0, float("nan")])})
    assert files.read_tensors(tmp_path / "w.safetensors")["bad"].isnan().any()
    with pytest.raises(WeightsError, match=r"bad .* holds 1 numbers that are not finite"):
        files.read_tensors(tmp_path / "w.safetensors", finite=True)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    files.write_tensors(path, STATE)

    def full(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(WeightsError, match="No space left"):
        files.replace_file(path, full)
    assert same(files.read_tensors(path)) and [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
