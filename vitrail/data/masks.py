"""Pictures with index masks: images/ and masks/ side by side, a PNG of class numbers for every picture.

Values of a mask are class numbers from 0; 255 is ignored, and so is every value that the caller names. With
`reduce_zero` 0 is no class (ignored) and 1 is the first. All masks are looked through before training, so that
a value that is no class is named then, and not met as a crash or a wrong score later.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from vitrail.data.boxes import renumbering
from vitrail.data.finding import SPLITS, is_picture, some
from vitrail.data.sources import Source
from vitrail.data.stores import Array, Store, entries
from vitrail.errors import DataError, ImageError

IGNORED = 255
"""What a mask holds where nothing is asked: void, borders, padding."""

PLACES = {
    "images": ("masks", "annotations", "labels"),
    "jpegimages": ("segmentationclass",),
    "img": ("mask",),
}
"""Names of picture folders, and of the mask folders that may stand beside each."""


class Pair(NamedTuple):
    """One picture and its mask."""

    store: int
    entry: int
    split: str
    mask: int
    """Entry of the mask, in the same store."""


class MaskSource(Source):
    """Pictures with masks. The third number of a row is the mask's entry, the fourth the store it lies in."""

    kind = "masks"

    def __init__(
        self,
        stores: Sequence[Store],
        rows: Array,
        classes: Sequence[str],
        values: Array,
        notes: Sequence[str] = (),
        listed: Mapping[str, tuple[str, ...]] | None = None,
        mask_stores: Sequence[Store] = (),
    ) -> None:
        super().__init__(stores, rows, classes, notes)
        self.values = values
        """Uint8 `[256]`: the class number of each value in the files, IGNORED where it has none."""
        self.listed = dict(listed or {})
        self.mask_stores = tuple(mask_stores) or self.stores

    @property
    def labels(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """-1: a picture as a whole has no class."""
        return np.full(len(self), -1, dtype=np.int64)

    def target(self, index: int) -> Array:
        """Class numbers uint8 `[H, W]`, IGNORED where nothing is asked. Raises ImageError."""
        _, _, mask, store = self._rows[index].tolist()
        found: Array = self.values[read_mask(self.mask_stores[store], mask)]
        return found

    def counts(self) -> dict[str, int]:
        """Pixels of each class (every mask is read for it; `listed` names those that cannot be)."""
        total = np.zeros(256, dtype=np.int64)
        for index in range(len(self)):
            with contextlib.suppress(ImageError):
                total += np.bincount(self.target(index).reshape(-1), minlength=256)
        return dict(zip(self.classes, total.tolist(), strict=False))

    def subset(self, indices: Sequence[int] | Array) -> MaskSource:
        rows = self._rows[np.asarray(indices, dtype=np.int64)]
        return self._with(rows=rows)

    def at(self, stores: Sequence[Store], rows: Array) -> MaskSource:
        """The same pictures kept elsewhere (data.cache); masks stay where they are."""
        return self._with(stores=stores, rows=np.concatenate([rows, self._rows[:, 2:]], axis=1))

    def relabel(self, classes: Sequence[str]) -> MaskSource:
        """The same masks with numbers in the order of `classes`. Raises DataError for a class that it lacks."""
        place = np.full(256, IGNORED, dtype=np.uint8)
        place[: len(self.classes)] = renumbering(self.classes, self.classes, classes)
        return self._with(classes=classes, values=place[self.values])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode() + self.values.tobytes())
        for _, _, mask, store in self._rows.tolist():
            digest.update(f"{self.mask_stores[store].size(mask)}\n".encode())
        return digest.hexdigest()

    def _with(self, **changes: Any) -> MaskSource:
        parts = {
            "stores": self.stores, "rows": self._rows, "classes": self.classes, "values": self.values,
            "notes": self.notes, "listed": self.listed, "mask_stores": self.mask_stores,
        }  # fmt: skip
        return MaskSource(**{**parts, **changes})


