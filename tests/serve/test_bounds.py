"""What is refused, before it costs anything, in words that tell nothing of the inside."""

from __future__ import annotations

import asyncio
import io
import json
import re
import resource
import socket
import struct
import time
import zlib
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serve.service import Answer, Running, picture, running
from vitrail.errors import ConfigError
from vitrail.jobs.serve import served_names
from vitrail.runs import ServeRun
from vitrail.serve import body
from vitrail.serve.refusals import TABLE, Refusal
from vitrail.serve.server import Service

INSIDE = re.compile(r"0x[0-9a-f]{6}|/[a-z]+/|Traceback|Error|\.py|PIL|torch", re.IGNORECASE)


def refused(answer: Answer, status: int, code: str) -> None:
    """The answer is this refusal, in its constant words."""
    assert (answer.status, answer.json["code"]) == (status, code)
    assert answer.json == {"error": TABLE[code][1], "code": code}
    assert not INSIDE.search(answer.json["error"].replace("/docs", "").replace("/models", ""))
    assert answer.headers["x-content-type-options"] == "nosniff"


def raw(service: Running, data: bytes, more: bytes = b"", wait: float = 10) -> bytes:
    """Bytes on the wire, and all that comes back until the service has said all or hangs up."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=wait) as link:
        try:
            link.sendall(data)
            if more:
                link.sendall(more)
        except (BrokenPipeError, ConnectionResetError):
            pass
        found = b""
        try:
            while piece := link.recv(65536):
                found += piece
                if b"\r\n\r\n" in found and b"}" in found:
                    break
        except (ConnectionResetError, TimeoutError):
            pass
        return found


def png_header(width: int, height: int, rest: bytes = b"") -> bytes:
    """A PNG that says it is so large."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, rest, data) if c
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def saved(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, format=kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused_whatever_they_are_called(service: Running, kind: str) -> None:
    refused(service.predict(saved(kind), content_type="image/jpeg"), 415, "wrong_format")


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<!doctype html>",
        b"PK\3\4",
        b"\x7fELF",
        b"8BPS",
        b"SIMPLE  =                    T",
        b"\0\0\0\x0cjP  \r\n\x87\n",
        b"RIFF\x10\0\0\0AVI LIST",
        b"GIF89a" + picture(0, kind="JPEG"),  # another format's head before a picture: a polyglot
        b"<!--" + picture(0),
    ],
)
def test_what_is_no_picture_is_refused(service: Running, data: bytes) -> None:
    refused(service.predict(data + b"\0" * 99), 415, "wrong_format")


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 1), (1001, 1000), (17_000, 2)])
def test_a_bomb_is_refused_by_its_header(service: Running, size: tuple[int, int]) -> None:
    begun = time.monotonic()
    refused(service.predict(png_header(*size)), 413, "picture_too_large")
    assert time.monotonic() - begun < 2


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def heavy_pictures() -> dict[str, bytes]:
    """Small files, or small pictures in large files, that would cost much to read whole."""
    jpeg, png = picture(0, kind="JPEG"), picture(0)
    at = jpeg.index(b"\xff\xc0") + 5
    frames = io.BytesIO()
    first, *rest = [Image.new("RGB", (4, 4), (number % 256, 0, 0)) for number in range(2000)]
    first.save(frames, format="WEBP", save_all=True, append_images=rest, lossless=True)
    profile = zlib.compress(b"\0" * 30_000_000)
    return {
        "a JPEG that says 65500 x 65500": jpeg[:at] + struct.pack(">HH", 65500, 65500) + jpeg[at + 4 :],
        "a WebP of 2000 frames": frames.getvalue(),
        "an ICC profile of 30 MB": png[:33] + chunk(b"iCCP", b"icc\0\0" + profile) + png[33:],
        "ten thousand text chunks": png[:33] + chunk(b"tEXt", b"a\0b") * 10_000 + png[33:],
        "an EXIF block that points at itself": jpeg[:2]
        + b"\xff\xe1\x00\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x87\x69\0\x04\0\0\0\x01\0\0\0\x08\0\0\0\0"
        + jpeg[2:],
    }


