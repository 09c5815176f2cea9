"""What every request passes first and last: its id, who may call, what became of it in the log and the counts."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from vitrail.serve import settings
from vitrail.serve.body import Left
from vitrail.serve.metrics import Metrics
from vitrail.serve.refusals import Refusal

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/v2/health/", "/page/", "/docs", "/openapi.json")
"""What needs no token: it tells nothing of the models."""

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; connect-src 'self';"
        b" media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)

LOGGED = ("refused", "model", "version", "images", "bytes", "admitted")
"""What the routes add to a request's line in the log."""

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Gate:
    """The outermost application.

    Args:
        app: what answers.
        metrics: where requests are counted.
        token: what requests must carry; empty for none.
        hosts: names under which the service may be called; empty for any.
        draining: whether connections should end with their answer.
        early: raises Refusal for a request that would be refused further in; what is refused soon costs the least.
    """

    def __init__(
        self,
        app: App,
        metrics: Metrics,
        token: str,
        hosts: tuple[str, ...],
        draining: Callable[[], bool],
        early: Callable[[Message], None] = lambda scope: None,
    ) -> None:
        self.app, self.metrics, self.token, self.hosts = app, metrics, token, hosts
        self.draining, self.early = draining, early
        self.full, self.full_told = 0, 0.0
        """Requests refused as full since that was last told in the log."""

    def turn_away(self, method: str, path: str, pairs: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """The whole answer to a request that has no room, where its head alone tells; None for all others.

        Under overload most requests are of this kind, and a task for each of them would take the cores from those
        that are let in.
        """
        begun, headers = time.monotonic(), _texts(pairs)
        lasting = headers.get("connection", "keep-alive").lower() == "keep-alive"
        if self.draining() or not lasting or headers.keys() & {"expect", "upgrade"}:
            return None
        state: dict[str, Any] = {"headers": headers}
        try:
            self._check(path, headers)
            self.early({"path": path, "method": method, "query_string": b"", "state": state})
            return None
        except Refusal as refusal:
            if refusal.code != "full":
                return None
            answer = _written(refusal, _identity(headers))
        route = state["route"]
        self.metrics.requests.labels(route, "503").inc()
        self.metrics.refusals.labels("full").inc()
        self.metrics.seconds.labels(route).observe(time.monotonic() - begun)
        self._many({"refused": "full"})
        return answer

    def turn_down(self, code: str) -> bytes:
        """The whole answer to bytes that are no request; it is counted, and told in the log, like any other."""
        refusal, identity = Refusal(code, close=True), uuid.uuid4().hex
        self.metrics.requests.labels("other", str(refusal.status)).inc()
        self.metrics.refusals.labels(code).inc()
        told = {"id": identity, "route": "other", "status": refusal.status, "refused": code}
        logger.info("no request: %d %s", refusal.status, code, extra={"request": told})
        return _written(refusal, identity)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = _texts(scope["headers"])
        identity = _identity(headers)
        state = scope.setdefault("state", {})
        lasting = scope.get("http_version") == "1.1" and "close" not in headers.get("connection", "").lower()
        ends = self.draining() or not lasting
        state.update(request_id=identity, begun=time.monotonic(), headers=headers, ends=ends, read=False)
        answer = _Answer(send, identity, self.draining)
        # HEAD is answered as GET; the protocol leaves the body out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def checked() -> Message:
            message = await receive()
            if state.get("broken"):
                raise Refusal("bad_request")
            state["read"] = not message.get("more_body")
            return message

        try:
            self._check(scope["path"], headers)
            self.early(inner)
            await self.app(inner, checked, answer.send)
        except Refusal as refusal:
            await refuse(checked, answer.send, refusal, state)
        except Left:
            answer.left = True
        except asyncio.CancelledError:  # the drain's time is up
            state["lost"] = True
            raise
        except Exception:  # a request may fail, the service may not
            logger.exception("request %s failed", identity)
            if not answer.status:
                await refuse(checked, answer.send, Refusal("failed"), state)
        finally:
            self._count(scope["method"], inner, state, answer)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        """Raise Refusal for callers that may not call: other names (DNS rebinding), other origins, no token."""
        host = headers.get("host", "")
        if self.hosts and _without_port(host) not in self.hosts:
            raise Refusal("foreign_host", close=True)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refusal("foreign_origin", close=True)
        if self.token and path != "/" and not path.startswith(OPEN):
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                raise Refusal("unauthorized", close=True)

    def _count(self, method: str, scope: Message, state: dict[str, Any], answer: _Answer) -> None:
        route = getattr(scope.get("route"), "path", "") or state.get("route", "other")
        # 499 is what others write for a client that left before its answer.
        status = 499 if answer.left or not answer.complete else answer.status
        seconds = time.monotonic() - state["begun"]
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if "refused" in state:
            self.metrics.refusals.labels(state["refused"]).inc()
        if state.get("admitted") and not state.get("lost"):
            self.metrics.finished.inc()
        if self._many(state):
            return
        told: dict[str, Any] = {
            "id": state["request_id"],
            "method": method,
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 2),
        }
        told.update({name: state[name] for name in LOGGED if name in state})
        message = "%s %s %d in %.1f ms"
        logger.info(message, method, route, status, 1000 * seconds, extra={"request": told})

    def _many(self, state: dict[str, Any]) -> bool:
        """Whether a request needs no line of its own: under overload, those refused share one a second."""
        now = time.monotonic()
        full = state.get("refused") == "full"
        self.full += full
        if self.full and now - self.full_told > 1.0:
            message = "%d requests refused since the last such line: full"
            told = {"event": "full", "count": self.full}
            logger.warning(message, self.full, extra={"request": told})
            self.full, self.full_told = 0, now
        return full


