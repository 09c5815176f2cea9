"""Files that are the old one or the new one, whoever writes them and whatever happens in between."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from vitrail.disk import write_atomically
from vitrail.errors import UserError


def test_readers_of_a_file_that_several_write_see_one_whole_version(tmp_path: Path) -> None:
    path, versions = tmp_path / "file", [bytes([letter]) * 200_000 for letter in b"abc"]
    write_atomically(path, versions[0])
    failures: list[BaseException] = []

    def write(version: bytes) -> None:
        try:
            for _ in range(40):
                write_atomically(path, version)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(version,)) for version in versions]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in versions
    assert not failures and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"Cannot write .*file: No space left on device\. Make room"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]
