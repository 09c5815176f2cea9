"""What `vitrail serve` says while it serves."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vitrail.cli import show
from vitrail.cli.main import last_words
from vitrail.errors import UnsupportedError

if TYPE_CHECKING:
    from vitrail.runs import ServeRun


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what a request adds."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "request", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def serve(run: ServeRun) -> int:
    """Serve until told to stop; 1 when accepted requests were left without an answer."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if run.log == "json" else logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("vitrail")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    if run.log != "json":
        return _start(
            run, lambda url: show.say(f"serving {url}" + ("  (the page is there too)" if run.page else ""))
        )

    def ready(url: str) -> None:
        logger.info("serving %s", url, extra={"request": {"event": "serving", "url": url, "page": run.page}})

    try:
        return _start(run, ready)
    except (Exception, KeyboardInterrupt) as error:
        # Whoever collects the lines must not find one that is no JSON, least of all the one that says why.
        words, code = last_words(error)
        told = {"request": {"event": "failed", "code": code}}
        logger.error("%s", words, extra=told, exc_info=bool(os.environ.get("VITRAIL_DEBUG")))
        return code


def _start(run: ServeRun, ready: Callable[[str], None]) -> int:
    with _stops_early():
        return _served(run, ready)


@contextlib.contextmanager
def _stops_early() -> Iterator[None]:
    """Have a stop be no failure until the service takes its signals: imports take seconds."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are another's
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _served(run: ServeRun, ready: Callable[[str], None]) -> int:
    try:
        from vitrail.serve.server import serve as start
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"vitrail serve needs {error.name}, which is not installed: pip install 'vitrail[serve]'."
        ) from None
    return start(run, ready)


def _leave(number: int, frame: object) -> None:
    """A stop before there was anything to stop."""
    logging.getLogger("vitrail").info("stopped before it served")
    sys.exit(0)
