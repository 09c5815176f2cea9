"""The command line as a person meets it: results on stdout, one clear line for a mistake, exit codes."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail import create_model
from vitrail.cli.main import COMMANDS, main, recipe

SIZE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model folder with three classes."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    network = create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        patch_size=8,
        width=48,
        heads=3,
        hidden=96,
        depth=2,
        num_classes=3,
    )
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with two classes of four pictures each."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            for number in range(4):
                place = folder / split / label / f"{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(place)
    return folder


def fails(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """What a command that must fail says last, on one line; no result on stdout, no traceback."""
    assert main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert lines[-1].startswith("vitrail")
    assert words[:1] == ("train",) or len(lines) == 1, err  # training says first what it chooses
    return lines[-1]


def answers(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What a command prints on stdout."""
    capsys.readouterr()
    assert main(words) == code, capsys.readouterr().err
    return capsys.readouterr().out


# Words


def test_a_flag_for_the_length_goes_before_the_recipes() -> None:
    told = recipe({"recipe": "digits", "steps": 7, "lr": 0.5})
    assert told["steps"] == 7 and told["lr"] == 0.5 and "epochs" not in told


def test_no_words_and_help_list_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["help"]):
        text = answers(capsys, *words)
        assert all(f"  {command.name} " in text for command in COMMANDS)


def test_the_first_of_two_words_has_help_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("vitrail data check ") and "usage" not in out
    assert "data needs a second word: data check" in fails(capsys, "data")


