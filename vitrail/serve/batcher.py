"""Pictures that are ready wait here for the engine, and go through it together.

Nothing waits for company: whenever the engine is free it takes what is there. Under load batches grow by themselves,
and a lone picture is never held back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vitrail.jobs.serve import DecodedPicture, Served, use_threads
from vitrail.serve.refusals import Refusal

logger = logging.getLogger(__name__)


DEEP = 2
"""Calls that a lane has in hand: the next one lies ready when one is done, or its core would wait for the loop."""


@dataclass
class Waiting:
    """One picture, ready for the network."""

    seen: DecodedPicture
    deadline: float
    done: asyncio.Future[Any]
    since: float


class Lane:
    """One thread that computes, on its share of the cores."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.executor = ThreadPoolExecutor(1, "engine", initializer=use_threads, initargs=(threads,))
        self.calls: set[Future[Any]] = set()
        self.taken = 0
        """Calls that it has in hand: one computes, the others follow without a pause."""
        self.busy_since = 0.0


class Engine:
    """What computes, shared by all models in turn.

    A lone picture has every core. Where several wait, each lane takes some with its share of the cores: on a CPU,
    pictures side by side on a thread each are done sooner than one after the other on all threads.

    Args:
        lanes: how many side by side.
        threads: cores in all.
    """

    def __init__(self, lanes: int = 1, threads: int = 1) -> None:
        self.whole = Lane(threads)
        self.lanes = [Lane(max(1, threads // lanes)) for _ in range(lanes)] if lanes > 1 else []
        self.share = self.lanes[0].threads if self.lanes else threads
        self.turn = asyncio.Lock()  # served in the order of asking: a busy model does not starve another
        self.waiting = 0
        self.left = asyncio.Event()

    async def enter(self, lone: Callable[[], bool], only_whole: bool = False) -> Lane:
        """A lane, to be handed back with `leave`.

        The whole engine where nobody else computes and `lone()`, or where `only_whole` will do; else the next lane.
        """
        self.waiting += 1
        try:
            async with self.turn:
                while True:
                    lane = self._open(only_whole or not self.lanes, lone)
                    if lane is not None:
                        lane.busy_since = lane.busy_since if lane.taken else time.monotonic()
                        lane.taken += 1
                        return lane
                    self.left.clear()
                    await self.left.wait()
        finally:
            self.waiting -= 1

    def _open(self, only_whole: bool, lone: Callable[[], bool]) -> Lane | None:
        if only_whole:
            mixed = any(lane.taken for lane in self.lanes)
            return None if mixed or self.whole.taken >= DEEP else self.whole
        if self.whole.taken:
            return None
        lane = min(self.lanes, key=lambda lane: lane.taken)
        if not self.busy() and lone() and self.waiting == 1:
            return self.whole
        return lane if lane.taken < DEEP else None

    def start(self, lane: Lane, call: Callable[[], Any]) -> Future[Any]:
        """One call in a lane that was entered. It is left when the thread is done, whoever still waits for it."""
        loop = asyncio.get_running_loop()

        def done(running: Future[Any]) -> None:
            lane.calls.discard(running)
            with contextlib.suppress(RuntimeError):  # the loop has ended before the thread
                loop.call_soon_threadsafe(self.leave, lane)

        running = lane.executor.submit(call)
        lane.calls.add(running)
        running.add_done_callback(done)
        return running

    def leave(self, lane: Lane) -> None:
        """One call less in a lane."""
        lane.taken -= 1
        lane.busy_since = time.monotonic()
        self.left.set()

    def busy(self) -> bool:
        """Whether any lane is taken."""
        return any(lane.taken for lane in (self.whole, *self.lanes))

    def computes(self) -> bool:
        """Whether a thread is at something, be it that nobody waits for it any more."""
        return any(lane.calls for lane in (self.whole, *self.lanes))

    def stuck(self, seconds: float) -> bool:
        """Whether one call has been running for so long."""
        now = time.monotonic()
        return any(lane.taken and now - lane.busy_since > seconds for lane in (self.whole, *self.lanes))

    def close(self) -> None:
        """Take no more calls."""
        for lane in (self.whole, *self.lanes):
            lane.executor.shutdown(wait=False, cancel_futures=True)


class Batcher:
    """The queue of one version of one model.

    Args:
        served: the model.
        engine: where it computes.
        observe: called with a stage and its seconds, and with "batch" and the number of pictures.
    """

    def __init__(self, served: Served, engine: Engine, observe: Callable[[str, float], None]) -> None:
        self.served, self.engine, self.observe = served, engine, observe
        self.sizes = sorted(served.warm_up.sizes, reverse=True)
        self.waiting: deque[Waiting] = deque()
        self.work = asyncio.Event()
        self.parallel = max(1, len(engine.lanes)) if served.warm_up.side_by_side else 1
        """Batches that are computed side by side."""
        self.pace = min(seconds / size for size, seconds in served.warm_up.seconds.items()) / self.parallel
        """Seconds a picture takes, smoothed; the warm-up's to begin with."""
        self.running: set[asyncio.Task[None]] = set()
        self.task = asyncio.create_task(self._run())

    async def submit(self, seen: DecodedPicture, deadline: float) -> Any:
        """What the model computes of one picture. Raises Refusal; may be cancelled at any time."""
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting.append(Waiting(seen, deadline, done, time.monotonic()))
        self.work.set()
        return await done

    async def close(self) -> None:
        """Stop; whoever still waits is refused."""
        tasks = [self.task, *self.running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        _refuse(list(self.waiting), "draining")

    async def _run(self) -> None:
        while True:
            await self.work.wait()
            lane = await self.engine.enter(lambda: len(self.waiting) == 1, only_whole=self.parallel == 1)
            batch = self._take()
            if batch:
                parallel = 1 if lane is self.engine.whole else self.parallel
                call = self.engine.start(lane, functools.partial(self._computed, batch))
                task = asyncio.create_task(self._hand_out(batch, call, parallel))
                self.running.add(task)
                task.add_done_callback(self.running.discard)
            else:
                self.engine.leave(lane)
            if not self.waiting:
                self.work.clear()

    def _take(self) -> list[Waiting]:
        """As many of the waiting as make the largest batch allowed; those nobody waits for any more are dropped."""
        now = time.monotonic()
        alive: list[Waiting] = []
        while self.waiting and len(alive) < self.sizes[0]:
            item = self.waiting.popleft()
            if item.done.done():
                continue
            if now >= item.deadline:
                item.done.set_exception(Refusal("deadline"))
                continue
            alive.append(item)
        size = next((size for size in self.sizes if size <= len(alive)), 0)
        self.waiting.extendleft(reversed(alive[size:]))
        return alive[:size]

    async def _hand_out(self, batch: list[Waiting], call: Future[Any], parallel: int) -> None:
        """Give each of a batch its result."""
        try:
            found = await asyncio.wrap_future(call)
        except asyncio.CancelledError:
            _refuse(batch, "draining")
            raise
        except Exception:  # one batch may fail, the service may not
            logger.exception("a batch of %d pictures of %s failed", len(batch), self.served.name)
            _refuse(batch, "failed")
            return
        if found is None:
            _refuse(batch, "deadline")
            return
        results, begun, spent = found
        for item in batch:
            self.observe("queue", begun - item.since)
        self.pace += 0.25 * (spent / len(batch) / parallel - self.pace)
        self.observe("infer", spent)
        self.observe("batch", len(batch))
        for item, result in zip(batch, results, strict=True):
            if not item.done.done():
                item.done.set_result(result)

    def _computed(self, batch: list[Waiting]) -> tuple[list[Any], float, float] | None:
        """In the lane's thread: results, when they were begun, their seconds; None where nobody waits any more."""
        begun = time.monotonic()
        if all(item.done.done() or begun >= item.deadline for item in batch):
            return None
        results = self.served.compute([item.seen for item in batch])
        return results, begun, time.monotonic() - begun


def _refuse(batch: list[Waiting], code: str) -> None:
    for item in batch:
        if not item.done.done():
            item.done.set_exception(Refusal(code))
