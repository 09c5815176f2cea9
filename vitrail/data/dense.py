"""Data for boxes and masks by convention, as `sources` does it for classes. Each is a folder, a .zip or a .tar:

COCO json        annotations/instances_{train,val}.json and pictures anywhere; or the .json itself is named
Pascal VOC       Annotations/*.xml, JPEGImages/*, ImageSets/Main/{train,val,test}.txt
index masks      images/*.jpg and masks/*.png side by side, split folders inside or outside them
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitrail.data import coco, masks, voc
from vitrail.data.boxes import Annotated, BoxSource, BoxTable, cleaned
from vitrail.data.finding import DIGITS, is_picture, some, with_validation
from vitrail.data.masks import MaskSource
from vitrail.data.sources import Source, Splits
from vitrail.data.stores import Folder, Store, entries, open_store
from vitrail.errors import ConfigError, DataError, suggestion

Kind = Literal["classes", "boxes", "masks"]

TASKS: dict[Kind, str] = {
    "classes": "image-classification",
    "boxes": "object-detection",
    "masks": "image-segmentation",
}
"""What a model must be for that learns from each kind of data."""

WORDS: dict[Kind, str] = {
    "classes": "pictures in class folders",
    "boxes": "pictures with boxes (COCO json or VOC xml)",
    "masks": "pictures with index masks (images/ and masks/)",
}


def kinds_of(paths: Sequence[str]) -> tuple[Kind, ...]:
    """What the data can teach, judged by names alone; VOC folders with masks can teach two things."""
    if not paths:
        raise DataError("Name the data: a folder, an archive, a .csv, or the word digits.")
    found: set[Kind] = set()
    for path in map(str, paths):
        if path.lower().endswith(".json"):
            found.add("boxes")
        elif path.lower().endswith(".csv") or (path == DIGITS and not os.path.exists(path)):
            found.add("classes")
        else:
            found |= _kinds_in(open_store(path))
    if len(found) > 1 and "classes" in found:
        raise DataError(f"{some(paths)} hold different kinds of data ({', '.join(sorted(found))}).")
    order: tuple[Kind, ...] = ("boxes", "masks", "classes")
    return tuple(kind for kind in order if kind in found)


def _kinds_in(store: Store) -> set[Kind]:
    found: set[Kind] = set()
    names = [parts for _, parts in entries(store)]
    if coco.annotation_files(store) or voc.annotation_files(store):
        found.add("boxes")
    if masks.mask_places([parts for parts in names if is_picture(parts[-1])]) is not None:
        found.add("masks")
    return found or {"classes"}


def open_boxes(
    paths: Sequence[str],
    *,
    val: Sequence[str] = (),
    val_share: float = 0.1,
    seed: int = 0,
    classes: Sequence[str] = (),
) -> Splits:
    """The splits of data with boxes. Without `classes` COCO's are in the order of their ids, VOC's sorted.

    Raises DataError: nothing there, a file that is damaged or speaks of what is not there, boxes of a class
    that `classes` lacks, not one sound box to learn from.
    """
    notes: list[str] = []
    listed: dict[str, list[str]] = {}
    stores: list[Store] = []
    ids: dict[str, Any] = {}

    def read(path: str) -> list[Annotated]:
        found, names = _read_boxes(path, stores, notes, listed)
        for name, id in names.items():
            ids.setdefault(name, id)
        return found

    pools, given = _pools(paths, val, read, stores, notes, val_share, seed)
    pools = {name: cleaned(pool, stores, listed) for name, pool in pools.items()}
    pictures = [picture for pool in pools.values() for picture in pool]
    used = sorted({box.label for picture in pictures for box in picture.boxes})
    if not used:
        raise DataError(f"{some(paths)}: {len(pictures)} pictures and not one sound box to learn from.")
    known = tuple(classes) or (*ids, *(name for name in used if name not in ids))
    unknown = [name for name in used if name not in known]
    if unknown:
        raise DataError(
            f"{some(paths)} has boxes of {some(unknown)}, which --classes does not name: {some(known)}."
            f"{suggestion(unknown[0], known)}"
        )
    held = "val" not in given and not val
    _compare_classes(pools, known, notes, held)
    empty = [stores[p.store].names[p.entry] for p in pictures if not p.boxes]
    listed["pictures without a box"] = empty
    _tell(listed, len(pictures), notes)
    table = BoxTable.build(pictures, {name: number for number, name in enumerate(known)}, ids)
    kept = {kind: tuple(names) for kind, names in listed.items() if names}
    rows = np.array([(p.store, p.entry, row) for row, p in enumerate(pictures)], dtype=np.int64)
    everything = BoxSource(stores, rows, known, table, notes, kept)
    return _split_up(everything, pools, given, notes)


def open_masks(
    paths: Sequence[str],
    *,
    val: Sequence[str] = (),
    val_share: float = 0.1,
    seed: int = 0,
    classes: Sequence[str] = (),
    ignore: Sequence[int] = (),
    reduce_zero: bool = False,
    otherwise: Sequence[str] = (),
) -> Splits:
    """The splits of data with index masks; every mask is looked through (data.masks.class_numbers).

    The classes are called as `classes` says; else as the data does; else as `otherwise` says.
    """
    wrong = [value for value in ignore if not 0 <= value <= 255]
    if wrong:
        raise ConfigError(f"ignore takes values of masks, 0..255; got {some(wrong)}.")
    notes: list[str] = []
    listed: dict[str, list[str]] = {}
    stores: list[Store] = []

    def read(path: str) -> list[masks.Pair]:
        stores.append(open_store(path))
        return masks.find(stores[-1], len(stores) - 1, listed)

    pools, given = _pools(paths, val, read, stores, notes, val_share, seed)
    pairs = [pair for pool in pools.values() for pair in pool]
    pixels, files, bad = masks.look_through(stores, pairs)
    if len(bad) == len(pairs):
        raise DataError(f"{some(paths)}: no mask can be read. {bad[0]}")
    listed["unreadable masks"] = bad
    named = tuple(classes) or _class_file(stores) or tuple(otherwise)
    known, values = masks.class_numbers(pixels, files, named, ignore, reduce_zero, some(paths), notes)
    if not named:
        notes.append(
            f"Nothing names the classes: they are called {known[0]} to {known[-1]}. Name them with --classes"
            " sky building ... or --classes names.txt (one name a line)."
        )
    _tell(listed, len(pairs), notes)
    kept = {kind: tuple(names) for kind, names in listed.items() if names}
    rows = np.array([(p.store, p.entry, p.mask, p.store) for p in pairs], dtype=np.int64)
    everything = MaskSource(stores, rows, known, values, notes, kept)
    return _split_up(everything, pools, given, notes)


def class_names(told: Sequence[str]) -> tuple[str, ...]:
    """Class names as they are told, or from one file with one name a line. Raises ConfigError for doubles."""
    names = tuple(told)
    if len(told) == 1 and Path(told[0]).suffix.lower() == ".txt":
        try:
            text = Path(told[0]).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"classes: {told[0]} cannot be read ({error}).") from None
        names = _lines(text)
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ConfigError(f"classes names {some(double)} more than once.")
    return names


def _class_file(stores: Sequence[Store]) -> tuple[str, ...]:
    """Names from classes.txt (or labels.txt) in the data itself, outside the folders of pictures."""
    for store in stores:
        for entry, parts in entries(store):
            if parts[-1].lower() in ("classes.txt", "labels.txt", "class_names.txt") and len(parts) <= 2:
                data = store.read(entry)
                assert isinstance(data, bytes)
                return class_names(_lines(data.decode("utf-8-sig", "replace")))
    return ()


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _read_boxes(
    path: str, stores: list[Store], notes: list[str], listed: dict[str, list[str]]
) -> tuple[list[Annotated], dict[str, Any]]:
    """The annotated pictures of one path, and the ids of the classes in the order that it tells, if it does."""
    if path.lower().endswith(".json"):
        file = Path(path)
        if not file.is_file():
            raise DataError(f"{path}: no such file.")
        home = file.parent.parent if file.parent.name.lower() == "annotations" else file.parent
        store: Store = Folder.scan(str(home))
        stores.append(store)
        wanted = file.relative_to(home).as_posix()
        files = [(entry, parts) for entry, parts in entries(store) if "/".join(parts) == wanted]
        return coco.find(store, len(stores) - 1, files, notes, listed)
    store = open_store(path)
    stores.append(store)
    files = coco.annotation_files(store)
    if files:
        return coco.find(store, len(stores) - 1, files, notes, listed)
    if not voc.annotation_files(store):
        raise DataError(f"{path}: no COCO json and no VOC xml in it; it holds {_kinds_in(store).pop()}.")
    return voc.find(store, len(stores) - 1, notes, listed), {}


def _pools(
    paths: Sequence[str],
    val: Sequence[str],
    read: Callable[[str], list[Any]],
    stores: list[Store],
    notes: list[str],
    val_share: float,
    seed: int,
) -> tuple[dict[str, list[Any]], tuple[str, ...]]:
    """Train, val and test, and which of them the data itself names."""
    if not 0 <= val_share < 1:
        raise ConfigError(f"val_share must lie in [0, 1), got {val_share}.")
    found = [item for path in map(str, paths) for item in read(path)]
    if val:
        found = with_validation(found, [item for path in map(str, val) for item in read(path)])
    given = tuple(name for name in ("train", "val", "test") if any(item.split == name for item in found))
    pools = {name: [item for item in found if item.split == name] for name in ("train", "val", "test")}
    loose = [item for item in found if item.split not in pools]
    if loose and pools["train"]:
        notes.append(f"{len(loose)} pictures outside any split count as training pictures.")
    pools["train"] += loose
    if pools["train"] and not pools["val"] and val_share:
        pools["train"], pools["val"] = held_back(pools["train"], stores, val_share, seed)
        count = len(pools["val"])
        notes.append(
            f"There is no val; {count} of {count + len(pools['train'])} training pictures are held back for it."
        )
    return pools, given


def held_back(
    pool: list[Any], stores: Sequence[Store], share: float, seed: int
) -> tuple[list[Any], list[Any]]:
    """Train and val: the `share` with the smallest hash of its name, one at least where there are two."""

    def key(item: Any) -> bytes:
        name = f"{seed}/{stores[item.store].names[item.entry]}"
        return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()

    count = min(max(1, round(share * len(pool))), len(pool) - 1)
    held = {(item.store, item.entry) for item in sorted(pool, key=key)[:count]}
    return (
        [item for item in pool if (item.store, item.entry) not in held],
        [item for item in pool if (item.store, item.entry) in held],
    )


def _compare_classes(
    pools: Mapping[str, Sequence[Annotated]], known: Sequence[str], notes: list[str], held: bool
) -> None:
    """Raises DataError where val or test has a class that train cannot teach; `held` is a val that was held back."""
    used = {
        name: {box.label for picture in pool for box in picture.boxes} for name, pool in pools.items() if pool
    }
    for name, own in used.items():
        extra = sorted(own - used.get("train", own))
        if extra:
            cure = ""
            if held and name == "val":
                cure = (
                    f" (The {len(pools[name])} of val were held back of the training pictures: label more, hold back"
                    " others by another --seed, name some by --val, or do without by --val-share 0.)"
                )
            raise DataError(f"{name} has boxes of {some(extra)}, of which train has none.{cure}")
        absent = [label for label in known if label not in own]
        if absent:
            notes.append(f"{name} has no box of {some(absent)}.")


def _tell(listed: Mapping[str, Sequence[str]], total: int, notes: list[str]) -> None:
    """One sentence for each kind of finding, with the first few."""
    actions = {
        "without area": "boxes without area are left out",
        "not numbers": "boxes with edges that are no numbers are left out",
        "outside the picture": "boxes wholly outside their picture are left out",
        "cut at the edge": "boxes reach over the edge of their picture and are cut there",
        "pictures without a box": f"of {total} pictures have no box: they teach what is none",
        "pictures without an annotation file": "pictures have no annotation file and are left out",
        "annotations without a picture": "annotation files have no picture and are left out",
        "in no ImageSets/Main list": "annotated pictures are in no list of ImageSets/Main and are left out",
        "listed but not there": "listed pictures are not there and are left out",
        "pictures without a mask": "pictures have no mask and are left out",
        "masks without a picture": "masks have no picture and are left out",
        "unreadable masks": "masks cannot be read",
    }
    for kind, names in listed.items():
        if names:
            notes.append(f"{len(names)} {actions[kind]}: {some(names, 3).removesuffix('.')}.")


def _split_up(
    everything: Any, pools: Mapping[str, Sequence[Any]], given: tuple[str, ...], notes: Sequence[str]
) -> Splits:
    parts: dict[str, Source | None] = {}
    start = 0
    for name in ("train", "val", "test"):
        count = len(pools[name])
        parts[name] = everything.subset(range(start, start + count)) if count else None
        start += count
    return Splits(
        train=parts["train"], val=parts["val"], test=parts["test"], everything=everything, given=given,
        notes=tuple(notes),
    )  # fmt: skip
