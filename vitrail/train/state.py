"""Checkpoints that survive anything: whole and checked, or not there at all.

A checkpoint is a folder `step-00001000/` of safetensors and JSON files with `manifest.json`, which holds the
size and SHA-256 of each. It is written under another name, every file is brought to the disk, the manifest
last, and only then is the folder given its name. A folder whose manifest is absent or does not match is
never loaded. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrail.disk import UNFINISHED, flush_folder, write_through
from vitrail.errors import TrainingError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FACTS = "state.json"
_NAME = re.compile(r"^(step|best)-(\d{8,})$")


@dataclass(kw_only=True)
class Place:
    """Where a run stands. Everything random in a step follows from the seed and this, so no generator's
    state needs to be kept: the order of images from (seed, epoch), each image's changes from (seed, epoch,
    index), mixing, dropout and stochastic depth from (seed, step, part of the step, rank)."""

    step: int = 0
    """Optimiser steps done, skipped ones included."""
    epoch: int = 0
    position: int = 0
    """Images taken from the epoch, over all processes."""
    images: int = 0
    """Images seen, over all processes."""
    skipped: int = 0
    """Steps left out because a number was not finite."""
    skipped_in_a_row: int = 0
    best: float | None = None
    """The best validation score."""
    best_loss: float | None = None
    """The validation loss beside it, which decides between equal scores."""
    best_step: int | None = None
    evaluations_since_best: int = 0
    seconds: float = 0.0
    """Time spent training, over all sittings."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read whole: tensors by file, and the facts beside them."""

    path: Path
    place: Place
    tensors: dict[str, dict[str, Tensor]] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)


def save(
    folder: Path,
    place: Place,
    tensors: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    prefix: str = "step",
) -> Path:
    """Writes a checkpoint into `folder` and returns its path; an equal name is replaced.

    `tensors` are CPU tensors by file name without ending. Raises TrainingError when the disk is full or
    refuses; earlier checkpoints are then as they were, and nothing half-written stays.
    """
    final = folder / f"{prefix}-{place.step:08d}"
    unfinished = folder / f"{UNFINISHED}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for name, group in tensors.items():
            write_through(unfinished / f"{name}.safetensors", _to_bytes(group))
        facts = {"place": asdict(place), **facts}
        write_through(unfinished / FACTS, json.dumps(facts, indent=1, sort_keys=True).encode())
        write_through(
            unfinished / MANIFEST, json.dumps(_manifest(unfinished), indent=1, sort_keys=True).encode()
        )
        flush_folder(unfinished)
        _put(unfinished, final)
        flush_folder(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        before = [path.name for path in names(folder) if path != final]
        raise TrainingError(
            f"Cannot write the checkpoint {final}: {error.strerror or error}."
            f" {'The last good one is ' + before[-1] if before else 'There is no earlier one'}."
            " Make room, then give the same command again."
        ) from error
    return final


def _put(unfinished: Path, final: Path) -> None:
    """Gives a finished folder its name; one of the same name goes only once this one is complete."""
    if not final.exists():
        os.replace(unfinished, final)
        return
    old = final.with_name(f"{UNFINISHED}old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(final, old)
    os.replace(unfinished, final)
    shutil.rmtree(old, ignore_errors=True)


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises TrainingError when it is not whole."""
    from safetensors.torch import load

    found: dict[str, bytes] = {}
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for name, expected in manifest["files"].items():
            data = (path / Path(name).name).read_bytes()
            if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
                raise TrainingError(f"{path} is damaged: {name} is not what was written.")
            found[name] = data
        facts = json.loads(found[FACTS])
        place = Place(**facts.pop("place"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path} is not a whole checkpoint: {error}.") from error
    tensors = {
        name.removesuffix(".safetensors"): load(data)
        for name, data in found.items()
        if name.endswith(".safetensors")
    }
    return Checkpoint(path=path, place=place, tensors=tensors, facts=facts)


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a folder, or None. Damaged ones are passed over with a warning."""
    for path in reversed(names(folder)):
        try:
            return read(path)
        except TrainingError as error:
            logger.warning("%s It is passed over.", error)
    return None


def names(folder: Path, prefix: str = "step") -> list[Path]:
    """The checkpoint folders in order of their steps, whole or not."""
    if not folder.is_dir():
        return []
    found = [(int(match[2]), path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found) if path.name.startswith(prefix)]


def prune(folder: Path, keep: int, best: Iterable[int | None] = ()) -> None:
    """Removes all but the newest `keep` (at least 2) checkpoints, and every best one not named in `best`."""
    wanted = {step for step in best if step is not None}
    stale = names(folder)[: -max(2, keep)]
    stale += [path for path in names(folder, "best") if int(path.name.rpartition("-")[2]) not in wanted]
    stale += list(folder.glob(f"{UNFINISHED}*"))
    for path in stale:
        # Renamed first: a folder that is being removed must not look like a checkpoint.
        gone = path.with_name(f"{UNFINISHED}{path.name.removeprefix(UNFINISHED)}")
        if gone != path:
            os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Inside, the folder is this process's alone; TrainingError when another process holds it.

    The system gives the claim up when the process ends, however it ends.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".claim", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TrainingError(
                f"Another process is training into {folder}. Wait, or take another --output."
            ) from None
        yield


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save as serialise

    return serialise({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def _manifest(folder: Path) -> dict[str, Any]:
    files = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        files[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {"format": 1, "files": files}
