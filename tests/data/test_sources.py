"""Finding labelled pictures: every layout that people have, and a clear word about those that cannot be used."""

from __future__ import annotations

import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, noise

from vitrail.data.image import decode
from vitrail.data.sources import Source, open_pictures, open_splits
from vitrail.errors import ConfigError, DataError, ImageError

PICTURE = encoded(noise(8, 8), "JPEG")

Tree = dict[str, bytes]


def as_folder(tree: Tree, where: Path) -> str:
    for name, data in tree.items():
        path = where / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(where / "data")


def as_zip(tree: Tree, where: Path, name: str = "data.zip", method: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(where / name, "w", method) as archive:
        for entry, data in tree.items():
            archive.writestr(entry, data)
    return str(where / name)


def as_deflated(tree: Tree, where: Path) -> str:
    return as_zip(tree, where, method=zipfile.ZIP_DEFLATED)


def as_tar(tree: Tree, where: Path) -> str:
    as_folder(tree, where)
    with tarfile.open(where / "data.tar", "w") as archive:
        archive.add(where / "data", ".")
    return str(where / "data.tar")


def pictures(**counts: int) -> Tree:
    """`train__cat=3` is train/cat/0.jpg and so on, each with bytes of its own."""
    return {
        f"{place.replace('__', '/')}/{number}.jpg": PICTURE + f"{place}{number}".encode()
        for place, count in counts.items()
        for number in range(count)
    }


@pytest.mark.parametrize("pack", [as_folder, as_zip, as_deflated, as_tar])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_folders_and_archives_are_read_alike(
    pack: Callable[[Tree, Path], str], val: str, tmp_path: Path
) -> None:
    tree = pictures(train__dog=3, train__cat=2, test__cat=1, test__dog=1)
    tree |= {f"{val}/cat/a.jpg": PICTURE, f"{val}/dog/deep/b.png": PICTURE, "train/dog/notes.txt": b"x"}
    tree |= {"__MACOSX/train/dog/._0.jpg": b"x", "train/dog/.hidden.jpg": b"x", "README.md": b"x"}
    splits = open_splits([pack(tree, tmp_path)])
    assert splits.given == ("train", "val", "test")
    assert splits.notes == ()
    assert splits.train and splits.val and splits.test
    assert splits.train.classes == splits.val.classes == ("cat", "dog")
    assert splits.train.counts() == {"cat": 2, "dog": 3}
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert splits.val.labels.tolist() == [0, 1]
    assert len(splits.everything) == 9
    for index in range(5):
        name = Path(splits.train.name(index))
        assert splits.train.read(index) == tree[f"train/{name.parent.name}/{name.name}"]
        assert splits.train.size(index) == len(tree[f"train/{name.parent.name}/{name.name}"])


@pytest.mark.parametrize("pack", [as_folder, as_zip, as_tar])
def test_a_source_travels_to_another_process(pack: Callable[[Tree, Path], str], tmp_path: Path) -> None:
    source = open_splits([pack(pictures(a=2, b=2), tmp_path)]).everything
    source.read(0)
    again: Source = pickle.loads(pickle.dumps(source))
    assert [again.read(index) for index in range(4)] == [source.read(index) for index in range(4)]
    assert again.name(3) == source.name(3)


def test_the_index_is_small(tmp_path: Path) -> None:
    source = open_splits([as_zip(pictures(first_class=500, second_class=500), tmp_path)]).everything
    assert len(pickle.dumps(source)) < 1000 * 150


def test_an_outer_folder_is_seen_through(tmp_path: Path) -> None:
    splits = open_splits(
        [as_zip(pictures(my__set__train__a=1, my__set__train__b=1, my__set__val__a=1), tmp_path)]
    )
    assert splits.given == ("train", "val")
    assert splits.notes == ("Validation has no picture of b; nothing is known about them.",)


def test_several_archives_are_one_data_set(tmp_path: Path) -> None:
    paths = [
        as_zip(pictures(train__a=2, train__b=1), tmp_path, "train-0.zip"),
        as_zip(pictures(train__c=2), tmp_path, "train-1.zip"),
        as_zip(pictures(val__a=1, val__b=1, val__c=1), tmp_path, "other.zip"),
    ]
    splits = open_splits(paths)
    assert splits.train and splits.val
    assert splits.train.classes == splits.val.classes == ("a", "b", "c")
    assert splits.train.counts() == {"a": 2, "b": 1, "c": 2}


def test_an_archives_name_can_tell_the_split(tmp_path: Path) -> None:
    paths = [as_zip(pictures(a=2, b=1), tmp_path, f"{name}.zip") for name in ("train-0", "val")]
    splits = open_splits(paths)
    assert splits.train and splits.val
    assert (len(splits.train), len(splits.val)) == (3, 3)


def test_validation_may_lie_elsewhere(tmp_path: Path) -> None:
    train = as_zip(pictures(a=9, b=9), tmp_path, "one.zip")
    val = as_zip(pictures(a=1, b=2), tmp_path, "two.zip")
    splits = open_splits([train], val=[val])
    assert splits.train and splits.val
    assert (len(splits.train), len(splits.val)) == (18, 3)


def test_without_val_some_of_every_class_is_held_back_always_the_same(tmp_path: Path) -> None:
    first = open_splits([as_zip(pictures(a=50, b=20, c=2, test__a=0), tmp_path)], val_share=0.1)
    assert first.train and first.val
    assert first.val.counts() == {"a": 5, "b": 2, "c": 1}
    assert "8 of 72 training pictures are held back" in first.notes[0]
    names = {first.val.name(index) for index in range(8)}
    again = open_splits([as_zip(pictures(a=51, b=20, c=2), tmp_path)], val_share=0.1)
    assert again.val
    kept = {again.val.name(index) for index in range(len(again.val))}
    assert len(names & kept) >= 7  # one more picture moves one at most
    other = open_splits([as_zip(pictures(a=50, b=20, c=2), tmp_path)], val_share=0.1, seed=1)
    assert other.val
    assert names != {other.val.name(index) for index in range(8)}
    assert open_splits([str(tmp_path / "data.zip")], val_share=0.0).val is None


def test_test_pictures_never_choose_the_model(tmp_path: Path) -> None:
    splits = open_splits([as_zip(pictures(train__a=10, train__b=10, test__a=3, test__b=3), tmp_path)])
    assert splits.train and splits.val and splits.test
    assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 2, 6)


