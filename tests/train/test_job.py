"""The training job, from pictures in folders to a model folder: what it writes, keeps, refuses and says."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.killed import pictures
from vitrail import config
from vitrail.errors import ConfigError, DataError, TrainingError
from vitrail.jobs.evaluate import evaluate
from vitrail.jobs.train import TrainResult, train
from vitrail.models.registry import from_pretrained
from vitrail.runs import EvaluateRun, TrainRun
from vitrail.train import state
from vitrail.train.log import Note, Progress, Record, Scores, read_log

SMALL = ("patch_size=8", "width=16", "depth=1", "heads=2", "hidden=32", "init=timm")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    pictures(folder)
    return folder


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a small run's time is its picture: `trained` draws one, which comes before this."""
    monkeypatch.setattr("vitrail.jobs.train.draw_curves", lambda *_: None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def record(data: Path, output: Path, **changes: Any) -> TrainRun:
    run = TrainRun(
        data=(str(data),),
        output=str(output),
        model="vit_tiny_patch16_224",
        img_size=(16,),
        model_kwargs=SMALL,
        epochs=3,
        batch_size=8,
        opt="adamw",
        lr=1e-2,
        mixup=0.0,
        cutmix=0.0,
        aa="none",
        workers=0,
        device="cpu",
        precision="fp32",
    )
    return config.replace(run, **changes)


def go(run: TrainRun) -> tuple[TrainResult, list[Record]]:
    said: list[Record] = []
    return train(run, said.append), said


def notes(said: list[Record]) -> str:
    return "\n".join(record.text for record in said if isinstance(record, Note))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, list[Record]]:
    return go(record(data, tmp_path_factory.mktemp("runs") / "first", epochs=6))


def test_it_learns_and_leaves_a_run_folder(trained: tuple[TrainResult, list[Record]]) -> None:
    result, said = trained
    assert result.reason == "done" and result.scores["val"]["acc1"] > 0.9
    for name in ("config.toml", "metrics.jsonl", "curves.png", "train.log", "model/config.json"):
        assert (result.folder / name).stat().st_size > 0
    resolved = config.from_dict(TrainRun, config.read_toml(result.folder / "config.toml"))
    assert resolved.lr == 1e-2 and resolved.sched == "cosine" and resolved.warmup_epochs is not None
    assert len(state.names(result.folder / "checkpoints")) == 2
    progress = [record for record in said if isinstance(record, Progress)]
    assert progress[-1].loss < progress[0].loss
    kept = read_log(result.folder / "metrics.jsonl")
    assert [found["step"] for found in kept if found["kind"] == "train"] == [r.step for r in progress]


