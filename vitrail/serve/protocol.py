"""uvicorn's HTTP protocol with bounds on what comes before a request is one: its head's size and time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vitrail.serve import settings
from vitrail.serve.refusals import Refusal


class GuardedProtocol(HttpToolsProtocol):
    """One connection. A head that is too large is answered 431, one that does not end in time is hung up on."""

    head_bytes = 0
    in_head = True
    tail = b""
    away = False
    """Whether the request was answered by its head alone; the body is not kept."""
    timer: asyncio.TimerHandle | None = None

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
        if self.in_head:
            if self.timer is None:
                self.timer = self.loop.call_later(settings.HEAD_SECONDS, self._too_slow)
            self.head_bytes += len(data)
            ended = b"\r\n\r\n" in self.tail + data
            self.tail = data[-3:]
            if self.head_bytes > settings.MOST_HEAD and not ended:
                self._refuse()
                return
        super().data_received(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Refuse a head with too many lines."""
        super().on_header(name, value)
        if len(self.headers) > settings.MOST_HEADERS:
            self._refuse()

    def on_headers_complete(self) -> None:
        """The head is whole: the body's own bounds follow."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > settings.MOST_HEAD or len(self.headers) > settings.MOST_HEADERS:
            self._refuse()
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

    def _refuse(self) -> None:
        if self.transport.is_closing():
            return
        refusal = Refusal("header_too_large")
        body = json.dumps(refusal.body()).encode()
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        self.transport.close()
