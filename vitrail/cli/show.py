"""Printing: results on stdout; progress, notes and messages on stderr.

A terminal gets tables and bars; a pipe or a file gets plain lines, nothing cut off.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.disk import write_atomically

if TYPE_CHECKING:
    from rich.console import Console


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table; the columns named in `right` are numbers and stand to the right."""
    rows = [list(row) for row in rows]
    if not sys.stdout.isatty():
        print(plain_table(columns, rows, right))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for name in columns:
        drawn.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console().print(drawn)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Aligned columns two spaces apart, as text."""
    lines = [list(columns), *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    )


def json_text(value: Any) -> str:
    """JSON for people: indented, letters as they are."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with a head line, as CSV."""
    if not rows:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def say(text: str) -> None:
    """A message to the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def write_result(text: str, output: str | None) -> None:
    """Text to stdout, or whole to a file: under a temporary name first, so that no half result is left."""
    if output is None:
        print(text, end="" if text.endswith("\n") else "\n")
        return
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        target, (text if text.endswith("\n") else text + "\n").encode("utf-8", "backslashreplace")
    )
    say(f"written: {target}")


def count(number: float) -> str:
    """22050664 as 22.05 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def percent(share: float) -> str:
    """0.8123 as 81.23 %."""
    return f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """3725 as 1:02:05."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Messages(logging.Handler):
    """Log records of vitrail as plain lines on stderr, above a progress bar where there is one."""

    console: Console | None = None

    def __init__(self, without: str = "") -> None:
        """`without`: a logger that is left out, because what it says is shown in another way."""
        super().__init__()
        self.without = without

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == self.without:
            return
        text = record.getMessage()
        line = text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
        if self.console is None:
            say(line)
        else:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def messages(without: str = "") -> Iterator[Messages]:
    """While inside, vitrail's log goes to stderr; that of one logger can be left out."""
    logger, handler = logging.getLogger("vitrail"), Messages(without)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if os.environ.get("VITRAIL_DEBUG") else logging.INFO)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Counter:
    """Progress of a job that counts items: a bar in a terminal, else a line every few seconds, on stderr."""

    PAUSE = 5.0
    """Seconds between plain lines."""

    def __init__(self, what: str, handler: Messages) -> None:
        self.what, self.handler = what, handler
        self.started = self.spoken = time.monotonic()
        self.begun = False
        self.bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            parts = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self.bar = Progress(*parts, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(what, total=None)

    def __enter__(self) -> Counter:
        if self.bar is not None:
            self.bar.start()
            self.handler.console = self.bar.console
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.handler.console = None

    def __call__(self, done: int, total: int | None = None) -> None:
        """`done` items of `total` are done."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total)
            return
        now = time.monotonic()
        ended = self.begun and done == total  # what was begun is told to its end
        if ended or now - self.spoken >= self.PAUSE:
            self.spoken, self.begun = now, done != total
            of = f" of {total}" if total else ""
            rate = done / (now - self.started)
            speed = f"{rate:.1f} a second" if rate >= 0.5 or not done else f"{1 / rate:.0f} s each"
            say(f"{self.what}: {done}{of}, {speed}")