def test_tables(tmp_path: Path) -> None:
    as_folder(pictures(a=3), tmp_path)
    table = tmp_path / "data" / "labels.csv"
    table.write_text(
        "label,Image_Path,split\ncat,a/0.jpg,train\ndog,a/1.jpg,train\n\ncat,a/2.jpg,valid\n", "utf-8-sig"
    )
    splits = open_splits([str(table)])
    assert splits.train and splits.val
    assert splits.train.classes == ("cat", "dog")
    assert splits.train.read(0) == pictures(a=1)["a/0.jpg"]
    assert splits.val.labels.tolist() == [0]
    table.write_text("image_path,label\na/0.jpg,cat\nnone.jpg,dog\n")
    with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
        open_splits([str(table)]).everything.read(1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,b\n1,2\n", "must name image_path,label, got a,b"),
        ("image_path,label\n", "no rows"),
        ("", "must name image_path,label"),
        ("image_path,label\nx.jpg,\n", "line 2: an image_path or a label is missing"),
        ("image_path,label,split\nx.jpg,a,later\n", "line 2: split must be train, val or test, got 'later'"),
    ],
)
def test_a_wrong_table_is_explained(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        open_splits([str(path)])


def test_digits_are_built_in() -> None:
    splits = open_splits(["digits"])
    assert splits.train and splits.val and splits.test
    assert splits.train.classes == tuple("0123456789")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1259, 179, 359)
    assert min(splits.test.counts().values()) >= 34
    names = [
        part.name(index) for part in (splits.train, splits.val, splits.test) for index in range(len(part))
    ]
    assert len(set(names)) == 1797
    pixels = splits.train.read(0)
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (8, 8)
    assert decode(pixels).shape == (3, 8, 8)
    assert max(int(np.max(splits.train.read(index))) for index in range(50)) == 255


@pytest.mark.slow  # scikit-learn takes seconds to import
def test_the_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    theirs = load_digits()
    everything = open_splits(["digits"]).everything
    for index in range(len(everything)):
        number = int(everything.name(index).rsplit("/")[-1])
        assert everything.labels[index] == theirs.target[number]
        assert np.abs(np.asarray(everything.read(index)) / (255 / 16) - theirs.images[number]).max() < 0.04


def test_a_model_s_own_order_of_classes(tmp_path: Path) -> None:
    source = open_splits([as_zip(pictures(a=1, b=2), tmp_path)]).everything
    turned = source.relabel(("c", "b", "a"))
    assert turned.labels.tolist() == [2, 1, 1]
    assert turned.counts() == {"c": 0, "b": 2, "a": 1}
    assert source.labels.tolist() == [0, 1, 1]
    with pytest.raises(DataError, match=r"has b, which the model does not know; .* Did you mean bb"):
        source.relabel(("a", "bb"))


def test_the_fingerprint_tells_data_sets_apart(tmp_path: Path) -> None:
    tree = pictures(a=2, b=2)
    one = open_splits([as_zip(tree, tmp_path, "one.zip")]).everything.fingerprint()
    assert open_splits([as_folder(tree, tmp_path)]).everything.fingerprint() == one  # the same, packed or not
    tree["b/1.jpg"] += b"more"
    assert open_splits([as_zip(tree, tmp_path, "two.zip")]).everything.fingerprint() != one


