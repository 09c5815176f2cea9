"""Pictures that are ready wait here for the engine, and go through it together.

Nothing waits for company: whenever the engine is free it takes what is there. Under load batches grow by themselves,
and a lone picture is never held back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from vitrail.jobs.serve import Seen, Served
from vitrail.serve.refusals import Refusal

logger = logging.getLogger(__name__)


@dataclass
class Waiting:
    """One picture, ready for the network."""

    seen: Seen
    deadline: float
    done: asyncio.Future[Any]
    since: float


class Engine:
    """The one thread that computes, shared by all models in turn."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.turn = asyncio.Lock()  # served in the order of asking: a busy model does not starve another
        self.busy_since: float | None = None

    async def run(self, call: Callable[[], Any]) -> Any:
        """One call in the thread; the turn must be held."""
        self.busy_since = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self.executor, call)
        finally:
            self.busy_since = None

    def stuck(self, seconds: float) -> bool:
        """Whether one call has been running for so long."""
        return self.busy_since is not None and time.monotonic() - self.busy_since > seconds


class Batcher:
    """The queue of one version of one model.

    Args:
        served: the model.
        engine: where it computes.
        heard: called with a stage and its seconds, and with "batch" and the number of pictures.
    """

    def __init__(self, served: Served, engine: Engine, heard: Callable[[str, float], None]) -> None:
        self.served, self.engine, self.heard = served, engine, heard
        self.sizes = sorted(served.warmth.sizes, reverse=True)
        self.waiting: deque[Waiting] = deque()
        self.work = asyncio.Event()
        self.pace = min(seconds / size for size, seconds in served.warmth.seconds.items())
        """Seconds a picture takes, smoothed; the warm-up's to begin with."""
        self.task = asyncio.create_task(self._run())

    async def submit(self, seen: Seen, deadline: float) -> Any:
        """What the model computes of one picture. Raises Refusal; may be cancelled at any time."""
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting.append(Waiting(seen, deadline, done, time.monotonic()))
        self.work.set()
        return await done

    async def close(self) -> None:
        """Stop; whoever still waits is refused."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        for item in self.waiting:
            if not item.done.done():
                item.done.set_exception(Refusal("draining"))

    async def _run(self) -> None:
        while True:
            await self.work.wait()
            async with self.engine.turn:
                batch = self._take()
                if batch:
                    await self._compute(batch)
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

    async def _compute(self, batch: list[Waiting]) -> None:
        begun = time.monotonic()
        for item in batch:
            self.heard("queue", begun - item.since)
        try:
            found = await self.engine.run(lambda: self.served.compute([item.seen for item in batch]))
        except asyncio.CancelledError:
            _refuse(batch, "draining")
            raise
        except Exception:  # one batch may fail, the service may not
            logger.exception("a batch of %d pictures of %s failed", len(batch), self.served.name)
            _refuse(batch, "failed")
            return
        spent = time.monotonic() - begun
        self.pace += 0.25 * (spent / len(batch) - self.pace)
        self.heard("infer", spent)
        self.heard("batch", len(batch))
        for item, result in zip(batch, found, strict=True):
            if not item.done.done():
                item.done.set_result(result)


def _refuse(batch: list[Waiting], code: str) -> None:
    for item in batch:
        if not item.done.done():
            item.done.set_exception(Refusal(code))
