"""uvicorn's HTTP protocol with bounds on what comes before a request is one, and an answer to what never is."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vitrail.serve import settings


class GuardedProtocol(HttpToolsProtocol):
    """One connection. A head that is too large is answered 431, one that does not end in time is hung up on.

    What is no HTTP is answered 400, in the service's own words: uvicorn's answer to it is plain text without our
    headers, in no count, and a line of its own in the log.
    """

    head_bytes = 0
    in_head = True
    tail = b""
    away = False
    """Whether the request was answered by its head alone; the body is not kept."""
    timer: asyncio.TimerHandle | None = None
    last = ""
    """Code of the refusal with which the connection ends; nothing is read any more."""

    def connection_made(self, transport: Any) -> None:
        """Start the clock of the first head."""
        super().connection_made(transport)
        if len(self.connections) > settings.MOST_CONNECTIONS:
            transport.close()
            return
        self.timer = self.loop.call_later(settings.HEAD_SECONDS, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to heads before it is parsed."""
        if self.last:
            return
        if self.in_head:
            if self.timer is None:
                self.timer = self.loop.call_later(settings.HEAD_SECONDS, self._too_slow)
            self.head_bytes += len(data)
            ended = b"\r\n\r\n" in self.tail + data
            self.tail = data[-3:]
            if self.head_bytes > settings.MOST_HEAD and not ended:
                self._refuse("header_too_large")
                return
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # the request is answered; nothing is upgraded
        except httptools.HttpParserError:
            self._broken()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Refuse a head with too many lines."""
        super().on_header(name, value)
        if len(self.headers) > settings.MOST_HEADERS:
            self._refuse("header_too_large")

    def on_headers_complete(self) -> None:
        """The head is whole: the body's own bounds follow."""
        if self.last:  # this one came in the same piece as the one that ends the connection
            return
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > settings.MOST_HEAD:
            self._refuse("header_too_large")
            return
        if self._is_ambiguous():
            self._refuse("bad_request")
            return
        self._stop_clock()
        self.in_head = False
        self._unset_keepalive_if_required()  # a request that came with the last one's end
        self.away = self._turned_away()
        if not self.away:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand it on, unless its head was refused."""
        if not self.in_head and not self.away:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """What comes next is a head again."""
        if self.away:
            self._stop_clock()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        elif not self.in_head:
            super().on_message_complete()
        self.in_head, self.head_bytes, self.tail, self.away = True, 0, b"", False

    def on_response_complete(self) -> None:
        """The refusal that ends the connection comes after the answers to the requests before it."""
        super().on_response_complete()
        if self.last:
            self._refuse(self.last)

    def _is_ambiguous(self) -> bool:
        """Whether a proxy before us could read this head otherwise (RFC 9112, 3.2 and 6.1)."""
        hosts = sum(name == b"host" for name, _ in self.headers)
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        return hosts > 1 or codings not in ([], [b"chunked"])

    def _turned_away(self) -> bool:
        """Answers at once a request that has no room; its body is then read over, for as long as bodies may take."""
        # With pipelining, answers to earlier requests come first.
        answers_wait = self.cycle is not None and not self.cycle.response_complete
        if answers_wait or self.parser.get_http_version() != "1.1" or self.url != b"/predict":
            return False
        gate: Any = self.config.app
        answer = gate.turn_away(self.parser.get_method().decode(), "/predict", self.headers)
        if answer is None:
            return False
        self.transport.write(answer)
        self.timer = self.loop.call_later(settings.BODY_SECONDS, self._too_slow)
        return True

    def _stop_clock(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _broken(self) -> None:
        """The parser has given up: in a head, in the body of a request that has begun, or of one turned away."""
        begun = not self.in_head and self.cycle is not None and self.cycle.scope is self.scope
        if self.away or (begun and self.cycle.response_complete):
            self.transport.close()
        elif begun:
            # It has a place in the queue and in the counts, so the gate answers, when the body is asked for.
            self.cycle.scope["state"]["broken"] = True
            self.cycle.keep_alive = False
            self.cycle.message_event.set()
        else:
            self._refuse("bad_request")

    def _refuse(self, code: str) -> None:
        """End the connection with a refusal, once the requests before it have their answers."""
        self.last = code
        self._stop_clock()
        if self.cycle is not None and not self.cycle.response_complete:
            return
        if not self.transport.is_closing():
            gate: Any = self.config.app
            self.transport.write(gate.turn_down(code))
            self.transport.close()
