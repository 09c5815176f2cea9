"""Boxes in pictures: as readers find them, cleaned before anything is trained on them, and as a source.

A box is (left, top, right, bottom) in pixels of the picture, edges and not centres: the whole picture is
(0, 0, width, height). Boxes without area are left out and listed; what reaches over the picture's edge is cut
there; a box wholly outside is left out and listed. Nothing of it happens in silence.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vitrail.data.finding import some
from vitrail.data.image import inspect
from vitrail.data.sources import Source
from vitrail.data.stores import Array, Store
from vitrail.errors import DataError, ImageError, suggestion

EDGE = 1.0
"""Pixels by which a box may reach over the edge without being worth a word: counting from 0 or 1."""


class Box(NamedTuple):
    """One box as a file has it."""

    label: str
    left: float
    top: float
    right: float
    bottom: float
    crowd: bool = False
    """A group, or one too hard to count: it is not trained on, and in scoring whoever finds it is not wrong."""
    area: float | None = None
    """Pixels that the thing itself covers, where the file tells it."""


class Annotated(NamedTuple):
    """One picture and its boxes, as a reader found them."""

    store: int
    entry: int
    split: str
    size: tuple[int, int] | None
    """Height and width as the annotation says, else by the picture's header once it is cleaned."""
    boxes: tuple[Box, ...]


class PictureBoxes(NamedTuple):
    """The boxes of one picture: pixels float32 `[n, 4]`, classes int64 `[n]`, crowds bool `[n]`, areas `[n]`."""

    boxes: Array
    labels: Array
    crowd: Array
    area: Array
    size: tuple[int, int]
    """Height and width as the annotation says; 0, 0 where it says nothing."""


@dataclass(frozen=True)
class BoxTable:
    """The boxes of all pictures in a few numpy buffers, which forked workers share."""

    starts: Array
    """Int64 `[N + 1]`: the boxes of picture n are starts[n] to starts[n + 1]."""
    boxes: Array
    labels: Array
    crowd: Array
    area: Array
    sizes: Array
    """Int64 `[N, 2]`: height and width as annotated, 0 where nothing was said."""
    ids: Mapping[str, Any]
    """The ids that the data itself gives its classes (COCO); empty where it has none."""

    @classmethod
    def build(
        cls, pictures: Sequence[Annotated], number: Mapping[str, int], ids: Mapping[str, Any]
    ) -> BoxTable:
        """The table of pictures whose labels all have a number."""
        flat = [box for picture in pictures for box in picture.boxes]
        own = [(b.right - b.left) * (b.bottom - b.top) if b.area is None else b.area for b in flat]
        return cls(
            starts=np.cumsum([0, *(len(picture.boxes) for picture in pictures)], dtype=np.int64),
            boxes=np.array([box[1:5] for box in flat], dtype=np.float32).reshape(-1, 4),
            labels=np.array([number[box.label] for box in flat], dtype=np.int64),
            crowd=np.array([box.crowd for box in flat], dtype=bool),
            area=np.array(own, dtype=np.float32),
            sizes=np.array([picture.size or (0, 0) for picture in pictures], dtype=np.int64).reshape(-1, 2),
            ids=dict(ids),
        )

    def of(self, row: int) -> PictureBoxes:
        """The boxes of one picture."""
        inside = slice(int(self.starts[row]), int(self.starts[row + 1]))
        height, width = self.sizes[row].tolist()
        return PictureBoxes(
            self.boxes[inside], self.labels[inside], self.crowd[inside], self.area[inside], (height, width)
        )


