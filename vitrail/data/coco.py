"""COCO json: `images`, `annotations` and `categories` in one file for each split, the pictures beside it.

Files are known by their names (`annotations/instances_train2017.json`, `train/_annotations.coco.json`) or named
themselves; the split is a word in the name of the file or of its folder.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from vitrail.data.boxes import Annotated, Box
from vitrail.data.finding import SPLITS, is_picture, some
from vitrail.data.stores import Store, entries
from vitrail.errors import DataError

LARGEST = 4 * 2**30
"""Bytes of a json file: COCO's own has half a gigabyte."""


def annotation_files(store: Store) -> list[tuple[int, list[str]]]:
    """Entries that are COCO json by their names, with the parts of their names."""
    found = [(entry, parts) for entry, parts in entries(store) if parts[-1].lower().endswith(".json")]
    meant = [item for item in found if _is_meant(item[1][-1].lower())]
    if meant:
        return meant
    return [item for item in found if len(item[1]) > 1 and item[1][-2].lower() == "annotations"]


def _is_meant(name: str) -> bool:
    return name.startswith("instances") or name.endswith(".coco.json")


def find(
    store: Store,
    number: int,
    files: Iterable[tuple[int, list[str]]],
    notes: list[str],
    listed: dict[str, list[str]],
) -> tuple[list[Annotated], dict[str, Any]]:
    """The pictures of some json files of a store with their boxes, and the id of every class, in the order of the ids.

    Raises DataError for a file that is no COCO json, an annotation of an unknown picture or category, or
    pictures that are nowhere to be found.
    """
    by_name: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for entry, parts in entries(store):
        if is_picture(parts[-1]):
            by_name[parts[-1]].append((entry, "/".join(parts)))
    found: list[Annotated] = []
    classes: dict[str, Any] = {}
    for entry, parts in files:
        where = os.path.join(store.place, store.names[entry])
        table = _table(store, entry, where)
        names = _categories(table, where, notes)
        split = split_of(parts)
        boxes = _boxes(table, names, where)
        found += _pictures(table, boxes, by_name, (number, split, parts[:-1]), where, listed)
        if classes and set(names.values()) != set(classes):
            notes.append(
                f"{where} lists other categories than the file before it; classes go by their names."
            )
        for id, name in names.items():
            classes.setdefault(name, id)
    return found, classes


def split_of(parts: list[str]) -> str:
    """train, val, test or nothing, from the words in the name of a file, else of its folders."""
    for part in reversed(parts):
        words = re.findall(r"[a-z]+", part.lower())
        told = [SPLITS[word] for word in words if word in SPLITS]
        if told:
            return told[0]
    return ""


def _table(store: Store, entry: int, where: str) -> Mapping[str, Any]:
    data = store.read(entry, LARGEST)
    assert isinstance(data, bytes)
    try:
        table = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where}: not a json file ({error}).") from None
    wanted = ("images", "annotations", "categories")
    if not isinstance(table, dict) or not all(isinstance(table.get(key), list) for key in wanted):
        raise DataError(f"{where}: COCO json has the lists images, annotations and categories.")
    if any(isinstance(item, dict) and "segments_info" in item for item in table["annotations"][:1]):
        raise DataError(
            f"{where}: panoptic annotations, which vitrail does not read; it reads boxes: give the instances_*.json"
            " of these pictures."
        )
    return table


def _categories(table: Mapping[str, Any], where: str, notes: list[str]) -> dict[Any, str]:
    """Names by id, in the order of the ids."""
    try:
        names = {item["id"]: str(item["name"]) for item in sorted(table["categories"], key=lambda c: c["id"])}
    except (KeyError, TypeError):
        raise DataError(f"{where}: every category needs an id and a name.") from None
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    twice += _twice(table["categories"])
    if twice:
        raise DataError(f"{where}: categories with the same name or id ({some(twice)}).")
    ids = list(names)
    if ids and ids != list(range(len(ids))):
        notes.append(
            f"{where}: category ids {ids[0]}..{ids[-1]} are counted 0..{len(ids) - 1} here, in the same order."
        )
    return names


