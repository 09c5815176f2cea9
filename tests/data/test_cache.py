"""A cached data set reads as the files do."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, noise

from vitrail.data.cache import cached, decoded_bytes
from vitrail.data.image import decode
from vitrail.data.sources import Source, open_splits
from vitrail.errors import ImageError


@pytest.fixture
def source(tmp_path: Path) -> Source:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for number in range(6):
            data = encoded(noise(8 + number, 12, number), "JPEG")
            archive.writestr(f"{'ab'[number % 2]}/{number}.jpg", data[:60] if number == 3 else data)
    return open_splits([str(tmp_path / "set.zip")]).everything


def test_pixels_names_labels_and_faults_stay(source: Source) -> None:
    seen: list[tuple[int, int]] = []
    kept = cached(source, watch=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (6, 6)
    again: Source = pickle.loads(pickle.dumps(kept))
    for index in range(6):
        assert again.name(index) == source.name(index)
        if source.name(index).endswith("3.jpg"):
            with pytest.raises(ImageError, match=r"3\.jpg: .*(damaged|cut off)"):
                again.read(index)
        else:
            expected = decode(source.read(index)).permute(1, 2, 0).numpy()
            assert np.array_equal(decode(again.read(index)).permute(1, 2, 0).numpy(), expected)
    assert again.labels.tolist() == source.labels.tolist()
    assert again.classes == source.classes


def test_a_reader_cannot_spoil_the_cache(source: Source) -> None:
    kept = cached(source)
    before = decode(kept.read(0)).clone()
    decode(kept.read(0)).zero_()
    assert (decode(kept.read(0)) == before).all()


def test_what_does_not_fit_is_left_on_disk(source: Source) -> None:
    assert 6 * 8 * 12 * 3 < decoded_bytes(source) < 6 * 13 * 12 * 3
    assert cached(source, budget=500) is source
    assert cached(source, budget=decoded_bytes(source) + 10_000) is not source
