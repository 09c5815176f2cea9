"""Pictures by URL: off by default, and then only from the hosts that were named, at the address that was checked."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.service import Running, picture, running
from vitrail.errors import ConfigError
from vitrail.serve.fetch import Fetcher, is_public
from vitrail.serve.refusals import Refusal

# Check 18 of the reliability sheet: what a request may try to reach through us.
HOSTILE = """
http://127.0.0.1:{port}/ http://localhost:{port}/ http://127.1:{port}/ http://127.0.1:{port}/ http://0.0.0.0:{port}/
http://0:{port}/ http://2130706433:{port}/ http://0x7f000001:{port}/ http://0x7f.1:{port}/ http://0177.0.0.1:{port}/
http://017700000001:{port}/ http://127.0.0.1.:{port}/ http://127.0.0.1%00:{port}/ http://[::1]:{port}/ http://[::]:{port}/
http://[::ffff:127.0.0.1]:{port}/ http://[::ffff:7f00:1]:{port}/ http://[0:0:0:0:0:ffff:127.0.0.1]:{port}/
http://[64:ff9b::7f00:1]:{port}/ http://[::127.0.0.1]:{port}/ http://[::1%25lo]:{port}/ http://[fe80::1]:{port}/
http://169.254.169.254/latest/meta-data/ http://[fd00:ec2::254]/latest/meta-data/ http://metadata.google.internal/
http://10.0.0.1/ http://172.16.0.1/ http://192.168.0.1/ http://100.64.0.1/ http://198.18.0.1/ http://224.0.0.1/
http://255.255.255.255/ http://pictures.example@127.0.0.1:{port}/ http://127.0.0.1:{port}@pictures.example/
http://pictures.example:80@127.0.0.1:{port}/ http://user:word@pictures.example/ http://pictures.example:{port}/
http://pictures.example\\@127.0.0.1:{port}/ http://127.0.0.1:{port}\\@pictures.example/ http:\\\\pictures.example/
http://pictures.example#@127.0.0.1:{port}/ http://127.0.0.1:{port}#pictures.example http://pictures.example%2f@127.0.0.1/
http://pictures.example.evil.example/ http://evilpictures.example/ http://pictures.example%00.evil.example/
http://PICTURES.example.evil/ http://pictures.example./ http://pictures%2eexample/ http://pictures.example:0/
http://pictures.example:99999/ http://pictures.example:080080/ http://pictures.example:+80/ http://pictures.example:-1/
http://pıctures.example/ http://pictures。example/ http://ⓟictures.example/ http://xn--pctures-3ya.example/
file:///etc/passwd file://pictures.example/etc/passwd gopher://pictures.example:70/_GET ftp://pictures.example/a.jpg
dict://127.0.0.1:{port}/ data:image/png;base64,AAAA jar:http://pictures.example!/ javascript:alert(1)
//pictures.example/ http:/pictures.example/ http:///pictures.example/ http://?pictures.example/ http://:80/ http://
"""
ODD = (
    "http://pictures.example/a b",
    "http://pictures.example/\r\nHost: evil",
    " http://pictures.example/",
    "http://pictures.example/\x00",
    "http://pictures.example/" + "a" * 3000,
    "HTTP://pictures.example/",
)


class Canary:
    """A listener on this machine that counts who comes, and says what it was told to."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.said: list[bytes] = []
        self.answer: Any = b""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                link, _ = self.listener.accept()
            except OSError:
                return
            with link:
                try:
                    self.said.append(link.recv(65536))
                    for piece in self.answer if isinstance(self.answer, list) else [self.answer]:
                        link.sendall(piece)
                        time.sleep(0.05 if isinstance(self.answer, list) else 0)
                except OSError:
                    pass


@pytest.fixture
def canary() -> Iterator[Canary]:
    found = Canary()
    yield found
    found.listener.close()


def ok(data: bytes, *lines: str, status: str = "200 OK") -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", *lines]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


def ask(service: Running, *urls: Any) -> Any:
    return service.predict(json.dumps({"urls": urls}).encode(), content_type="application/json")


def test_no_url_is_fetched_by_default(service: Running, canary: Canary) -> None:
    answer = ask(service, f"http://127.0.0.1:{canary.port}/a.png")
    assert (answer.status, answer.json["code"]) == (403, "not_fetching")
    assert "--fetch-from" in answer.json["error"]
    assert canary.said == []
    assert service.predict(b"{}", content_type="application/json").json["code"] == "bad_json"
    # A picture is known by its first bytes, whatever the header says.
    assert service.predict(picture(), content_type="application/json").status == 200


