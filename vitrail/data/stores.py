"""Where the bytes of pictures lie: folders, .zip and .tar archives, arrays. An index in numpy, read by number.

A store is made once, in the main process, by looking at names only. Its index lies in a few numpy buffers
and not in a hundred thousand Python objects, so that forked workers share its memory; archives are opened
again in each process on first use, and read at given places, which is safe across forks and threads.
"""

from __future__ import annotations

import itertools
import os
import tarfile
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vitrail.errors import DataError, ImageError

Array = np.ndarray[Any, np.dtype[Any]]

LARGEST = 256 * 2**20
"""Bytes of one file above which it is not read at all: no picture within the limits is as large."""

LOCAL_HEADER = 30
"""Bytes of a zip entry's fixed header, before its name."""


class Names(Sequence[str]):
    """Many short strings in two buffers."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        text, ends = self._text.tobytes(), self._ends.tolist()
        for start, end in itertools.pairwise(ends):
            yield text[start:end].decode("utf-8", "surrogateescape")

    def __getitem__(self, index: Any) -> Any:
        start, end = self._ends[index], self._ends[index + 1]
        return self._text[start:end].tobytes().decode("utf-8", "surrogateescape")


class Store(Protocol):
    """What every store offers."""

    place: str
    """Path of the folder or archive, for messages."""
    names: Names
    """Name of each entry below the place, with / between its parts."""
    folders: tuple[str, ...]
    """Names of the folders below the place, for empty classes."""

    def read(self, entry: int, most: int = LARGEST) -> bytes | Array:
        """The file's bytes, `most` at most, or pixels uint8 `[H, W]` or `[H, W, 3]`. Raises ImageError."""
        ...

    def size(self, entry: int) -> int:
        """Bytes of the file; -1 where it is gone."""
        ...


class Folder:
    """Files below a folder."""

    def __init__(self, place: str, names: Iterable[str], folders: Iterable[str] = ()) -> None:
        self.place = place
        self.names = Names(names)
        self.folders = tuple(folders)

    @classmethod
    def scan(cls, place: str) -> Folder:
        """All files below a folder, links followed, in a stable order."""
        names: list[str] = []
        folders: list[str] = []
        above: dict[str, set[str]] = {}  # of each folder: where it and those around it really lie
        for root, below, files in os.walk(place, followlinks=True):
            real, around = os.path.realpath(root), above.get(os.path.dirname(root), set())
            if real in around:  # a link to a folder above: it would go round for ever
                below[:] = []
                continue
            above[root] = around | {real}
            prefix = Path(root).relative_to(place).as_posix()
            prefix = "" if prefix == "." else prefix + "/"
            folders += [prefix + name for name in below]
            names += [prefix + name for name in files]
        return cls(place, sorted(names), sorted(folders))

    def path(self, entry: int) -> str:
        return os.path.join(self.place, self.names[entry])

    def read(self, entry: int, most: int = LARGEST) -> bytes:
        path = self.path(entry)
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size > most:
                    raise ImageError(f"{path}: larger than {most >> 20} MiB; no picture needs that.")
                return file.read()
        except FileNotFoundError:
            raise ImageError(f"{path}: no such file.") from None
        except OSError as error:
            raise ImageError(f"{path}: cannot be read ({error.strerror or error}).") from None

    def size(self, entry: int) -> int:
        try:
            return os.stat(self.path(entry)).st_size
        except OSError:
            return -1