def test_heavy_pictures_cost_little(service: Running) -> None:
    """Check 12 of the reliability sheet: refused or answered, soon, and without memory that stays."""
    pools = service.backend.decoders
    before = {place: resident(number) for place, number in pools.processes.items()}
    restarts = service.count("decoder_restarts_total")
    for name, data in heavy_pictures().items():
        begun = time.monotonic()
        answer = service.predict(data)
        assert answer.status in (200, 413, 422), name
        assert time.monotonic() - begun < 5, name
    assert service.count("decoder_restarts_total") == restarts
    for place, number in pools.processes.items():
        assert resident(number) - before[place] < 64 * 2**20


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def test_odd_sizes_are_answered(service: Running) -> None:
    for size in ((1, 1), (1, 10_000), (10_000, 1), (15, 15), (1000, 1000)):
        buffer = io.BytesIO()
        Image.new("RGB", size, "blue").save(buffer, format="PNG")
        assert service.predict(buffer.getvalue()).status == 200


def test_damaged_pictures_are_refused(service: Running) -> None:
    restarts = service.count("decoder_restarts_total")
    for kind in ("PNG", "JPEG", "WEBP"):
        data = picture(1, kind=kind)
        refused(service.predict(data[: len(data) // 2]), 422, "undecodable")
    refused(service.predict(b"\xff\xd8\xff"), 422, "undecodable")
    refused(service.predict(b""), 422, "no_picture")
    text = b"zTXt" + b"a\0\0" + zlib.compress(b"\0" * 50_000_000)
    assert service.predict(png_header(8, 8, text)).status in (200, 422)
    assert service.count("decoder_restarts_total") == restarts


def test_bodies_are_bounded_however_they_come(service: Running) -> None:
    refused(service.predict(b"\0" * (2**21 + 1)), 413, "body_too_large")
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"
    lying = raw(service, head + b"Content-Length: 99999999999\r\n\r\n")
    assert b" 413 " in lying.splitlines()[0] and b"body_too_large" in lying
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    endless = raw(service, head + b"Transfer-Encoding: chunked\r\n\r\n", chunk * 40)
    assert b" 413 " in endless.splitlines()[0]
    refused(service.predict(picture(), content_encoding="gzip"), 415, "wrong_encoding")
    assert b" 400 " in raw(service, head + b"Content-Length: -5\r\n\r\n").splitlines()[0]
    tiny = raw(
        service, head + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n", 30
    )
    assert tiny.splitlines()[0].split()[1] in (b"400", b"413", b"415")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/predict?model=nope", "no_such_model"),
        ("/predict?top_k=0", "bad_parameter"),
        ("/nope", "no_such_route"),
        ("/models", "wrong_method"),
    ],
)
def test_a_refusal_is_heard_where_the_connection_ends_with_it(
    service: Running, path: str, code: str, version: str
) -> None:
    """Proxies ask so: closing while a body still comes would reset the connection, and lose the answer."""
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\nContent-Length: "
    for size in (900 * 2**10, 0):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as link:
            begun = time.monotonic()
            link.sendall(f"{head}{size}\r\n\r\n".encode() + bytes(size))
            found = b""
            while piece := link.recv(65536):
                found += piece
        assert code.encode() in found
    assert time.monotonic() - begun < 0.9  # nobody waits for the rest of a body that is there


def test_a_large_body_may_come_in_the_pieces_of_a_network() -> None:
    whole, piece = 30 * 2**20, 1448  # what one Ethernet frame carries of it

    def pieces(size: int) -> Any:
        starts = iter(range(0, whole, size))

        async def receive() -> MutableMapping[str, Any]:
            start = next(starts)
            data = bytes(min(size, whole - start))
            return {"type": "http.request", "body": data, "more_body": start + size < whole}

        return receive

    assert len(asyncio.run(body.read(pieces(piece), 32 * 2**20, whole))) == whole
    with pytest.raises(Refusal, match="bad_request"):
        asyncio.run(body.read(pieces(100), 32 * 2**20, whole))


def test_heads_are_bounded(service: Running) -> None:
    head = b"GET /models HTTP/1.1\r\nHost: localhost\r\n"
    for flood in (b"".join(b"a%d: b\r\n" % i for i in range(10_000)), b"a: " + b"b" * 100_000 + b"\r\n"):
        assert b" 431 " in raw(service, head + flood + b"\r\n").splitlines()[0]
    assert (
        b" 431 "
        in raw(service, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n").splitlines()[0]
    )
    assert service.ask("GET", "/models").status == 200


def test_multipart_is_bounded(service: Running) -> None:
    kind = {"content_type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
    refused(service.predict(part * 10_000 + b"--x--", **kind), 400, "bad_multipart")
    refused(service.predict(b"--x\r\n" + b"a: b\r\n" * 100 + b"\r\n1\r\n--x--", **kind), 400, "bad_multipart")
    refused(service.predict(b"--y", **kind), 400, "bad_multipart")
    refused(service.predict(part, content_type="multipart/form-data"), 400, "bad_multipart")
    refused(service.predict(b"--x--", **kind), 422, "no_picture")
    refused(service.predict(part + b"--x--", **kind), 422, "no_picture")  # a field that is no picture


def test_tensors_are_checked_before_they_are_made(service: Running) -> None:
    path = "/v2/models/first/infer"

    def infer(data: Any, **headers: str) -> Answer:
        return service.ask("POST", path, data if isinstance(data, bytes) else json.dumps(data), **headers)

    def one(**fields: Any) -> dict[str, Any]:
        return {
            "inputs": [
                {"name": "pixels", "datatype": "UINT8", "shape": [1, 3, 32, 32], "data": [0] * 3072} | fields
            ]
        }

    assert infer(one()).status == 200
    for fields in (
        {"name": "pixel"}, {"datatype": "FP32"}, {"shape": [3, 32, 32]}, {"shape": [1, 3, 32, -32]},
        {"shape": [2**31, 3, 32, 32]}, {"shape": [True, 3, 32, 32]}, {"shape": "x"}, {"data": [0] * 3071},
        {"data": [256] * 3072},
        {"data": [0.5] * 3072}, {"data": None}, {"parameters": {"binary_data_size": 3072}}, {"shape": [2, 3, 32, 32]},
    ):  # fmt: skip
        answer = infer(one(**fields))
        assert answer.status == 400 or answer.json["code"] == "too_many_pictures", fields
    refused(infer(b"[" * 10_000), 400, "bad_json")
    refused(infer(b'{"a":' * 20 + b"1" + b"}" * 20), 400, "bad_json")
    refused(infer(b'{"inputs": NaN}'), 400, "bad_json")
    refused(infer(b"{}", Inference_Header_Content_Length="9"), 400, "bad_request")
    refused(infer(b'"' + b'\\"' * 500_000), 400, "bad_json")
    refused(service.ask("POST", "/v2/models/first/versions/0/infer", b"{}"), 404, "no_such_model")
    refused(service.ask("GET", "/v2/models/nobody"), 404, "no_such_model")


def test_parameters_routes_and_methods(service: Running) -> None:
    data = picture()
    for query in ("top_k=0", "top_k=x", "top_k=1001", "deadline_ms=-1", "deadline_ms=1e3"):
        refused(service.predict(data, f"?{query}"), 400, "bad_parameter")
    refused(service.predict(data, "?model=nobody"), 404, "no_such_model")
    refused(service.ask("GET", "/nothing"), 404, "no_such_route")
    refused(service.ask("GET", "/page/../app.py"), 404, "no_such_route")
    refused(service.ask("GET", "/page/..%2f..%2fapp.py"), 404, "no_such_route")
    for method, path, allowed in (
        ("GET", "/predict", "POST"),
        ("HEAD", "/predict", "POST"),
        ("POST", "/models", "GET, HEAD"),
        ("DELETE", "/", "GET, HEAD"),
        ("OPTIONS", "/openapi.json", "GET, HEAD"),
    ):
        answer = service.ask(method, path)
        assert (answer.status, answer.headers["allow"]) == (405, allowed), path
        if method != "HEAD":
            refused(answer, 405, "wrong_method")
    for query in ("index=-1", "index=x", "index=1&class=1"):
        refused(service.ask("POST", f"/explain?{query}", data), 400, "bad_parameter")
    refused(service.ask("POST", "/explain?index=5", data), 422, "cannot_explain")
    for query in ("method=nothing", "class=whale", "head=1&method=gradcam"):
        refused(service.ask("POST", f"/explain?{query}", data), 422, "cannot_explain")
    refused(service.ask("POST", "/explain?score=perhaps", data), 400, "bad_parameter")


def test_only_pages_of_the_service_itself_may_call_it(service: Running) -> None:
    refused(service.ask("GET", "/models", Host="evil.example"), 403, "foreign_host")
    refused(service.ask("GET", "/models", Host=f"localhost.evil.example:{service.port}"), 403, "foreign_host")
    refused(service.predict(picture(), Origin="https://evil.example"), 403, "foreign_origin")
    own = f"localhost:{service.port}"
    assert service.ask("GET", "/models", Host=own, Origin=f"http://{own}").status == 200


def test_a_token_is_asked_of_everything_that_tells_something(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    token = "a-token-of-some-length"
    (tmp_path / "token").write_text(token + "\n")
    with running(str(folders[0]), token_file=str(tmp_path / "token")) as service:
        for method, path in (
            ("GET", "/models"),
            ("POST", "/predict"),
            ("GET", "/metrics"),
            ("GET", "/v2/models/first"),
        ):
            refused(service.ask(method, path), 401, "unauthorized")
            refused(service.ask(method, path, authorization="Bearer wrong"), 401, "unauthorized")
        assert service.predict(picture(), authorization=f"Bearer {token}").status == 200
        for path in ("/", "/health/live", "/health/ready", "/page/page.js", "/docs"):
            assert service.ask("GET", path).status == 200


def test_exported_files_are_refused_before_anything_is_opened(tmp_path: Path) -> None:
    (tmp_path / "graph").mkdir()
    for name in ("a.onnx", "a.pt2", "graph/model.xml"):
        (tmp_path / name).write_bytes(b"")
    for word in ("a.onnx", "a.pt2", "graph"):
        for prefix in ("", "it="):
            with pytest.raises(ConfigError, match="not served: name the model folder"):
                served_names([f"{prefix}{tmp_path / word}"])


def test_other_machines_are_served_with_a_token_only(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token"):
        Service(ServeRun(models=(str(folders[0]),), host="0.0.0.0", port=0))
    (tmp_path / "short").write_text("short\n")
    with pytest.raises(ConfigError, match="16 to 512"):
        Service(ServeRun(models=(str(folders[0]),), port=0, token_file=str(tmp_path / "short")))


def test_a_request_without_an_end_is_hung_up_on(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.serve.settings.HEAD_SECONDS", 0.3)
    monkeypatch.setattr("vitrail.serve.settings.BODY_SECONDS", 0.3)
    begun = time.monotonic()
    assert raw(service, b"GET /models HT") == b""
    slow = raw(service, b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc")
    assert b" 408 " in slow.splitlines()[0] and b"slow_body" in slow
    assert time.monotonic() - begun < 8
    assert service.call(lambda: service.backend.slots["first"].admission.images) == 0
