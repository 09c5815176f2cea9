"""Disposable processes that decode: each may be killed by a picture, by us, or by anybody, and is replaced.

One process has one picture at a time, so its end costs that picture's request and no other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitrail.errors import UserError
from vitrail.jobs.decode_worker import HEAD, Bounds, work
from vitrail.jobs.serve import DecodedPicture
from vitrail.serve.refusals import Refusal

logger = logging.getLogger(__name__)

LARGEST_REPORT = 4096
SLACK_SECONDS = 15.0
"""How much longer than its CPU time a picture may take by the clock, on a busy machine."""

REFUSALS = {"damaged": "undecodable", "large": "picture_too_large", "costly": "costly"}
TRIES = 3
"""Starts of a process that may fail because the one that forks has ended, before the service gives up."""
SLOWEST_RESTART = 5.0
"""Seconds between starts of a process that keeps dying before it has decoded anything."""


@dataclass
class Job:
    """One picture that waits to be decoded."""

    order: dict[str, Any]
    picture: bytes
    name: str
    deadline: float
    done: asyncio.Future[DecodedPicture]
    waiting_since: float


class Decoders:
    """A pool of decoding processes.

    Args:
        count: processes.
        bounds: what each may use.
        observe: called with a stage and its seconds, for the metrics; with "restart" when a process was replaced.
    """

    def __init__(self, count: int, bounds: Bounds, observe: Callable[[str, float], None]) -> None:
        self.count, self.bounds, self.observe = count, bounds, observe
        methods = multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        self.waiting: deque[Job] = deque()
        self.work = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.processes: dict[int, int] = {}
        """Place in the pool -> process number, of those that are ready."""
        self.closing = False
        self.pace = 0.0
        """Seconds that the pool takes for one picture, smoothed."""

    async def start(self) -> None:
        """Start the processes; returns when each was started. Raises UserError where one cannot be."""
        if hasattr(self.context, "set_forkserver_preload"):
            # What a decoder needs is loaded once, in the process that forks them: a new one is there in milliseconds.
            self.context.set_forkserver_preload(["vitrail.jobs.decode_worker"])
        started = [asyncio.get_running_loop().create_future() for _ in range(self.count)]
        self.tasks = [asyncio.create_task(self._keep(place, started[place])) for place in range(self.count)]
        await asyncio.gather(*started)

    async def close(self) -> None:
        """End every process."""
        self.closing = True
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def decode(
        self,
        picture: bytes,
        preprocessing: dict[str, Any],
        *,
        name: str,
        deadline: float,
        shown: bool = False,
    ) -> DecodedPicture:
        """One picture as the network sees it. Raises Refusal; may be cancelled at any time."""
        order = {"preprocessing": preprocessing, "shown": shown}
        done: asyncio.Future[DecodedPicture] = asyncio.get_running_loop().create_future()
        self.waiting.append(Job(order, picture, name, deadline, done, time.monotonic()))
        self.work.set()
        return await done

    async def _keep(self, place: int, started: asyncio.Future[None]) -> None:
        """Keep one process alive for as long as the pool is."""
        pause, tries = 0.0, 0
        while not self.closing:
            try:
                process, link = await asyncio.to_thread(self._fork)
                reader, writer = await asyncio.open_unix_connection(sock=link)
            except (OSError, EOFError) as error:
                # No more processes or files at the moment. EOFError where the process that forks ended over it: tried
                # again, since a signal to the whole group, at a stop while the service begins, ends that one too.
                tries += 1
                if not started.done() and not (isinstance(error, EOFError) and tries < TRIES):
                    started.set_exception(
                        UserError(f"A decoder cannot be started: {error!r}. Free memory or processes.")
                    )
                    return
                logger.warning("a decoder cannot be started (%r); it is tried again.", error)
                pause = min(SLOWEST_RESTART, 2 * pause + 0.1)
                await asyncio.sleep(pause)
                continue
            self.processes[place] = process.pid
            if not started.done():
                started.set_result(None)
            decoded, since = 0, time.monotonic()
            try:
                while await self._one(process, reader, writer):
                    decoded += 1
            except asyncio.CancelledError:
                break
            finally:
                self.processes.pop(place, None)
                writer.close()
                _kill(process)
            self.observe("restart", 0.0)
            useful = decoded or time.monotonic() - since > SLOWEST_RESTART
            pause = 0.0 if useful else min(SLOWEST_RESTART, 2 * pause + 0.1)
            logger.warning("decoder %d ended (%s); a new one follows.", process.pid, process.exitcode)
            await asyncio.sleep(pause)

    def _fork(self) -> tuple[Any, socket.socket]:
        ours, theirs = multiprocessing.Pipe(duplex=True)
        process = self.context.Process(target=work, args=(theirs, self.bounds), daemon=True)
        process.start()
        theirs.close()
        link = socket.socket(fileno=os.dup(ours.fileno()))
        ours.close()
        link.setblocking(False)
        return process, link

    async def _one(self, process: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Decode the next picture; False when the process is lost."""
        job = await self._next(reader)
        if job is None:
            return False
        begun = time.monotonic()
        self.observe("queue", begun - job.waiting_since)
        try:
            async with asyncio.timeout(self.bounds.seconds + SLACK_SECONDS):
                text = json.dumps(job.order).encode()
                writer.write(HEAD.pack(len(text), len(job.picture)) + text)
                writer.write(job.picture)
                await writer.drain()
                seen = await _answer(reader, job)
        except TimeoutError:
            _settle(job, Refusal("costly"))
            return False
        except (OSError, asyncio.IncompleteReadError, ValueError, KeyError, TypeError) as error:
            _kill(process)
            ended_by_cost = process.exitcode == -signal.SIGXCPU
            logger.warning("decoder %d was lost over a picture: %r", process.pid, error)
            _settle(job, Refusal("costly" if ended_by_cost else "decoder_lost"))
            return False
        except asyncio.CancelledError:
            _settle(job, Refusal("draining"))
            raise
        spent = time.monotonic() - begun
        self.pace += 0.25 * (spent / self.count - self.pace)
        self.observe("decode", spent)
        _settle(job, seen)
        return True

    async def _next(self, reader: asyncio.StreamReader) -> Job | None:
        """The next picture that somebody still waits for; None when the process ended while it was idle."""
        while True:
            while self.waiting:
                job = self.waiting.popleft()
                if job.done.done():
                    continue
                if time.monotonic() >= job.deadline:
                    job.done.set_exception(Refusal("deadline"))
                    continue
                return job
            self.work.clear()
            ended = asyncio.create_task(reader.read(1))
            woken = asyncio.create_task(self.work.wait())
            try:
                await asyncio.wait({ended, woken}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                woken.cancel()
                lost = ended.done()
                ended.cancel()
                await asyncio.gather(ended, woken, return_exceptions=True)
            if lost:
                return None


async def _answer(reader: asyncio.StreamReader, job: Job) -> DecodedPicture | Refusal:
    """What the process said, trusted no further than its lengths."""
    report_size, data_size = HEAD.unpack(await reader.readexactly(HEAD.size))
    if report_size > LARGEST_REPORT or data_size > 2**28:
        raise ValueError("a report of an impossible length")
    report = json.loads(await reader.readexactly(report_size))
    data = await reader.readexactly(data_size)
    if "refused" in report:
        return Refusal(REFUSALS[report["refused"]])
    shape = _shape(report["pixels"])
    shown_shape = None if report["shown"] is None else _shape(report["shown"])
    split = int(np.prod(shape))
    if split + (int(np.prod(shown_shape)) if shown_shape else 0) != len(data):
        raise ValueError("pixels of another number than reported")
    pixels = np.frombuffer(data, dtype=np.uint8, count=split).reshape(shape)
    shown = None
    if shown_shape:
        # torch wants memory that it may write to; batches are copied together anyway.
        pixels = pixels.copy()
        shown = np.frombuffer(data, dtype=np.uint8, offset=split).reshape(shown_shape).copy()
    height, width = (int(side) for side in report["size"])
    return DecodedPicture(pixels, (height, width), shown, job.name)


def _shape(sides: Any) -> tuple[int, int, int]:
    channels, rows, columns = (int(side) for side in sides)
    if min(channels, rows, columns) < 1:
        raise ValueError("a side below one")
    return channels, rows, columns


def _settle(job: Job, found: DecodedPicture | Refusal) -> None:
    """Tell whoever waits, if anybody still does."""
    if job.done.done():
        return
    if isinstance(found, Refusal):
        job.done.set_exception(found)
    else:
        job.done.set_result(found)


def _kill(process: Any) -> None:
    if process.is_alive():
        process.kill()
    process.join(timeout=2)
