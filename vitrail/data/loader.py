"""Batches of uint8 pictures: the same ones whatever the number of workers, and after a resume.

What an epoch holds follows from (seed, epoch) alone; what is done to a picture from (seed, epoch, its place
in the data set, which copy). Workers are torch's DataLoader processes; each builds whole batches.

An unreadable picture does not stop training. Its place in the batch goes to the next picture of the data set
that can be read, with the same seed, so batches keep their size and every run replaces alike. In evaluation
nothing may be counted twice, so there its row is dropped. Both are recorded in `Loader.skipped`, and too many
of them are an error.
"""

from __future__ import annotations

import functools
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vitrail.data.augment import sample_seed
from vitrail.data.image import LIMITS, Limits, decode
from vitrail.data.stores import Array
from vitrail.data.transforms import one_thread
from vitrail.errors import ConfigError, DataError, ImageError

logger = logging.getLogger(__name__)

PREFETCH = 2
"""Batches that each worker prepares ahead."""

FILLER = -1
"""Index and target of a row that only keeps a process in step (see `Loader`)."""


class Batch(NamedTuple):
    """Pictures ready for the device: uint8 `[B, C, h, w]`, labels int64 `[B]`, places in the source `[B]`."""

    images: Tensor
    targets: Tensor
    indices: Tensor


class Pictures(Protocol):
    """What a loader needs of a source (data.sources.Source, or anything like it)."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Array: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> Any: ...


class Transform(Protocol):
    """`Preprocess` or `TrainTransform`: uint8 `[3, H, W]` and a seed to uint8 `[C, h, w]`."""

    def __call__(self, image: Tensor, seed: int, /) -> Tensor: ...


class Share(NamedTuple):
    """One rank's share of one batch: epoch, places in the source, and which copy of each."""

    epoch: int
    indices: Array
    copies: Array


class Built(NamedTuple):
    """What a worker hands back: the batch, what it could not read, and why there is none if so."""

    batch: Batch | None
    skipped: list[tuple[int, str]]


