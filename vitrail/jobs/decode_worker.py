"""A process that decodes pictures for the service, and may die of one.

It is forked by the service, reads one frame after the other from its socket, and answers each with another. What it
answers is plain bytes and JSON, never anything that is executed: a decoder that a hostile picture took over can say
wrong pixels, and no more.

A frame to it:   length of the order (4 bytes), length of the picture (8 bytes), the order as JSON, the picture.
A frame from it: length of the report (4 bytes), length of the pixels (8 bytes), the report as JSON, the pixels.
"""

from __future__ import annotations

import io
import json
import resource
import signal
import socket
import struct
import sys
import warnings
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vitrail.data.image import FORMATS, Limits, decode
from vitrail.data.transforms import Preprocess
from vitrail.errors import ImageError
from vitrail.weights.card import Preprocessing

HEAD = struct.Struct("!IQ")
"""Lengths of the JSON and of the bytes that follow."""

SHOWN_SIDE = 768
"""Longest side of the picture that explanations are drawn on."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What one decoder may use. Megabytes count above what it needs when idle."""

    megabytes: int = 1024
    seconds: float = 5.0
    """CPU time for one picture."""
    pixels: int = 50_000_000
    side: int = 16_384


def work(connection: Connection, bounds: Bounds) -> None:
    """Serve frames until the other end closes. The entry of the process."""
    # A terminal or a service manager signals the whole group: who stops, and when, is the service's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _confine(bounds)
    link = socket.socket(fileno=connection.fileno())
    while True:
        head = _receive(link, HEAD.size)
        if head is None:
            break
        order_size, picture_size = HEAD.unpack(head)
        order, picture = _receive(link, order_size), _receive(link, picture_size)
        if order is None or picture is None:
            break
        _grant(bounds.seconds)
        report, pixels = answer(json.loads(order), bytes(picture), bounds)
        text = json.dumps(report).encode()
        link.sendall(HEAD.pack(len(text), len(pixels)) + text)
        link.sendall(pixels)
    link.detach()


def answer(order: dict[str, Any], picture: bytes, bounds: Bounds) -> tuple[dict[str, Any], bytes]:
    """The report on one picture, and its pixels: those the network sees, then those that are shown, if asked for."""
    limits = Limits(pixels=bounds.pixels, side=bounds.side)
    refusal = _look(picture, limits)
    if refusal:
        return {"refused": refusal}, b""
    try:
        upright = decode(picture, name="picture", limits=limits)
        pixels = _preprocess(order["preprocessing"])(upright)
        shown = _shrunk(upright) if order.get("shown") else None
    except MemoryError:
        return {"refused": "costly"}, b""
    except ImageError as error:
        return {"refused": "costly" if "not enough memory" in str(error) else "damaged"}, b""
    except RuntimeError:  # torch has no other word for memory that it was not given
        return {"refused": "costly"}, b""
    report = {
        "size": list(upright.shape[1:]),
        "pixels": list(pixels.shape),
        "shown": None if shown is None else list(shown.shape),
    }
    data = pixels.contiguous().numpy().tobytes()
    if shown is not None:
        data += shown.contiguous().numpy().tobytes()
    return report, data


def _look(picture: bytes, limits: Limits) -> str:
    """Why a picture is refused by its header alone; empty where it is not."""
    try:
        with Image.open(io.BytesIO(picture), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        return "large"
    except Exception:  # the parsers of headers raise whatever they like
        return "damaged"
    if width < 1 or height < 1:
        return "damaged"
    return "large" if max(width, height) > limits.side or width * height > limits.pixels else ""


@lru_cache(maxsize=16)
def _cached(text: str) -> Preprocess:
    fields: dict[str, Any] = json.loads(text)
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Preprocess(Preprocessing(**{**fields, **lists}))


def _preprocess(fields: dict[str, Any]) -> Preprocess:
    return _cached(json.dumps(fields, sort_keys=True))


def _shrunk(picture: Tensor) -> Tensor:
    """A picture for the eye, uint8 [3, H, W], at most SHOWN_SIDE a side."""
    height, width = picture.shape[1:]
    share = min(1.0, SHOWN_SIDE / max(height, width))
    size = (max(1, round(height * share)), max(1, round(width * share)))
    if size == (height, width):
        return picture
    return functional.interpolate(picture[None], size=size, mode="bilinear", antialias=True)[0]


def _receive(link: socket.socket, size: int) -> bytearray | None:
    """Exactly that many bytes, or None where the other end has closed."""
    data = bytearray(size)
    view, place = memoryview(data), 0
    while place < size:
        count = link.recv_into(view[place:], size - place)
        if count == 0:
            return None
        place += count
    return data


def _confine(bounds: Bounds) -> None:
    """Memory above what is in use now, no files written, no core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        most = pages * resource.getpagesize() + bounds.megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _grant(seconds: float) -> None:
    """CPU time for one more picture; SIGXCPU ends the process when it is used up."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))
