"""Batches: the same whatever the workers, ranks and resumes; bad files replaced alike, and not too many."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pictures import noise

from vitrail.data.augment import Augmentation, TrainTransform
from vitrail.data.loader import FILLER, Batch, Loader
from vitrail.data.transforms import Preprocess
from vitrail.errors import ConfigError, DataError, ImageError
from vitrail.weights.card import Preprocessing

RECORD = Preprocessing(input_size=(16, 16), crop_pct=1.0)


class Pictures:
    """Pictures in memory, some of them unreadable, some never coming."""

    def __init__(self, count: int, bad: tuple[int, ...] = (), stuck: int = -1, deadly: int = -1) -> None:
        self.images = [noise(18, 20, seed) for seed in range(count)]
        self.labels = np.arange(count) % 3
        self.bad, self.stuck, self.deadly = bad, stuck, deadly

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{index}.jpg"

    def read(self, index: int) -> Any:
        if index in self.bad:
            raise ImageError(f"{index}.jpg: damaged.")
        if index == self.stuck:
            time.sleep(60)
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images[index]


def train_loader(source: Pictures, **options: Any) -> Loader:
    options = {"batch_size": 8, "shuffle": True, "seed": 5, "drop_last": True, **options}
    return Loader(source, TrainTransform(RECORD, Augmentation(aa="trivial")), **options)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_batches_hold_what_they_say() -> None:
    source = Pictures(20)
    batches = list(Loader(source, Preprocess(RECORD), 8))
    assert [len(batch.images) for batch in batches] == [8, 8, 4]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(20))
    first = batches[0]
    assert first.images.dtype == torch.uint8
    assert first.images.shape == (8, 3, 16, 16)
    assert first.targets.dtype == torch.int64
    assert first.targets.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    expected = Preprocess(RECORD)(torch.from_numpy(source.images[3]).permute(2, 0, 1))
    assert torch.equal(first.images[3], expected)


def test_workers_change_nothing_and_nor_does_the_rest_of_the_program() -> None:
    source = Pictures(40, bad=(7,))
    torch.manual_seed(0)
    alone = train_loader(source, max_bad_share=0.1)
    helped = train_loader(source, max_bad_share=0.1, workers=2)
    for _ in range(2):
        expected = list(alone)
        torch.rand(5)
        assert same(list(helped), expected)
    assert alone.skipped == helped.skipped == {7: "7.jpg: damaged."}


def test_epochs_differ_and_come_again() -> None:
    loader = train_loader(Pictures(24))
    first, second = list(loader), list(loader)
    assert not same(first, second)
    assert sorted(torch.cat([batch.indices for batch in second]).tolist()) == list(range(24))
    loader.resume(0)
    assert same(list(loader), first)
    assert loader.state() == {"epoch": 1, "position": 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_goes_on_exactly(workers: int) -> None:
    source = Pictures(48)
    whole = list(train_loader(source))
    loader = train_loader(source, workers=workers)
    taken = []
    for batch in loader:
        taken.append(batch)
        if len(taken) == 2:
            state = loader.state()
            break
    assert state == {"epoch": 0, "position": 16}
    other = train_loader(source, workers=workers)
    other.resume(**state)
    assert same(taken + list(other), whole)
    loader.resume(**state)  # the same loader, left in the middle, goes on too
    assert same(list(loader), whole[2:])


@pytest.mark.parametrize("workers", [0, 1])
def test_torchs_own_random_numbers_are_left_to_the_model(workers: int) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    list(train_loader(Pictures(16), workers=workers))
    assert torch.equal(torch.rand(2), expected)


def test_the_state_after_the_last_batch_is_the_next_epoch() -> None:
    loader = train_loader(Pictures(16))
    states = [loader.state() for _ in loader]
    assert states == [{"epoch": 0, "position": 8}, {"epoch": 1, "position": 0}]
    with pytest.raises(ConfigError, match="not a place"):
        loader.resume(0, 99)


def test_ranks_share_each_batch_of_the_single_process() -> None:
    source = Pictures(40)
    whole = list(train_loader(source))
    parts = [list(train_loader(source, rank=rank, world=2)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        for rank in (0, 1):
            assert torch.equal(parts[rank][step].images, batch.images[rank::2])
            assert torch.equal(parts[rank][step].indices, batch.indices[rank::2])


def test_every_rank_makes_as_many_steps() -> None:
    source = Pictures(9)
    parts = [list(Loader(source, Preprocess(RECORD), 4, rank=rank, world=4)) for rank in range(4)]
    assert [len(part) for part in parts] == [3, 3, 3, 3]
    indices = [index for part in parts for batch in part for index in batch.indices.tolist()]
    assert sorted(index for index in indices if index != FILLER) == list(range(9))
    assert parts[3][-1].indices.tolist() == [FILLER]
    assert parts[3][-1].targets.tolist() == [FILLER]
    assert parts[3][-1].images.shape == (1, 3, 16, 16)


def test_repeated_augmentation_shows_a_picture_several_times_in_different_ways() -> None:
    batches = list(train_loader(Pictures(24), repeats=3))
    assert len(batches) == 3
    indices = torch.cat([batch.indices for batch in batches])
    counts = torch.bincount(indices)
    assert sorted(counts[counts > 0].tolist()) == [3] * 8
    images = torch.cat([batch.images for batch in batches])
    copies = images[indices == indices[0]]
    assert not torch.equal(copies[0], copies[1])
    assert not torch.equal(copies[1], copies[2])


def test_unreadable_pictures_are_replaced_in_training_by_the_next_one() -> None:
    loader = train_loader(Pictures(16, bad=(4, 5, 15)), max_bad_share=0.5)
    batches = list(loader)
    assert all(len(batch.images) == 8 for batch in batches)
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    assert sorted(indices) == sorted([*range(4), 6, 6, *range(6, 15), 0])
    assert sorted(loader.skipped) == [4, 5, 15]


def test_unreadable_pictures_are_dropped_in_evaluation() -> None:
    source = Pictures(12, bad=(1, 4, 5, 6, 7))
    loader = Loader(source, Preprocess(RECORD), 4, unreadable="drop", max_bad_share=1.0)
    assert [batch.indices.tolist() for batch in loader] == [[0, 2, 3], [8, 9, 10, 11]]


def test_too_many_unreadable_pictures_stop_the_run_with_their_names() -> None:
    loader = train_loader(Pictures(100, bad=(3, 50)))  # 0.5 % of 100 is less than one; one is forgiven
    with pytest.raises(DataError, match=r"2 of 100 pictures .* more than the 0\.50%.*\d\.jpg: damaged"):
        list(loader)
    list(train_loader(Pictures(100, bad=(3,))))
    with pytest.raises(DataError, match="1 of 100"):
        list(train_loader(Pictures(100, bad=(3,)), max_bad_share=0.0))
    with pytest.raises(DataError, match="No readable picture"):
        list(train_loader(Pictures(16, bad=tuple(range(16))), max_bad_share=1.0))


def test_the_workers_of_a_loader_that_is_let_go_end_at_once() -> None:
    """Not when the garbage collector comes by, in whose hands torch waits five seconds for each worker."""
    loader = train_loader(Pictures(16), workers=2)
    list(loader)
    began = time.monotonic()
    assert multiprocessing.active_children()
    del loader
    assert not multiprocessing.active_children()
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(("batches", "expected"), [(20, 2), (4, 1), (2, 0)])
def test_workers_whose_batches_would_overflow_shared_memory_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, batches: int, expected: int
) -> None:
    size = next(iter(train_loader(Pictures(16)))).images.nbytes
    room = SimpleNamespace(free=batches * size)
    monkeypatch.setattr("vitrail.data.loader.shutil.disk_usage", lambda _: room)
    monkeypatch.setattr("vitrail.data.loader.os.path.isdir", lambda _: True)
    monkeypatch.setattr("vitrail.data.loader.PREFETCH", 2)  # so a worker may hold three batches
    assert train_loader(Pictures(16), workers=2)._processes().num_workers == expected
    assert bool(caplog.records) == (expected < 2)
    if caplog.records:
        assert f"not of 2; using {expected}. Give the machine more shared memory" in caplog.text


def test_a_worker_that_hangs_is_reported() -> None:
    loader = train_loader(Pictures(16, stuck=3), workers=1, timeout=1)
    with pytest.raises(DataError, match="not delivered a batch for 1 s"):
        list(loader)


def test_a_worker_that_dies_is_reported() -> None:
    loader = train_loader(Pictures(16, deadly=3), workers=1)
    with pytest.raises(DataError, match="A worker process died"):
        list(loader)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 9, "world": 2}, "multiple of their number 2, got 9"),
        ({"rank": 2, "world": 2}, "rank must lie in 0..1"),
        ({"batch_size": 32}, "A batch of 32 is more than all 16 pictures"),
        ({"max_bad_share": float("nan")}, "max_bad_share"),
        ({"repeats": 0}, "repeats"),
        ({"seed": -1}, "seed must be 0"),
    ],
)
def test_illegal_settings_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        train_loader(Pictures(16), **options)


ORPHAN = """
import os, time
from vitrail.data.loader import _begin_worker

owner = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == owner:
    time.sleep(0.01)
_begin_worker(0, owner)  # the owner is gone before the worker looks for it
time.sleep(60)
"""


def test_a_worker_whose_owner_was_killed_while_it_began_ends() -> None:
    # Its output is a pipe that it holds open: the call returns when nobody does any more.
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, timeout=40)
    assert done.returncode == 0, done.stderr