class Loader:
    """Iterate over one epoch's batches, from the position that `resume` set; then the next epoch is due.

    Args:
        source: pictures and labels.
        transform: `TrainTransform` or `Preprocess` (a Transform), or what the `builder` asks for.
        batch_size: pictures in one step over all ranks; a multiple of `world`.
        shuffle: a new order in each epoch, from (seed, epoch).
        workers: processes that build batches; 0 builds them in this one.
        rank, world: this process among all. Global batch k is the same whatever `world` is; rank r takes its
            rows r, r + world, ... Every rank makes the same number of steps.
        drop_last: leave out the incomplete batch at the end. Without it the last batch is smaller, and a rank
            that no row is left for gets one filler row with index and target -1, so that all keep in step.
        repeats: copies of each picture in a row, each augmented on its own (repeated augmentation, Hoffer et
            al. 2020); the epoch keeps its length and sees 1 / repeats of the pictures.
        unreadable: `replace` by the next readable picture, or `drop` the row.
        max_bad_share: share of unreadable pictures above which DataError is raised (one alone never does,
            unless the share is 0). A batch of which nothing is left is passed over, or made a filler row
            where several ranks go in step.
        timeout: seconds to wait for a worker's batch before giving up with DataError.
        pin_memory: page-locked batches, for quicker copies to a CUDA device.
        builder: what makes a batch of a share; data.dense_loader's for boxes and masks.
    """

    def __init__(
        self,
        source: Pictures,
        transform: Any,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        repeats: int = 1,
        unreadable: Literal["replace", "drop"] = "replace",
        max_bad_share: float = 0.005,
        timeout: float = 300.0,
        pin_memory: bool = False,
        limits: Limits = LIMITS,
        builder: type[Builder] | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise ConfigError(f"rank must lie in 0..{world - 1}, got {rank}.")
        if batch_size < 1 or batch_size % world:
            raise ConfigError(
                f"batch_size counts all processes together and must be a multiple of their number {world}, "
                f"got {batch_size}."
            )
        if repeats < 1 or workers < 0:
            raise ConfigError(f"repeats must be at least 1 and workers 0, got {repeats} and {workers}.")
        if seed < 0:
            raise ConfigError(f"seed must be 0 or a positive whole number, got {seed}.")
        if not 0 <= max_bad_share <= 1:
            raise ConfigError(f"max_bad_share must lie in 0..1, got {max_bad_share}.")
        if len(source) == 0:
            raise DataError("The data set has no pictures.")
        if drop_last and len(source) < batch_size:
            raise ConfigError(f"A batch of {batch_size} is more than all {len(source)} pictures; lower it.")
        self.source = source
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world = world
        self.drop_last = drop_last
        self.repeats = repeats
        self.max_bad_share = max_bad_share
        self.timeout = timeout
        self.skipped: dict[int, str] = {}
        """What could not be read so far: place in the source, and the reason with the file's name."""
        self.epoch = 0
        self._position = 0
        self._builder = (builder or Builder)(source, transform, seed, unreadable, limits)
        self._workers = workers
        self._pin_memory = pin_memory
        self._batches: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        whole, rest = divmod(len(self.source), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    @property
    def position(self) -> int:
        """Pictures of this epoch that were handed out, over all ranks."""
        return self._position

    def state(self) -> dict[str, int]:
        """Where the data stands: the next batch is the first one after it. JSON-ready."""
        if self._position >= len(self) * self.batch_size:
            return {"epoch": self.epoch + 1, "position": 0}
        return {"epoch": self.epoch, "position": self._position}

    def resume(self, epoch: int, position: int = 0) -> None:
        """Go on where `state()` was taken, perhaps with another number of ranks or workers."""
        if epoch < 0 or not 0 <= position <= len(self.source):
            raise ConfigError(
                f"epoch {epoch}, position {position}: not a place in {len(self.source)} pictures."
            )
        self.epoch, self._position = epoch, position

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is None:
            self._batches = self._processes()
        epoch = self.epoch
        built = iter(self._batches)
        while True:
            try:
                batch, skipped = next(built)
            except StopIteration:
                break
            except RuntimeError as error:
                raise self._explained(error) from error
            self._record(skipped)
            if batch is None:
                raise DataError(
                    f"No readable picture was found near {skipped[-1][1]} Run vitrail data check."
                )
            self._position += self.batch_size
            if self.world > 1 or int(batch.indices[0]) != FILLER:
                yield batch
        self.epoch, self._position = epoch + 1, 0

    def shares(self) -> Iterator[Share]:
        """This rank's share of every batch from the current position on."""
        order, copies = self._order(self.epoch)
        end = len(self) * self.batch_size
        for start in range(self._position, min(end, len(order)), self.batch_size):
            stop = min(start + self.batch_size, len(order))
            mine = slice(start + self.rank, stop, self.world)
            yield Share(self.epoch, order[mine], copies[mine])

    def _order(self, epoch: int) -> tuple[Array, Array]:
        count = len(self.source)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(count)
        else:
            order = np.arange(count)
        copies = np.tile(np.arange(self.repeats), count)[:count]
        return np.repeat(order, self.repeats)[:count], copies

    def _processes(self) -> DataLoader[Any]:
        workers = self._affordable(self._workers)
        several: dict[str, Any] = {}
        if workers:
            several = {"prefetch_factor": PREFETCH, "persistent_workers": True, "timeout": self.timeout}
        return DataLoader(
            self._builder,
            batch_size=None,
            sampler=Shares(self),
            num_workers=workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # without batch_size it gets one item
            pin_memory=self._pin_memory,
            worker_init_fn=functools.partial(_begin_worker, owner=os.getpid()),
            generator=torch.Generator(),  # of its own: torch's one is the model's, and must resume exactly
            **several,
        )

    def _affordable(self, workers: int) -> int:
        """Fewer workers where shared memory (small in many containers) would overflow: a bus error else."""
        folder = "/dev/shm"
        if not workers or not os.path.isdir(folder):
            return workers
        batch = self._builder.batch_bytes(math.ceil(self.batch_size / self.world))
        room = shutil.disk_usage(folder).free // max(1, (PREFETCH + 1) * batch)
        if room >= workers:
            return workers
        logger.warning(
            "%s has room for the batches of %d worker processes, not of %d; using %d. Give the machine more "
            "shared memory (docker run --shm-size=2g), or use smaller batches.",
            folder,
            room,
            workers,
            room,
        )
        return int(room)

    def _record(self, skipped: list[tuple[int, str]]) -> None:
        for index, reason in skipped:
            if index not in self.skipped:
                logger.warning("Left out: %s", reason)
                self.skipped[index] = reason
        count = len(self.source)
        allowed = max(1, math.floor(self.max_bad_share * count)) if self.max_bad_share else 0
        if len(self.skipped) > allowed:
            first = next(iter(self.skipped.values()))
            raise DataError(
                f"{len(self.skipped)} of {count} pictures could not be read so far, more than the "
                f"{self.max_bad_share:.2%} that are tolerated; the first: {first} "
                "Look at them with vitrail data check, or raise max_bad_share (--max-bad-share)."
            )

    def _explained(self, error: RuntimeError) -> Exception:
        text = str(error)
        if "timed out" in text:
            return DataError(
                f"A worker has not delivered a batch for {self.timeout:g} s. Is the disk or the network drive "
                "gone? Try workers=0 to see the error itself."
            )
        if "exited unexpectedly" in text or "killed by signal" in text:
            return DataError(
                f"A worker process died ({text.splitlines()[0]}). Most often memory or shared memory has run "
                "out: use fewer workers or smaller batches."
            )
        return error


class Builder(Dataset[Built]):
    """Builds a batch from its share; what each worker holds."""

    def __init__(self, source: Pictures, transform: Any, seed: int, unreadable: str, limits: Limits) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.unreadable = unreadable
        self.limits = limits

    def __getitem__(self, share: Share) -> Built:
        with one_thread():
            return self._built(share)

    def _built(self, share: Share) -> Built:
        rows: list[Any] = []
        indices: list[int] = []
        skipped: list[tuple[int, str]] = []
        for index, copy in zip(share.indices.tolist(), share.copies.tolist(), strict=True):
            seed = sample_seed(self.seed, share.epoch, index, copy)
            tries = TRIES if self.unreadable == "replace" else 1
            for candidate in range(index, index + min(tries, len(self.source))):
                place = candidate % len(self.source)
                try:
                    rows.append(self.picture(place, seed))
                    indices.append(place)
                    break
                except ImageError as error:
                    skipped.append((place, str(error)))
            else:
                if self.unreadable == "replace":
                    return Built(None, skipped)
        return Built(self._batch(rows, indices), skipped)

    def picture(self, index: int, seed: int) -> Tensor:
        """One picture as the network gets it. Raises ImageError."""
        data = self.source.read(index)
        return self.transform(decode(data, self.source.name(index), self.limits), seed)

    def batch_bytes(self, count: int) -> int:
        """Bytes of a batch of so many pictures."""
        return count * self.blank.numel()

    @functools.cached_property
    def blank(self) -> Tensor:
        """A black input of the network's size: the transform of a black picture."""
        return torch.zeros_like(self.transform(torch.zeros(3, 32, 32, dtype=torch.uint8), 0))

    def _batch(self, rows: list[Tensor], indices: list[int]) -> Batch:
        targets = self.source.labels[indices] if indices else np.array([FILLER])
        places = indices or [FILLER]
        images = torch.stack(rows or [self.blank])  # [B, C, h, w]
        return Batch(images, torch.tensor(targets, dtype=torch.int64), torch.tensor(places))


TRIES = 100
"""Pictures in a row that may be unreadable before a batch is given up."""


class Shares(Sampler[Share]):
    """Torch's name for what says which items are next.

    The loader is held weakly: it holds the worker processes, and in a cycle with them it would be left to the
    garbage collector, in whose hands torch waits five seconds for each worker.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = weakref.ref(loader)

    def __iter__(self) -> Iterator[Share]:
        loader = self.loader()
        assert loader is not None
        return iter(list(loader.shares()))


def _as_it_is(built: Built) -> Built:
    return built


def _begin_worker(_: int, owner: int) -> None:
    """Ctrl-C is the main process's to handle; it ends the workers itself. A worker also ends when `owner` is gone.

    torch's own watch takes whoever is the parent when it begins for the owner: a worker whose owner was killed a moment
    before would live for ever, and keep what it inherited.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if multiprocessing.get_start_method() == "fork":  # else the parent is not the owner
        threading.Thread(target=_end_with, args=(owner,), daemon=True).start()


def _end_with(owner: int) -> None:
    while os.getppid() == owner:
        time.sleep(1.0)
    os._exit(1)
