"""What a training run keeps: checkpoints, the best weights, and the claim that they are the same run's."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import vitrail
from vitrail import config as records
from vitrail.disk import write_atomically
from vitrail.errors import ConfigError, TrainingError
from vitrail.jobs import plan as plans
from vitrail.runs import TrainRun
from vitrail.runtime import Runtime
from vitrail.train import state
from vitrail.train.average import Average
from vitrail.train.log import Note
from vitrail.train.optim import Optimiser
from vitrail.train.pace import Pace
from vitrail.train.state import Checkpoint, Place

Say = Callable[[Note], None]


def versions() -> dict[str, str]:
    """What a result may depend on besides the record of its run."""
    return {
        "vitrail": vitrail.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


# Fields in which a resumed run may differ from the one it goes on with: where and how fast it computes, how long
# it goes on, and how often it looks up.
MAY_DIFFER = {
    "output", "resume", "workers", "device", "compile", "shard", "keep", "patience", "epochs", "steps",
    "eval_every", "save_every", "deterministic", "max_bad_share", "grad_checkpointing", "recipe", "data", "val",
    "precision",
}  # fmt: skip


def check_same(before: Mapping[str, Any], run: TrainRun, where: Path) -> None:
    """Raises ConfigError when a checkpoint belongs to another run than the one asked for."""
    now = records.to_dict(run)
    changed = [
        name for name in now if name not in MAY_DIFFER and name in before and before[name] != now[name]
    ]
    if changed:
        listed = ", ".join(f"{name} was {before[name]}, is {now[name]}" for name in changed[:4])
        raise ConfigError(
            f"{where} holds another run ({listed}). Give the same settings to go on with it, --resume none to"
            " start it anew, or another --output."
        )


def find_checkpoint(run: TrainRun, folder: Path, runtime: Runtime) -> Checkpoint | None:
    """The checkpoint that the run goes on from, as `resume` asks; an old run is moved aside for a new one.

    Raises ConfigError when `resume` names a checkpoint that is not whole, TrainingError when another process
    trains into the folder that is to be moved.
    """
    checkpoints = folder / "checkpoints"
    if run.resume == "auto":
        return state.newest(checkpoints)
    if run.resume != "none":
        try:
            return state.read(Path(run.resume))
        except TrainingError as error:  # here it is the caller who named it
            raise ConfigError(f"{error} resume takes auto, none, or a checkpoint folder.") from error
    if runtime.main and checkpoints.exists():
        number = next(n for n in range(1, 10_000) if not Path(f"{folder}-before-{n}").exists())
        with state.claim(folder):  # a run that still goes on keeps its folder
            folder.rename(f"{folder}-before-{number}")
    runtime.barrier()
    return None


def continued(run: TrainRun, found: Checkpoint, fingerprint: str, say: Say) -> TrainRun:
    """The run with its open fields as the checkpoint has them; ConfigError when it is another run's."""
    before = found.facts["config"]
    kept = {
        name: value for name, value in before.items() if plans.is_open(run, name) and value not in (None, [])
    }
    if run.steps is not None or run.epochs is not None:
        kept = {name: value for name, value in kept.items() if name not in ("epochs", "steps")}
    run = records.replace(run, **kept)
    check_same(before, run, found.path)
    if found.facts["data"] != fingerprint:
        raise ConfigError(
            f"The training pictures are others than those of {found.path}: files were added, removed or"
            " changed. Give --resume none, or another --output."
        )
    say(Note(text=f"Going on from {found.path} (step {found.place.step:,})."))
    for name, version in versions().items():
        if found.facts["versions"].get(name) != version and run.deterministic:
            text = f"{name} was {found.facts['versions'].get(name)} and is {version}: bits may differ."
            say(Note(text=text, kind="warning"))
    return run