class BoxSource(Source):
    """Pictures with boxes. The third number of a row is the picture's row in the table of boxes."""

    kind = "boxes"

    def __init__(
        self,
        stores: Sequence[Store],
        rows: Array,
        classes: Sequence[str],
        table: BoxTable,
        notes: Sequence[str] = (),
        listed: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        super().__init__(stores, rows, classes, notes)
        self.table = table
        self.listed = dict(listed or {})
        """Findings for people, by kind: no area, cut at the edge, outside ..."""

    @property
    def labels(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """-1: a picture as a whole has no class."""
        return np.full(len(self), -1, dtype=np.int64)

    def target(self, index: int) -> PictureBoxes:
        """The boxes of a picture."""
        return self.table.of(int(self._rows[index, 2]))

    def counts(self) -> dict[str, int]:
        """Boxes of each class."""
        found = np.zeros(len(self.classes), dtype=np.int64)
        for index in range(len(self)):
            found += np.bincount(self.target(index).labels, minlength=len(self.classes))
        return dict(zip(self.classes, found.tolist(), strict=True))

    def subset(self, indices: Sequence[int] | Array) -> BoxSource:
        rows = self._rows[np.asarray(indices, dtype=np.int64)]
        return BoxSource(self.stores, rows, self.classes, self.table, self.notes, self.listed)

    def at(self, stores: Sequence[Store], rows: Array) -> BoxSource:
        """The same pictures kept elsewhere (data.cache); `rows` `[N, 2]` name store and entry of each."""
        rows = np.concatenate([rows, self._rows[:, 2:]], axis=1)
        return BoxSource(stores, rows, self.classes, self.table, self.notes, self.listed)

    def relabel(self, classes: Sequence[str]) -> BoxSource:
        """The same boxes with labels in the order of `classes`. Raises DataError for a class that it lacks."""
        place = renumbering(self.classes, [self.classes[i] for i in np.unique(self.table.labels)], classes)
        table = dataclasses.replace(self.table, labels=place[self.table.labels])
        return BoxSource(self.stores, self._rows, classes, table, self.notes, self.listed)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        for index in range(len(self)):
            for part in self.target(index)[:4]:
                digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def renumbering(own: Sequence[str], used: Sequence[str], classes: Sequence[str]) -> Array:
    """For each class of the data its number among a model's. Raises DataError for one that is used and unknown."""
    order = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(used) - order.keys())
    if unknown:
        raise DataError(
            f"The data has {some(unknown)}, which the model does not know; it knows {some(classes)}."
            f"{suggestion(unknown[0], classes)}"
        )
    return np.array([order.get(name, 0) for name in own], dtype=np.int64)


def cleaned(
    found: Iterable[Annotated], stores: Sequence[Store], listed: dict[str, list[str]]
) -> list[Annotated]:
    """The pictures with boxes that can be trained on; what was left out or cut goes to `listed`."""
    sized = (
        picture if picture.size else picture._replace(size=_own_size(picture, stores)) for picture in found
    )
    return [picture._replace(boxes=tuple(_sound(picture, stores, listed))) for picture in sized]


def _own_size(picture: Annotated, stores: Sequence[Store]) -> tuple[int, int] | None:
    """Height and width by the picture's header, for boxes whose file does not tell them."""
    store = stores[picture.store]
    if not picture.boxes:
        return None
    try:
        header = inspect(store.read(picture.entry), store.names[picture.entry])
    except ImageError:  # said when the picture is read
        return None
    return header.height, header.width


def _sound(picture: Annotated, stores: Sequence[Store], listed: dict[str, list[str]]) -> Iterable[Box]:
    name = stores[picture.store].names[picture.entry]
    for box in picture.boxes:
        edges = box[1:5]
        told = f"{name}: {box.label} ({', '.join(f'{edge:g}' for edge in edges)})"
        if not np.isfinite(edges).all():
            listed.setdefault("not numbers", []).append(told)
            continue
        if box.right <= box.left or box.bottom <= box.top:
            listed.setdefault("without area", []).append(told)
            continue
        if picture.size is None:
            yield box
            continue
        height, width = picture.size
        left, right = (min(max(edge, 0.0), float(width)) for edge in (box.left, box.right))
        top, bottom = (min(max(edge, 0.0), float(height)) for edge in (box.top, box.bottom))
        if right <= left or bottom <= top:
            listed.setdefault("outside the picture", []).append(f"{told} in {height}×{width}")
            continue
        if max(abs(a - b) for a, b in zip(edges, (left, top, right, bottom), strict=True)) > EDGE:
            listed.setdefault("cut at the edge", []).append(f"{told} in {height}×{width}")
        yield box._replace(left=left, top=top, right=right, bottom=bottom)
