"""A service for tests: a small network in a thread of the test's own process, and a client that says what it likes."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import vitrail
from vitrail.runs import ServeRun
from vitrail.serve.server import Service

LABELS = ("ant", "bee", "cat", "dog", "elk")


def save_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny ViT with random weights, as a model folder."""
    torch.manual_seed(seed)
    size = {"img_size": 32, "patch_size": 8, "width": 48, "depth": 2, "heads": 3, "num_classes": len(LABELS)}
    model = vitrail.create_model("vit_tiny_patch16_224", **{**size, **changes})
    with torch.no_grad():
        model.head.linear.weight.normal_(std=0.5)
    wanted = dataclasses.replace(model.card.preprocessing, input_size=(32, 32))
    model.card = dataclasses.replace(model.card, labels=LABELS, preprocessing=wanted)
    model.save_pretrained(folder)
    return folder


def picture(seed: int = 0, size: tuple[int, int] = (40, 52), kind: str = "PNG", **options: Any) -> bytes:
    """A picture of noise in blocks, as a file's bytes."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize(size[::-1], Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


class Answer(NamedTuple):
    """Status, headers and body of an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Running:
    """A service that answers at `port`."""

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        self.service, self.loop = service, loop
        self.port = int(service.url.rpartition(":")[2])

    @property
    def backend(self) -> Any:
        assert self.service.backend is not None
        return self.service.backend

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 60, **headers: str) -> Answer:
        """One request on a connection of its own; `_` in a header's name stands for `-`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            told = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, told, answer.read())
        finally:
            connection.close()

    def predict(self, data: bytes, query: str = "", **headers: str) -> Answer:
        return self.ask("POST", f"/predict{query}", data, **headers)

    def count(self, name: str, **labels: str) -> float:
        """A number of the service's metrics."""
        return self.service.metrics.registry.get_sample_value(f"vitrail_{name}", labels) or 0.0

    def call(self, function: Any, *arguments: Any) -> Any:
        """Something done in the service's own thread."""
        done: Any = asyncio.run_coroutine_threadsafe(_wrapped(function, *arguments), self.loop)
        return done.result(timeout=60)


async def _wrapped(function: Any, *arguments: Any) -> Any:
    found = function(*arguments)
    return await found if asyncio.iscoroutine(found) else found


@contextmanager
def running(*models: str, ends: int = 0, **changes: Any) -> Iterator[Running]:
    """A service over model folders; drained and ended afterwards, with the code `ends`."""
    # On a busy machine `auto` would find it worth its while to measure engines, for minutes.
    usual = {"port": 0, "decoders": 1, "watch": 0.05, "device": "cpu", "engine": "torch"}
    run = ServeRun(models=models, **{**usual, **changes})
    service = Service(run)
    ready = threading.Event()
    ended: list[Any] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def go() -> None:
        loops.append(asyncio.get_running_loop())
        ended.append(await service.run_until_told(lambda _: ready.set(), signals=False))

    def run_thread() -> None:
        try:
            asyncio.run(go())
        except BaseException as error:
            ended.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run_thread)
    thread.start()
    ready.wait(timeout=120)
    if ended:
        raise ended[0]
    try:
        yield Running(service, loops[0])
    finally:
        if not service.backend or not service.backend.draining:
            loops[0].call_soon_threadsafe(service.stop)
        thread.join(timeout=60)
    assert ended == [ends], ended
