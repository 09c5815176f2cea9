"""Pascal VOC: one xml file of boxes for each picture, in Annotations/ beside JPEGImages/ or beside the picture.

Splits come from ImageSets/Main/{train,val,test}.txt, else from the names of folders. Coordinates are taken as
they are written, as edges in pixels.
"""

from __future__ import annotations

import os
from collections import defaultdict
from xml.etree import ElementTree

from vitrail.data.boxes import Annotated, Box
from vitrail.data.finding import SPLITS, is_picture, some
from vitrail.data.stores import Store, entries
from vitrail.errors import DataError

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def annotation_files(store: Store) -> list[tuple[int, list[str]]]:
    """Entries that are VOC annotations by their names."""
    return [(entry, parts) for entry, parts in entries(store) if parts[-1].lower().endswith(".xml")]


def find(store: Store, number: int, notes: list[str], listed: dict[str, list[str]]) -> list[Annotated]:
    """The pictures of a store that have an xml file, with their boxes. Raises DataError for a damaged file."""
    pictures: dict[tuple[str, str], int] = {}
    for entry, parts in entries(store):
        if is_picture(parts[-1]):
            pictures[_key(parts)] = entry
    sets = _sets(store)
    found: list[Annotated] = []
    seen: set[tuple[str, str]] = set()
    alone: list[str] = []
    unlisted: list[str] = []
    hard = 0
    for entry, parts in annotation_files(store):
        key = _key(parts)
        where = store.names[entry]
        if key not in pictures:
            alone.append(where)
            continue
        seen.add(key)
        size, boxes = _read(store, entry)
        hard += sum(box.crowd for box in boxes)
        split = sets.get(key, "") if sets else _split(parts)
        if sets and not split:
            unlisted.append(where)
            continue
        found.append(Annotated(number, pictures[key], split, size, boxes))
    if alone and not found:
        raise DataError(f"{store.place}: no picture beside its {len(alone)} xml files, such as {alone[0]}.")
    listed.setdefault("annotations without a picture", []).extend(alone)
    listed.setdefault("in no ImageSets/Main list", []).extend(unlisted)
    left = sorted(store.names[entry] for key, entry in pictures.items() if key not in seen)
    listed.setdefault("pictures without an annotation file", []).extend(left)
    lost = sorted(name for key, name in _named(store).items() if key not in pictures)
    listed.setdefault("listed but not there", []).extend(lost)
    if hard:
        notes.append(
            f"{store.place}: {hard} boxes are marked difficult: as in VOC, they are neither learned nor counted."
        )
    return found


def _key(parts: list[str]) -> tuple[str, str]:
    """What a picture and its xml share: the folder that holds Annotations/ and JPEGImages/ (or both files), and
    the name without its ending."""
    folders = [part for part in parts[:-1] if part.lower() not in ("annotations", "jpegimages", "images")]
    return "/".join(folders), os.path.splitext(parts[-1])[0]


def _split(parts: list[str]) -> str:
    return next((SPLITS[part.lower()] for part in parts[:-1] if part.lower() in SPLITS), "")


def _named(store: Store) -> dict[tuple[str, str], str]:
    return {key: f"{'/'.join(filter(None, key))} ({split})" for key, split in _sets(store).items()}


def _sets(store: Store) -> dict[tuple[str, str], str]:
    """The split of each picture that ImageSets/Main lists."""
    lists: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for entry, parts in entries(store):
        name = os.path.splitext(parts[-1].lower())[0]
        if name in SPLITS and [part.lower() for part in parts[-3:-1]] == ["imagesets", "main"]:
            data = store.read(entry)
            assert isinstance(data, bytes)
            for line in data.decode("utf-8", "replace").split("\n"):
                if line.strip():
                    lists[SPLITS[name]].append(("/".join(parts[:-3]), line.split()[0]))
    found: dict[tuple[str, str], str] = {}
    twice: list[str] = []
    for split, keys in lists.items():
        for key in keys:
            if found.setdefault(key, split) != split:
                twice.append(key[1])
    if twice:
        raise DataError(f"{store.place}: in two lists of ImageSets/Main: {some(twice)}.")
    return found


def _read(store: Store, entry: int) -> tuple[tuple[int, int] | None, tuple[Box, ...]]:
    """Size and boxes."""
    where = os.path.join(store.place, store.names[entry])
    data = store.read(entry)
    assert isinstance(data, bytes)
    if b"<!ENTITY" in data:
        raise DataError(f"{where}: an annotation defines no entities.")
    try:
        root = ElementTree.fromstring(data)
        boxes = tuple(_box(item) for item in root.findall("object"))
        tall, wide = (float(root.findtext(f"size/{side}") or 0) for side in ("height", "width"))
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{where}: not a whole VOC annotation ({error}).") from None
    return ((int(tall), int(wide)) if tall > 0 and wide > 0 else None), boxes


def _box(item: ElementTree.Element) -> Box:
    left, top, right, bottom = (float(_text(item, f"bndbox/{corner}")) for corner in CORNERS)
    difficult = (item.findtext("difficult") or "0").strip() == "1"
    return Box(_text(item, "name"), left, top, right, bottom, crowd=difficult)


def _text(item: ElementTree.Element, path: str) -> str:
    text = (item.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"an object has no {path}")
    return text