@dataclass(frozen=True, kw_only=True)
class Checkpointer:
    """Brings the parts of a run to the disk and back."""

    folder: Path
    """The run folder."""
    run: TrainRun
    runtime: Runtime
    model: nn.Module
    optimiser: Optimiser
    average: Average | None
    pace: Pace
    fingerprint: str
    """Hash of the training pictures."""
    validation_fingerprint: str | None
    """Hash of the validation pictures, where there are any."""
    say: Say
    classes: tuple[str, ...]

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def restore(self, found: Checkpoint) -> Place:
        """Puts a checkpoint into network, optimiser, average and scaler; where the run stands then."""
        live = self.model.state_dict()
        if set(live) != set(found.tensors["model"]):
            raise TrainingError(f"{found.path} holds another network than {self.run.model} as configured.")
        if found.facts["steps_per_epoch"] != self.pace.steps_per_epoch:
            raise TrainingError(f"{found.path} has epochs of another length; it cannot be gone on with.")
        with torch.no_grad():
            for name, value in live.items():
                value.copy_(self.runtime.place_like(found.tensors["model"][name], value))
        self.optimiser.load(found.tensors["optimiser"])
        if self.average is not None:
            self.average.load(found.tensors["average"], self.runtime)
        if self.runtime.scaler is not None and found.facts["scaler"]:
            self.runtime.scaler.load_state_dict(found.facts["scaler"])
        return self._with_best(found)

    def _with_best(self, found: Checkpoint) -> Place:
        """The checkpoint's place; its best weights come along from another run's folder, or are forgotten."""
        place = dataclasses.replace(found.place)
        if place.best_step is None:
            return place
        if found.facts["val"] != self.validation_fingerprint:
            text = "The validation pictures are others than before: which weights are best is found anew, from here on."
            self.say(Note(text=text, kind="warning"))
            place.best = place.best_loss = place.best_step = None
            place.evaluations_since_best = 0
            return place
        name = f"best-{place.best_step:08d}"
        ours, theirs = self.checkpoints / name, found.path.parent / name
        here, there = ours.exists(), theirs.exists()
        self.runtime.barrier()
        if not here and there and self.runtime.main:
            best = state.read(theirs)
            state.save(self.checkpoints, best.place, best.tensors, best.facts, prefix="best")
        if not here and not there:
            place.best = place.best_loss = place.best_step = None
        self.runtime.barrier()
        return place

    def save(self, place: Place) -> str:
        """Writes a checkpoint, and removes those that are no longer wanted. Every process must call this."""
        gather = self.runtime.gather
        tensors = {"model": gather(self.model.state_dict()), "optimiser": gather(self.optimiser.state())}
        if self.average is not None:
            tensors["average"] = gather(self.average.weights)
        path = self.checkpoints / f"step-{place.step:08d}"
        if self.runtime.main:
            path = state.save(self.checkpoints, place, tensors, self.facts())
            state.prune(self.checkpoints, self.run.keep, best=[place.best_step, *self._best_of_others()])
            write_atomically(self.checkpoints / "latest", path.name.encode(), TrainingError)
        self.runtime.barrier()
        return str(path)

    def save_best(self, place: Place) -> None:
        """Keeps the weights that were just scored. Every process must call this."""
        weights = self.runtime.gather(self.scored())
        if self.runtime.main:
            state.save(self.checkpoints, place, {"model": weights}, self.facts(), prefix="best")
        self.runtime.barrier()

    def scored(self) -> dict[str, Tensor]:
        """The weights that are scored: averaged ones where there are any."""
        return {**self.model.state_dict(), **(self.average.weights if self.average is not None else {})}

    def facts(self) -> dict[str, Any]:
        """What is written beside the tensors."""
        config = records.to_dict(self.run)
        scaler = self.runtime.scaler
        return {
            "config": config,
            "config_hash": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            "data": self.fingerprint,
            "val": self.validation_fingerprint,
            "classes": list(self.classes),
            "versions": versions(),
            "world": self.runtime.world,
            "precision": self.runtime.precision,
            "steps_per_epoch": self.pace.steps_per_epoch,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def _best_of_others(self) -> list[int | None]:
        """Best steps that the checkpoints which stay speak of."""
        named: list[int | None] = []
        for path in state.names(self.checkpoints)[-max(2, self.run.keep) :]:
            with contextlib.suppress(OSError, ValueError, KeyError):
                named.append(json.loads((path / state.FACTS).read_text())["place"]["best_step"])
        return named
