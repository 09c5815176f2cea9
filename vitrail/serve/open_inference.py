"""The Open Inference Protocol, version 2, so that KServe's, Triton's and other clients speak with the service.

A model takes either `pictures` (BYTES [n], files) or `pixels` (UINT8 [n, C, h, w], as its preprocessing makes them),
and answers `logits`, `probabilities` (FP32 [n, K]), `index` (INT64 [n]) and `label` (BYTES [n]). A model that finds
boxes or masks takes `pictures` alone, and answers `records` (BYTES [n]): one JSON a picture. Tensors stand in the
JSON, or behind it in binary (the protocol's binary extension). Pictures within JSON are base64.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import struct
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI, Request, Response

import vitrail
from vitrail.jobs.serve import DecodedPicture, Served
from vitrail.serve import body, schema, settings
from vitrail.serve.backend import Slot, Version
from vitrail.serve.refusals import Refusal

if TYPE_CHECKING:
    from vitrail.serve.app import Handlers

OUTPUTS = {"logits": "FP32", "probabilities": "FP32", "index": "INT64", "label": "BYTES"}
DENSE_OUTPUTS = {"records": "BYTES"}
LENGTH_HEADER = "inference-header-content-length"


def add_routes(app: FastAPI, handlers: Handlers) -> None:
    """Add the protocol's routes to an app."""
    routes = Routes(handlers)
    add = app.add_api_route
    tell = schema.open_inference
    add("/v2", routes.server, response_class=Response, **tell("v2_server", "The server"))
    add("/v2/health/live", handlers.live, response_class=Response, **tell("v2_live", "Live"))
    add("/v2/health/ready", handlers.ready, response_class=Response, **tell("v2_ready", "Ready"))
    for tail, name in (("", ""), ("/versions/{version}", "_version")):
        at = "/v2/models/{name}" + tail
        add(at, routes.metadata, response_class=Response, **tell(f"v2_metadata{name}", "A model's tensors"))
        add(
            at + "/ready",
            routes.ready,
            response_class=Response,
            **tell(f"v2_model_ready{name}", "A model is ready"),
        )
        add(
            at + "/infer",
            routes.infer,
            methods=["POST"],
            response_class=Response,
            **tell(f"v2_infer{name}", "Answers for tensors", infer=True),
        )


class Routes:
    """What the protocol's routes do."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers

    async def server(self) -> Response:
        """Name and extensions."""
        return _answer(
            {"name": "vitrail", "version": vitrail.__version__, "extensions": ["binary_tensor_data"]}
        )

    async def ready(self, name: str, version: str = "") -> Response:
        """Whether a model answers."""
        self._slot(name, version)
        return _answer({"name": name, "ready": True})

    async def metadata(self, name: str, version: str = "") -> Response:
        """Names, types and shapes of a model's tensors."""
        served = self._slot(name, version).version.served
        classes = len(served.labels)
        shapes = {
            "records": [-1],
            "logits": [-1, classes],
            "probabilities": [-1, classes],
            "index": [-1],
            "label": [-1],
        }
        return _answer(
            {
                "name": name,
                "versions": [served.version],
                "platform": "vitrail",
                "inputs": [
                    {"name": "pictures", "datatype": "BYTES", "shape": [-1]},
                    {"name": "pixels", "datatype": "UINT8", "shape": [-1, *served.input_shape]},
                ][: 2 if served.classifies else 1],
                "outputs": [
                    {"name": out, "datatype": kind, "shape": shapes[out]}
                    for out, kind in outputs_of(served).items()
                ],
            }
        )

    async def infer(self, request: Request, name: str, version: str = "") -> Response:
        """Answers for one tensor of pictures or pixels."""
        slot = self._slot(name, version)
        state = request.scope["state"]
        headers = state["headers"]
        backend = self.handlers.backend
        most = backend.run.body_megabytes * 2**20
        declared = body.declared_length(headers, most)
        ticket = slot.admission.enter(1, declared or 0)
        state.update(admitted=True, model=name)
        backend.metrics.admitted.inc()
        try:
            data = await body.read(request.receive, most, declared, ticket)
            order, binary = _split(headers, data)
            with slot.version as current:
                batch = _batch(order, binary, current.served)
                ticket.resize(len(batch), len(data))
                state.update(images=len(batch), bytes=len(data), version=current.served.version)
                deadline = time.monotonic() + _timeout(order, backend.run.deadline)
                found = await body.unless_left(request.receive, self._computed(current, batch, deadline))
                backend.metrics.images.labels(name, "answered").inc(len(batch))
                return _outputs(order, current.served, found)
        finally:
            ticket.release()

    def _slot(self, name: str, version: str) -> Slot:
        slot = self.handlers.backend.slot(name)
        if version and version != slot.version.served.version:
            raise Refusal("no_such_model")
        return slot

    async def _computed(
        self, version: Version, batch: list[bytes] | np.ndarray[Any, Any], deadline: float
    ) -> list[Any]:
        if isinstance(batch, list):
            found = await self.handlers.look(version, [("image", data) for data in batch], deadline)
        else:
            size = (batch.shape[2], batch.shape[3])
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    found = await asyncio.gather(
                        *(version.batcher.submit(DecodedPicture(row, size), deadline) for row in batch),
                        return_exceptions=True,
                    )
            except TimeoutError:
                raise Refusal("deadline") from None
        for row in found:
            if isinstance(row, BaseException):
                raise row
        return list(found)


