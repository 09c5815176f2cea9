"""Nonsense of every kind: pictures with wrong bytes, requests with wrong grammar. Counts are set by the environment.

VITRAIL_FUZZ_IMAGES and VITRAIL_FUZZ_REQUESTS; few by default, 10,000 and 2,000 in the slow tests.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.serve.service import LABELS, Running, picture, running
from tests.serve.test_answers import form
from vitrail.serve.refusals import TABLE

HOME = re.escape(str(Path(__file__).parents[2])).encode()
"""Where the code lies: no answer tells it."""

TEXTS = {text for _, text in TABLE.values()}
FEW = int(os.environ.get("VITRAIL_FUZZ_IMAGES", "384")), int(os.environ.get("VITRAIL_FUZZ_REQUESTS", "150"))
MANY = (
    int(os.environ.get("VITRAIL_FUZZ_IMAGES", "10000")),
    int(os.environ.get("VITRAIL_FUZZ_REQUESTS", "2000")),
)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A file with something wrong in it: bits, bytes, runs, ends, doubled or moved pieces."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        place = chance.randrange(max(1, len(found)))
        if chance.random() < 0.4:
            place = min(place, chance.randrange(64))  # heads matter most
        kind = chance.randrange(6)
        length = chance.choice((1, 2, 4, 16, 200))
        if not found:
            break
        if kind == 0:
            found[place % len(found)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            found[place % len(found)] = chance.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF))
        elif kind == 2:
            found[place : place + length] = chance.randbytes(length)
        elif kind == 3:
            del found[place : place + length]
        elif kind == 4:
            found[place:place] = found[place : place + length]
        else:
            del found[chance.randrange(len(found)) :]
    return bytes(found)


def sources() -> list[bytes]:
    size = (24, 31)
    kinds = [("PNG", {}), ("JPEG", {"quality": 80}), ("JPEG", {"progressive": True}), ("WEBP", {"quality": 70}),
             ("WEBP", {"lossless": True}), ("PNG", {"optimize": True, "dpi": (72, 72)})]  # fmt: skip
    return [picture(seed, size, kind, **options) for seed, (kind, options) in enumerate(kinds)]


def fuzz_images(service: Running, count: int, seed: int) -> Counter[str]:
    """Every mutated picture gets a prediction or a constant refusal."""
    chance = random.Random(seed)
    files = sources()
    found: Counter[str] = Counter()
    while sum(found.values()) < count:
        batch = [mutated(chance.choice(files), chance) for _ in range(64)]
        body, kind = form(batch)
        answer = service.predict(body, content_type=kind)
        assert answer.status in (200, 413, 415, 422), answer
        if answer.status != 200:
            found[answer.json["code"]] += len(batch)
            continue
        for record in answer.json["results"]:
            assert record["error"] is None or record["error"] in TEXTS
            assert record["error"] is not None or record["label"] in LABELS
            found[record.get("code", "answered")] += 1
    assert service.predict(picture()).status == 200
    assert set(found) <= {
        "answered",
        "undecodable",
        "wrong_format",
        "picture_too_large",
        "no_picture",
        "costly",
    }, found
    return found


def fuzz_requests(service: Running, count: int, seed: int) -> Counter[str]:
    """Every broken request gets a status that is no crash, or a closed connection."""
    chance = random.Random(seed)
    data = picture(1, (16, 16))
    found: Counter[str] = Counter()
    for _ in range(count):
        told = talk(service.port, request(chance, data))
        status = told[9:12].decode("latin-1") if told.startswith(b"HTTP/1.1 ") else "closed"
        assert status == "closed" or (status.isdecimal() and (status < "500" or status in ("503", "504"))), (
            told
        )
        assert not re.search(rb"Traceback|0x[0-9a-f]{6}|site-packages|" + HOME, told), told
        found[status] += 1
    assert service.predict(data).status == 200
    return found


METHODS = [
    "GET",
    "POST",
    "PUT",
    "DELETE",
    "HEAD",
    "OPTIONS",
    "TRACE",
    "P\0ST",
    "",
    "A" * 300,
]
PATHS = [
    "/",
    "/predict",
    "/explain",
    "/story",
    "/models",
    "/metrics",
    "/docs",
    "/openapi.json",
    "/health/live",
    "/v2",
    "//",
    "/v2/models/first",
    "/v2/models/first/infer",
    "/v2/models/%00/infer",
    "/page/page.js",
    "/page/%2e%2e/app.py",
    "/predict?top_k=99999999999999999999",
    "/predict?model=%ff%fe",
    "/explain?class=%0a&score=1",
    "*",
    "/" + "a" * 5000,
    "http://x/predict",
    "/predict?" + "a=b&" * 500,
]
HEADERS = [
    "Content-Length: -1",
    "Content-Length: 5\r\nContent-Length: 6",
    "Transfer-Encoding: chunked",
    "Expect: 100-continue",
    "Transfer-Encoding: gzip, chunked",
    "Content-Type: multipart/form-data; boundary=",
    "Content-Encoding: br",
    'Content-Type: multipart/form-data; boundary="a b"',
    "X: \xff\xfe",
    "Connection: upgrade\r\nUpgrade: websocket",
    ": x",
    "Inference-Header-Content-Length: 99",
    "X-Request-ID: ../../x",
    "Authorization: Bearer \0",
    "Origin: null",
    "Range: bytes=0-1",
    "Content-Type: application/json",
    "Cookie: " + "c" * 9000,
    "bad header",
    " folded: x",
]
BODIES = [
    b"",
    b"{}",
    b"[",
    b'{"inputs":[{"name":"pixels","shape":[1e999],"datatype":"UINT8"}]}',
    b"--a\r\n\r\n\r\n--a--",
    b"\0" * 999,
    b"5\r\nabcde\r\n0\r\n\r\n",
    b"zz\r\nabc\r\n",
    b"ffffffffffffffff\r\n",
    b'{"inputs":' + b"[" * 5000,
]


def request(chance: random.Random, data: bytes) -> bytes:
    body = chance.choice([*BODIES, data])
    lines = [
        f"{chance.choice(METHODS[:2] * 6 + METHODS)} {chance.choice(PATHS)}"
        f" HTTP/{chance.choice(['1.1'] * 8 + ['1.0', '9.9', ''])}"
    ]
    lines += ["Host: " + chance.choice(["localhost"] * 8 + ["evil", "", "localhost:99999"])]
    lines += chance.sample(HEADERS, chance.choice((0, 0, 1, 2, 3)))
    if chance.random() < 0.6:
        lines += [f"Content-Length: {len(body)}"]
    head = "\r\n".join(lines).encode("latin-1") + chance.choice([b"\r\n\r\n"] * 9 + [b"\n\n", b"\r\n"])
    made = head + body
    return mutated(made, chance) if chance.random() < 0.3 else made


def talk(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as link:
        try:
            link.sendall(data)
            link.shutdown(socket.SHUT_WR)
            found = b""
            while piece := link.recv(65536):
                found += piece
                if len(found) > 2**20 or b"\r\n\r\n" in found:
                    break
            return found
        except OSError:
            return b""


def test_a_few_wrong_pictures(service: Running) -> None:
    fuzz_images(service, FEW[0], 0)


def test_a_few_wrong_requests(service: Running) -> None:
    fuzz_requests(service, FEW[1], 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_wrong_pictures(service: Running) -> None:
    restarts = service.count("decoder_restarts_total")
    found = fuzz_images(service, MANY[0], 1)
    print(dict(found), "decoders lost:", service.count("decoder_restarts_total") - restarts)
    assert service.count("decoder_restarts_total") == restarts


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_wrong_requests(service: Running) -> None:
    print(dict(fuzz_requests(service, MANY[1], 1)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_files_cut_off_or_flipped_at_every_byte(service: Running) -> None:
    restarts = service.count("decoder_restarts_total")
    for kind in ("PNG", "JPEG", "WEBP"):
        data = picture(0, (9, 11), kind, **({"quality": 40} if kind != "PNG" else {}))
        wrong = [data[:end] for end in range(len(data))]
        wrong += [data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :] for at in range(len(data))]
        for start in range(0, len(wrong), 64):
            body, form_kind = form(wrong[start : start + 64])
            answer = service.predict(body, content_type=form_kind)
            assert answer.status in (200, 413, 415, 422)
    assert service.count("decoder_restarts_total") == restarts


CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
]


# 503 and 504 are answers (full, late); everything else above 499 is a crash.
ALLOWED = """
[parameters]
"path.name" = "first"

[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "503", "504"]
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_schemathesis_finds_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A fuzzer that we did not write, against our OpenAPI file."""
    tool = shutil.which("schemathesis") or shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("schemathesis is not installed")
    with running(*map(str, folders), body_megabytes=2, megapixels=1.0) as service:
        command = [tool, "run", f"http://127.0.0.1:{service.port}/openapi.json", "--max-examples", str(MANY[1] // 20),
                   "--checks", ",".join(CHECKS),
                   "--seed", "1", "--request-timeout", "60"]  # fmt: skip
        (tmp_path / "schemathesis.toml").write_text(ALLOWED)
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert service.predict(picture()).status == 200
    assert ran.returncode == 0, ran.stdout[-6000:]
