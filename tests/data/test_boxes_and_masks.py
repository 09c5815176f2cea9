"""Boxes and masks as people have them: every layout, and a clear word about everything that is odd."""

from __future__ import annotations

import json
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dense_worlds import box, coco, image, mask, masks, packed, picture, voc, xml

from vitrail.data.cache import cached
from vitrail.data.dense import class_names, kinds_of, open_boxes, open_masks
from vitrail.errors import ConfigError, DataError

CAT, DOG = ("cat", 1.0, 2.0, 11.0, 12.0), ("dog", 4.0, 4.0, 30.0, 20.0)


def small_voc(**changes: bytes) -> dict[str, bytes]:
    """Three training pictures and one for validation."""
    notes = {"a": xml(CAT), "b": xml(DOG), "c": xml(CAT, DOG), "d": xml(CAT, DOG)} | changes
    return voc(notes, {"train": ["a", "b", "c"], "val": ["d"]})


@pytest.mark.parametrize("as_zip", [False, True])
def test_voc_is_read_with_its_lists(tmp_path: Path, as_zip: bool) -> None:
    path = packed(small_voc(), tmp_path, as_zip)
    assert kinds_of([path]) == ("boxes",)
    splits = open_boxes([path])
    assert splits.given == ("train", "val") and splits.train is not None and splits.val is not None
    assert splits.train.classes == ("cat", "dog") and len(splits.train) == 3 and len(splits.val) == 1
    source: Any = pickle.loads(pickle.dumps(splits.train))
    found = source.target(2)
    assert found.boxes.tolist() == [[1, 2, 11, 12], [4, 4, 30, 20]]
    assert found.labels.tolist() == [0, 1] and found.size == (24, 32) and found.area.tolist() == [100, 416]
    assert splits.train.counts() == {"cat": 2, "dog": 2}


def test_what_voc_calls_difficult_is_neither_learned_nor_counted(tmp_path: Path) -> None:
    hard = xml(CAT, DOG).replace(b"<difficult>0", b"<difficult>1", 1)
    splits = open_boxes([packed(small_voc(c=hard), tmp_path)])
    assert splits.train is not None
    assert splits.train.target(2).crowd.tolist() == [True, False]
    assert any("1 boxes are marked difficult" in note for note in splits.notes)


@pytest.mark.parametrize("as_zip", [False, True])
def test_coco_is_read_and_gaps_in_its_ids_are_closed(tmp_path: Path, as_zip: bool) -> None:
    many = ((7, "dog"), (3, "cat"), (90, "cow"))
    tree = {f"train2017/{n}.png": picture(n) for n in (5, 8)} | {"val2017/5.png": picture(9)}
    tree["annotations/instances_train2017.json"] = coco(
        [image(50, "5.png"), image(80, "8.png")],
        [box(50, 7, 1, 2, 10, 10), box(80, 3, 0, 0, 4, 4, iscrowd=1), box(80, 90, 1, 1, 5, 6, area=11)],
        many,
    )
    tree["annotations/instances_val2017.json"] = coco([image(1, "5.png")], [box(1, 3, 1, 1, 5, 5)], many)
    path = packed(tree, tmp_path, as_zip)
    splits = open_boxes([path])
    train: Any = splits.train
    assert train.classes == ("cat", "dog", "cow") and len(train) == 2
    assert train.table.ids == {"cat": 3, "dog": 7, "cow": 90}
    assert "val has no box of dog, cow." in splits.notes
    assert any("ids 3..90 are counted 0..2" in note for note in splits.notes)
    assert train.target(0).boxes.tolist() == [[1, 2, 11, 12]] and train.target(0).labels.tolist() == [1]
    assert train.target(1).crowd.tolist() == [True, False] and train.target(1).area.tolist() == [16, 11]
    assert splits.val is not None and splits.val.name(0).endswith("val2017/5.png"), (
        "not train's of the same name"
    )


