"""Starting and stopping: the socket, the signals, the drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import uvicorn

from vitrail.errors import ConfigError
from vitrail.jobs.serve import served_names
from vitrail.runs import ServeRun
from vitrail.serve import settings
from vitrail.serve.app import make_app
from vitrail.serve.backend import Backend
from vitrail.serve.gate import LOOPBACK
from vitrail.serve.http_protocol import GuardedProtocol
from vitrail.serve.metrics import Metrics

logger = logging.getLogger(__name__)

LOCAL = ("localhost", "127.0.0.1", "::1")
"""Addresses that only this machine reaches."""


def serve(run: ServeRun, ready: Callable[[str], None] = lambda url: None) -> int:
    """Serve until SIGTERM or SIGINT; 0 when every accepted request was answered, 1 when the drain's time was up.

    Args:
        run: what to serve, and how.
        ready: called with the service's URL when every model is warm.

    Raises:
        ConfigError: an address that is taken or not allowed, an unfit token. What opening a model raises.
    """
    service = Service(run)
    with _one_log(), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        code = runner.run(service.run_until_told(ready))
        if service.backend is not None and service.backend.busy():
            # Python would wait for the thread, however long its batch, explanation or loading still takes.
            logger.warning("leaving while something is still computed that nobody waits for")
            _leave(code)
    return code


class _HandOn(logging.Handler):
    """Gives what other libraries log to the service's own log."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.handle(record)


@contextlib.contextmanager
def _one_log() -> Iterator[None]:
    """Have the lines of uvicorn and asyncio, and warnings, go the way of our own: bare they would be no JSON."""
    others = [logging.getLogger(name) for name in ("uvicorn", "asyncio", "py.warnings")]
    before = [(other.handlers, other.propagate) for other in others]
    logging.captureWarnings(True)
    try:
        for other in others:
            other.handlers, other.propagate = [_HandOn()], False
        yield
    finally:
        logging.captureWarnings(False)
        for other, (handlers, propagate) in zip(others, before, strict=True):
            other.handlers, other.propagate = handlers, propagate


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, and with an end to every connection that holds no request."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are taken by `Service`; uvicorn would end the process by the signal instead of with a code."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, wait for the requests in hand."""
        letting_go = asyncio.create_task(self._let_go())
        try:
            await super().shutdown(sockets)
        finally:
            letting_go.cancel()

    async def _let_go(self) -> None:
        """Close what holds no request, again and again, and cut off who does not read.

        uvicorn closes once. A connection that was accepted a moment before is made a moment later, and one whose
        client does not read is never lost: either would hold up the stop for the whole drain.
        """
        unread: dict[Any, tuple[int, float]] = {}
        while True:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                connection.shutdown()
                size = connection.transport.get_write_buffer_size()
                before, since = unread.setdefault(connection, (size, now))
                if not size or size != before:
                    unread[connection] = (size, now)
                elif now - since > settings.LINGER_SECONDS:
                    connection.transport.abort()
            await asyncio.sleep(0.1)


class Service:
    """One socket with what answers behind it.

    Args:
        run: what to serve, and how. Raises ConfigError for names, tokens and addresses that will not do.
    """

    def __init__(self, run: ServeRun) -> None:
        self.run = run
        self.folders = served_names(run.models)
        self.token = _token(run)
        self.listener = _listener(run)
        self.metrics = Metrics()
        self.backend: Backend | None = None
        self.server: Server | None = None
        self.told = time.monotonic()
        """When the service was told to stop."""

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def run_until_told(
        self, ready: Callable[[str], None] = lambda url: None, signals: bool = True
    ) -> int:
        """Open the models, serve until `stop` is called, drain; the exit code. Raises what opening a model raises."""
        backend = self.backend = Backend(self.run, self.folders, self.metrics)
        server = self.server = self._server(backend)
        if signals:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
            loop.add_signal_handler(signal.SIGHUP, backend.look.set)
        url = self.url
        serving = asyncio.create_task(server.serve(sockets=[self.listener]))
        opening = asyncio.create_task(backend.open())
        try:
            await asyncio.wait({opening, serving}, return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                opening.result()
                ready(url)
            await serving
        finally:
            server.should_exit = True
            opening.cancel()
            await asyncio.gather(opening, serving, return_exceptions=True)
            drained = time.monotonic()
            await backend.close()
        return self._reckon(drained)

    def stop(self) -> None:
        """Take no more, answer what was accepted, end. The second time: end at once."""
        assert self.backend is not None and self.server is not None
        if self.backend.draining:
            logger.warning("told twice: leaving at once")
            self.backend.discard()
            _leave(1)
        self.backend.draining = True
        self.server.should_exit = True
        self.told = time.monotonic()
        logger.info("stopping: accepted requests are answered first")

    def _server(self, backend: Backend) -> Server:
        loopback = self.run.host in LOCAL
        hosts = (*LOOPBACK, *self.run.allow_host) if loopback else self.run.allow_host
        config = uvicorn.Config(
            make_app(backend, self.metrics, self.token, tuple(name.lower() for name in hosts)),
            http=GuardedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(self.run.drain)),
        )
        return Server(config)

    def _reckon(self, drained: float) -> int:
        """Compare what was let in with what got an answer; `drained` is when the last connection was closed."""
        admitted, finished = (
            int(self.metrics.registry.get_sample_value(f"vitrail_{name}_total") or 0)
            for name in ("admitted", "finished")
        )
        logger.info(
            "stopped: %d requests accepted, %d of them ended; %.1f s for connections, %.1f s for the rest",
            admitted,
            finished,
            drained - self.told,
            time.monotonic() - drained,
            extra={
                "request": {
                    "event": "stopped",
                    "admitted": admitted,
                    "finished": finished,
                    "drain_seconds": round(drained - self.told, 3),
                    "close_seconds": round(time.monotonic() - drained, 3),
                }
            },
        )
        return 0 if admitted == finished else 1


def _leave(code: int) -> NoReturn:
    """End the process without waiting for its threads."""
    logging.shutdown()
    os._exit(code)


def _token(run: ServeRun) -> str:
    if run.token_file is None:
        if run.host not in LOCAL:
            raise ConfigError(
                f"--host {run.host} is reached from other machines, so --token-file is needed; got none."
                " Leave --host out to serve this machine alone."
            )
        return ""
    token = Path(run.token_file).read_bytes().decode("utf-8", "replace").splitlines()[:1]
    if not token or not 16 <= len(token[0].strip()) <= 512 or not token[0].isascii():
        raise ConfigError(f"{run.token_file}: its first line must be a token of 16 to 512 ASCII letters.")
    return token[0].strip()


def _listener(run: ServeRun) -> socket.socket:
    try:
        found = socket.getaddrinfo(run.host, run.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(found[0], found[1])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found[4])
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{run.host}:{run.port} cannot be listened on ({error}); choose another --port, or 0 for a free one."
        ) from None
    listener.setblocking(False)
    return listener


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's loop where it is installed: it is the quicker one."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
