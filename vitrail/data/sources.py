"""Data sets by convention: which picture is of which class, and in which split.

Understood are, each as a folder or inside a .zip or an uncompressed .tar, and several together as one:

    train/CLASS/*.jpg with val/ (valid, validation) and test/ beside it
    CLASS/*.jpg       without splits: `val_share` of every class is held back, the same ones each time
    a .csv            with columns image_path and label, and split if you like; paths from where it lies
    digits            scikit-learn's 1,797 grey digits of 8×8: 70 % train, 10 % val, 20 % test

Classes are sorted by name, as everywhere else. What is found is said in `notes`; nothing is guessed silently.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.data.finding import OTHER_TASKS, SPLITS, Found, find, is_picture, some, with_validation
from vitrail.data.image import SUFFIXES
from vitrail.data.stores import Array, Store, entries, open_store
from vitrail.errors import ConfigError, DataError, suggestion


class Source:
    """Pictures with classes: `len(source)` of them, read by number. Cheap to pickle and to fork.

    `classes`: names in the order of the labels; `labels`: int64 `[N]`, -1 where there are no classes.
    """

    kind = "classes"
    """What the pictures teach: classes, boxes or masks."""

    def __init__(
        self, stores: Sequence[Store], rows: Array, classes: Sequence[str], notes: Sequence[str] = ()
    ) -> None:
        self.stores = tuple(stores)
        self.classes = tuple(classes)
        self.notes = tuple(notes)
        self._rows = rows  # int64 [N, 3]: store, entry, label
        self._rows.flags.writeable = False

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self._rows[:, 2]

    def name(self, index: int) -> str:
        """The picture's file, for people."""
        store, entry = self._rows[index, :2].tolist()
        return os.path.join(self.stores[store].place, self.stores[store].names[entry])

    def entry_name(self, index: int) -> str:
        """The picture's name below its folder or archive, wherever that lies."""
        store, entry = self._rows[index, :2].tolist()
        name: str = self.stores[store].names[entry]
        return name

    def read(self, index: int) -> bytes | Array:
        """The file's bytes, or pixels (uint8 `[H, W]` or `[H, W, 3]`). Raises ImageError."""
        store, entry = self._rows[index, :2].tolist()
        return self.stores[store].read(entry)

    def size(self, index: int) -> int:
        """Bytes of the file; -1 where it is gone."""
        store, entry = self._rows[index, :2].tolist()
        return self.stores[store].size(entry)

    def counts(self) -> dict[str, int]:
        """Pictures of each class, in the order of the classes."""
        found = np.bincount(self.labels[self.labels >= 0], minlength=len(self.classes))
        return dict(zip(self.classes, found.tolist(), strict=True))

    def subset(self, indices: Sequence[int] | Array) -> Source:
        """Some of the pictures, in the order given; the classes stay."""
        return Source(self.stores, self._rows[np.asarray(indices, dtype=np.int64)], self.classes, self.notes)

    def sample(self, count: int, seed: int) -> Source:
        """So many of the pictures (0 = all), chosen by the seed, in their order."""
        if count == 0 or count >= len(self):
            return self
        order = np.random.default_rng(seed).permutation(len(self))[:count]
        return self.subset(np.sort(order))

    def at(self, stores: Sequence[Store], rows: Array) -> Source:
        """The same pictures kept elsewhere (data.cache); `rows` `[N, 2]` name store and entry of each."""
        return Source(stores, np.concatenate([rows, self._rows[:, 2:]], axis=1), self.classes, self.notes)

    def called(self, names: Mapping[str, str]) -> Source:
        """The same pictures, with other names for the classes that `names` has (name in the data -> name)."""
        return Source(self.stores, self._rows, [names.get(name, name) for name in self.classes], self.notes)

    def relabel(self, classes: Sequence[str]) -> Source:
        """The same pictures with labels in the order of `classes`, such as a model's own.

        Raises DataError for a class of the data that `classes` does not have.
        """
        order = {name: number for number, name in enumerate(classes)}
        used = {self.classes[label] for label in np.unique(self.labels) if label >= 0}
        unknown = sorted(used - order.keys())
        if unknown:
            raise DataError(
                f"The data has {some(unknown)}, which the model does not know; it knows {some(classes)}."
                f"{suggestion(unknown[0], classes)}"
            )
        place = np.array([order.get(name, -1) for name in self.classes] + [-1], dtype=np.int64)
        rows = self._rows.copy()
        rows[:, 2] = place[rows[:, 2]]
        return Source(self.stores, rows, classes, self.notes)

    def fingerprint(self) -> str:
        """A hash of classes, names, labels and file sizes: another data set has another one."""
        digest = hashlib.sha256("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        for store, entry, label in self._rows[:, :3].tolist():
            name = self.stores[store].names[entry]
            line = f"{name}\0{label}\0{self.stores[store].size(entry)}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Splits:
    """A data set taken apart. A split that the data does not have is None."""

    train: Source | None
    val: Source | None
    test: Source | None
    everything: Source
    """All pictures of all splits."""
    given: tuple[str, ...]
    """The splits that the data itself names; empty where it names none."""
    notes: tuple[str, ...]
    """What was decided or is odd about the data: for people, one sentence each."""

    @property
    def scored(self) -> Source:
        """What a model is scored on: val, else test, where the data names them; else everything."""
        found = self.val if "val" in self.given else self.test if "test" in self.given else None
        return self.everything if found is None else found


def open_splits(
    paths: Sequence[str], *, val: Sequence[str] = (), val_share: float = 0.1, seed: int = 0
) -> Splits:
    """Find the splits of a data set (several folders and archives together are one).

    `val`: folders or archives whose pictures all are validation pictures. Without them, and without val/ in
    the data, `val_share` of every class is held back from training (0: no validation), chosen by the hash of
    (seed, name), so that adding a picture moves no other. test/ never stands in for val/: what chooses the
    model cannot judge it.

    Raises DataError: nothing there, no pictures, no classes, one class alone, val has a class that train has
    not.
    """
    if not 0 <= val_share < 1:
        raise ConfigError(f"val_share must lie in [0, 1), got {val_share}.")
    stores: list[Store] = []
    notes: list[str] = []
    found = [item for path in paths for item in find(path, stores, notes)]
    if val:
        found = with_validation(found, [item for path in val for item in find(path, stores, notes)])
    given = tuple(name for name in ("train", "val", "test") if any(item.split == name for item in found))
    pools = {name: [item for item in found if item.split == name] for name in ("train", "val", "test", "")}
    if pools[""]:
        if pools["train"]:
            notes.append(f"{len(pools[''])} pictures outside any split count as training pictures.")
        pools["train"] += pools.pop("")
    if pools["train"] and not pools["val"] and val_share:
        pools["train"], pools["val"] = _held_back(pools["train"], stores, val_share, seed)
        count = len(pools["val"])
        notes.append(
            f"There is no val/; {count} of {count + len(pools['train'])} training pictures are held back for it."
            + _beside(paths)
        )
    return _assemble(paths, stores, pools, given, notes)


def _beside(paths: Sequence[str]) -> str:
    """A word on validation folders that lie beside the folders named, and are not part of them."""
    parents = {
        Path(path).resolve().parent for path in paths if SPLITS.get(Path(path).name.lower()) == "train"
    }
    near = [str(other) for parent in parents for other in sorted(parent.iterdir())
            if other.is_dir() and SPLITS.get(other.name.lower()) == "val"]  # fmt: skip
    return f" (Beside lies {some(near)}: give it with --val, or name the folder around both.)" if near else ""


def open_pictures(paths: Sequence[str]) -> Source:
    """All pictures below folders and in archives, with no classes (labels -1), in a stable order."""
    stores = [open_store(str(path)) for path in paths]
    rows = [
        (number, entry, -1)
        for number, store in enumerate(stores)
        for entry, parts in entries(store)
        if is_picture(parts[-1])
    ]
    if not rows:
        raise DataError(f"No pictures in {some(paths)} ({', '.join(sorted(SUFFIXES))}).")
    return Source(stores, np.array(rows, dtype=np.int64), ())


def _assemble(
    paths: Sequence[str],
    stores: list[Store],
    pools: dict[str, list[Found]],
    given: tuple[str, ...],
    notes: list[str],
) -> Splits:
    for label in {item.label for pool in pools.values() for item in pool}:
        if label != label.encode("utf-8", "replace").decode():
            shown = label.encode("unicode_escape", "surrogatepass").decode()
            raise DataError(
                f"{some(paths)}: the class {shown} has a name that is not UTF-8; rename its folder."
            )
    leading = pools["train"] or pools["val"] or pools["test"]
    classes = sorted({item.label for item in leading})
    for name in ("val", "test"):
        pool = pools[name]
        extra = sorted({item.label for item in pool} - set(classes))
        if extra and pools["train"]:
            raise DataError(
                f"{name} has {some(extra)}, which train has not; train knows {some(classes)}."
                f"{suggestion(extra[0], classes)}"
            )
        classes = sorted({*classes, *extra})
    missing = sorted(set(classes) - {item.label for item in pools["val"]})
    if pools["val"] and missing:
        notes.append(f"Validation has no picture of {some(missing)}; nothing is known about them.")
    if all(name.lower() in OTHER_TASKS for name in classes):
        raise DataError(
            f"{some(paths)} looks like data for boxes or masks: its folders are {some(classes)}, which are no "
            "classes. A classifier wants a folder for each class."
        )
    if pools["train"] and len(classes) < 2:
        raise DataError(
            f"{some(paths)} has one class only, {classes[0]!r}; a classifier needs two or more, each in a "
            "folder of its own."
        )
    number = {name: place for place, name in enumerate(classes)}

    def source(pool: Iterable[Found]) -> Source | None:
        rows = [(item.store, item.entry, number[item.label]) for item in pool]
        return Source(stores, np.array(rows, dtype=np.int64), classes, notes) if rows else None

    everything = source(dict.fromkeys([*pools["train"], *pools["val"], *pools["test"]]))
    assert everything is not None  # find raises where there is no picture
    return Splits(
        train=source(pools["train"]),
        val=source(pools["val"]),
        test=source(pools["test"]),
        everything=everything,
        given=given,
        notes=tuple(notes),
    )


def _held_back(
    pool: list[Found], stores: list[Store], share: float, seed: int
) -> tuple[list[Found], list[Found]]:
    """Train and val: of each class the `share` with the smallest hash, one at least where there are two."""
    classes: dict[str, list[tuple[bytes, Found]]] = {}
    for item in pool:
        name = f"{seed}/{item.label}/{stores[item.store].names[item.entry]}"
        key = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        classes.setdefault(item.label, []).append((key, item))
    held: set[Found] = set()
    for members in classes.values():
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.update(item for _, item in sorted(members)[:count])
    return [item for item in pool if item not in held], [item for item in pool if item in held]