def test_the_model_folder_knows_its_classes_and_scores_as_training_said(
    trained: tuple[TrainResult, list[Record]], data: Path, tmp_path: Path
) -> None:
    result, said = trained
    model = from_pretrained(result.model)
    assert model.card.labels == ("apple", "grass", "sky")
    assert model.card.scores["val_acc1"] == result.scores["val"]["acc1"]
    best = [record for record in said if isinstance(record, Scores) and record.weights == "average"]
    assert max(record.scores["acc1"] for record in best) == result.scores["val"]["acc1"]
    again = evaluate(
        EvaluateRun(
            model=str(result.model), data=(str(data),), output=str(tmp_path), device="cpu", precision="fp32"
        )
    )
    scores = dict(again.scores)
    assert scores["acc1"] == result.scores["val"]["acc1"]
    assert scores["loss"] == pytest.approx(result.scores["val"]["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def flat(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training pictures alone, as CLASS/*.png."""
    return shutil.copytree(data / "train", tmp_path_factory.mktemp("flat") / "pictures")


def test_evaluate_scores_what_training_held_back(flat: Path, tmp_path: Path) -> None:
    result, _ = go(record(flat, tmp_path / "run", seed=3, val_share=0.25, epochs=1))
    ask = EvaluateRun(model=str(result.model), data=(str(flat),), output=str(tmp_path), precision="fp32")
    for split in ("auto", "val"):
        found = evaluate(config.replace(ask, split=split))
        assert found.split == "val" and found.scores["images"] == 12
        assert found.scores["loss"] == pytest.approx(result.scores["val"]["loss"], rel=1e-5)
    copy = shutil.copytree(flat, tmp_path / "elsewhere")
    found = evaluate(config.replace(ask, data=(str(copy),)))
    assert found.split == "all" and found.scores["images"] == 48 and "flatters" in found.notes[-1]


def test_a_table_whose_pictures_are_elsewhere_is_told_by_the_first_of_them(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("image_path,label\nhere/1.png,cat\nhere/2.png,dog\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"Not one of 2 training pictures .*here/1.png: no such file"):
        go(record(table, tmp_path / "run"))


def test_test_pictures_that_cannot_be_read_cost_their_rows_and_no_model(data: Path, tmp_path: Path) -> None:
    pictures = shutil.copytree(data, tmp_path / "pictures")
    shutil.copytree(pictures / "val", pictures / "test")
    for bad in ("apple/000.png", "sky/001.png"):
        (pictures / "test" / bad).write_bytes(b"no picture")
    result, said = go(record(pictures, tmp_path / "run", epochs=1))
    assert (result.model / "model.safetensors").is_file() and result.scores["test"]["images"] == 10
    assert "2 of 12 pictures could not be read and are not scored" in notes(said)


def test_other_validation_pictures_find_the_best_weights_anew(data: Path, flat: Path, tmp_path: Path) -> None:
    go(record(flat, tmp_path / "run", val=(str(data / "val"),), epochs=2))
    result, said = go(record(flat, tmp_path / "run", val=(str(flat),), epochs=3))
    assert "validation pictures are others than before" in notes(said)
    assert result.step == 18 and state.read(tmp_path / "run/checkpoints/best-00000018").place.best_step == 18


def test_what_does_nothing_is_said(data: Path, tmp_path: Path) -> None:
    changes = {"mix_off": 0.5, "distill_weight": 0.7, "patience": 2, "eval_every": 0.0, "val_share": 0.3}
    result, said = go(record(data, tmp_path / "run", epochs=1, **changes))
    for name in ("mix_off", "distill_weight", "patience", "val_share"):
        assert f"{name} does nothing" in notes(said)
    assert from_pretrained(result.model).card.notes == ""  # nothing chose these weights


def interrupt_after(step: int) -> Callable[[Record], None]:
    """Presses Ctrl-C when a step is told."""

    def interrupt(record: Record) -> None:
        if isinstance(record, Progress) and record.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return interrupt


def test_an_interrupted_run_saves_and_goes_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    whole, _ = go(record(data, tmp_path / "whole", deterministic=True))
    first = train(record(data, tmp_path / "cut", deterministic=True), interrupt_after(7))
    assert first.reason == "interrupted"
    assert state.names(tmp_path / "cut" / "checkpoints")[-1].name == "step-00000008"
    second, said = go(record(data, tmp_path / "cut", deterministic=True))
    assert "Going on from" in notes(said) and second.reason == "done"
    files = [(run.model / "model.safetensors").read_bytes() for run in (whole, second)]
    assert files[0] == files[1]
    steps = [
        found["step"] for found in read_log(tmp_path / "cut" / "metrics.jsonl") if found["kind"] == "train"
    ]
    assert steps == sorted(set(steps)) and steps[-1] == 18


def test_patches_left_out_and_dropped_pictures_go_on_to_the_same_bits(data: Path, tmp_path: Path) -> None:
    changes = {"patch_drop": 0.5, "patch_drop_off": 0.3, "drop_path": 0.5, "drop_path_subset": True}
    seen: list[int] = []
    run = record(data, tmp_path / "whole", deterministic=True, **changes)

    def watch(stage: torch.nn.Module, given: Any, found: Any) -> None:
        if stage.training:
            seen.append(found[1].size)

    with torch.nn.modules.module.register_module_forward_hook(
        lambda part, given, found: watch(part, given, found) if type(part).__name__ == "Stage" else None
    ):
        whole, _ = go(run)
    assert seen == [2] * 13 + [4] * 5  # of 18 steps the last three tenths see all four patches
    first = train(record(data, tmp_path / "cut", deterministic=True, **changes), interrupt_after(7))
    assert first.reason == "interrupted"
    second, _ = go(record(data, tmp_path / "cut", deterministic=True, **changes))
    files = [(run.model / "model.safetensors").read_bytes() for run in (whole, second)]
    assert second.reason == "done" and files[0] == files[1]


def test_a_run_goes_on_longer_but_not_as_another_run(data: Path, tmp_path: Path) -> None:
    go(record(data, tmp_path / "run", epochs=1))
    with pytest.raises(ConfigError, match=r"another run \(lr was 0.01, is 0.02\).*--resume none"):
        go(record(data, tmp_path / "run", lr=2e-2))
    longer, _ = go(record(data, tmp_path / "run", epochs=2))
    assert longer.step <= 12 and read_log(tmp_path / "run" / "metrics.jsonl")[-1]["epoch"] == 2.0
    other = shutil.copytree(data, tmp_path / "other")
    (other / "train" / "apple" / "000.png").unlink()
    with pytest.raises(ConfigError, match="pictures are others"):
        go(record(other, tmp_path / "run", epochs=2))
    go(record(data, tmp_path / "run", lr=2e-2, epochs=1, resume="none"))
    assert (tmp_path / "run-before-1" / "model" / "model.safetensors").exists()


def test_a_head_is_kept_for_the_same_classes_and_new_for_others(
    trained: tuple[TrainResult, list[Record]], data: Path, tmp_path: Path
) -> None:
    start = str(trained[0].folder)
    changes: dict[str, Any] = {
        "model": None,
        "model_kwargs": (),
        "pretrained": start,
        "epochs": 1,
        "lr": 1e-6,
    }
    kept, said = go(record(data, tmp_path / "same", **changes))
    assert "head is kept" in notes(said)
    assert kept.scores["val"]["acc1"] == trained[0].scores["val"]["acc1"]
    renamed = shutil.copytree(data, tmp_path / "renamed")
    for split in ("train", "val"):
        (renamed / split / "apple").rename(renamed / split / "zebra")
    new, said = go(record(renamed, tmp_path / "new", **changes))
    assert "head is new" in notes(said)
    assert from_pretrained(new.model).card.labels == ("grass", "sky", "zebra")


def test_positions_follow_the_image_size_and_that_is_said(
    trained: tuple[TrainResult, list[Record]], data: Path, tmp_path: Path
) -> None:
    start = str(trained[0].model)
    changes: dict[str, Any] = {"model": None, "model_kwargs": (), "pretrained": start, "epochs": 1}
    result, said = go(record(data, tmp_path / "large", img_size=(32, 24), **changes))
    assert "2×2" in notes(said) or "2x2" in notes(said) or "(2, 2)" in notes(said)
    assert from_pretrained(result.model).card.preprocessing.input_size == (32, 24)


@pytest.mark.parametrize("crop", [None, "pad"])
def test_a_linear_probe_trains_the_last_layer_alone(
    trained: tuple[TrainResult, list[Record]], data: Path, tmp_path: Path, crop: Any
) -> None:
    start = trained[0].model
    changes: dict[str, Any] = {
        "model": None,
        "model_kwargs": (),
        "pretrained": str(start),
        "freeze": "backbone",
    }
    result, said = go(record(data, tmp_path / "probe", crop=crop, **changes))
    assert ("computed once" in notes(said)) == (crop is None)
    before, after = from_pretrained(start).state_dict(), from_pretrained(result.model).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.linear.weight", "head.linear.bias"}
    assert "nothing taught" not in notes(said)


def test_a_frozen_backbone_without_weights_is_said_to_be_random(data: Path, tmp_path: Path) -> None:
    _, said = go(record(data, tmp_path / "probe", freeze="backbone", epochs=1))
    assert "features that nothing taught" in notes(said)


def test_a_student_learns_from_a_teacher(
    trained: tuple[TrainResult, list[Record]], data: Path, tmp_path: Path
) -> None:
    wrong = from_pretrained(trained[0].model)  # calls every class by its neighbour's number
    with torch.no_grad():
        wrong.head.linear.weight.copy_(wrong.head.linear.weight.roll(1, 0))
        wrong.head.linear.bias.copy_(wrong.head.linear.bias.roll(1, 0))
    wrong.save_pretrained(tmp_path / "wrong")
    teacher = {"teacher": str(tmp_path / "wrong"), "distill": "soft", "epochs": 6}
    believed, _ = go(record(data, tmp_path / "student", distill_weight=1.0, **teacher))
    assert believed.scores["val"]["acc1"] < 0.1
    ignored, _ = go(record(data, tmp_path / "pupil", distill_weight=0.0, **teacher))
    assert ignored.scores["val"]["acc1"] > 0.9
    renamed = shutil.copytree(data, tmp_path / "renamed")
    (renamed / "train" / "apple").rename(renamed / "train" / "zebra")
    shutil.rmtree(renamed / "val")
    with pytest.raises(Exception, match=r"teacher .* knows other classes"):
        go(record(renamed, tmp_path / "other", teacher=str(trained[0].model)))


def test_a_full_disk_leaves_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = state.write_through, 0

    def full(path: Path, content: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(state, "write_through", full)
    with pytest.raises(TrainingError, match=r"No space left.*Make room"):
        go(record(data, tmp_path / "run"))
    monkeypatch.undo()
    found = state.newest(tmp_path / "run" / "checkpoints")
    assert found is not None and found.place.step > 0
    result, said = go(record(data, tmp_path / "run"))
    assert "Going on from" in notes(said) and result.reason == "done"


def test_test_pictures_choose_nothing(data: Path, tmp_path: Path) -> None:
    """Without val/, validation pictures come from train/, and test/ is scored once, at the end."""
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "val").rename(folder / "test")
    result, said = go(record(folder, tmp_path / "run", epochs=1))
    assert "held back" in notes(said)
    assert result.scores["test"]["images"] == 12 and result.scores["val"]["images"] == 6
    splits = [record.split for record in said if isinstance(record, Scores)]
    assert splits.count("test") == 1 and splits[-1] == "test"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": float("nan")}, "lr must be"),
        ({"batch_size": 64}, "One step takes 64 images"),
        ({"epochs": 2, "steps": 5}, "not both"),
        ({"smoothing": 1.5}, "smoothing"),
        ({"patch_drop": 1.0}, "patch_drop is a share"),
        ({"patch_drop_off": 2.0}, "patch_drop_off is a share"),
        ({"drop_path_subset": True}, "with a drop_path above 0"),
        (
            {
                "model": "resnet20_32",
                "model_kwargs": (),
                "img_size": (32,),
                "drop_path": 0.2,
                "drop_path_subset": True,
            },
            "with a drop_path above 0",
        ),
        ({"patch_drop": 0.5, "freeze": "backbone"}, "sees whole pictures"),
        (
            {"model": "swin_nano_patch2_32", "model_kwargs": (), "patch_drop": 0.5},
            "do not: take one of those",
        ),
        ({"model_kwargs": ("width",)}, "NAME=VALUE"),
        ({"model_kwargs": ("widht=16",)}, "width"),
        ({"img_size": (15,)}, "16|patch|divide"),
        ({"recipe": "nowhere"}, "no recipe nowhere"),
        ({"warmup_epochs": -1.0}, "warmup_epochs"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_mistake_is_named_before_anything_is_trained(
    data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message) as caught:
        go(record(data, tmp_path / "run", **changes))
    assert getattr(caught.value, "exit_code", None) == 2
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_can_start_from_another_runs_checkpoint(
    trained: tuple[TrainResult, list[Record]], data: Path, tmp_path: Path
) -> None:
    last = state.names(trained[0].folder / "checkpoints")[-1]
    result, said = go(record(data, tmp_path / "on", epochs=7, resume=str(last)))
    assert "Going on from" in notes(said)
    assert {found["step"] for found in read_log(tmp_path / "on" / "metrics.jsonl")} <= set(range(36, 43))
    assert result.scores["val"]["acc1"] >= trained[0].scores["val"]["acc1"]


def test_two_processes_cannot_train_into_one_folder(tmp_path: Path) -> None:
    with state.claim(tmp_path):
        code = (
            "import pathlib, sys; from vitrail.train import state\n"
            f"with state.claim(pathlib.Path({str(tmp_path)!r})): pass"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "Another process is training" in done.stderr


def test_the_recipe_travels_with_the_model(trained: tuple[TrainResult, list[Record]]) -> None:
    card = json.loads((trained[0].model / "config.json").read_text())
    assert card["vitrail"]["recipe"]["lr"] == 1e-2
    assert "label_names" in card
