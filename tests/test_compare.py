"""Comparing families: exponents, means, a comparison that goes on where it stood, and refusals before any work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vitrail.errors import ConfigError, ModelError
from vitrail.jobs import compare as jobs
from vitrail.jobs.compare import compare
from vitrail.jobs.compare_cells import Cell, Price, by_model, exponents
from vitrail.jobs.compare_report import write_report
from vitrail.jobs.models import count
from vitrail.jobs.train import TrainResult
from vitrail.models import registry
from vitrail.runs import CompareRun


def price(model: str, size: int, power: float) -> Price:
    tokens = (size / 16) ** 2
    return Price(
        model=model,
        size=size,
        seconds=1e-3 * tokens**power,
        memory=int(1e6 * tokens),
        multiply_adds=int(tokens**power),
    )


def cell(model: str, acc1: float, share: float = 1.0, seed: int = 0) -> Cell:
    return Cell(
        model=model, share=share, seed=seed, acc1=acc1, split="val", steps=10, seconds=2.0, images_per_second=50.0,
        parameters=1_000_000, multiply_adds=80_000_000,
    )  # fmt: skip


def test_the_exponent_is_the_power_of_the_number_of_tokens() -> None:
    prices = [price("square", size, 2.0) for size in (224, 512, 1024)]
    prices += [price("linear", size, 1.0) for size in (1024, 224)]
    found = exponents(prices, "seconds")
    assert found == pytest.approx({"square": 2.0, "linear": 1.0})
    assert exponents(prices, "memory") == pytest.approx({"square": 1.0, "linear": 1.0}, abs=1e-3)
    assert exponents([price("alone", 224, 1.0)], "seconds") == {}


def test_models_are_ordered_by_their_mean_over_seeds() -> None:
    cells = [cell("a", 0.5), cell("a", 0.7, seed=1), cell("b", 0.65), cell("b", 0.1, share=0.5)]
    rows = by_model(cells, 1.0)
    assert list(rows) == ["b", "a"]
    assert rows["a"][0] == pytest.approx(0.6) and rows["a"][1] == pytest.approx(0.1 * 2**0.5)


def test_the_report_holds_every_number_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    cells = [cell("a", 0.5), cell("b", 0.4), cell("a", 0.3, share=0.1), cell("b", 0.35, share=0.1)]
    prices = [price("a", size, 1.5) for size in (224, 512)]
    page = write_report(tmp_path, cells, prices, CompareRun(data=("d",))).read_text()
    assert "50.00 %" in page and "1.50" in page
    assert "http" not in page and page.count("data:image/png;base64,") == 3
    kept = json.loads((tmp_path / "report.json").read_text())
    assert len(kept["cells"]) == 4 and kept["exponents"]["seconds"]["a"] == pytest.approx(1.5)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "accuracy.png",
        "data-efficiency.png",
        "cost.png",
    }


def test_without_a_budget_five_epochs_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stop(record: Any, reporter: Any = None) -> None:
        asked.append(record)
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        compare(
            CompareRun(
                data=("digits",), part="accuracy", models=("vit_nano_patch4_32",), output=str(tmp_path)
            )
        )
    assert asked[0].epochs == 5


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, float]] = []

    def trained(run: Any, folder: Any, name: str, share: float, seed: int, reporter: Any) -> Cell:
        done.append((name, share))
        if len(done) == 3:
            raise KeyboardInterrupt
        return cell(name, 0.5, share, seed)

    monkeypatch.setattr(jobs, "_train", trained)
    models = ("vit_nano_patch4_32", "vit_tiny_patch4_32")
    run = CompareRun(data=("d",), models=models, part="accuracy", shares=(0.5, 1.0), output=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        compare(run)
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"model": "vit_na')  # a line that was cut short by the stop
    found = compare(run)
    assert len(found.cells) == len(compare(run).cells) == 4
    assert done == [(models[0], 0.5), (models[1], 0.5), (models[0], 1.0), (models[0], 1.0), (models[1], 1.0)]


def test_trainings_that_differ_do_not_meet_in_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        jobs, "_train", lambda run, folder, name, share, seed, _: cell(name, 0.5, share, seed)
    )
    run = CompareRun(data=("d",), models=("vit_nano_patch4_32",), part="accuracy", output=str(tmp_path))
    compare(run)
    with pytest.raises(ConfigError, match=r"holds a comparison with data d \(now e\), epochs None \(now 2\)"):
        compare(dataclasses.replace(run, data=("e",), epochs=2))
    assert len(compare(dataclasses.replace(run, seeds=2)).cells) == 2


def test_trainings_on_two_devices_do_not_meet_in_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        jobs, "_train", lambda run, folder, name, share, seed, _: cell(name, 0.5, share, seed)
    )
    monkeypatch.setattr(jobs, "choose_device", lambda name: "cpu" if name == "auto" else name)
    run = CompareRun(data=("d",), models=("vit_nano_patch4_32",), part="accuracy", output=str(tmp_path))
    compare(run)
    compare(dataclasses.replace(run, device="cpu"))
    with pytest.raises(ConfigError, match=r"holds a comparison with device cpu \(now cuda:0\)"):
        compare(dataclasses.replace(run, device="cuda:0"))


def test_costs_are_those_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measured(run: Any) -> SimpleNamespace:
        asked.append(run.device)
        best = 10.0 if run.device == "cpu" else 1000.0
        return SimpleNamespace(
            device=run.device,
            speeds=[SimpleNamespace(best=best, memory=1)],
            cost=SimpleNamespace(multiply_adds=run.img_size[0]),
        )

    monkeypatch.setattr(jobs, "bench", measured)
    monkeypatch.setattr(jobs, "choose_device", lambda name: "cpu" if name == "auto" else name)
    run = CompareRun(cost_models=("pvt_v2_b0",), sizes=(32, 64), part="cost", output=str(tmp_path))
    for device, seconds in (("auto", 0.1), ("cuda:0", 0.001), ("cpu", 0.1), ("cuda:0", 0.001)):
        found = compare(dataclasses.replace(run, device=device))
        assert [price.seconds for price in found.prices] == [seconds, seconds]
    assert asked == ["cpu", "cpu", "cuda:0", "cuda:0"]


def test_an_interrupted_training_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = TrainResult(
        folder=tmp_path, model=tmp_path, scores={"val": {"acc1": 0.1}}, step=1, seconds=1.0, reason="interrupted"
    )  # fmt: skip
    monkeypatch.setattr(jobs, "train", lambda record, reporter=None: stopped)
    run = CompareRun(data=("d",), models=("vit_nano_patch4_32",), part="accuracy", output=str(tmp_path / "c"))
    with pytest.raises(KeyboardInterrupt):
        compare(run)
    assert not (tmp_path / "c" / "cells.jsonl").exists()


def test_a_network_is_counted_as_it_was_trained() -> None:
    name = "setr_pup_nano"
    small = count(name, registry.variant(name, img_size=(96, 128), num_classes=5))
    assert small.multiply_adds < 0.5 * count(name).multiply_adds
    assert small.parameters < count(name).parameters


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"epochs": 1, "minutes": 2.0}, ConfigError, "give one of the two"),
        ({"shares": (0.5, 1.5)}, ConfigError, "got 1.5"),
        ({"models": ("vit_nanno_patch4_32",)}, ModelError, "Did you mean vit_nano_patch4_32"),
        ({"sizes": (512, 224)}, ConfigError, "sizes must grow"),
        (
            {"models": ("fcos_nano", "setr_pup_nano")},
            ConfigError,
            "finds objects as boxes and setr_pup_nano gives",
        ),
        ({"data": ()}, ConfigError, "Accuracy needs data"),
        ({"seeds": 0}, ConfigError, "at least 1"),
    ],
)
def test_a_mistake_is_refused_before_any_work(
    changes: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(error, match=says):
        compare(CompareRun(**{"data": ("digits",), "output": str(folder), **changes}))
    assert not folder.exists()


@pytest.mark.slow
def test_two_families_are_compared_on_digits(tmp_path: Path) -> None:
    found = compare(
        CompareRun(
            data=("digits",), models=("vit_nano_patch4_32", "resnet20_32"), epochs=1, shares=(0.2,), batch_size=64,
            cost_models=("vit_nano_patch4_32",), sizes=(32, 64), repeats=1, workers=0, output=str(tmp_path),
        )
    )  # fmt: skip
    assert {one.model for one in found.cells} == {"vit_nano_patch4_32", "resnet20_32"}
    assert {one.split for one in found.cells} == {"test"} and len(found.prices) == 2
    assert found.report.is_file()


def test_smaller_shares_of_the_training_pictures_lie_within_larger_ones() -> None:
    from vitrail.data.sources import open_splits
    from vitrail.jobs.training_data import part_of

    source = open_splits(("digits",)).train
    assert source is not None
    half, tenth = part_of(source, 0.5), part_of(source, 0.1)
    names = {half.name(index) for index in range(len(half))}
    assert {tenth.name(index) for index in range(len(tenth))} < names
    for kept, whole in zip(half.counts().values(), source.counts().values(), strict=True):
        assert kept == round(0.5 * whole)
    with pytest.raises(ConfigError, match=r"got 1\.5"):
        part_of(source, 1.5)


def test_a_share_holds_the_same_pictures_wherever_the_data_lies(tmp_path: Path) -> None:
    from vitrail.data.sources import open_splits
    from vitrail.jobs.training_data import part_of

    prints = set()
    for number in range(3):
        for place in range(20):
            picture = tmp_path / str(number) / f"{'ab'[place % 2]}/{place}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(b"")
        source = open_splits((str(tmp_path / str(number)),), val_share=0).train
        assert source is not None
        prints.add(part_of(source, 0.3).fingerprint())
    assert len(prints) == 1