def test_only_the_hosts_on_the_list_are_reached(canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def resolve(host: str, *rest: Any, **options: Any) -> Any:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", canary.port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    fetcher = Fetcher(["pictures.example"])
    urls = [*HOSTILE.format(port=canary.port).split(), *ODD]
    assert len(urls) >= 60

    async def go() -> None:
        for url in [*urls, "http://pictures.example/a.jpg", "https://pictures.example/"]:
            with pytest.raises(Refusal) as told:
                await fetcher.fetch(url, 10**6, lambda size: None)
            assert told.value.code == "url_not_allowed", url

    asyncio.run(go())
    # A name on the list that leads into the own network is looked up, and not called.
    assert asked == ["pictures.example"] * 2 and canary.said == []


def test_a_name_is_looked_up_once_and_that_address_is_called(
    canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that answers differently the second time (DNS rebinding) finds nobody asking."""
    answers = [["93.184.216.34"], ["127.0.0.1"]]
    called: list[str] = []

    def resolve(host: str, *rest: Any, **options: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 80)) for one in answers.pop(0)]

    async def connect(address: str, *rest: Any, **options: Any) -> Any:
        called.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(asyncio, "open_connection", connect)
    with pytest.raises(Refusal, match="not_fetched"):
        asyncio.run(Fetcher(["pictures.example"]).fetch("http://pictures.example/", 99, lambda size: None))
    assert called == ["93.184.216.34"] and len(answers) == 1


def test_a_picture_is_fetched_and_answered_as_if_it_had_been_sent(
    folders: tuple[Path, Path], canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.serve.settings.FETCH_SECONDS", 1.0)
    data = picture(3)
    here = f"127.0.0.1:{canary.port}"
    with running(str(folders[0]), body_megabytes=1, fetch_from=(here,)) as service:
        canary.answer = ok(data)
        found = ask(service, f"http://{here}/albums/a.png", f"http://{here}/b.png?size=2").json
        sent = service.predict(data).json
        assert [record["predictions"] for record in found["results"]] == [
            sent["results"][0]["predictions"]
        ] * 2
        assert [record["source"] for record in found["results"]] == ["a.png", "b.png?size=2"]
        assert canary.said[0].startswith(b"GET /albums/a.png HTTP/1.0\r\nHost: " + here.encode())
        assert service.ask(
            "POST", "/explain", json.dumps({"url": f"http://{here}/"}), content_type="application/json"
        ).status == 200  # fmt: skip
        for wrong, code in (
            (ok(b"", "Location: http://169.254.169.254/", status="302 Found"), "not_fetched"),
            (ok(data, status="404 Not Found"), "not_fetched"),
            (ok(data, "Content-Encoding: gzip"), "not_fetched"),
            (ok(data, "Transfer-Encoding: chunked"), "not_fetched"),
            (ok(data)[:-5], "not_fetched"),
            (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000, "not_fetched"),
            (b"nonsense", "not_fetched"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n", "body_too_large"),
            (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (2**20 + 1), "body_too_large"),
            ([ok(data)[:60], *([b"a"] * 60)], "not_fetched"),  # drop by drop
            (ok(b"GIF89a"), "wrong_format"),
        ):
            canary.answer = wrong
            before = len(canary.said)
            answer = ask(service, f"http://{here}/a")
            assert answer.json["code"] == code, wrong[:60]
            assert answer.status in (413, 415, 422) and len(canary.said) == before + 1
        for bad in ([1], [], ["http://a/"] * 17):
            assert ask(service, *bad).status in (400, 413)
        assert ask(service, "http://localhost/").json["code"] == "url_not_allowed"
        assert service.backend.slots["first"].admission.bytes == 0


def test_which_addresses_are_public() -> None:
    for address in ("93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34"):
        assert is_public(address), address
    for address in (
        "127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1", "::1", "::",
        "fe80::1", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::", "ff02::1",
        "::7f00:1",
    ):  # fmt: skip
        assert not is_public(address), address


def test_a_list_that_is_none_is_told() -> None:
    for entry in ("", "http://a", "a/b", "a b", "*.example", "a:b"):
        with pytest.raises(ConfigError, match="HOST"):
            Fetcher([entry])
