"""Started by torchrun in tests: a small run whose losses, or whose end, the test looks at.

processes.py FOLDER MODE      MODE: losses, norms, shard, die, or hang
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.train.standin import Batches, Net, training
from vitrail import runtime as runtimes
from vitrail.errors import TrainingError
from vitrail.nn.joint_norm import join_batch_norms
from vitrail.runtime import open_runtime
from vitrail.train.average import Average
from vitrail.train.log import Progress
from vitrail.train.loop import train
from vitrail.train.optim import Hyperparameters, build_optimiser


class Normed(Net):
    """With a batch norm behind its stem."""

    def __init__(self) -> None:
        super().__init__()
        # no bias: behind it the norm would leave its gradient nothing but rounding, which Adam makes large
        self.stem = nn.Linear(12, 8, bias=False)
        self.batch_norm = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.batch_norm(self.stem(images.flatten(1))[:, :, None, None]).flatten(1) + self.position
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def main(folder: Path, mode: str) -> int:
    if mode == "hang":
        runtimes.PATIENCE = timedelta(seconds=5)
    runtime = open_runtime("cpu", "fp32", shard=mode == "shard" and "RANK" in os.environ)
    batches = Batches(count=48, size=8, rank=runtime.rank, world=runtime.world)
    run = training(steps=12, runtime=runtime, batches=batches, accumulate=2, log_every=1)
    network = run.network
    if mode == "norms":
        network = run.network = Normed()
        join_batch_norms(network, runtime.add_up)
    run.network = runtime.prepare(network, blocks=list(network.blocks))  # type: ignore[arg-type]
    run.optimiser = build_optimiser(network, Hyperparameters(lr=1e-2), runtime)  # type: ignore[arg-type]
    run.average = Average(network, 0.9)
    losses = []
    try:
        for record in train(run):
            if isinstance(record, Progress):
                losses.append(record.loss)
                if runtime.rank == 1 and record.step == 3 and mode == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                if runtime.rank == 1 and record.step == 3 and mode == "hang":
                    time.sleep(40)
    except TrainingError as error:
        (folder / f"error-{runtime.rank}.txt").write_text(str(error))
        return 1
    whole = runtime.gather(network.state_dict())
    averaged = runtime.gather(run.average.weights)
    memory = runtime.gather(run.optimiser.state())
    if runtime.shard:
        # What was gathered goes back to where it came from.
        run.optimiser.load(memory if runtime.main else _empty(run.optimiser.state()))
    if runtime.main:
        found = {"losses": losses, "sum": float(sum(value.double().sum() for value in whole.values()))}
        found["average"] = float(sum(value.double().sum() for value in averaged.values()))
        found["memory"] = len(memory)
        (folder / "found.json").write_text(json.dumps(found))
    runtime.barrier()
    runtime.close()
    return 0


def _empty(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in state.items()}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
