"""Reading a request's body within bounds, finding the pictures in it, and noticing that the client has gone."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.parse
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from typing import Any, NamedTuple, TypeVar

from vitrail.serve import settings
from vitrail.serve.admission import Ticket
from vitrail.serve.refusals import Refusal

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Part(NamedTuple):
    """One part of a multipart body."""

    field: str
    filename: str
    data: bytes


class Left(Exception):
    """The client has gone."""


def declared_length(headers: Mapping[str, str], most: int) -> int | None:
    """The length that the head of a request declares. Raises Refusal where it is over `most`, or no number."""
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise Refusal("wrong_encoding", close=True)
    text = headers.get("content-length")
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise Refusal("bad_request", close=True)
    if int(text) > most:
        raise Refusal("body_too_large", close=True)
    return int(text)


async def read(receive: Receive, most: int, declared: int | None, ticket: Ticket | None = None) -> bytes:
    """The whole body. Raises Refusal where it is too long, too slow or in too many pieces; Left."""
    pieces: list[bytes] = []
    size, count = 0, 0
    try:
        async with asyncio.timeout(settings.BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Left
                piece: bytes = message.get("body", b"")
                size, count = size + len(piece), count + 1
                if size > most:
                    raise Refusal("body_too_large", close=True)
                if count > settings.MOST_PIECES * max(1.0, most / settings.PIECES_PER):
                    raise Refusal("bad_request", close=True)
                if ticket is not None and declared is None:
                    ticket.resize(ticket.images, size)
                pieces.append(piece)
                if not message.get("more_body"):
                    return b"".join(pieces)
    except TimeoutError:
        raise Refusal("slow_body", close=True) from None


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. Raises Left, and cancels it, when the client goes first."""
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise Left
    finally:
        watching.cancel()
        doing.cancel()
        await asyncio.gather(watching, doing, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def media_type(headers: Mapping[str, str]) -> tuple[str, str]:
    """The type of a body without its parameters, and the boundary of a multipart one."""
    text = headers.get("content-type", "")
    kind, _, rest = text.partition(";")
    found = re.search(r'(?:^|;)\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))\s*(?:;|$)', rest, re.IGNORECASE)
    return kind.strip().lower(), (found.group(1) or found.group(2)) if found else ""


def multipart(body: bytes, boundary: str) -> list[Part]:
    """The parts of a body (RFC 7578), in time that grows with its length. Raises Refusal where it is no such body."""
    mark = b"--" + boundary.encode("latin-1")
    if not boundary or not body.startswith(mark):
        raise Refusal("bad_multipart")
    parts: list[Part] = []
    place = len(mark)
    while True:
        if body[place : place + 2] == b"--":
            return parts
        if body[place : place + 2] != b"\r\n":
            raise Refusal("bad_multipart")
        head_end = body.find(b"\r\n\r\n", place, place + settings.MOST_PART_HEAD)
        end = body.find(b"\r\n" + mark, head_end + 2) if head_end >= 0 else -1
        if end < 0 or len(parts) == settings.MOST_PARTS:
            raise Refusal("bad_multipart")
        field, filename = _disposition(body[place + 2 : head_end])
        parts.append(Part(field, filename, body[head_end + 4 : end]))
        place = end + 2 + len(mark)


PARAMETER = re.compile(r';\s*(name|filename\*?)=(?:"((?:[^"\\]|\\.)*)"|([^\s";]+))')


def _disposition(head: bytes) -> tuple[str, str]:
    """The field and the file's name of a part."""
    lines = head.split(b"\r\n")
    if len(lines) > settings.MOST_PART_HEADERS:
        raise Refusal("bad_multipart")
    for line in lines:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-disposition":
            text = value.decode("utf-8", "replace")
            found = {key: quoted or bare for key, quoted, bare in PARAMETER.findall(text)}
            named = found.get("filename") or urllib.parse.unquote(
                found.get("filename*", "").rpartition("'")[2]
            )
            return found.get("name", ""), plain_name(named)
    raise Refusal("bad_multipart")


def plain_name(name: str) -> str:
    """A picture's name as it is handed back: no folders, nothing that is not printed, not too long."""
    name = re.split(r"[/\\]", name)[-1]
    return "".join(letter for letter in name if letter.isprintable())[: settings.NAME_LENGTH]


def looks_like_picture(data: bytes) -> bool:
    """Whether the first bytes are those of a format on the list; no parser is called for anything else."""
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (
        data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    )


# A string that never ends is one to the end, so that nothing is read twice.
STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
NO_BRACKETS = re.compile(rb"[^\[\]{}]+")


def read_json(data: bytes) -> Any:
    """JSON whose brackets stand neither too deep nor too many. Raises Refusal `bad_json`."""
    brackets = NO_BRACKETS.sub(b"", STRINGS.sub(b"", data))
    if len(brackets) > settings.MOST_JSON_BRACKETS:
        raise Refusal("bad_json")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > settings.MOST_JSON_DEPTH:
            raise Refusal("bad_json")
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Refusal("bad_json") from None


def _no_constant(word: str) -> Any:
    """NaN and the infinities are not JSON."""
    raise ValueError(word)
