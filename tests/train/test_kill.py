"""A run killed with SIGKILL at any moment, and gone on with, ends with the bits of one never killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.train.log import read_log
from vitrail.train.state import UNFINISHED, newest

ROOT = Path(__file__).parents[2]
TIMES = {"images_per_second", "waiting", "seconds", "seconds_left"}


LONG = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(("kills", "epochs"), [(3, 4), pytest.param(24, 8, marks=LONG)])
def test_killed_again_and_again_the_run_ends_with_the_same_bits(
    tmp_path: Path, kills: int, epochs: int
) -> None:
    """With worker processes, accumulation, averaged weights, mixup, CutMix, dropout and stochastic depth."""
    script = Path(__file__).with_name("killed.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(kills), str(epochs), "7"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stderr
    assert f"killed {kills}:" in done.stdout

    for run in [tmp_path / "killed", *tmp_path.glob("through-*")]:
        assert_same_bits(tmp_path / "whole", run, epochs)


def assert_same_bits(one: Path, other: Path, epochs: int) -> None:
    """Whether two run folders hold the same weights, memory, records and model."""
    whole, killed = newest(one / "checkpoints"), newest(other / "checkpoints")
    assert whole is not None and killed is not None
    assert whole.place.step == killed.place.step == 6 * epochs
    assert set(whole.tensors) == {"model", "optimiser", "average"}
    for file, tensors in whole.tensors.items():
        assert set(tensors) == set(killed.tensors[file])
        for name, value in tensors.items():
            assert torch.equal(value, killed.tensors[file][name]), f"{file}: {name}"
    assert records(one) == records(other)
    files = [(run / "model" / "model.safetensors").read_bytes() for run in (one, other)]
    assert files[0] == files[1]
    assert not list((other / "checkpoints").glob(f"{UNFINISHED}*"))
    places = [json.dumps({**vars(found.place), "seconds": 0}) for found in (whole, killed)]
    assert places[0] == places[1]


def records(folder: Path) -> list[dict[str, Any]]:
    """What the run wrote step by step, without the times."""
    found = read_log(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMES} for record in found]