def test_pictures_without_classes(tmp_path: Path) -> None:
    source = open_pictures([as_zip({"b.jpg": PICTURE, "x/a.png": PICTURE, "n.txt": b""}, tmp_path)])
    assert len(source) == 2
    assert source.labels.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({}, "No pictures in"),
        ({"a/x.txt": b"", "b/y.bmp": b""}, r"No pictures in .*; it holds 1 \.bmp, 1 \.txt"),
        ({"1.jpg": PICTURE, "2.jpg": PICTURE}, "2 pictures but no classes. Put each class into a folder"),
        ({"train/1.jpg": PICTURE, "train/2.jpg": PICTURE}, "has one class only, 'train'"),
        (pictures(cats=3), "has one class only, 'cats'"),
        (pictures(train__a=1, train__b=1, val__a=1, val__d=1), "val has d, which train has not"),
        (pictures(images=2, masks=2), "looks like data for boxes or masks"),
    ],
)
def test_what_cannot_be_used_is_explained(tree: Tree, reason: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for pack in (as_folder, as_zip):
        with pytest.raises(DataError, match=reason):
            open_splits([pack(tree, tmp_path)])


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    tree = pictures(a=2, b=2) | {"0.jpg": PICTURE, "a/c.tiff": b"", "a/d.GIF": b""}
    path = as_folder(tree, tmp_path)
    (tmp_path / "data" / "empty").mkdir()
    notes = open_splits([path], val_share=0.0).notes
    assert any("1 .gif, 1 .tiff left out" in note for note in notes)
    assert any("1 pictures outside class folders left out" in note for note in notes)
    assert any("no pictures in empty; not counted as classes" in note for note in notes)


def test_wrong_places_are_explained(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"not a zip")
    (tmp_path / "a.tar").write_bytes(b"not a tar")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    (tmp_path / "a.jpg").write_bytes(PICTURE)
    for name, reason in (
        ("none", "no such folder or archive"),
        ("a.zip", "not a readable .zip"),
        ("a.tar", "not a readable .tar"),
        ("a.tar.gz", "unpack it first"),
        ("a.jpg", "data is a folder, a .zip or .tar archive, a .csv, a COCO .json, or the word digits"),
    ):
        with pytest.raises(DataError, match=reason):
            open_splits([str(tmp_path / name)])
    with pytest.raises(ConfigError, match="val_share"):
        open_splits(["digits"], val_share=1.0)


def test_a_damaged_archive_is_noticed(tmp_path: Path) -> None:
    path = Path(as_zip(pictures(a=2, b=2), tmp_path))
    source = open_splits([str(path)], val_share=0.0).everything
    data = bytearray(path.read_bytes())
    data[200] ^= 255  # within the first picture
    path.write_bytes(data)
    with pytest.raises(ImageError, match="damaged here"):
        source.read(0)
    assert source.read(1)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match="damaged here"):
        source.read(1)


def test_a_split_may_be_a_link_to_another(tmp_path: Path) -> None:
    place = Path(as_folder(pictures(train__cat=3, train__dog=3, val__cat=2, val__dog=2), tmp_path))
    (place / "test").symlink_to(place / "val", target_is_directory=True)
    splits = open_splits([str(place)])
    assert splits.given == ("train", "val", "test") and splits.val is not None and splits.test is not None
    assert len(splits.val) == len(splits.test) == 4


def test_splits_inside_classes_are_refused(tmp_path: Path) -> None:
    tree = pictures(cat__train=3, cat__test=2, dog__train=3, dog__test=2)
    with pytest.raises(DataError, match=r"splits lie inside the classes \(cat/train/...\).*train/CLASS"):
        open_splits([as_folder(tree, tmp_path)])


def test_a_val_that_lies_beside_is_pointed_at(tmp_path: Path) -> None:
    place = as_folder(pictures(train__cat=3, train__dog=3, val__cat=2, val__dog=2), tmp_path)
    assert "--val" in open_splits([f"{place}/train"]).notes[-1]
    assert not open_splits([place]).notes


def test_a_class_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    place = as_folder(pictures(cat=3, dog=3), tmp_path)
    os.rename(os.fsencode(place) + b"/dog", os.fsencode(place) + b"/caf\xe9")
    with pytest.raises(DataError, match=r"the class caf\\udce9 .* rename"):
        open_splits([place])


def test_pictures_of_kinds_that_are_not_read_are_counted(tmp_path: Path) -> None:
    tree = pictures(cat=3, dog=3) | {"cat/a.heic": b"x", "dog/b.bmp": b"x", "dog/notes.txt": b"x"}
    notes = open_splits([as_folder(tree, tmp_path)], val_share=0).notes
    assert any("1 .bmp, 1 .heic left out" in note for note in notes)


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    path = as_folder(pictures(a=1, b=1), tmp_path)
    (tmp_path / "data" / "a" / "again").symlink_to(tmp_path / "data", target_is_directory=True)
    assert len(open_splits([path], val_share=0.0).everything) == 2


def test_real_archives(data_dir: Path) -> None:
    parts = [str(data_dir / "imagenette" / name) for name in ("train-0.zip", "train-1.zip", "val.zip")]
    splits = open_splits(parts)
    assert splits.train and splits.val
    assert (len(splits.train), len(splits.val), len(splits.train.classes)) == (9469, 2949, 10)
    assert splits.notes == ()
    assert decode(splits.train.read(9468)).shape[0] == 3
