"""Starting and stopping: the socket, the signals, the drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from vitrail.errors import ConfigError
from vitrail.jobs.serve import served_names
from vitrail.runs import ServeRun
from vitrail.serve.app import make_app
from vitrail.serve.gate import LOOPBACK, Gate
from vitrail.serve.house import House
from vitrail.serve.metrics import Metrics
from vitrail.serve.protocol import GuardedProtocol

logger = logging.getLogger(__name__)


def serve(run: ServeRun, ready: Callable[[str], None] = lambda url: None) -> int:
    """Serve until SIGTERM or SIGINT; 0 when every accepted request was answered, 1 when the drain's time was up.

    Args:
        run: what to serve, and how.
        ready: called with the service's URL when every model is warm.

    Raises:
        ConfigError: an address that is taken or not allowed, an empty token. What opening a model raises.
    """
    folders = served_names(run.models)
    token = _token(run)
    listener = _listener(run, token)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(run, folders, token, listener, ready))


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which end the process by the signal instead of with a code."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are taken by `_serve`."""
        yield


async def _serve(
    run: ServeRun, folders: dict[str, str], token: str, listener: socket.socket, ready: Callable[[str], None]
) -> int:
    metrics = Metrics()
    house = House(run, folders, metrics)
    config = uvicorn.Config(
        _gate(run, house, metrics, token),
        http=GuardedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(run.drain)),
    )
    server = Server(config)

    def stop() -> None:
        if house.draining:
            logger.warning("told twice: leaving at once")
            os._exit(1)
        house.draining = True
        server.should_exit = True
        logger.info("stopping: accepted requests are answered first")

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, house.look.set)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    address = listener.getsockname()
    try:
        opening = asyncio.create_task(house.open())
        await asyncio.wait({opening, serving}, return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            opening.result()
            ready(f"http://{'[' + address[0] + ']' if ':' in address[0] else address[0]}:{address[1]}")
        else:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
        await serving
    except BaseException:
        server.should_exit = server.force_exit = True
        await asyncio.gather(serving, return_exceptions=True)
        raise
    finally:
        await house.close()
    admitted, finished = (int(counter._value.get()) for counter in (metrics.admitted, metrics.finished))
    logger.info(
        "stopped: %d requests accepted, %d of them ended",
        admitted,
        finished,
        extra={"request": {"event": "stopped", "admitted": admitted, "finished": finished}},
    )
    return 0 if admitted == finished else 1


def _gate(run: ServeRun, house: House, metrics: Metrics, token: str) -> Gate:
    loopback = run.host in ("localhost", "127.0.0.1", "::1")
    hosts = (*LOOPBACK, *run.allow_host) if loopback else run.allow_host
    return make_app(house, metrics, token, tuple(name.lower() for name in hosts))


def _token(run: ServeRun) -> str:
    if run.token_file is None:
        if run.host not in ("localhost", "127.0.0.1", "::1"):
            raise ConfigError(
                f"--host {run.host} is reached from other machines, so --token-file is needed; got none."
                " Leave --host out to serve this machine alone."
            )
        return ""
    token = Path(run.token_file).read_text(encoding="utf-8").splitlines()[:1]
    if not token or not 16 <= len(token[0].strip()) <= 512 or not token[0].isascii():
        raise ConfigError(f"{run.token_file}: its first line must be a token of 16 to 512 ASCII letters.")
    return token[0].strip()


def _listener(run: ServeRun, token: str) -> socket.socket:
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