def _twice(items: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The ids that more than one of the items have."""
    return [id for id, count in Counter(item.get("id") for item in items).items() if count > 1]


def _boxes(table: Mapping[str, Any], names: Mapping[Any, str], where: str) -> dict[Any, list[Box]]:
    """Boxes by picture id."""
    boxes: dict[Any, list[Box]] = {}
    for image in table["images"]:
        if not isinstance(image, dict):
            raise DataError(f"{where}: images are objects with id and file_name; got {image!r}.")
        boxes[image.get("id")] = []
    if twice := _twice(table["images"]):
        raise DataError(f"{where}: images with the same id, or without one ({some(twice)}).")
    strange: Counter[str] = Counter()
    for item in table["annotations"]:
        try:
            if item["category_id"] not in names:
                strange[f"category_id {item['category_id']!r}"] += 1
            elif item["image_id"] not in boxes:
                strange[f"image_id {item['image_id']!r}"] += 1
            elif item.get("bbox"):
                left, top, wide, tall = _edges(item["bbox"])
                area = item.get("area")
                box = Box(
                    names[item["category_id"]], left, top, left + wide, top + tall,
                    bool(item.get("iscrowd", 0)), float(area) if area else None,
                )  # fmt: skip
                boxes[item["image_id"]].append(box)
            else:
                strange["no bbox"] += 1
        except KeyError as error:
            raise DataError(f"{where}: annotation {item.get('id')} has no {error.args[0]}.") from None
        except (AttributeError, TypeError, ValueError) as error:
            told = f"annotation {item.get('id')}" if isinstance(item, dict) else "an annotation"
            raise DataError(f"{where}: {told} is not whole: {error}.") from None
    if strange:
        told = some(f"{name} ({count} times)" for name, count in strange.items())
        told_names = f"categories {some(map(repr, names))}" if names else "no categories"
        raise DataError(
            f"{where}: annotations that fit nothing: {told}. It has {told_names} and"
            f" {len(boxes)} images; fix the file, or its boxes would be lost in silence."
        )
    return boxes


def _edges(told: Any) -> tuple[float, float, float, float]:
    """The four numbers of a bbox. Raises ValueError."""
    try:
        left, top, wide, tall = (float(value) for value in told)
    except (TypeError, ValueError):
        raise ValueError(f"bbox is [left, top, width, height] in pixels; got {told!r}") from None
    return left, top, wide, tall


def _pictures(
    table: Mapping[str, Any],
    boxes: Mapping[Any, list[Box]],
    by_name: Mapping[str, list[tuple[int, str]]],
    home: tuple[int, str, list[str]],
    where: str,
    listed: dict[str, list[str]],
) -> Iterable[Annotated]:
    number, split, folder = home
    for item in table["images"]:
        edges = (item.get("height"), item.get("width"))
        if not all(edge is None or (isinstance(edge, int | float) and edge >= 0) for edge in edges):
            raise DataError(f"{where}: height and width of an image are numbers of pixels; got {item}.")
    missing: list[str] = []
    found: list[Annotated] = []
    for item in table["images"]:
        name = str(item.get("file_name", "")).replace("\\", "/")
        entry = _entry(name, by_name, split, folder)
        if entry is None:
            missing.append(name)
            continue
        height, width = item.get("height"), item.get("width")
        size = (int(height), int(width)) if height and width else None
        found.append(Annotated(number, entry, split, size, tuple(boxes[item["id"]])))
    if missing and not found:
        raise DataError(f"{where}: none of its {len(missing)} images is there, such as {missing[0]!r}.")
    listed.setdefault("listed but not there", []).extend(missing)
    return found


def _entry(
    name: str, by_name: Mapping[str, list[tuple[int, str]]], split: str, folder: list[str]
) -> int | None:
    """The picture of a file_name: at that path from somewhere, in the split or the json's folder if several."""
    ways = [
        (entry, path)
        for entry, path in by_name.get(name.rpartition("/")[2], ())
        if path == name or path.endswith("/" + name)
    ]
    if len(ways) > 1:
        beside = "/".join([*folder, name])
        nearer = [way for way in ways if way[1] == beside] or [
            way for way in ways if split and split_of(way[1].split("/")[:-1]) == split
        ]
        ways = nearer or ways
    return ways[0][0] if ways else None
