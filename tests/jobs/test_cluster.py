"""Prediction as a Ray Data job: what is looked at, how a job goes on, and that nothing is told twice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from export.worlds import colour_model, pictures

import vitrail
from vitrail.errors import ConfigError, DataError
from vitrail.jobs import cluster
from vitrail.predict import Predictor
from vitrail.runs import PredictRun

pa = pytest.importorskip("pyarrow", reason="pip install 'vitrail[ray]' brings pyarrow and ray")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_model(tmp_path_factory.mktemp("cluster") / "model")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures and a file that is none."""
    folder = pictures(tmp_path / "photos")
    (folder / "val" / "broken.jpg").write_bytes(b"no picture")
    return folder


def worker(model: Path, **changes: Any) -> cluster.Worker:
    run = PredictRun(model=str(model), images=("unused",), engine="torch", precision="fp32")
    return cluster.Worker(cluster.worker_settings(run, 1) | changes, frozenset(changes.get("told", ())))


def test_folders_patterns_addresses_and_lists_give_names_once(photos: Path, tmp_path: Path) -> None:
    some = photos / "val" / "red" / "0.png"
    lines = tmp_path / "list.txt"
    lines.write_text(f"s3://bucket/one.jpg\n\n{some}\n", encoding="utf-8")
    found = cluster.find([str(photos), str(some), str(lines), "https://example.org/two.jpg"]).names
    assert len(found) == 13 + 2 and len(set(found)) == len(found)
    assert found[-2:] == ["s3://bucket/one.jpg", "https://example.org/two.jpg"]
    assert all(os.path.isabs(name) for name in found[:13])


def test_a_parquet_holds_addresses_or_pictures(photos: Path, tmp_path: Path) -> None:
    files = sorted((photos / "val" / "red").glob("*.png"))
    held = [path.read_bytes() for path in files]
    parquet.write_table(pa.table({"path": [str(path) for path in files]}), tmp_path / "addresses.parquet")
    assert cluster.find([str(tmp_path / "addresses.parquet")]).names == [str(path) for path in files]
    pairs = [{"bytes": data, "path": f"{place}.png"} for place, data in enumerate(held)]
    parquet.write_table(pa.table({"image": pairs, "label": [0] * 4}), tmp_path / "pairs.parquet")
    found = cluster.find([str(tmp_path / "pairs.parquet")])
    assert (found.column, found.named_by, found.names) == ("image", "", ["0.png", "1.png", "2.png", "3.png"])