def outputs_of(served: Served) -> dict[str, str]:
    """Names and types of what a model answers."""
    return OUTPUTS if served.classifies else DENSE_OUTPUTS


def _split(headers: dict[str, str], data: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON and the binary tensors behind it."""
    text = headers.get(LENGTH_HEADER)
    size = len(data)
    if text is not None:
        if not text.isascii() or not text.isdecimal() or len(text) > 12 or int(text) > size:
            raise Refusal("bad_request")
        size = int(text)
    order = body.read_json(data[:size])
    if not isinstance(order, dict):
        raise Refusal("bad_json")
    return order, data[size:]


def _parameters(holder: dict[str, Any]) -> dict[str, Any]:
    found = holder.get("parameters", {})
    if not isinstance(found, dict):
        raise Refusal("bad_json")
    return found


def _timeout(order: dict[str, Any], most: float) -> float:
    """Seconds: the protocol's clients give microseconds."""
    wanted = _parameters(order).get("timeout", 0)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 <= wanted < 2**53:
        raise Refusal("bad_parameter")
    return min(most, wanted / 1e6) if wanted else most


def _batch(order: dict[str, Any], binary: bytes, served: Served) -> list[bytes] | np.ndarray[Any, Any]:
    """The one input of a request: pictures as bytes, or pixels [n, C, h, w]."""
    inputs = order.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise Refusal("bad_tensor")
    given = inputs[0]
    shape = given.get("shape")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 4:
        raise Refusal("bad_tensor")
    if not all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < 2**31 for side in shape):
        raise Refusal("bad_tensor")
    if shape[0] > settings.MOST_PARTS:
        raise Refusal("too_many_pictures")
    size = _parameters(given).get("binary_data_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size != len(binary)):
        raise Refusal("bad_tensor")
    if size is None and binary:
        raise Refusal("bad_tensor")
    kind = (given.get("name"), given.get("datatype"))
    if kind == ("pictures", "BYTES") and len(shape) == 1:
        pictures = _binary_bytes(binary) if size is not None else _json_bytes(given.get("data"))
        if len(pictures) != shape[0]:
            raise Refusal("bad_tensor")
        return pictures
    if kind == ("pixels", "UINT8") and served.classifies and tuple(shape[1:]) == served.input_shape:
        count = int(np.prod(shape, dtype=np.int64))
        values = (
            np.frombuffer(binary, dtype=np.uint8)
            if size is not None
            else _json_uint8(given.get("data"), count)
        )
        if len(values) != count:
            raise Refusal("bad_tensor")
        return values.reshape(shape)
    raise Refusal("bad_tensor")


def _binary_bytes(data: bytes) -> list[bytes]:
    """Elements of a BYTES tensor: each behind its length, four bytes, the least first."""
    found, offset = [], 0
    while offset < len(data):
        if offset + 4 > len(data):
            raise Refusal("bad_tensor")
        (size,) = struct.unpack_from("<I", data, offset)
        if offset + 4 + size > len(data):
            raise Refusal("bad_tensor")
        found.append(data[offset + 4 : offset + 4 + size])
        offset += 4 + size
    return found


def _json_bytes(data: Any) -> list[bytes]:
    if not isinstance(data, list) or not all(isinstance(text, str) for text in data):
        raise Refusal("bad_tensor")
    try:
        return [base64.b64decode(text, validate=True) for text in data]
    except (binascii.Error, ValueError):
        raise Refusal("bad_tensor") from None


def _json_uint8(data: Any, count: int) -> np.ndarray[Any, Any]:
    """Whole numbers 0..255, flat or nested."""
    flat: list[Any] = []
    _flatten(data, flat, count)
    if not all(type(value) is int and 0 <= value <= 255 for value in flat):
        raise Refusal("bad_tensor")
    return np.array(flat, dtype=np.uint8)


def _flatten(data: Any, into: list[Any], most: int) -> None:
    if not isinstance(data, list):
        raise Refusal("bad_tensor")
    for value in data:
        if isinstance(value, list):
            _flatten(value, into, most)
        else:
            into.append(value)
        if len(into) > most:
            raise Refusal("bad_tensor")


def _values(served: Served, found: list[Any]) -> dict[str, Any]:
    """Every output by its name: an array, or a list of texts."""
    if not served.classifies:
        records = served.records(found, ["image"] * len(found), 1)
        return {"records": [json.dumps(record, ensure_ascii=False) for record in records]}
    logits = np.stack(found)
    index = logits.argmax(axis=1)
    return {
        "logits": logits.astype("<f4"),
        "probabilities": served.probabilities(logits).astype("<f4"),
        "index": index.astype("<i8"),
        "label": [served.labels[at] for at in index],
    }


def _outputs(order: dict[str, Any], served: Served, found: list[Any]) -> Response:
    """The outputs that were asked for, in JSON or behind it."""
    values = _values(served, found)
    wanted = order.get("outputs")
    everywhere = bool(_parameters(order).get("binary_data_output", False))
    if wanted is None:
        wanted = [{"name": name} for name in values]
    if not isinstance(wanted, list) or not all(isinstance(one, dict) for one in wanted):
        raise Refusal("bad_json")
    told, blobs = [], []
    for one in wanted:
        name = one.get("name")
        if not isinstance(name, str) or name not in values:
            raise Refusal("bad_tensor")
        value = values[name]
        shape = list(value.shape) if isinstance(value, np.ndarray) else [len(value)]
        entry: dict[str, Any] = {"name": name, "datatype": outputs_of(served)[name], "shape": shape}
        if _parameters(one).get("binary_data", everywhere):
            blob = value.tobytes() if isinstance(value, np.ndarray) else _packed(value)
            entry["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            entry["data"] = value.ravel().tolist() if isinstance(value, np.ndarray) else value
        told.append(entry)
    answer: dict[str, Any] = {"model_name": served.name, "model_version": served.version, "outputs": told}
    if isinstance(order.get("id"), str) and len(order["id"]) <= 200:
        answer["id"] = order["id"]
    text = json.dumps(answer, ensure_ascii=True).encode()
    if not blobs:
        return Response(text, media_type="application/json")
    headers = {LENGTH_HEADER: str(len(text))}
    return Response(b"".join([text, *blobs]), headers=headers, media_type="application/octet-stream")


def _packed(texts: list[str]) -> bytes:
    words = [text.encode() for text in texts]
    return b"".join(struct.pack("<I", len(data)) + data for data in words)


def _answer(value: Any) -> Response:
    return Response(json.dumps(value).encode(), media_type="application/json")
