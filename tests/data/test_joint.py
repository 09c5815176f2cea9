"""Pictures with their boxes and masks through transforms and loaders: they stay together, and come again alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vitrail.data.boxes import PictureBoxes
from vitrail.data.dense_loader import DenseBatch, DenseBuilder, Several, capped_batch_size
from vitrail.data.joint import DenseTrainTransform, DenseTransform, JointAugmentation
from vitrail.data.loader import FILLER, Loader
from vitrail.errors import ConfigError, DataError
from vitrail.weights.card import Preprocessing

SQUASH = Preprocessing(input_size=(48, 64), crop_mode="squash", crop_pct=1.0, interpolation="bilinear")
FIT = Preprocessing(input_size=(40, 80), crop_mode="fit", interpolation="bilinear")


class World:
    """Grey pictures, each with one bright rectangle of class index % 2, as boxes or as masks."""

    def __init__(
        self, kind: str = "boxes", count: int = 16, sizes: tuple[tuple[int, int], ...] = ((60, 80),)
    ) -> None:
        self.kind, self.classes = kind, ("even", "odd")
        self.images, self.targets = [], []
        for index in range(count):
            height, width = sizes[index % len(sizes)]
            left, top, right, bottom = 10 + index, 12, 40 + index, 42
            pixels = np.full((height, width, 3), 60, dtype=np.uint8)
            pixels[top:bottom, left:right] = 255
            self.images.append(pixels)
            numbers = np.zeros((height, width), dtype=np.uint8)
            numbers[top:bottom, left:right] = 1
            found = PictureBoxes(
                np.array([[left, top, right, bottom]], np.float32), np.array([index % 2]), np.array([False]),
                np.array([900.0], np.float32), (height, width),
            )  # fmt: skip
            self.targets.append(found if kind == "boxes" else numbers)
        self.labels = np.full(count, -1)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{index}.png"

    def read(self, index: int) -> Any:
        return self.images[index]

    def target(self, index: int) -> Any:
        return self.targets[index]


def loader(source: Any, preprocessing: Preprocessing = SQUASH, train: bool = True, **options: Any) -> Loader:
    record = JointAugmentation(color_jitter=0.2)
    transform = DenseTrainTransform(preprocessing, record) if train else DenseTransform(preprocessing)
    options = {"batch_size": 4, "shuffle": train, "drop_last": train, "seed": 3, **options}
    return Loader(source, transform, builder=DenseBuilder, **options)


def same(first: list[Any], second: list[Any]) -> bool:
    def equal(one: Any, other: Any) -> bool:
        if isinstance(one, torch.Tensor):
            return torch.equal(one, other)
        if isinstance(one, Several | tuple):
            return len(one) == len(other) and all(map(equal, one, other))
        return bool(one == other)

    return len(first) == len(second) and all(map(equal, first, second))


def bright(image: torch.Tensor) -> list[float]:
    """Left, top, right, bottom of what is brighter than half of the brightest."""
    light = image[0] > 160
    rows, columns = light.any(1).nonzero().flatten(), light.any(0).nonzero().flatten()
    return [float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1]


@pytest.mark.parametrize("preprocessing", [SQUASH, FIT], ids=["squash", "fit"])
def test_boxes_lie_where_their_things_went(preprocessing: Preprocessing) -> None:
    world = World(count=1, sizes=((60, 80),))
    transform = DenseTrainTransform(preprocessing, JointAugmentation(scale=(0.6, 1.9)))
    image = torch.from_numpy(world.images[0]).permute(2, 0, 1)
    seen, lost = 0, 0
    for seed in range(60):
        changed, target = transform(image, world.target(0), seed, 7)
        rows, columns = changed.shape[1:]
        assert target.size == (60, 80) and target.index == 7 and len(target.boxes) == len(target.labels)
        if not len(target.boxes):
            lost += 1
            continue
        seen += 1
        cx, cy, wide, tall = target.boxes[0].tolist()
        mine = [
            (cx - wide / 2) * columns,
            (cy - tall / 2) * rows,
            (cx + wide / 2) * columns,
            (cy + tall / 2) * rows,
        ]
        assert np.abs(np.array(mine) - bright(changed)).max() < 1.6
        assert min(mine) > -1e-3 and mine[2] <= columns + 1e-3 and mine[3] <= rows + 1e-3
    assert seen > 40


def test_boxes_that_leave_the_crop_are_dropped() -> None:
    world = World(count=1)
    transform = DenseTrainTransform(SQUASH, JointAugmentation(scale=(6.0, 6.0), hflip=0.0))
    image = torch.from_numpy(world.images[0]).permute(2, 0, 1)
    counts = {len(transform(image, world.target(0), seed, 0)[1].boxes) for seed in range(40)}
    assert counts == {0, 1}


@pytest.mark.parametrize("preprocessing", [SQUASH, FIT], ids=["squash", "fit"])
def test_masks_go_with_their_pictures_and_the_border_is_ignored(preprocessing: Preprocessing) -> None:
    world = World("masks", count=1)
    transform = DenseTrainTransform(preprocessing, JointAugmentation(scale=(0.5, 2.0)))
    image = torch.from_numpy(world.images[0]).permute(2, 0, 1)
    for seed in range(30):
        changed, mask = transform(image, world.target(0), seed, 0)
        assert mask.shape == changed.shape[1:] and mask.dtype == torch.uint8
        wrong = (mask == 1) != (changed[0] > 160)
        assert wrong[mask != 255].float().mean() < 0.05
        border = mask == 255
        assert (changed[:, border] == torch.tensor([128, 128, 128], dtype=torch.uint8)[:, None]).all()


def test_crowds_are_not_learned_but_kept_for_scoring() -> None:
    world = World(count=4)
    world.targets[0] = world.targets[0]._replace(crowd=np.array([True]))
    train = {int(t.index): len(t.boxes) for batch in loader(world) for t in batch.targets}
    assert train == {0: 0, 1: 1, 2: 1, 3: 1}
    first = next(iter(loader(world, train=False))).targets[0]
    assert first.crowd.tolist() == [True] and first.boxes[0].tolist() == pytest.approx(
        [0.3125, 0.45, 0.375, 0.5]
    )


def test_boxes_travel_between_processes_without_shared_memory() -> None:
    """Each tensor there would hold a file open: 16 workers with batches of 16 want two thousand."""
    first = next(iter(loader(World()))).targets[0]
    maker, parts = first.__reduce__()
    assert not any(isinstance(part, torch.Tensor) for part in [*parts, *parts[-1].values()])
    again = maker(*parts)
    assert all(torch.equal(*pair) for pair in zip(again[:2], first[:2], strict=True))
    assert again.size == first.size and again.index == first.index


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_workers_and_resumes_change_nothing(kind: str) -> None:
    world = World(kind)
    whole = list(loader(world))
    assert same(list(loader(world, workers=2)), whole)
    first = loader(world)
    taken = []
    for batch in first:
        taken.append(batch)
        if len(taken) == 2:
            break
    other = loader(world)
    other.resume(**first.state())
    assert same(taken + list(other), whole)
    assert not same(list(loader(world, seed=4)), whole)


def test_ranks_share_each_batch_and_a_rank_without_a_row_keeps_step() -> None:
    world = World(count=5)
    parts = [list(loader(world, train=False, rank=rank, world=2)) for rank in (0, 1)]
    assert [len(part) for part in parts] == [2, 2]
    assert parts[1][1].indices.tolist() == [FILLER] and len(parts[1][1].targets) == 0
    found = [t.index for part in parts for batch in part for t in batch.targets]
    assert sorted(found) == list(range(5))


def test_pictures_of_different_sizes_are_padded_together() -> None:
    world = World(count=4, sizes=((60, 80), (80, 60)))
    batch: Any = next(iter(loader(world, FIT, train=False)))
    assert (
        isinstance(batch, DenseBatch) and batch.images.shape == (4, 3, 53, 53) and batch.padding is not None
    )
    assert [(~own).sum().item() for own in batch.padding] == [40 * 53, 53 * 40] * 2
    assert not batch.padding[0, :40].any() and batch.padding[0, 40:].all()
    assert (batch.images[0, :, 40:] == 128).all()
    together: Any = next(iter(loader(World(count=4), FIT, train=False)))
    assert together.padding is None
    masks: Any = next(iter(loader(World("masks", 4, ((60, 80), (80, 60))), FIT, shuffle=False)))
    assert masks.targets.shape == masks.padding.shape and (masks.targets[masks.padding] == 255).all()


def test_evaluation_sees_masks_at_their_own_size() -> None:
    batch: Any = next(iter(loader(World("masks", 4, ((60, 80), (80, 60))), train=False)))
    assert (
        batch.images.shape == (4, 3, 48, 64)
        and [tuple(t.shape) for t in batch.targets] == [(60, 80), (80, 60)] * 2
    )


def test_a_picture_of_another_size_than_annotated_is_named() -> None:
    world = World(count=4)
    world.targets[2] = world.targets[2]._replace(size=(80, 60))
    with pytest.raises(DataError, match=r"2.png: the picture has 60×80 pixels, its annotation 80×60.*turned"):
        list(loader(world, max_bad_share=0.0))
    world.targets[2] = world.targets[2]._replace(size=(0, 0))  # nothing was said
    assert len(list(loader(world, max_bad_share=0.0))) == 1


@pytest.mark.parametrize("crop", ["center", "border"])
def test_what_cuts_something_off_is_refused(crop: str) -> None:
    with pytest.raises(ConfigError, match="want the whole picture"):
        DenseTransform(Preprocessing(crop_mode=crop))
    with pytest.raises(ConfigError, match="want the whole picture"):
        DenseTrainTransform(Preprocessing(crop_mode="squash", crop_pct=0.9))


@pytest.mark.parametrize(
    "changes", [{"scale": (2.0, 1.0)}, {"scale": (0.01, 1.0)}, {"hflip": 2.0}, {"color_jitter": -1.0}]
)
def test_illegal_augmentations_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        JointAugmentation(**changes)


def test_a_batch_has_no_more_pixels_than_memory_is_meant_for() -> None:
    assert capped_batch_size(64, Preprocessing(input_size=(192, 256))) == 64
    assert capped_batch_size(64, Preprocessing(input_size=(800, 1333))) == 7
    assert capped_batch_size(64, Preprocessing(input_size=(4000, 4000))) == 1