class _Answer:
    """Hands an answer on, and remembers what it was."""

    def __init__(self, send: Send, identity: str, draining: Callable[[], bool]) -> None:
        self.to, self.identity, self.draining = send, identity, draining
        self.status, self.complete, self.left = 0, False, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), *HEADERS, (b"x-request-id", self.identity.encode())]
            if self.draining():
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self.to(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete = True


def _texts(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers as text, by names in small letters."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in pairs}


def _identity(headers: Mapping[str, str]) -> str:
    """The id that a request brings, or a new one."""
    asked = headers.get("x-request-id", "")
    return asked if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", asked) else uuid.uuid4().hex


def _refused(refusal: Refusal, body: bytes) -> list[tuple[bytes, bytes]]:
    """The headers of every refusal."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.retry_after is not None:
        headers.append((b"retry-after", str(refusal.retry_after).encode()))
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.allow:
        headers.append((b"allow", refusal.allow.encode()))
    if refusal.close:
        headers.append((b"connection", b"close"))
    return headers


def _written(refusal: Refusal, identity: str) -> bytes:
    """A refusal as it goes over the wire, for what never becomes a request of the application."""
    body = json.dumps(refusal.body()).encode()
    lines = [*_refused(refusal, body), *HEADERS, (b"x-request-id", identity.encode())]
    head = b"".join(b"%s: %s\r\n" % line for line in lines)
    phrase = http.HTTPStatus(refusal.status).phrase
    return f"HTTP/1.1 {refusal.status} {phrase}\r\n".encode() + head + b"\r\n" + body


async def refuse(receive: Receive, send: Send, refusal: Refusal, state: dict[str, Any]) -> None:
    """Answer with a refusal."""
    state["refused"] = refusal.code
    body = json.dumps(refusal.body()).encode()
    await send({"type": "http.response.start", "status": refusal.status, "headers": _refused(refusal, body)})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    ends = refusal.close or state["ends"]
    if ends and not state["read"] and refusal.code != "slow_body" and "expect" not in state["headers"]:
        await _discard(receive)
    await send({"type": "http.response.body", "body": b""})


async def _discard(receive: Receive) -> None:
    """Read on for a moment, and keep nothing.

    A connection that is closed while its client still sends is reset, and the answer lost on the way.
    """
    size = 0
    with contextlib.suppress(TimeoutError, Refusal):  # it may turn out to be broken as well
        async with asyncio.timeout(settings.DISCARD_SECONDS):
            while size < settings.MOST_DISCARDED:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name.lower() if colon and port.isdecimal() else host.lower()
