"""The models that are served, each with its queue; how one is replaced while it is asked."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vitrail.errors import VitrailError
from vitrail.jobs.decode_worker import Bounds
from vitrail.jobs.serve import Served, find_engine, shares, stamp, use_threads
from vitrail.runs import ServeRun
from vitrail.serve import settings
from vitrail.serve.admission import Admission
from vitrail.serve.batcher import Batcher, Engine
from vitrail.serve.decoders import Decoders
from vitrail.serve.fetch import Fetcher
from vitrail.serve.metrics import Metrics
from vitrail.serve.refusals import Refusal

logger = logging.getLogger(__name__)

PATIENCE = 0.6
"""Share of the deadline that a picture may have to wait by what is known when it comes."""

STUCK_SECONDS = 60.0
"""A batch that takes longer is taken for an engine that will never answer."""


class Version:
    """One version of a model with its queue, and how many requests are with it."""

    def __init__(self, served: Served, batcher: Batcher) -> None:
        self.served, self.batcher = served, batcher
        self.users = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def __enter__(self) -> Version:
        self.users += 1
        self.idle.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.users -= 1
        if not self.users:
            self.idle.set()


class Slot:
    """One name that requests use, the version of the model that answers to it now, and its admission control."""

    def __init__(self, name: str, folder: str, version: Version, backend: Backend) -> None:
        self.name, self.folder, self.version = name, folder, version
        self.refused = ""
        """The stamp of a folder that could not be taken over, so that it is tried once and not for ever."""
        run = backend.run
        self.admission = Admission(
            run.queue_images,
            run.queue_megabytes * 2**20,
            lambda: self.version.batcher.pace + backend.decoders.pace,
            PATIENCE * run.deadline,
        )
        inside, size = backend.metrics.inside, backend.metrics.inside_bytes
        inside.labels(name).set_function(lambda: self.admission.images)
        size.labels(name).set_function(lambda: self.admission.bytes)


class Backend:
    """Everything that lives while the service runs.

    Args:
        run: what was asked for.
        folders: name -> folder.
        metrics: where counts go.
    """

    def __init__(self, run: ServeRun, folders: Mapping[str, str], metrics: Metrics) -> None:
        self.run, self.folders, self.metrics = run, folders, metrics
        self.slots: dict[str, Slot] = {}
        lanes, cores = shares(run.device)
        self.engine = Engine(lanes, cores)
        # A new thread takes as many cores as were last set anywhere, so each is told its own number.
        self.loader = ThreadPoolExecutor(1, "loader", initializer=use_threads, initargs=(cores,))
        self.explainer = ThreadPoolExecutor(1, "explain", initializer=use_threads, initargs=(cores,))
        self.explanations: set[Future[Any]] = set()
        self.loads: set[Future[Any]] = set()
        self.copies = tempfile.mkdtemp(prefix="vitrail-serve-")
        """Where the models lie that are computed with."""
        self.ready = self.draining = False
        self.look = asyncio.Event()
        """Set to have the folders looked at now."""
        self.tasks: list[asyncio.Task[None]] = []
        self.retiring: set[asyncio.Task[None]] = set()
        bounds = Bounds(
            megabytes=run.decoder_megabytes, seconds=run.decode_seconds, pixels=round(run.megapixels * 1e6)
        )
        self.fetcher = Fetcher(run.fetch_from)
        self.decoders = Decoders(run.decoders or _cores(), bounds, metrics.observe)

    async def open(self) -> None:
        """Start the decoders, load and warm every model; ready afterwards. Raises what opening a model raises."""
        await self.decoders.start()
        for name, folder in self.folders.items():
            served = await self._load(name, folder, self.run.engine)
            self.slots[name] = Slot(name, folder, self._version(served), self)
        _settle()
        self.ready = True
        self.metrics.ready.set_function(lambda: float(self.ready and not self.draining))
        self.tasks.append(asyncio.create_task(self._watch()))

    async def close(self) -> None:
        """Stop what still runs; the requests have been answered by now."""
        for task in [*self.tasks, *self.retiring]:
            task.cancel()
        await asyncio.gather(*self.tasks, *self.retiring, return_exceptions=True)
        for slot in self.slots.values():
            await slot.version.batcher.close()
        await self.decoders.close()
        self.engine.close()
        for executor in (self.loader, self.explainer):
            executor.shutdown(wait=False, cancel_futures=True)
        self.discard()
        gc.unfreeze()

    def discard(self) -> None:
        """Remove the copies; what is mapped from them stays readable for as long as the process lives."""
        shutil.rmtree(self.copies, ignore_errors=True)

    def busy(self) -> bool:
        """Whether a thread is at something, be it that nobody waits for it any more."""
        return self.engine.computes() or bool(self.explanations or self.loads)

    def slot(self, name: str | None) -> Slot:
        """The model that a request means; the only or the first one where it names none. Raises Refusal."""
        if self.draining:
            raise Refusal("draining", retry_after=5)
        if not self.ready:
            raise Refusal("not_ready", retry_after=5)
        if not name:
            return next(iter(self.slots.values()))
        if name not in self.slots:
            raise Refusal("no_such_model")
        return self.slots[name]

    def alive(self) -> bool:
        """Whether progress is possible."""
        return not self.engine.stuck(STUCK_SECONDS)

    async def explain(self, call: Callable[[], Any]) -> Any:
        """Something that takes long, one at a time and apart from the batches. Raises Refusal when many wait."""
        if len(self.explanations) > settings.EXPLANATIONS_WAITING:
            raise Refusal("full", retry_after=5)
        return await _known_in(self.explanations, self.explainer.submit(call))

    def _version(self, served: Served) -> Version:
        return Version(served, Batcher(served, self.engine, self.metrics.observe))

    async def _load(self, name: str, folder: str, engine: str) -> Served:
        run = self.run

        def load() -> Served:
            chosen = find_engine(folder, run.device, run.precision) if engine == "auto" else engine
            return Served(
                name,
                folder,
                copies=self.copies,
                exact=run.exact,
                batch_size=run.batch_size,
                device=run.device,
                precision=run.precision,
                engine=chosen,
                share=self.engine.share,
            )

        served: Served = await _known_in(self.loads, self.loader.submit(load))
        logger.info(
            "%s: version %s on %s in %s, batches of %s%s; a batch moves no logit by more than %.1g",
            name,
            served.version,
            served.predictor.engine.name,
            served.predictor.engine.precision,
            ", ".join(map(str, served.warm_up.sizes)),
            f", {len(self.engine.lanes)} side by side" if served.warm_up.side_by_side else "",
            served.warm_up.difference,
        )
        return served

    async def _watch(self) -> None:
        """Look at the folders now and then, and take over those that have changed and hold still."""
        seen: dict[str, str] = {}
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.look.wait(), self.run.watch or None)
            told = self.look.is_set()
            self.look.clear()
            for slot in list(self.slots.values()):
                now = await asyncio.to_thread(stamp, slot.folder)
                # A folder that is being written changes from one look to the next.
                settled = told or seen.get(slot.name) == now
                seen[slot.name] = now
                known = (slot.version.served.stamp, *(() if told else (slot.refused,)))
                if now and settled and now not in known:
                    await self._swap(slot, now)

    async def _swap(self, slot: Slot, now: str) -> None:
        """Put the folder's new model in the old one's slot; what is wrong with it leaves the old one there."""
        # Under load no engine is measured: it stays with the one that was found at the start.
        engine = slot.version.served.predictor.engine.name if self.run.engine == "auto" else self.run.engine
        try:
            served = await self._load(slot.name, slot.folder, engine)
        except (VitrailError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            slot.refused = now
            self.metrics.swaps.labels(slot.name, "refused").inc()
            logger.error("%s stays as it is: its folder changed, and was refused: %s", slot.name, error)
            return
        old, slot.version = slot.version, self._version(served)
        self.metrics.swaps.labels(slot.name, "taken").inc()
        logger.info("%s: version %s follows %s", slot.name, served.version, old.served.version)
        task = asyncio.create_task(_retire(old))
        self.retiring.add(task)
        task.add_done_callback(self.retiring.discard)


async def _known_in(running: set[Future[Any]], call: Future[Any]) -> Any:
    """What a call in a thread gives; it is known until the thread is done, not until nobody waits for it."""
    running.add(call)
    call.add_done_callback(running.discard)
    return await asyncio.wrap_future(call)


async def _retire(old: Version) -> None:
    """Let a version go when the last request that came to it has its answer."""
    await old.idle.wait()
    await old.batcher.close()
    _settle()


def _settle() -> None:
    """Sort out what lives for as long as the models do: else Python goes through all of it again and again, and every
    request waits for that, a tenth of a second each time."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _cores() -> int:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, count))