def test_a_parquet_that_names_nothing_or_one_thing_twice_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the columns label"):
        cluster.find([str(tmp_path / "a.parquet")])
    parquet.write_table(pa.table({"path": ["x", "x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="name each picture once"):
        cluster.find([str(tmp_path / "b.parquet")])
    with pytest.raises(ConfigError, match="looked at alone"):
        cluster.find([str(tmp_path / "b.parquet"), "picture.jpg"])


def test_a_worker_tells_what_the_predictor_tells_and_why_it_cannot(model: Path, photos: Path) -> None:
    names = cluster.find([str(photos)]).names
    table = worker(model)(pa.table({"source": names}))
    assert table.schema == cluster.layout("image-classification")
    told = {row["source"]: row for row in table.to_pylist()}
    wanted = Predictor(model, "torch", "fp32")(names)
    assert [told[record.source]["label"] for record in wanted] == [record.label for record in wanted]
    broken = next(row for name, row in told.items() if name.endswith("broken.jpg"))
    assert broken["label"] is None and "broken.jpg" in broken["error"]


def test_pictures_inside_a_parquet_and_addresses_that_fail(model: Path, photos: Path) -> None:
    data = (photos / "val" / "green" / "0.png").read_bytes()
    held = worker(model, column="content", named_by="id", told=("1",))
    rows = held(pa.table({"id": [1, 2], "content": [data, data]})).to_pylist()
    assert [(row["source"], row["label"]) for row in rows] == [("2", "green")]
    rows = worker(model)(pa.table({"source": ["nowhere://bucket/one.jpg"]})).to_pylist()
    assert rows[0]["label"] is None and "nowhere" in rows[0]["error"]


def test_what_was_cut_off_is_removed_and_what_is_told_twice_refused(tmp_path: Path) -> None:
    schema = cluster.layout("image-classification")
    rows = pa.Table.from_pylist([{"source": "a"}], schema=schema)
    parquet.write_table(rows, tmp_path / "one.parquet")
    whole = (tmp_path / "one.parquet").read_bytes()
    (tmp_path / "two.parquet").write_bytes(whole[: len(whole) // 2])
    assert cluster.already(str(tmp_path)) == {"a"}
    assert not (tmp_path / "two.parquet").exists()
    (tmp_path / "three.parquet").write_bytes(whole)
    with pytest.raises(DataError, match="was told before"):
        cluster.already(str(tmp_path))


def test_flags_without_a_use_are_refused(model: Path) -> None:
    run = PredictRun(model=str(model), images=("x.jpg",), cluster=True, format="csv")
    with pytest.raises(ConfigError, match="leave --format"):
        cluster.predict_on_cluster(run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_thousand_pictures_are_told_once_though_a_worker_and_the_job_are_killed(
    tmp_path: Path, data_dir: Path
) -> None:
    """A worker is killed in the middle, then the whole job; started again, it tells the rest."""
    pytest.importorskip("ray", reason="pip install 'vitrail[ray]' brings ray")
    psutil = pytest.importorskip("psutil")
    model, folder, out = tmp_path / "model", tmp_path / "pictures", tmp_path / "out.parquet"
    # large enough to be at work for a while: files appear seconds after their pictures are looked at
    slow: Any = vitrail.create_model("vit_tiny_patch16_224", img_size=(128, 128), num_classes=3)
    slow.save_pretrained(model)
    folder.mkdir()
    marked, said = {**os.environ, "VITRAIL_TEST_JOB": str(out)}, tmp_path / "said"
    with zipfile.ZipFile(data_dir / "cifar10" / "test.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[:5000]
        for name in names:
            (folder / name.replace("/", "_")).write_bytes(archive.read(name))

    def start() -> Any:
        command = [sys.executable, "-m", "vitrail", "predict", str(model), str(folder), "--cluster"]
        command += ["--output", str(out), "--workers", "2"]
        with said.open("w") as stderr:  # a pipe that nobody reads would fill and stop the job
            return subprocess.Popen(command, stderr=stderr, start_new_session=True, env=marked)

    def family() -> list[Any]:
        """The processes of the job: Ray's leave their parents but keep what they inherited; its workers write their
        titles over it, and are known as children."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("VITRAIL_TEST_JOB") == str(out):
                    found |= {one.pid: one for one in [process, *process.children(recursive=True)]}
        return list(found.values())

    def titles() -> list[str]:
        found = []
        for process in family():
            with contextlib.suppress(psutil.Error):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        return found

    def told() -> list[str]:
        found: list[str] = []
        for file in out.glob("*.parquet"):
            with contextlib.suppress(pa.ArrowInvalid):  # it is being written
                found += parquet.read_table(file, columns=["source"])[0].to_pylist()
        return found

    def end() -> None:
        for process in family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        job.wait()

    def wait(count: int) -> None:
        deadline = time.monotonic() + 300
        while len(told()) < count and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        assert len(told()) >= count, f"exit {job.poll()}, {len(told())} pictures told"

    job = start()
    try:
        wait(1)
        workers = [int(title.split()[0]) for title in titles() if "MapWorker" in title]
        assert len(workers) == 2, "; ".join(titles())
        os.kill(workers[0], signal.SIGKILL)
        wait(1500)
        end()
        before = len(told())
        assert 1500 <= before < 5000 and len(set(told())) == before
        job = start()
        assert job.wait(timeout=600) == 0, said.read_text()
        assert "5000 images" in said.read_text() and len(told()) == 5000
        assert set(told()) == {str(path) for path in folder.iterdir()}
    finally:
        end()
