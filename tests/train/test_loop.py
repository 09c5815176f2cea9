"""What a training run promises: it learns, repeats, skips what is not finite, and stops when asked."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train.standin import Batches, training
from vitrail.errors import DataError, TrainingError
from vitrail.runtime import Runtime
from vitrail.train.log import Log, Progress, Saved, Scores, Stopped, read_log
from vitrail.train.loop import Training, seed_part, train
from vitrail.train.optim import Kind
from vitrail.train.state import Place


def weights(run: object) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.network.state_dict().items()}  # type: ignore[attr-defined]


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_every_optimiser_learns(kind: Kind) -> None:
    run = training(steps=60, kind=kind, lr=0.1 if kind == "sgd" else 1e-2, log_every=10)
    records = [record for record in train(run) if isinstance(record, Progress)]
    assert records[-1].loss < 0.3 * records[0].loss
    assert records[-1].accuracy is not None and records[-1].accuracy > 0.95
    assert [record.step for record in records] == [10, 20, 30, 40, 50, 60]
    assert all(0 <= record.waiting <= 1 and record.images_per_second > 0 for record in records)


def test_accumulation_equals_a_big_batch() -> None:
    big, small = training(size=8), training(size=4, accumulate=2)
    losses = [[record.loss for record in train(run) if isinstance(record, Progress)] for run in (big, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in weights(big).items():
        torch.testing.assert_close(weights(small)[name], value, rtol=1e-4, atol=1e-6)


def test_a_run_cut_anywhere_and_gone_on_with_has_the_same_bits() -> None:
    whole = training(steps=11, dropout=0.3, accumulate=2, size=4, average=True)
    list(train(whole))
    cut = training(steps=11, dropout=0.3, accumulate=2, size=4, average=True)
    records = train(cut)
    for record in records:
        if isinstance(record, Progress) and record.step == 7:
            break
    records.close()  # type: ignore[attr-defined]
    again = training(
        steps=11, dropout=0.3, accumulate=2, size=4, average=True, place=Place(**vars(cut.place))
    )
    again.network.load_state_dict(cut.network.state_dict())
    again.optimiser.load(cut.optimiser.state())
    assert again.average is not None and cut.average is not None and whole.average is not None
    again.average.load(cut.average.weights, again.runtime)
    list(train(again))
    assert again.place.step == 11
    assert equal(weights(again), weights(whole))
    assert equal(again.average.weights, whole.average.weights)


def test_mixing_ends_at_the_step_that_was_set() -> None:
    run, mixed = training(steps=6), list[int]()

    def mix(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mixed.append(run.place.step)
        return images, targets

    run.mix, run.mix_until = mix, 4
    list(train(run))
    assert mixed == [0, 1, 2, 3]


def test_an_epoch_shows_every_image_once() -> None:
    batches = Batches(count=24, size=4)
    list(train(training(steps=6, batches=batches)))
    assert sorted(index for batch in batches.seen for index in batch) == list(range(24))


def test_a_step_that_is_not_finite_is_left_out_and_counted() -> None:
    run = training(steps=6, log_every=1)
    normal = run.inputs
    calls: list[int] = []

    def poisoned(images: Tensor) -> Tensor:
        calls.append(1)
        return normal(images) * (float("nan") if len(calls) == 3 else 1.0)

    run.inputs = poisoned
    records = [record for record in train(run) if isinstance(record, Progress)]
    assert [record.skipped for record in records] == [0, 0, 1, 1, 1, 1]
    assert all(bool(torch.isfinite(value).all()) for value in weights(run).values())


def test_a_loss_that_stays_infinite_stops_the_run_and_names_the_layer() -> None:
    run = training(steps=50, bad_steps=4)
    with torch.no_grad():
        run.network.blocks[1][2].weight.fill_(float("inf"))  # type: ignore[index, union-attr]
    with pytest.raises(TrainingError, match=r"4 steps in a row.*blocks\.1\.2.*--lr"):
        list(train(run))


def scaled() -> Runtime:
    """What fp16 trains with on a GPU: losses are scaled up, gradients back down."""
    return Runtime(device=torch.device("cpu"), scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40))


def enlarge(run: Training, factor: Callable[[int], float]) -> None:
    """Multiplies the loss by a factor of the step."""
    normal = run.objective
    run.objective = lambda *args: {
        name: value * factor(run.place.step) for name, value in normal(*args).items()
    }


def test_a_scaler_changes_no_bit_and_halves_itself_where_gradients_overflow() -> None:
    plain, run = training(steps=8), training(steps=8, runtime=scaled())
    list(train(plain))
    list(train(run))
    assert equal(weights(run), weights(plain))  # a power of two is lost nowhere in float32
    assert run.runtime.scaler is not None and run.runtime.scaler.get_scale() == 2.0**40

    run = training(steps=3, runtime=scaled(), log_every=1)
    before = weights(run)
    enlarge(run, lambda step: 1e30 if step == 0 else 1.0)
    first, *_, last = [record for record in train(run) if isinstance(record, Progress)]
    assert (first.skipped, last.skipped) == (1, 1)
    assert run.runtime.scaler is not None and run.runtime.scaler.get_scale() == 2.0**39
    assert not equal(weights(run), before)
    assert all(bool(torch.isfinite(value).all()) for value in weights(run).values())


def test_a_scaler_may_look_for_its_scale_for_thirty_steps_more() -> None:
    run = training(steps=50, bad_steps=4, runtime=scaled())
    enlarge(run, lambda step: float("inf") if step < 33 else 1.0)
    list(train(run))
    assert (run.place.step, run.place.skipped) == (50, 33)
    run = training(steps=50, bad_steps=4, runtime=scaled())
    enlarge(run, lambda step: float("inf"))
    with pytest.raises(TrainingError, match="34 steps in a row"):
        list(train(run))


def test_a_signal_saves_and_ends_the_run() -> None:
    saved: list[int] = []
    run = training(steps=50, log_every=1)
    run.save = lambda place: saved.append(place.step) or "somewhere"  # type: ignore[func-returns-value]
    records = []
    for record in train(run):
        records.append(record)
        if isinstance(record, Progress) and record.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
    assert isinstance(records[-2], Saved)
    assert records[-1] == Stopped(step=4, reason="interrupted")
    assert saved == [4]


def test_scores_that_do_not_grow_end_the_run_and_the_best_is_kept() -> None:
    run = training(steps=50, evaluate_every=2, patience=2)
    values = iter([0.1, 0.5, 0.4, 0.5])
    best: list[int] = []
    run.evaluate = lambda: ({"acc1": next(values)}, "raw")
    run.keep_best = lambda place: best.append(place.step)
    records = list(train(run))
    assert [record.best for record in records if isinstance(record, Scores)] == [True, True, False, False]
    assert best == [2, 4]
    assert records[-1] == Stopped(step=8, reason="patience")


def test_checkpoints_come_when_due_and_at_the_end() -> None:
    run = training(steps=10, save_every=4)
    run.save = lambda place: "somewhere"
    assert [record.step for record in train(run) if isinstance(record, Saved)] == [4, 8, 10]


def test_a_run_whose_patience_is_over_does_not_go_on() -> None:
    run = training(steps=50, patience=2, place=Place(step=8, evaluations_since_best=2))
    assert list(train(run)) == [Stopped(step=8, reason="patience")]


def test_progress_is_told_by_the_clock_too_but_not_kept(tmp_path: Path) -> None:
    run = training(steps=4, log_every=4, speak_seconds=0)
    log = Log(tmp_path, tensorboard=False)
    told = [record for record in train(run) if isinstance(record, Progress)]
    for record in told:
        log.write(record)
    log.close()
    assert [(record.step, record.passing) for record in told] == [(1, True), (2, True), (3, True), (4, False)]
    assert [found["step"] for found in read_log(tmp_path / "metrics.jsonl")] == [4]


def test_no_full_batch_is_said_plainly() -> None:
    with pytest.raises(DataError, match="smaller batch size"):
        training(batches=Batches(count=4, size=8))


def test_randomness_depends_on_seed_step_part_and_rank() -> None:
    def draw(*place: int) -> float:
        generator = seed_part(*place)
        return float(torch.rand(()) + torch.rand((), generator=generator))

    places = [(0, 5, 0, 0), (1, 5, 0, 0), (0, 6, 0, 0), (0, 5, 1, 0), (0, 5, 0, 1)]
    assert draw(*places[0]) == draw(*places[0])
    assert len({draw(*place) for place in places}) == 5
