"""Pictures on the device: the same crops as one by one, every choice repeated by its seed, errors that say the cure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from vitrail.data.augment import Augmentation
from vitrail.data.resident import (
    Resident,
    _fits,
    blurred,
    boxes,
    flipped,
    jittered,
    padded_crop,
    resized_crop,
    three,
)
from vitrail.data.sources import open_splits
from vitrail.errors import ConfigError, DataError
from vitrail.weights.card import Preprocessing

CPU = torch.device("cpu")


def noise(count: int = 6, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=seeded(1))


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten pictures, 20 x 24, and one file that is no picture."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(20):
        place = root / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02}.png")
    (root / "train" / "a" / "broken.png").write_bytes(b"no picture")
    return root


def made(
    data: Path, augmentation: Augmentation, batch_size: int = 4, channels: int = 3, **options: object
) -> Resident:
    source = open_splits((str(data),), val_share=0.0).train
    assert source is not None
    size = Preprocessing(input_size=(16, 16), in_chans=channels, mean=(0.5,), std=(0.5,))
    return Resident(source, size, augmentation, batch_size, device=CPU, **options)  # type: ignore[arg-type]


FULL = Augmentation(crop="resized", aa="three", color_jitter=0.3, reprob=0.5)


def test_an_epoch_holds_every_readable_picture_once_with_its_label(data: Path) -> None:
    batches = list(made(data, FULL))
    assert len(batches) == 5 and all(batch.images.shape == (4, 3, 16, 16) for batch in batches)
    found = torch.cat([batch.indices for batch in batches])
    source = open_splits((str(data),), val_share=0.0).train
    assert source is not None and len(found.unique()) == 20
    assert torch.cat([batch.targets for batch in batches]).tolist() == source.labels[found.numpy()].tolist()
    assert list(made(data, FULL).skipped) == [10]


def test_a_resumed_epoch_is_the_rest_of_the_whole_one_and_the_next_differs(data: Path) -> None:
    whole = made(data, FULL, seed=3)
    first = list(whole)
    second = list(whole)
    assert not torch.equal(first[0].images, second[0].images)
    again = made(data, FULL, seed=3)
    again.resume(0, 8)
    for one, other in zip(first[2:], again, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.indices, other.indices)


def test_two_processes_share_each_batch(data: Path) -> None:
    halves = [list(made(data, FULL, rank=rank, world=2)) for rank in (0, 1)]
    whole = list(made(data, FULL))
    for one, zero, two in zip(whole, *halves, strict=True):
        assert set(one.indices.tolist()) == {*zero.indices.tolist(), *two.indices.tolist()}


def test_without_augmentation_pixels_are_those_of_evaluation(data: Path) -> None:
    from vitrail.data.image import decode
    from vitrail.data.transforms import Preprocess

    plain = made(data, Augmentation(crop="none", hflip=0.0))
    source = open_splits((str(data),), val_share=0.0).train
    assert source is not None
    prepare = Preprocess(Preprocessing(input_size=(16, 16), crop_pct=1.0))
    batch = next(iter(plain))
    for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
        assert torch.equal(image, prepare(decode(source.read(index), name="picture")))


def test_a_padded_crop_is_a_window_of_the_mirrored_picture() -> None:
    pictures = noise()
    crops = padded_crop(pictures, 3, seeded(0))
    for picture, crop in zip(pictures, crops, strict=True):
        around = torch.nn.functional.pad(picture[None].float(), [3] * 4, mode="reflect")[0].to(torch.uint8)
        windows = [around[:, y : y + 16, x : x + 16] for y in range(7) for x in range(7)]
        assert any(torch.equal(crop, window) for window in windows)
    assert not torch.equal(crops, pictures)


def test_a_box_of_the_output_size_is_cut_out_exactly_and_a_larger_one_resized() -> None:
    pictures = noise(side=20)
    box = torch.tensor([[2, 3, 16, 16]]).expand(6, 4)
    assert torch.equal(resized_crop(pictures, box, (16, 16)), pictures[:, :, 2:18, 3:19])
    whole = torch.tensor([[0, 0, 20, 20]]).expand(6, 4)
    expected = torch.nn.functional.interpolate(pictures.float(), size=(16, 16), mode="bilinear")
    assert (resized_crop(pictures, whole, (16, 16)).float() - expected).abs().max() <= 0.51


def test_boxes_lie_inside_and_have_the_areas_and_shapes_asked_for() -> None:
    found = boxes(2000, (64, 64), Augmentation(scale=(0.2, 0.8)), seeded(0)).double()
    top, left, tall, wide = found.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + tall <= 64).all() and (left + wide <= 64).all()
    area = tall * wide / 64**2
    assert area.min() > 0.18 and area.max() < 0.83 and abs(area.mean() - 0.5) < 0.03
    assert (wide / tall).max() < 1.45 and (tall / wide).max() < 1.45


def test_flips_are_of_the_chosen_pictures_alone() -> None:
    pictures = noise(2)
    found = flipped(pictures, torch.tensor([True, False]))
    assert torch.equal(found[0], pictures[0].flip(-1)) and torch.equal(found[1], pictures[1])


def test_each_picture_is_grey_solarised_or_blurred() -> None:
    pictures = noise(60)
    kinds = {"grey": 0, "solar": 0, "soft": 0}
    for before, after in zip(pictures, three(pictures, seeded(2)), strict=True):
        if torch.equal(after[0], after[1]):
            kinds["grey"] += 1
        elif torch.equal(after, torch.where(before >= 128, 255 - before, before)):
            kinds["solar"] += 1
        else:
            kinds["soft"] += 1
    assert min(kinds.values()) >= 10


def test_blur_is_gaussian_as_in_pillow() -> None:
    pixels = np.asarray(Image.fromarray(noise(1, 40)[0].permute(1, 2, 0).numpy()))
    ours = blurred(noise(1, 40).float(), torch.tensor([1.5]))[0].permute(1, 2, 0)
    theirs = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1.5)), dtype=np.float32)
    assert (ours - torch.from_numpy(theirs)).abs()[6:-6, 6:-6].mean() < 3  # Pillow's is three box blurs


def test_jitter_of_nothing_changes_nothing_and_some_keeps_within_bounds() -> None:
    pictures = noise()
    assert torch.equal(jittered(pictures, 0.0, seeded(0)), pictures)
    assert not torch.equal(jittered(pictures, 0.4, seeded(0)), pictures)


def test_what_cannot_be_done_is_refused_with_the_cure(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 channels; the network takes 1.*--resident"):
        made(data, Augmentation(), channels=1)
    with pytest.raises(DataError, match="takes 64 pictures, and 20 can be read"):
        made(data, Augmentation(), batch_size=64)


def test_pictures_that_leave_the_network_too_little_room_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 2**30, 8 * 2**30))
    _fits(2 * 2**30, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"take 2\.5 GiB.*at most 50%.*4\.0 GiB.*leave --resident out"):
        _fits(5 * 2**29, torch.device("cuda"))


@pytest.mark.parametrize("aa", ["rand", "trivial"])
def test_a_policy_changes_pictures_and_repeats_by_its_seed(data: Path, aa: str) -> None:
    plain = made(data, Augmentation(crop="none", hflip=0.0), batch_size=16)
    first, again = (made(data, Augmentation(crop="none", hflip=0.0, aa=aa), batch_size=16) for _ in range(2))
    before, one, two = (next(iter(batches)).images for batches in (plain, first, again))
    assert torch.equal(one, two)
    assert ((one != before).flatten(1).any(dim=1)).float().mean() > 0.5


def test_more_readers_see_the_same_pictures(data: Path) -> None:
    one, many = (made(data, FULL, readers=count) for count in (1, 4))
    assert torch.equal(one.pixels, many.pixels) and one.skipped.keys() == many.skipped.keys()