def test_a_json_is_named_itself_or_lies_beside_its_pictures(tmp_path: Path) -> None:
    tree = {f"set/train/{n}.png": picture(n) for n in range(4)}
    tree["set/train/_annotations.coco.json"] = coco(
        [image(n, f"{n}.png") for n in range(4)], [box(n, 1, 1, 1, 5, 5) for n in range(4)], ((1, "cat"),)
    )
    path = packed(tree, tmp_path)
    splits = open_boxes([path])
    assert (
        splits.train is not None
        and len(splits.train) + len(splits.val or ()) == 4
        and splits.given == ("train",)
    )
    named = open_boxes([f"{path}/set/train/_annotations.coco.json"], val_share=0.0)
    assert kinds_of([f"{path}/set/train/_annotations.coco.json"]) == ("boxes",)
    assert named.train is not None and len(named.train) == 4 and named.val is None
    with pytest.raises(DataError, match="no such file"):
        open_boxes([f"{path}/nothing.json"])


def test_boxes_that_cannot_be_learned_are_left_out_or_cut_and_listed(tmp_path: Path) -> None:
    flat, far = ("cat", 5.0, 5.0, 5.0, 9.0), ("cat", 40.0, 2.0, 50.0, 9.0)
    over, edge = ("dog", -6.0, 4.0, 20.0, 20.0), ("dog", 1.0, 1.0, 32.5, 24.0)
    none = ("cat", float("nan"), 1.0, 5.0, 5.0)
    tree = small_voc(a=xml(CAT, flat, far, none), b=xml(DOG, over, edge))
    splits = open_boxes([packed(tree, tmp_path)])
    train: Any = splits.train
    assert train.target(0).boxes.tolist() == [[1, 2, 11, 12]]
    assert train.target(1).boxes.tolist() == [[4, 4, 30, 20], [0, 4, 20, 20], [1, 1, 32, 24]]
    assert {kind: len(names) for kind, names in train.listed.items()} == {
        "without area": 1, "outside the picture": 1, "not numbers": 1, "cut at the edge": 1,
    }  # fmt: skip
    told = "\n".join(splits.notes)
    assert "1 boxes without area are left out: VOC/JPEGImages/a.png: cat (5, 5, 5, 9)." in told
    assert "1 boxes wholly outside" in told and "1 boxes reach over the edge" in told


@pytest.mark.parametrize("as_zip", [False, True])
def test_boxes_whose_file_tells_no_size_are_held_against_the_picture(tmp_path: Path, as_zip: bool) -> None:
    notes = {"a": xml(("cat", -9, 2, 40, 12), ("dog", 60, 4, 90, 20), CAT, size=None)}
    splits = open_boxes([packed(voc(notes, {"train": ["a"]}), tmp_path, as_zip)])
    assert splits.train is not None
    found: Any = splits.train
    assert found.target(0).boxes.tolist() == [[0, 2, 32, 12], [1, 2, 11, 12]]
    assert {kind: len(lines) for kind, lines in found.listed.items()} == {
        "outside the picture": 1, "cut at the edge": 1,
    }  # fmt: skip