class Archive:
    """What zip and tar share: one file, read at given places."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def _at(self, offset: int, count: int) -> bytes:
        try:
            if not hasattr(os, "pread"):  # Windows
                with open(self.place, "rb") as file:
                    file.seek(offset)
                    return file.read(count)
            if self._descriptor is None:
                self._descriptor = os.open(self.place, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                weakref.finalize(self, os.close, self._descriptor).atexit = False
            return os.pread(self._descriptor, count, offset)
        except OSError as error:
            raise ImageError(f"{self.place}: cannot be read ({error.strerror or error}).") from None


class Zip(Archive):
    """Entries of a .zip, stored or deflated."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        try:
            with zipfile.ZipFile(place) as archive:
                listed = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise DataError(f"{place}: not a readable .zip ({error}); fetch or pack it again.") from None
        entries = sorted((entry for entry in listed if not entry.is_dir()), key=lambda entry: entry.filename)
        self.names = Names(entry.filename for entry in entries)
        self.folders = tuple(sorted(entry.filename.rstrip("/") for entry in listed if entry.is_dir()))
        self._index = np.array(
            [
                (e.header_offset, e.compress_size, e.file_size, e.compress_type, e.CRC, e.flag_bits & 1)
                for e in entries
            ],
            dtype=np.int64,
        ).reshape(-1, 6)

    def size(self, entry: int) -> int:
        return int(self._index[entry, 2])

    def read(self, entry: int, most: int = LARGEST) -> bytes:
        offset, packed, size, method, checksum, locked = self._index[entry].tolist()
        name = f"{self.place}/{self.names[entry]}"
        if locked:
            raise ImageError(f"{name}: locked with a password; pack the archive without one.")
        if max(size, packed) > most:
            raise ImageError(f"{name}: larger than {most >> 20} MiB; no picture needs that.")
        spare = len(self.names[entry].encode("utf-8", "surrogateescape")) + 64
        block = self._at(offset, LOCAL_HEADER + spare + packed)
        if block[:4] != b"PK\x03\x04":
            raise ImageError(f"{name}: the archive is damaged here; fetch or pack it again.")
        start = LOCAL_HEADER + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
        data = block[start : start + packed]
        if len(data) < packed:  # an entry with more extra fields than usual
            data = self._at(offset + start, packed)
        data = self._unpacked(data, method, size, name)
        if len(data) != size or zlib.crc32(data) != checksum:
            raise ImageError(f"{name}: the archive is damaged here (checksum); fetch or pack it again.")
        return data

    @staticmethod
    def _unpacked(data: bytes, method: int, size: int, name: str) -> bytes:
        if method == zipfile.ZIP_STORED:
            return data
        if method == zipfile.ZIP_DEFLATED:
            try:
                return zlib.decompressobj(-15).decompress(data, size + 1)
            except zlib.error as error:
                raise ImageError(f"{name}: the archive is damaged here ({error}).") from None
        raise ImageError(f"{name}: packed by an uncommon method; pack the archive with zip -0.")


class Tar(Archive):
    """Files of an uncompressed .tar."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        try:
            with tarfile.open(place, "r:") as archive:
                listed = [entry for entry in archive if entry.isreg() or entry.isdir()]
        except (tarfile.TarError, OSError) as error:
            raise DataError(
                f"{place}: not a readable .tar ({error}). A compressed one cannot be read at given places: "
                "uncompress or unpack it first."
            ) from None
        listed = [entry for entry in listed if not entry.issparse()]
        clean = {id(entry): entry.name.removeprefix("./") for entry in listed}
        entries = sorted((entry for entry in listed if entry.isreg()), key=lambda entry: clean[id(entry)])
        self.names = Names(clean[id(entry)] for entry in entries)
        self.folders = tuple(sorted(clean[id(entry)] for entry in listed if entry.isdir()))
        index = [(entry.offset_data, entry.size) for entry in entries]
        self._index = np.array(index, dtype=np.int64).reshape(-1, 2)

    def size(self, entry: int) -> int:
        return int(self._index[entry, 1])

    def read(self, entry: int, most: int = LARGEST) -> bytes:
        offset, size = self._index[entry].tolist()
        name = f"{self.place}/{self.names[entry]}"
        if size > most:
            raise ImageError(f"{name}: larger than {most >> 20} MiB; no picture needs that.")
        data = self._at(offset, size)
        if len(data) != size:
            raise ImageError(f"{name}: the archive is cut off here; fetch or pack it again.")
        return data


class Pixels:
    """Decoded pictures in memory."""

    folders: tuple[str, ...] = ()

    def __init__(self, place: str, images: Array, names: Iterable[str]) -> None:
        self.place = place
        self.images = images  # uint8 [N, H, W] or [N, H, W, 3]
        self.names = Names(names)

    def read(self, entry: int, most: int = LARGEST) -> Array:
        pixels: Array = self.images[entry]
        return pixels

    def size(self, entry: int) -> int:
        return int(self.images[entry].nbytes)


def open_store(place: str) -> Store:
    """The store of a folder or an archive. Raises DataError for anything else."""
    path = Path(place)
    if path.is_dir():
        return Folder.scan(place)
    if not path.exists():
        raise DataError(f"{place}: no such folder or archive.")
    lower = path.name.lower()
    if lower.endswith(".zip"):
        return Zip(place)
    if lower.endswith(".tar"):
        return Tar(place)
    if lower.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".gz", ".7z", ".rar")):
        raise DataError(f"{place}: a compressed archive cannot be read at given places; unpack it first.")
    raise DataError(
        f"{place}: data is a folder, a .zip or .tar archive, a .csv, a COCO .json, or the word digits."
    )


def entries(store: Store) -> Iterator[tuple[int, list[str]]]:
    """Number and name parts of every file that is no one's housekeeping (hidden, or __MACOSX)."""
    for entry, name in enumerate(store.names):
        parts = name.split("/")
        if not any(part.startswith(".") or part == "__MACOSX" for part in parts):
            yield entry, parts
