"""Data sets with boxes or masks, made in memory: names and bytes of files, to be written as a folder or a .zip."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pictures import encoded, noise
from PIL import Image

Tree = dict[str, bytes]

HEIGHT, WIDTH = 24, 32


def picture(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    return encoded(noise(height, width, seed))


def packed(tree: Tree, where: Path, as_zip: bool = False) -> str:
    """The tree as a folder, or as one .zip."""
    if as_zip:
        with zipfile.ZipFile(where / "data.zip", "w") as archive:
            for name, data in tree.items():
                archive.writestr(name, data)
        return str(where / "data.zip")
    for name, data in tree.items():
        path = where / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(where / "data")


def xml(
    *objects: tuple[str, float, float, float, float], size: tuple[int, int] | None = (HEIGHT, WIDTH)
) -> bytes:
    inside = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for name, a, b, c, d in objects
    )
    told = f"<size><width>{size[1]}</width><height>{size[0]}</height></size>" if size else ""
    return f"<annotation>{told}{inside}</annotation>".encode()


def voc(annotations: Mapping[str, bytes], lists: Mapping[str, Sequence[str]], root: str = "VOC") -> Tree:
    """A VOC tree: xml by name, and the names in each list of ImageSets/Main."""
    tree = {f"{root}/JPEGImages/{name}.png": picture(seed) for seed, name in enumerate(annotations)}
    tree |= {f"{root}/Annotations/{name}.xml": data for name, data in annotations.items()}
    return tree | {
        f"{root}/ImageSets/Main/{name}.txt": "\n".join(names).encode() for name, names in lists.items()
    }


def coco(
    images: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    categories: Sequence[tuple[int, str]] = ((1, "cat"), (2, "dog")),
) -> bytes:
    table = {
        "images": list(images),
        "annotations": [{"id": number, **item} for number, item in enumerate(annotations)],
        "categories": [{"id": number, "name": name} for number, name in categories],
    }
    return json.dumps(table).encode()


def image(number: int, name: str, size: tuple[int, int] = (HEIGHT, WIDTH)) -> dict[str, Any]:
    return {"id": number, "file_name": name, "height": size[0], "width": size[1]}


def box(number: int, category: int, *bbox: float, **more: Any) -> dict[str, Any]:
    return {"image_id": number, "category_id": category, "bbox": list(bbox), **more}


def mask(values: Any, mode: str = "L") -> bytes:
    array = np.asarray(values)
    array = np.kron(array, np.ones((HEIGHT // array.shape[0], WIDTH // array.shape[1]))).astype(np.uint8)
    return encoded(
        Image.fromarray(array).convert("L") if mode == "L" else Image.fromarray(array).convert(mode)
    )


def masks(**values: Any) -> Tree:
    """`train_a=[[0, 1]]` is images/train/a.png with a mask of these blocks."""
    tree: Tree = {}
    for seed, (name, blocks) in enumerate(values.items()):
        path = name.replace("_", "/")
        tree[f"images/{path}.png"] = picture(seed)
        tree[f"masks/{path}.png"] = blocks if isinstance(blocks, bytes) else mask(blocks)
    return tree
