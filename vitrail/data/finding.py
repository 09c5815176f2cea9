"""Finding labelled pictures: what the names of folders, archives and table columns say about each."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitrail.data.image import SUFFIXES
from vitrail.data.stores import Folder, Pixels, Store, entries, open_store
from vitrail.errors import DataError

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Names of folders, archives and table entries that mean a split."""

COLUMNS = {
    "image": ("image_path", "path", "image", "file_name", "filename", "file"),
    "label": ("label", "class", "target"),
    "split": ("split", "subset"),
}
"""Names of the columns of a table, the first one ours."""

DIGITS = "digits"

OTHER_TASKS = {"images", "masks", "jpegimages", "annotations", "labels", "imagesets", "segmentationclass"}
"""Folder names that speak of detection or segmentation, not of classes."""


UNREAD = (
    ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".dng", ".raw", ".ppm", ".pgm", ".tga",
)  # fmt: skip
"""Endings of pictures that are not read."""


class Found(NamedTuple):
    """One picture that was found: where, and what its place says about it."""

    store: int
    entry: int
    split: str
    label: str


def find(path: str, stores: list[Store], notes: list[str]) -> list[Found]:
    """The labelled pictures of one path; its store is added to `stores`."""
    path = str(path)
    if path == DIGITS and not os.path.exists(path):
        return _digits(stores)
    if path.lower().endswith(".csv"):
        return _table(path, stores)
    store = open_store(path)
    stores.append(store)
    pictures: list[tuple[int, list[str]]] = []
    others: Counter[str] = Counter()
    for entry, parts in entries(store):
        if is_picture(parts[-1]):
            pictures.append((entry, parts))
        else:
            others[os.path.splitext(parts[-1])[1].lower() or "(none)"] += 1
    if not pictures:
        seen = f"; it holds {_tally(others)}" if others else ""
        raise DataError(f"No pictures in {path} ({', '.join(sorted(SUFFIXES))}){seen}.")
    note_unread(path, (store.names[entry] for entry, _ in entries(store)), notes.append)
    found = _by_folder(path, len(stores) - 1, pictures, notes)
    _empty_classes(store, found, notes)
    return found


def _by_folder(
    path: str, number: int, pictures: list[tuple[int, list[str]]], notes: list[str]
) -> list[Found]:
    """Split and class of each picture, from the folders that it lies in."""
    while _has_wrapper(pictures):
        pictures = [(entry, parts[1:]) for entry, parts in pictures]
    split = any(len(parts) >= 3 and parts[0].lower() in SPLITS for _, parts in pictures)
    inner = {SPLITS.get(parts[1].lower()) for _, parts in pictures if len(parts) >= 3} - {None}
    if not split and len(inner) > 1:
        raise DataError(
            f"{path}: the splits lie inside the classes ({pictures[0][1][0]}/train/...). Put the classes inside the"
            " splits (train/CLASS/picture.jpg), or list the pictures in a .csv (image_path,label,split)."
        )
    depth = 2 if split else 1
    usual = "" if split else _split_of(path)
    found: list[Found] = []
    for entry, parts in pictures:
        name = SPLITS.get(parts[0].lower(), "") if split else usual
        if len(parts) > depth and (name or not split):
            found.append(Found(number, entry, name, parts[depth - 1]))
    lost = len(pictures) - len(found)
    if not found:
        raise DataError(
            f"{path}: {len(pictures)} pictures but no classes. Put each class into a folder of its own "
            "(CLASS/picture.jpg, or train/CLASS/picture.jpg), or list them in a .csv (image_path,label)."
        )
    if lost:
        where = "outside the splits or" if split else ""
        notes.append(f"{path}: {lost} pictures {where} outside class folders left out.".replace("  ", " "))
    return found


def _has_wrapper(pictures: list[tuple[int, list[str]]]) -> bool:
    """Whether all pictures lie in one outer folder that is neither a split nor a class."""
    first = pictures[0][1][0]
    return first.lower() not in SPLITS and all(len(parts) >= 3 and parts[0] == first for _, parts in pictures)


def _split_of(path: str) -> str:
    """The split that the name of an archive or folder tells: train, train-0.zip, val_1.tar, test."""
    name = re.fullmatch(r"([a-z]+)([-_.]?\d+)?", Path(path).stem.lower())
    return SPLITS.get(name.group(1), "") if name else ""