def test_the_doctor_names_each_package_once() -> None:
    from vitrail.jobs.doctor import doctor
    from vitrail.runs import DoctorRun

    names = [finding.name for finding in doctor(DoctorRun())]
    assert len(names) == len(set(names)) and {"torch", "timm", "onnx"} <= set(names)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert answers(capsys, "--version").startswith("vitrail 0")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian digits", "Did you mean train"),
        ("data", "data check"),
        ("finetune photos", "vitrail train DATA --pretrained MODEL"),
        ("export vit_tiny_patch16_224.imagenete", "Did you mean vit_tiny_patch16_224.imagenette"),
        ("train digits --epoch 3", "Did you mean --epochs"),
        ("train digits --lr nan", "finite"),
        ("train digits --lr fast", "--lr takes a number"),
        ("train digits --epochs 1.5", "--epochs takes a whole number"),
        ("train digits --opt adam", "adamw"),
        ("train", "DATA is missing"),
        ("train digits --recipe digts", "Did you mean digits"),
        ("predict somewhere", "IMAGES is missing"),
        ("models --format xml", "table"),
        ("info vit_tny_patch16_224", "Did you mean vit_tiny_patch16_224"),
        ("bench vit_tiny_patch16_24", "Did you mean vit_tiny_patch16_224"),
        ("models nothing_like_it", "No model matches"),
        ("train digits --model vit_tiny_patch16_24", "vit_tiny_patch16_224"),
        ("train digits --model vit_tiny_patch16_224 --img-size 9", "patch"),
        ("train /nowhere/at/all", "/nowhere/at/all"),
        ("train digits --device tpu", "tpu"),
        ("convert /nowhere/at/all.npz out", "/nowhere/at/all.npz"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_cure(
    line: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in fails(capsys, *line.split())


def test_an_unexpected_error_is_one_line_and_debug_shows_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: object) -> int:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("vitrail.cli.verbs.doctor", broken)
    assert "unexpected ZeroDivisionError: a bug" in fails(capsys, "doctor", code=1)
    monkeypatch.setenv("VITRAIL_DEBUG", "1")
    assert main(["doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_is_no_bug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(run: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a library writes, without the file's name

    monkeypatch.setattr("vitrail.cli.verbs.doctor", full)
    assert "No space left on device. Make room" in fails(capsys, "doctor", code=2)


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitrail.cli.verbs.doctor", interrupted)
    assert "interrupted" in fails(capsys, "doctor", code=130)


def test_a_part_of_an_epoch_is_told_with_one_digit() -> None:
    from vitrail.cli.training import progress_text
    from vitrail.train.log import Progress

    now = Progress(
        step=1, steps=2, epoch=1 / 6, epochs=1 / 3, loss=1.0, accuracy=None, rate=0.1, gradient=1.0,
        images_per_second=8.0, waiting=0.0, seconds=1.0, seconds_left=1.0, skipped=0,
    )  # fmt: skip
    assert progress_text(now).startswith("epoch 0.2/0.3  ")


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m vitrail models | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and done.stdout.startswith("model")


# Results


def test_models_and_info_agree(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(answers(capsys, "models", "vit_tiny_patch16_224", "--format", "json"))
    card = json.loads(answers(capsys, "info", "vit_tiny_patch16_224", "--format", "json"))
    assert rows[0]["parameters"] == card["cost"]["parameters"] == 5_717_416


def test_info_knows_a_folder_and_a_bare_weight_file(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = json.loads(answers(capsys, "info", model, "--format", "json"))
    assert (folder["what"], folder["config"]["num_classes"], folder["layout"]) == ("model folder", 3, "timm")
    assert "vit_tiny_patch16_224" in answers(capsys, "info", model)


def test_predict_gives_the_same_in_every_form(
    model: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", model, str(pictures / "val"), "--top-k", "2", "--precision", "fp32"]
    records = json.loads(answers(capsys, *words, "--format", "json"))
    lines = [json.loads(line) for line in answers(capsys, *words, "--format", "jsonl").splitlines()]
    rows = list(csv.DictReader(io.StringIO(answers(capsys, *words, "--format", "csv"))))
    assert len(records) == 8 and records == lines
    assert [row["label_1"] for row in rows] == [record["label"] for record in records]
    table = answers(capsys, *words)
    assert all(record["source"] in table for record in records)
    target = tmp_path / "new" / "out.json"
    assert answers(capsys, *words, "--format", "json", "-o", str(target)) == ""
    assert json.loads(target.read_text()) == records


def test_predict_goes_on_past_a_bad_file_and_says_so_at_the_end(
    model: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = pictures / "val" / "cat" / "0.png"
    torn = tmp_path / "torn.png"
    torn.write_bytes(good.read_bytes()[:200])
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    words = ["predict", model, str(torn), str(good), str(text), "--format", "json"]
    records = json.loads(answers(capsys, *words, code=1))
    assert [record["error"] is None for record in records] == [False, True, False]
    assert "torn.png" in records[0]["error"] and "text.jpg" in records[2]["error"]
    assert main(words[:-2]) == 1
    table, said = capsys.readouterr()
    # Reasons are long, and would widen a column.
    assert table.count("error") == 2 and "not a picture" not in table
    assert "text.jpg: not a picture" in said


def test_trace_prints_the_steps_and_writes_the_pictures(
    model: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pictures / "val" / "dog" / "1.png"
    text = answers(capsys, "trace", model, str(image), "-o", str(tmp_path))
    assert "4 × 4" in text and "16 × 192" in text and "17 × 48" in text
    assert (tmp_path / "trace.png").stat().st_size > 10_000
    page = (tmp_path / "trace.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), "the page must stand alone"


def test_data_check_finds_what_was_planted(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    shutil.copy(data / "train" / "cat" / "0.png", data / "val" / "cat" / "again.png")
    (data / "train" / "dog" / "9.png").write_bytes(b"nothing")
    words = ["data", "check", str(data), "-o", str(tmp_path / "out"), "--format", "json"]
    report = json.loads(answers(capsys, *words, code=1))
    assert len(report["leaks"]) == 1 and len(report["unreadable"]) == 1
    assert (tmp_path / "out" / "contact-sheet.png").exists()


def test_convert_there_and_back_changes_no_bit(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    answers(capsys, "convert", model, there, "--layout", "transformers")
    answers(capsys, "convert", there, back, "--layout", "timm", "--model", "vit_tiny_patch16_224")
    first, last = Path(model) / "model.safetensors", Path(back) / "model.safetensors"
    assert first.read_bytes()[-1000:] == last.read_bytes()[-1000:]


# What must not be believed


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.mark.parametrize("line", ["info {0}", "convert {0} out", "train digits --pretrained {0}"])
def test_a_pickle_is_never_executed(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mark, file = tmp_path / "executed", tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps({"state_dict": Bomb(mark)}, protocol=2))
    line = line.format(file) + (" --model vit_tiny_patch16_224" if line.startswith("train") else "")
    assert "weights.pth" in fails(capsys, *line.split())
    assert not mark.exists()


def test_a_class_that_the_model_does_not_know_is_named(
    model: str,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "classes" in fails(capsys, "evaluate", model, str(pictures))