def test_pictures_without_labels_and_without_boxes_are_told_apart(tmp_path: Path) -> None:
    tree = small_voc(c=xml())
    tree["VOC/JPEGImages/lonely.png"] = picture(9)
    tree["VOC/Annotations/ghost.xml"] = xml(CAT)
    tree["VOC/ImageSets/Main/train.txt"] += b"\nnowhere"
    splits = open_boxes([packed(tree, tmp_path)])
    train: Any = splits.train
    assert len(train) == 3 and len(train.target(2).labels) == 0
    told = "\n".join(splits.notes)
    for said in (
        "1 of 4 pictures have no box: they teach what is none", "1 pictures have no annotation file",
        "1 annotation files have no picture", "1 listed pictures are not there",
    ):  # fmt: skip
        assert said in told


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not a json file"),
        (b'{"images": []}', "COCO json has the lists"),
        (coco([image(1, "1.png")], [box(1, 5, 1, 1, 5, 5)]), r"category_id 5 \(1 times\)"),
        (coco([image(1, "1.png")], [box(77, 1, 1, 1, 5, 5)]), r"image_id 77 \(1 times\)"),
        (
            coco([image(1, "1.png")], [box(1, "1", 1, 1, 5, 5)]),  # type: ignore[arg-type]
            r"category_id '1' \(1 times\). It has categories 1, 2",
        ),
        (coco([image(1, "1.png")], [{"image_id": 1, "category_id": 1}]), "no bbox"),
        (
            coco([image(1, "1.png")], [box(1, 1, 1, 1, 5)]),
            r"annotation 0 is not whole: bbox is \[left.*got \[1, 1, 5\]",
        ),
        (coco([image(1, "1.png"), image(1, "2.png")], []), "images with the same id"),
        (coco([image(1, "9.png")], []), "none of its 1 images is there"),
        (coco(["1.png"], []), "images are objects with id and file_name; got '1.png'"),  # type: ignore[list-item]
        (coco([{**image(1, "1.png"), "height": "tall"}], []), "height and width of an image are numbers"),
        (coco([image(1, "1.png")], [], ((1, "cat"), (2, "cat"))), "categories with the same name"),
        (coco([image(1, "1.png"), image(2, "2.png")], []), "not one sound box to learn from"),
    ],
)
def test_a_coco_json_that_means_nothing_is_an_error_that_names_it(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    tree = {"annotations/instances_train.json": content, "train/1.png": picture(1), "train/2.png": picture(2)}
    with pytest.raises(DataError, match=reason):
        open_boxes([packed(tree, tmp_path)])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<annotation>", "not a whole VOC annotation"),
        (b"<annotation><object><name>cat</name></object></annotation>", "an object has no bndbox/xmin"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "defines no entities"),
        (xml(("cow", 1.0, 1.0, 5.0, 5.0)), None),
    ],
)
def test_a_damaged_xml_is_an_error_that_names_it(tmp_path: Path, content: bytes, reason: str | None) -> None:
    path = packed(small_voc(a=content), tmp_path)
    if reason is None:
        assert open_boxes([path]).everything.classes == ("cat", "cow", "dog")
        with pytest.raises(DataError, match="cow, which --classes does not name"):
            open_boxes([path], classes=("cat", "dog"))
        return
    with pytest.raises(DataError, match=f"a.xml: .*{reason}|a.xml: {reason}"):
        open_boxes([path])


def test_what_only_validation_has_cannot_be_learned(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="val has boxes of cow, of which train has none"):
        open_boxes([packed(small_voc(d=xml(("cow", 1.0, 1.0, 5.0, 5.0))), tmp_path)])


def test_val_is_held_back_by_name_where_there_is_none(tmp_path: Path) -> None:
    tree = voc({f"p{n}": xml(CAT, DOG) for n in range(10)}, {})
    splits = open_boxes([packed(tree, tmp_path)], val_share=0.2)
    assert splits.train is not None and splits.val is not None and splits.given == ()
    assert len(splits.train) == 8 and len(splits.val) == 2
    again = open_boxes([packed(tree, tmp_path)], val_share=0.2)
    assert again.val is not None and again.val.name(0) == splits.val.name(0)
    assert again.train is not None and again.train.fingerprint() == splits.train.fingerprint()


@pytest.mark.parametrize("as_zip", [False, True])
def test_masks_are_read_with_their_folders_as_splits(tmp_path: Path, as_zip: bool) -> None:
    tree = masks(train_a=[[0, 1], [2, 255]], train_b=[[0, 0], [1, 1]], val_c=[[2, 1], [0, 0]])
    path = packed({f"Set/{name}": data for name, data in tree.items()}, tmp_path, as_zip)
    assert kinds_of([path]) == ("masks",)
    splits = open_masks([path], classes=("sky", "road", "car"))
    train: Any = splits.train
    assert splits.given == ("train", "val") and train.classes == ("sky", "road", "car")
    found = pickle.loads(pickle.dumps(train)).target(0)
    assert found.dtype == np.uint8 and found.shape == (24, 32)
    assert [found[0, 0], found[0, -1], found[-1, 0], found[-1, -1]] == [0, 1, 2, 255]
    assert train.counts()["sky"] == 192 + 384