def _empty_classes(store: Store, found: list[Found], notes: list[str]) -> None:
    """Say which folders beside the classes hold no picture."""
    full = {"/".join(store.names[item.entry].split("/")[:-1]) for item in found}
    beside = {os.path.dirname(folder) for folder in full}
    lively = {folder for name in full for folder in _above(name)}
    empty = [name for name in store.folders if os.path.dirname(name) in beside and name not in lively]
    empty = [name for name in empty if not os.path.basename(name).startswith((".", "__"))]
    if empty:
        notes.append(f"{store.place}: no pictures in {some(empty)}; not counted as classes.")


def _above(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _table(path: str, stores: list[Store]) -> list[Found]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = [name.strip().lower() for name in reader.fieldnames or []]
            reader.fieldnames = header
            column = {kind: next((n for n in names if n in header), "") for kind, names in COLUMNS.items()}
            if not column["image"] or not column["label"]:
                raise DataError(f"{path}: the first line must name image_path,label, got {','.join(header)}.")
            rows = [(reader.line_num, row) for row in reader if any(row.values())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable table ({error}).") from None
    if not rows:
        raise DataError(f"{path}: the table has no rows.")
    names: list[str] = []
    found: list[Found] = []
    for line, row in rows:
        name, label = (str(row[column[kind]] or "").strip() for kind in ("image", "label"))
        told = str(row.get(column["split"]) or "").strip().lower() if column["split"] else ""
        if not name or not label:
            raise DataError(f"{path}, line {line}: an image_path or a label is missing.")
        if told and told not in SPLITS:
            raise DataError(f"{path}, line {line}: split must be train, val or test, got {told!r}.")
        found.append(Found(len(stores), len(names), SPLITS.get(told, ""), label))
        names.append(name)
    stores.append(Folder(os.path.dirname(path), names))
    return found


def _digits(stores: list[Store]) -> list[Found]:
    table = _digits_table()
    labels = table[:, 64].astype(int)
    images = np.rint(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)  # they count to 16
    order = np.random.default_rng(0).permutation(len(images))
    split = np.empty(len(images), dtype=object)
    for digit in range(10):
        members = order[labels[order] == digit]
        val, test = round(0.1 * len(members)), round(0.2 * len(members))
        split[members[:test]], split[members[test : test + val]] = "test", "val"
        split[members[test + val :]] = "train"
    stores.append(Pixels(DIGITS, images, (f"{number:04d}" for number in range(len(images)))))
    return [
        Found(len(stores) - 1, number, split[number], str(labels[number])) for number in range(len(images))
    ]


def _digits_table() -> np.ndarray[Any, np.dtype[np.float64]]:
    """64 values and the digit in each row, from the file that scikit-learn brings along.

    It is read in place, since importing scikit-learn for it would take seconds.
    """
    package = importlib.util.find_spec("sklearn")
    path = Path(package.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if package else None
    if path is None or not path.is_file():
        raise DataError("The digits come with scikit-learn, which is not whole here: install scikit-learn.")
    with gzip.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",")


def with_validation(found: list[Any], beside: list[Any]) -> list[Any]:
    """What was found, with other pictures in place of its own val/: of those their val/, else their test/, else all.

    Both hold named tuples with a field `split`, such as Found.
    """
    named = {item.split for item in beside}
    chosen = "val" if "val" in named else "test" if "test" in named else None
    validation = [item._replace(split="val") for item in beside if chosen in (None, item.split)]
    return [item for item in found if item.split != "val"] + validation


def is_picture(name: str) -> bool:
    """Whether a file is, by its ending, a picture of a kind that is read."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def some(names: Iterable[object], most: int = 5) -> str:
    """The first of the names and the number of the others, for a message: a, b, c and 12 more."""
    listed = [str(name) for name in names]
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def is_unread(name: str) -> bool:
    """Whether a file is, by its ending, a picture of a kind that is not read."""
    return os.path.splitext(name)[1].lower() in UNREAD


def note_unread(place: str, names: Iterable[str], say: Callable[[str], None]) -> None:
    """A word on the pictures below a place that are left out for their kind."""
    unread = Counter(os.path.splitext(name)[1].lower() for name in names if is_unread(name))
    if unread:
        say(f"{place}: {_tally(unread)} left out; convert them to PNG to use them.")


def _tally(endings: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{count} {ending}" for ending, count in sorted(endings.items()))