def mask_places(names: Sequence[list[str]]) -> tuple[str, tuple[str, ...]] | None:
    """The name of the picture folder and those of the mask folders beside it; None where there are no such two."""
    for pictures, masks in PLACES.items():
        folders = {tuple(parts[: place + 1]) for parts in names for place in range(len(parts) - 1)}
        lower = {tuple(part.lower() for part in folder) for folder in folders}
        for folder in lower:
            if folder[-1] == pictures and any((*folder[:-1], mask) in lower for mask in masks):
                return pictures, masks
    return None


def find(store: Store, number: int, listed: dict[str, list[str]]) -> list[Pair]:
    """Pictures with their masks in one store; those without a partner go to `listed`. Raises DataError where no
    picture has one."""
    files = [(entry, parts) for entry, parts in entries(store) if is_picture(parts[-1])]
    places = mask_places([parts for _, parts in files])
    if places is None:
        raise DataError(f"{store.place}: no folders images/ and masks/ side by side.")
    pictures: dict[tuple[str, ...], tuple[int, list[str]]] = {}
    masks: dict[tuple[str, ...], int] = {}
    for entry, parts in files:
        lower = [part.lower() for part in parts[:-1]]
        if places[0] in lower:
            pictures[_key(parts, lower.index(places[0]))] = (entry, parts)
        elif any(place in lower for place in places[1]):
            masks[_key(parts, next(lower.index(place) for place in places[1] if place in lower))] = entry
    found: list[Pair] = []
    bare: list[str] = []
    for key, (entry, parts) in pictures.items():
        if key in masks:
            split = next((SPLITS[part.lower()] for part in parts[:-1] if part.lower() in SPLITS), "")
            found.append(Pair(number, entry, split, masks[key]))
        else:
            bare.append(store.names[entry])
    if not found:
        raise DataError(f"{store.place}: none of {len(pictures)} pictures has a mask of its name.")
    listed.setdefault("pictures without a mask", []).extend(bare)
    over = [store.names[entry] for key, entry in masks.items() if key not in pictures]
    listed.setdefault("masks without a picture", []).extend(over)
    return found


def _key(parts: list[str], place: int) -> tuple[str, ...]:
    stem = os.path.splitext(parts[-1])[0]
    for ending in ("_mask", "_labelids", "_label"):
        stem = stem.removesuffix(ending)
    return (*parts[:place], *parts[place + 1 : -1], stem)


def read_mask(store: Store, entry: int) -> Array:
    """The numbers in a mask, uint8 `[H, W]`. Raises ImageError for a file that is no index mask."""
    from PIL import Image, UnidentifiedImageError

    name = os.path.join(store.place, store.names[entry])
    data = store.read(entry)
    if isinstance(data, np.ndarray):
        return data
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.format != "PNG":
                raise ImageError(f"{name}: a mask is a PNG; {picture.format} changes its numbers.")
            if picture.mode not in ("P", "L", "1", "I;16", "I"):
                raise ImageError(
                    f"{name}: a mask of {picture.mode} colours; an index mask has one number a pixel (grey or"
                    " palette). Turn each colour into its class number first."
                )
            values = np.asarray(picture)
            if picture.mode == "L":
                values = values // _stretch(data)
    except UnidentifiedImageError:  # whose text is an address in memory
        raise ImageError(f"{name}: not a readable mask (no picture in any known format).") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{name}: not a readable mask ({error}).") from None
    if values.dtype != np.uint8:
        largest = int(values.max(initial=0))
        if largest > 255 or values.min(initial=0) < 0:
            raise ImageError(f"{name}: a mask with the value {largest}; class numbers end at 254.")
        values = values.astype(np.uint8)
    return values