def narrow_mask(depth: int) -> bytes:
    """A grey PNG of so many bits a pixel, 24 rows of 32: columns of 0 and the largest value, in turns."""
    pixels = "".join(f"{(column % 2) * (2**depth - 1):0{depth}b}" for column in range(32))
    row = b"\0" + int(pixels, 2).to_bytes(32 * depth // 8, "big")

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 32, 24, depth, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(row * 24)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_masks_of_few_bits_keep_their_numbers(tmp_path: Path, depth: int) -> None:
    path, names = packed(masks(train_a=narrow_mask(depth)), tmp_path), tuple("abcdefghijklmnop"[: 2**depth])
    source: Any = open_masks([path], classes=names, val_share=0.0).everything
    assert np.unique(source.target(0)).tolist() == [0, 2**depth - 1]  # Pillow stretches them to 255


def test_values_of_masks_are_classes_ignored_or_an_error(tmp_path: Path) -> None:
    path = packed(masks(train_a=[[0, 1], [2, 11]], val_b=[[0, 1], [2, 2]]), tmp_path)
    with pytest.raises(DataError, match=r"hold the values 11 \(1 masks\), 12.5% of all pixels.*--ignore 11"):
        open_masks([path], classes=("a", "b", "c"))
    splits = open_masks([path], classes=("a", "b", "c"), ignore=(11,))
    train: Any = splits.train
    assert train.target(0)[-1, -1] == 255
    assert any("12.5% of the pixels are ignored (values 11, 255)" in note for note in splits.notes)
    unnamed = open_masks([path], ignore=(11,))
    assert unnamed.everything.classes == ("class 0", "class 1", "class 2")
    assert any("Nothing names the classes" in note for note in unnamed.notes)
    with pytest.raises(ConfigError, match=r"ignore takes values of masks, 0..255; got 300"):
        open_masks([path], ignore=(300,))


def test_zero_can_be_no_class(tmp_path: Path) -> None:
    path = packed(masks(train_a=[[0, 1], [2, 3]], val_b=[[0, 1], [2, 2]]), tmp_path)
    splits = open_masks([path], classes=("a", "b", "c"), reduce_zero=True)
    train: Any = splits.train
    found = train.target(0)
    assert [found[0, 0], found[0, -1], found[-1, 0], found[-1, -1]] == [255, 0, 1, 2]
    with pytest.raises(
        DataError, match=r"hold the values 3 .*there are 3 classes \(a, b, c\), numbers 0 to 2"
    ):
        open_masks([path], classes=("a", "b", "c"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (mask([[0, 128], [255, 0]]), "no class numbers in a row"),
        (mask([[0, 1], [2, 200]]), "if 200 is no class, say --ignore 200"),
        (mask([[0, 0], [255, 0]]), "one class only.* write 1 in its place"),
        (mask([[255, 255]]), "nothing but ignored values"),
    ],
)
def test_masks_without_class_numbers_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        open_masks([packed(masks(train_a=content, val_b=content), tmp_path)])


def test_files_that_are_no_index_masks_are_named(tmp_path: Path) -> None:
    tree = masks(train_a=[[0, 1]], train_b=mask([[0, 1]], "RGB"), val_c=[[0, 1]])
    splits = open_masks([packed(tree, tmp_path)])
    assert any("1 masks cannot be read" in note and "RGB colours" in note for note in splits.notes)
    only = masks(train_a=mask([[0, 1]], "RGB"))
    with pytest.raises(DataError, match=r"no mask can be read.*an index mask has one number a pixel"):
        open_masks([packed(only, tmp_path / "only")])


def test_pictures_without_a_mask_are_left_out_and_told(tmp_path: Path) -> None:
    tree = masks(train_a=[[0, 1]], val_b=[[0, 1]])
    tree["images/train/bare.png"] = picture(7)
    tree["masks/val/ghost.png"] = mask([[0, 1]])
    splits = open_masks([packed(tree, tmp_path)])
    assert splits.train is not None and len(splits.train) == 1
    told = "\n".join(splits.notes)
    assert "1 pictures have no mask and are left out: images/train/bare.png." in told
    assert "1 masks have no picture" in told
    with pytest.raises(DataError, match="none of 1 pictures has a mask of its name"):
        open_masks([packed({"images/a.png": picture(), "masks/b.png": mask([[0, 1]])}, tmp_path / "other")])


def test_class_names_come_from_words_a_file_or_the_data(tmp_path: Path) -> None:
    assert class_names(("a", "b")) == ("a", "b")
    (tmp_path / "names.txt").write_text("sky\n\nroad \n")
    assert class_names((str(tmp_path / "names.txt"),)) == ("sky", "road")
    with pytest.raises(ConfigError, match="cannot be read"):
        class_names((str(tmp_path / "none.txt"),))
    with pytest.raises(ConfigError, match="names a more than once"):
        class_names(("a", "b", "a"))
    tree = masks(train_a=[[0, 1]], val_b=[[0, 1]]) | {"classes.txt": b"sky\nroad\n"}
    assert open_masks([packed(tree, tmp_path)]).everything.classes == ("sky", "road")


def test_sources_of_boxes_and_masks_can_be_cut_relabelled_and_kept_in_memory(tmp_path: Path) -> None:
    boxes: Any = open_boxes([packed(small_voc(), tmp_path / "boxes")]).train
    other = boxes.relabel(("dog", "cow", "cat"))
    assert other.target(2).labels.tolist() == [2, 0] and boxes.target(2).labels.tolist() == [0, 1]
    with pytest.raises(DataError, match="the model does not know; it knows dog"):
        boxes.relabel(("dog",))
    kept: Any = cached(boxes.subset([2, 0]))
    assert kept.target(1).labels.tolist() == [0] and kept.read(0).shape == (24, 32, 3)
    assert kept.fingerprint() != boxes.fingerprint()
    path = packed(masks(train_a=[[0, 1]], train_b=[[1, 1]], val_c=[[0, 1]]), tmp_path / "masks")
    source: Any = open_masks([path], classes=("a", "b")).train
    assert np.unique(source.relabel(("b", "c", "a")).target(0)).tolist() == [0, 2]
    held: Any = cached(source.subset([1]))
    assert np.unique(held.target(0)).tolist() == [1] and held.read(0).shape == (24, 32, 3)


def test_kinds_are_told_by_names(tmp_path: Path) -> None:
    folders = packed({"train/cat/1.png": picture(), "train/dog/2.png": picture()}, tmp_path / "classes")
    assert kinds_of([folders]) == ("classes",) and kinds_of(["digits"]) == ("classes",)
    both = small_voc() | {"VOC/SegmentationClass/a.png": mask([[0, 1]])}
    assert kinds_of([packed(both, tmp_path / "both")]) == ("boxes", "masks")
    with pytest.raises(DataError, match="different kinds of data"):
        kinds_of([folders, packed(small_voc(), tmp_path / "voc")])


def test_a_mask_that_cannot_be_read_is_left_out_of_every_count(tmp_path: Path) -> None:
    tree = {f"images/{n}.png": picture(n) for n in range(4)}
    tree |= {f"masks/{n}.png": mask(np.full((24, 32), n % 2)) for n in range(3)} | {
        "masks/3.png": b"nonsense"
    }
    splits = open_masks([packed(tree, tmp_path)], val_share=0.0)
    assert splits.everything.listed["unreadable masks"][0].endswith("(no picture in any known format).")
    assert splits.everything.counts() == {"class 0": 1536, "class 1": 768}


def test_panoptic_annotations_are_named(tmp_path: Path) -> None:
    told = {
        "images": [image(1, "1.png")],
        "categories": [],
        "annotations": [{"segments_info": [], "image_id": 1}],
    }
    tree = {"annotations/panoptic_train.json": json.dumps(told).encode(), "train/1.png": picture(1)}
    with pytest.raises(DataError, match="panoptic annotations, which vitrail does not read"):
        open_boxes([packed(tree, tmp_path)])
