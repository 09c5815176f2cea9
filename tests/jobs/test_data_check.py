"""`vitrail data check` finds what was planted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.jobs.data_check import check, data_check
from vitrail.runs import DataCheckRun


def save(path: Path, height: int, width: int, seed: int) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def planted(root: Path) -> Path:
    """A data set with one of every trouble."""
    data = root / "set"
    for number in range(12):
        save(data / f"train/cat/{number}.png", 64, 80, number)
    save(data / "train/dog/0.png", 64, 64, 100)
    first = save(data / "val/cat/0.png", 64, 64, 200)
    (data / "train/cat/leak.png").write_bytes(first)
    (data / "train/cat/twin.png").write_bytes((data / "train/cat/3.png").read_bytes())
    (data / "train/cat/conflict.png").write_bytes((data / "train/dog/0.png").read_bytes())
    save(data / "train/cat/tiny.png", 1, 1, 300)
    save(data / "train/cat/huge.png", 120, 100, 400)
    (data / "train/cat/cut.png").write_bytes(first[:300])
    (data / "train/bird").mkdir()
    return data


def test_every_trouble_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.jobs.data_check.HUGE", 10_000)
    data = planted(tmp_path)
    heard: list[tuple[int, int]] = []
    report = check([str(data)], tmp_path / "out", watch=lambda done, total: heard.append((done, total)))
    assert heard[-1] == (20, 20)
    assert report.pictures == {"train": 19, "val": 1}
    assert report.classes == {"cat": {"train": 18, "val": 1}, "dog": {"train": 1, "val": 0}}

    def short(groups: list[list[str]]) -> list[set[str]]:
        return [{str(Path(name).relative_to(data)) for name in group} for group in groups]

    assert [Path(item["file"]).name for item in report.unreadable] == ["cut.png"]
    assert "damaged" in report.unreadable[0]["reason"]
    assert [Path(item["file"]).name for item in report.tiny] == ["tiny.png"]
    assert [(item["height"], item["width"]) for item in report.huge] == [(120, 100)]
    assert short(report.leaks) == [{"train/cat/leak.png", "val/cat/0.png"}]
    assert short(report.conflicts) == [{"train/cat/conflict.png", "train/dog/0.png"}]
    assert {"train/cat/3.png", "train/cat/twin.png"} in short(report.duplicates)
    assert len(report.duplicates) == 3
    assert report.thin == ["dog"]
    assert report.absent == ["val/dog"]
    assert report.imbalance == 18.0
    assert report.sizes == {"smallest": [1, 1], "middle": [64, 80], "largest": [120, 100]}
    assert any("no pictures in train/bird" in note for note in report.notes)
    assert len(report.problems) == 9


def test_the_report_and_the_sheet_are_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = data_check(DataCheckRun(data=(str(planted(tmp_path)),), output=str(out)))
    assert {Path(name).name for name in report.files} == {"report.json", "contact-sheet.png"}
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    with Image.open(out / "contact-sheet.png") as sheet:
        assert min(sheet.size) > 500
        colours = sheet.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 1000  # pictures, and not an empty page
    assert sorted(path.name for path in out.iterdir()) == ["contact-sheet.png", "report.json"]


def test_pictures_that_nothing_reads_are_a_problem(tmp_path: Path) -> None:
    data = tmp_path / "set"
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
        save(data / name, 40, 40, len(list(data.rglob("*"))))
    (data / "dog/2.bmp").write_bytes(b"BM")
    report = check([str(data)], tmp_path / "out")
    assert any(
        "1 × picture of a kind that is not read" in said and "2.bmp" in said for said in report.problems
    )


def test_a_sound_data_set_has_no_problems(tmp_path: Path) -> None:
    report = check(["digits"], tmp_path)
    assert report.problems == []
    assert report.pictures == {"train": 1259, "val": 179, "test": 359}
