"""What comes over the wire and is no request: answered like every other refusal, counted, and told in one form."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.serve.service import Answer, Running
from tests.serve.test_bounds import refused
from vitrail.cli.serving import serve
from vitrail.runs import ServeRun

NO_REQUESTS = {
    "no HTTP": b"GARBAGE\r\n\r\n",
    "a negative length": b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    "two lengths": b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "a broken chunk": b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "two hosts": b"GET /models HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\n\r\n",
    "two codings": b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a path of bytes": b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a long head": b"GET / HTTP/1.1\r\nHost: localhost\r\na: " + b"b" * 100_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("what", NO_REQUESTS)
def test_what_is_no_request_is_refused_in_the_same_form_and_counted(
    service: Running, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    code, status = ("header_too_large", "431") if "head" in what else ("bad_request", "400")
    route = "/predict" if "chunk" in what else "other"
    before = service.count("requests_total", route=route, status=status)
    refusals = service.count("refusals_total", code=code)
    answers = list(answers_of(raw_until_the_end(service, NO_REQUESTS[what])))
    assert len(answers) == 1
    refused(answers[0], int(status), code)
    assert answers[0].headers["connection"] == "close" and answers[0].headers["x-request-id"]
    assert "default-src 'none'" in answers[0].headers["content-security-policy"]
    end = time.monotonic() + 10
    while service.count("requests_total", route=route, status=status) == before:
        assert time.monotonic() < end, "it is in no count"
        time.sleep(0.01)
    assert service.count("requests_total", route=route, status=status) == before + 1
    assert service.count("refusals_total", code=code) == refusals + 1
    names = [record.name for record in caplog.records]
    assert "vitrail.serve.gate" in names and "uvicorn.error" not in names
    assert service.ask("GET", "/health/live").status == 200


def test_what_follows_a_request_and_is_none_is_refused_after_its_answer(service: Running) -> None:
    good = b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    found = list(answers_of(raw_until_the_end(service, good * 3 + b"GARBAGE\r\n\r\n" + good)))
    assert [answer.status for answer in found] == [200, 200, 200, 400]
    assert found[2].json["models"]
    refused(found[3], 400, "bad_request")


def raw_until_the_end(service: Running, data: bytes) -> bytes:
    """All that comes back for bytes on the wire, until the service hangs up."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as link:
        link.sendall(data)
        found = b""
        while piece := link.recv(65536):
            found += piece
        return found


def answers_of(data: bytes) -> Iterator[Answer]:
    """The answers in what came over the wire."""
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = int(headers["content-length"])
        yield Answer(int(first.split()[1]), headers, data[:size])
        data = data[size:]


class Hearing(logging.Handler):
    """Calls with the URL when a line of the log says that the service is ready."""

    def __init__(self, ready: Callable[[str], None]) -> None:
        super().__init__()
        self.ready = ready

    def emit(self, record: logging.LogRecord) -> None:
        told = getattr(record, "request", {})
        if told.get("event") == "serving":
            self.ready(told["url"])


def test_every_line_of_the_log_is_one_object(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --log json: where it serves and uvicorn's and asyncio's lines too, and of a broken request ours alone."""
    ours = logging.getLogger("vitrail")
    monkeypatch.setattr(
        ours, "handlers", [Hearing(lambda url: threading.Thread(target=ask, args=(url,)).start())]
    )
    monkeypatch.setattr(ours, "level", ours.level)
    asked: list[bytes] = []

    def ask(url: str) -> None:
        """Called when the service is ready, with where it is."""
        address = url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=10) as link:
            link.sendall(b"GARBAGE\r\n\r\n")
            asked.append(link.recv(65536))
        logging.getLogger("uvicorn.error").warning("said by uvicorn")
        logging.getLogger("asyncio").error("said by asyncio")
        os.kill(os.getpid(), signal.SIGTERM)

    run = ServeRun(
        models=(str(folders[0]),), port=0, decoders=1, device="cpu", engine="torch", page=False, log="json"
    )
    assert serve(run) == 0
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {"said by uvicorn", "said by asyncio"} <= {line["message"] for line in told}
    (ready,) = [line for line in told if line.get("event") == "serving"]
    assert ready["url"].startswith("http://127.0.0.1:") and ready["message"] == f"serving {ready['url']}"
    assert ready["page"] is False
    assert [line["status"] for line in told if line.get("refused") == "bad_request"] == [400]
    assert not any("Invalid HTTP" in line["message"] for line in told) and b" 400 " in asked[0]
    assert logging.getLogger("uvicorn").propagate and not logging.getLogger("uvicorn").handlers


@pytest.mark.parametrize("log", ["text", "json"])
@pytest.mark.parametrize("wrong", ["no model", "no port", "no host"])
def test_a_failed_start_is_told_in_the_form_of_the_log(
    folders: tuple[Path, Path], tmp_path: Path, wrong: str, log: str
) -> None:
    """As a program, since the last words are the program's; the code is the same in either form."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options, words = {
            "no model": ([str(tmp_path / "nothing"), "--port", "0"], "nothing is no folder"),
            "no port": ([str(folders[0]), "--port", str(port)], "choose another --port"),
            "no host": ([str(folders[0]), "--port", "0", "--host", "0.0.0.0"], "--token-file is needed"),
        }[wrong]
        command = [sys.executable, "-m", "vitrail", "serve", *options, "--log", log, "--device", "cpu"]
        ended = subprocess.run(
            [*command, "--engine", "torch"], capture_output=True, text=True, timeout=120, check=False
        )
    lines = ended.stderr.splitlines()
    assert ended.returncode == 2 and not ended.stdout and words in lines[-1]
    if log == "text":
        assert lines[-1].startswith("vitrail serve: ")
        return
    last = [json.loads(line) for line in lines][-1]
    assert (last["event"], last["level"], last["code"]) == ("failed", "error", 2) and words in last["message"]