def _stretch(data: bytes) -> int:
    """By what Pillow multiplies the grey values of a PNG of 2 or 4 bits, so that the largest becomes 255; else 1."""
    depth = data[24]  # in the header that every PNG begins with
    return 255 // (2**depth - 1) if depth < 8 else 1


def look_through(stores: Sequence[Store], pairs: Sequence[Pair]) -> tuple[Array, Array, list[str]]:
    """Over all masks: pixels of each value int64 `[256]`, masks that hold it, and what could not be read."""
    pixels, files = np.zeros(256, dtype=np.int64), np.zeros(256, dtype=np.int64)
    bad: list[str] = []

    def look(pair: Pair) -> Array | str:
        try:
            return np.bincount(read_mask(stores[pair.store], pair.mask).reshape(-1), minlength=256)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for found in pool.map(look, pairs):
            if isinstance(found, str):
                bad.append(found)
            else:
                pixels += found
                files += found > 0
    return pixels, files, bad


def class_numbers(
    pixels: Array,
    files: Array,
    classes: Sequence[str],
    ignore: Sequence[int],
    reduce_zero: bool,
    where: str,
    notes: list[str],
) -> tuple[tuple[str, ...], Array]:
    """Class names, and the class number of each value, from what the masks hold and what the caller says.

    Raises DataError for a value that is neither a class nor ignored, and for masks whose values are no class
    numbers (0, 128, 255 for one).
    """
    first = 1 if reduce_zero else 0
    ignored = {IGNORED, *ignore, *(range(first))}
    met = [value for value in np.flatnonzero(pixels).tolist() if value not in ignored]
    if not met:
        raise DataError(f"{where}: the masks hold nothing but ignored values ({_values(pixels, files)}).")
    count = len(classes) or max(met) + 1 - first
    strange = [value for value in met if value >= count + first]
    if strange:
        share = pixels[strange].sum() / pixels.sum()
        raise DataError(
            f"{where}: the masks hold {_values(pixels, files, strange)}, {share:.1%} of all pixels, and there are"
            f" {count} classes ({some(classes)}), numbers {first} to {count - 1 + first}. Name what is no class"
            f" with --ignore {' '.join(map(str, strange))}, or name more classes."
        )
    unmet = [value for value in range(first, count + first) if value not in met and value not in ignored]
    if not classes and len(unmet) > len(met):
        row = next(value for value in range(first, 257) if value not in met)  # where the numbers in a row end
        strays = [value for value in met if value > row]
        told = (
            f" Behind {row - 1} there is a gap: if {some(strays)} {'are' if len(strays) > 1 else 'is'} no class, say"
            f" --ignore {' '.join(map(str, strays))}; else renumber them,"
        )
        raise DataError(
            f"{where}: the masks hold {_values(pixels, files, met)}: no class numbers in a row from {first}."
            f"{told if row > first else ' Renumber them,'} or name the classes with --classes."
        )
    if count < 2:
        raise DataError(
            f"{where}: the masks hold one class only ({_values(pixels, files)}); a segmenter needs two or more."
            + (" 255 never is one: write 1 in its place." if pixels[IGNORED] else "")
        )
    if unmet:
        notes.append(f"No mask holds {some(unmet, 10)}; nothing is learned about them.")
    table = np.full(256, IGNORED, dtype=np.uint8)
    kept = [value for value in range(first, count + first) if value not in ignored]
    names = tuple(classes) or tuple(f"class {value - first}" for value in range(first, count + first))
    for value in kept:
        table[value] = value - first
    void = pixels[[value for value in ignored if 0 <= value < 256]].sum() / pixels.sum()
    if void:
        notes.append(f"{void:.1%} of the pixels are ignored (values {some(sorted(ignored))}).")
    return names, table


def _values(pixels: Array, files: Array, which: Sequence[int] | None = None) -> str:
    chosen = np.flatnonzero(pixels).tolist() if which is None else which
    return "the values " + some((f"{value} ({int(files[value])} masks)" for value in chosen), 8)
