"""A network and data so small that a training run takes a moment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrail.runtime import Runtime
from vitrail.tasks.classify import Classify
from vitrail.train.average import Average
from vitrail.train.loop import Training
from vitrail.train.optim import Hyperparameters, build_optimiser
from vitrail.train.pace import Pace
from vitrail.train.schedule import Schedule
from vitrail.train.state import Place


class Net(nn.Module):
    """Two blocks of matrices between a stem and a head, with a position that never decays."""

    depth = 2

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 8)
        self.position = nn.Parameter(torch.zeros(1, 8))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)) for _ in "ab"
        )
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.flatten(1)) + self.position
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(self.dropout(self.norm(x)))
        return out

    def no_weight_decay(self) -> set[str]:
        return {"position"}

    def depth_of(self, name: str) -> int:
        if name.startswith("blocks."):
            return 1 + int(name.split(".")[1])
        return 3 if name.startswith(("head", "norm")) else 0


class Batch(NamedTuple):
    images: Tensor
    targets: Tensor


class Batches:
    """Images of three classes, shuffled by (seed, epoch)."""

    def __init__(self, count: int = 48, size: int = 8, rank: int = 0, world: int = 1) -> None:
        generator = torch.Generator().manual_seed(5)
        self.targets = torch.arange(count) % 3
        noise = torch.randint(0, 60, (count, 3, 2, 2), generator=generator)
        self.images = (noise + 60 * self.targets[:, None, None, None]).to(torch.uint8)
        self.batch_size, self.rank, self.world = size, rank, world
        self.at = (0, 0)
        self.seen: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self.targets) // self.batch_size

    def resume(self, epoch: int, position: int) -> None:
        self.at = (epoch, position)

    def __iter__(self) -> Iterator[Batch]:
        epoch, position = self.at
        torch.rand(())  # as torch's own DataLoader does when an iteration begins
        order = torch.randperm(len(self.targets), generator=torch.Generator().manual_seed(epoch))
        for start in range(position, len(self) * self.batch_size, self.batch_size):
            index = order[start : start + self.batch_size][self.rank :: self.world]
            self.seen.append(tuple(index.tolist()))
            yield Batch(self.images[index], self.targets[index])


def inputs(images: Tensor) -> Tensor:
    return images.float() / 255 - 0.5


def training(
    *,
    steps: int = 12,
    accumulate: int = 1,
    size: int = 8,
    dropout: float = 0.0,
    kind: str = "adamw",
    average: bool = False,
    place: Place | None = None,
    clip: float = 1.0,
    runtime: Runtime | None = None,
    batches: Batches | None = None,
    lr: float = 1e-2,
    **pace: int,
) -> Training:
    """A small run, ready to go."""
    torch.manual_seed(0)
    net = Net(dropout)
    runtime = runtime or Runtime(device=torch.device("cpu"))
    task = Classify(["a", "b", "c"])
    batches = Batches(size=size) if batches is None else batches
    recipe = Hyperparameters(kind=kind, lr=lr)  # type: ignore[arg-type]
    return Training(
        network=net,
        runtime=runtime,
        batches=batches,
        inputs=inputs,
        objective=lambda output, targets, images: task.loss(output, targets),
        optimiser=build_optimiser(net, recipe, runtime),
        schedule=Schedule(steps=steps, warmup=2),
        pace=Pace(
            steps=steps, steps_per_epoch=len(batches) // accumulate, accumulate=accumulate, clip=clip, **pace
        ),
        place=place or Place(),
        average=Average(net, 0.9) if average else None,
    )
