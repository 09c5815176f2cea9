"""Where a run computes: devices, precisions, and several processes that agree with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import processes as processes_
from tests.train.killed import pictures
from vitrail.errors import ConfigError, UnsupportedError
from vitrail.nn.block import DropPath
from vitrail.runtime import choose_device, choose_precision, has_bfloat16, open_runtime
from vitrail.train.log import read_log

ROOT = Path(__file__).parents[2]


def launch(folder: Path, mode: str, processes: int) -> subprocess.CompletedProcess[str]:
    """Runs tests/train/processes.py in several processes, started by torchrun."""
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    start += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("processes.py"))
    return subprocess.run(
        [*start, script, str(folder), mode], env=environment, capture_output=True, text=True, timeout=120
    )


def found(folder: Path, mode: str, processes: int) -> dict[str, Any]:
    folder.mkdir()
    if processes == 1:
        assert processes_.main(folder, mode) == 0
    else:
        done = launch(folder, mode, processes)
        assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return result


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    one, two = found(tmp_path / "one", "losses", 1), found(tmp_path / "two", "losses", 2)
    assert len(one["losses"]) == 12
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["sum"] == pytest.approx(one["sum"], rel=1e-4)


def test_two_processes_normalise_over_the_pictures_of_both(tmp_path: Path) -> None:
    one, two = found(tmp_path / "one", "norms", 1), found(tmp_path / "two", "norms", 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    # the sum holds the running statistics, too
    assert two["sum"] == pytest.approx(one["sum"], rel=1e-4)


COMPILED = """
import functools, torch
from vitrail.models.registry import create_model
from vitrail.runtime import Runtime

network = create_model("vit_nano_patch4_32", drop_path_rate=0.3).train()
blocks = list(network.backbone.stages[0].blocks)
for block in blocks:
    block.compile = functools.partial(block.compile, backend="eager")
Runtime(device=torch.device("cpu")).prepare(network, blocks=blocks, compile=True)
network(torch.randn(4, 3, 32, 32)).sum().backward()
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_equal_blocks_are_compiled_once_whatever_their_drop_path() -> None:
    # In a process of its own: the shape checks of tests are not for the compiler.
    start = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, **start)
    assert done.stdout.strip() == "2", done.stderr  # the first block, which drops nothing, and all others


def test_a_compiled_drop_path_drops_the_share_that_it_should_and_keeps_the_mean() -> None:
    drop = DropPath(0.25)
    drop.share_code(torch.device("cpu"))
    torch.manual_seed(0)
    kept = drop.train()(torch.ones(20_000, 1))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((kept == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(drop.eval()(kept), kept) and not drop.state_dict()


@pytest.mark.slow
def test_sharded_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    one, two = found(tmp_path / "one", "losses", 1), found(tmp_path / "two", "shard", 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["average"] == pytest.approx(one["average"], rel=1e-4)
    assert two["memory"] == one["memory"]


@pytest.mark.parametrize("mode", ["die", pytest.param("hang", marks=pytest.mark.slow)])
def test_a_lost_process_ends_the_job_within_a_minute(tmp_path: Path, mode: str) -> None:
    start = time.monotonic()
    done = launch(tmp_path, mode, 2)
    assert done.returncode != 0
    assert time.monotonic() - start < 60
    if mode == "hang":
        assert "lost another process" in (tmp_path / "error-0.txt").read_text()


def test_one_process_needs_no_others() -> None:
    runtime = open_runtime("cpu", "auto")
    assert runtime.main and runtime.world == 1
    assert runtime.any(True) and not runtime.any(False)
    runtime.barrier()
    runtime.close()


def test_bf16_only_where_the_chip_computes_in_it() -> None:
    expected = "bf16" if has_bfloat16(torch.device("cpu")) else "fp32"
    assert choose_precision("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="cpu"):
        choose_device(device)


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs CUDA"):
        choose_precision("fp16", torch.device("cpu"))
    with pytest.raises(ConfigError, match="auto, fp32, bf16"):
        choose_precision("int8", torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="more than one process"):
        open_runtime("cpu", shard=True)


@pytest.mark.slow
def test_the_command_trains_alike_with_one_process_or_two_and_goes_on_with_either(tmp_path: Path) -> None:
    """Losses of `vitrail train` under torchrun, and a run begun by two processes that one takes up."""
    pictures(tmp_path / "data")
    one = command(tmp_path / "data", tmp_path / "one", processes=1, epochs=4)
    two = command(tmp_path / "data", tmp_path / "two", processes=2, epochs=4)
    assert two == pytest.approx(one, rel=1e-4)
    command(tmp_path / "data", tmp_path / "changing", processes=2, epochs=2)
    changing = command(tmp_path / "data", tmp_path / "changing", processes=1, epochs=4)
    assert len(changing) == len(one) == 24


def command(data: Path, output: Path, processes: int, epochs: int) -> list[float]:
    """Losses by step of the command line's run; what is random in the network is off."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        start += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    line = f"-m vitrail train {data} --output {output} --epochs {epochs} --model vit_tiny_patch16_224 --img-size 16"
    line += (
        " --model-kwargs patch_size=8 width=16 depth=1 heads=2 hidden=32 --batch-size 8 --opt adamw --lr 0.01"
    )
    line += " --mixup 0 --cutmix 0 --drop-path 0 --aa none --workers 0 --device cpu --precision fp32"
    line += " --warmup-epochs 0.5 --model-ema 0.9"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, *line.split()], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [found["loss"] for found in read_log(output / "metrics.jsonl") if found["kind"] == "train"]
