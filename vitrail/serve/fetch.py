"""Pictures from other machines, where the service was told which: no other host, no redirect, one resolution.

Off by default. A URL is taken apart once, by the grammar below, and what was checked is what is connected to: the
name is looked up once, every address that it has must be a public one, and the connection goes to the first of
them. An address that is itself on the list may be a private one: whoever runs the service named it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vitrail.errors import ConfigError
from vitrail.serve import settings
from vitrail.serve.refusals import Refusal

URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9.-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*)?(?P<query>\?[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*)?",
)
"""RFC 3986 with what pictures need of it: no user, no fragment, nothing beyond ASCII, nothing to decode."""

PORTS = {"http": 80, "https": 443}


class Target(NamedTuple):
    """A URL taken apart."""

    secure: bool
    host: str
    port: int
    path: str

    @property
    def place(self) -> str:
        """Host and port, as the list has them."""
        return f"{self.host}:{self.port}"


class Fetcher:
    """Fetches pictures from the hosts on a list.

    Args:
        allowed: HOST (its ports 80 and 443) or HOST:PORT each; none switches fetching off.

    Raises:
        ConfigError: an entry that is no host.
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self.allowed: set[str] = set()
        for entry in allowed:
            found = URL.fullmatch(f"http://{entry.lower()}")
            if not found or found["path"] or found["query"]:
                raise ConfigError(f"--fetch-from takes HOST or HOST:PORT; got {entry!r}.")
            ports = [int(found["port"])] if found["port"] else list(PORTS.values())
            self.allowed |= {f"{found['host']}:{port}" for port in ports}
        self.tls: ssl.SSLContext | None = None

    def target(self, url: str) -> Target:
        """A URL that may be fetched. Raises Refusal for any other."""
        found = URL.fullmatch(url) if len(url) <= settings.MOST_URL else None
        if not self.allowed or not found:
            raise Refusal("url_not_allowed")
        port = int(found["port"] or PORTS[found["scheme"]])
        path = (found["path"] or "/") + (found["query"] or "")
        target = Target(found["scheme"] == "https", found["host"], port, path)
        if target.place not in self.allowed:
            raise Refusal("url_not_allowed")
        return target

    async def fetch(self, url: str, most: int, grown: Callable[[int], None]) -> bytes:
        """The bytes behind a URL, at most so many; `grown` hears how many there are and may raise. Raises Refusal."""
        target = self.target(url)
        try:
            async with asyncio.timeout(settings.FETCH_SECONDS):
                return await self._get(target, await _address(target), most, grown)
        except (TimeoutError, OSError, ssl.SSLError, ValueError, EOFError):
            raise Refusal("not_fetched") from None

    async def _get(self, target: Target, address: str, most: int, grown: Callable[[int], None]) -> bytes:
        if target.secure and self.tls is None:
            self.tls = await asyncio.to_thread(ssl.create_default_context)
        safe: dict[str, Any] = {"ssl": self.tls, "server_hostname": target.host.strip("[]")}
        reader, writer = await asyncio.open_connection(
            address, target.port, limit=settings.MOST_HEAD, **(safe if target.secure else {})
        )
        try:
            # HTTP/1.0 has neither chunks nor connections that stay open.
            host = target.host if target.port in PORTS.values() else target.place
            writer.write(
                f"GET {target.path} HTTP/1.0\r\nHost: {host}\r\nUser-Agent: vitrail\r\n"
                "Accept: image/jpeg, image/png, image/webp\r\nAccept-Encoding: identity\r\n\r\n".encode()
            )
            declared = _checked_head(await reader.readuntil(b"\r\n\r\n"), most)
            data = bytearray()
            while piece := await reader.read(1 << 16):
                data += piece
                if len(data) > most:
                    raise Refusal("body_too_large")
                grown(len(data))
            if declared is not None and declared != len(data):
                raise EOFError
            return bytes(data)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            raise EOFError from None
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError, TimeoutError):
                writer.transport.abort()


async def _address(target: Target) -> str:
    """The one address that is connected to. Raises Refusal where the host has one that is not public."""
    with contextlib.suppress(ValueError):  # written as an address: the list has it as it stands
        return str(ipaddress.ip_address(target.host.strip("[]")))
    found = await asyncio.get_running_loop().getaddrinfo(
        target.host, target.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise Refusal("url_not_allowed")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is one of the open network, and holds no other address that is not."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # with a zone, so of a link
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = [found.ipv4_mapped, found.sixtofour, *(found.teredo or ())]
        if found in ipaddress.ip_network("64:ff9b::/96") or int(found) < 2**32:
            inner.append(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF))
        if any(one is not None and not is_public(str(one)) for one in inner):
            return False
        if found.ipv4_mapped:
            return True
    return found.is_global and not found.is_multicast and not found.is_reserved


def _checked_head(head: bytes, most: int) -> int | None:
    """The declared length of an answer's body. Raises ValueError, or Refusal, for an answer that is not taken."""
    first, *lines = head.decode("latin-1").split("\r\n")
    if not re.fullmatch(r"HTTP/1\.[01] 200(?: .*)?", first):
        raise ValueError("not 200; redirects are not followed")
    fields = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    if "transfer-encoding" in fields or fields.get("content-encoding", "identity") not in ("", "identity"):
        raise ValueError("encoded")
    length = fields.get("content-length")
    if length is None:
        return None
    if not re.fullmatch(r"[0-9]{1,15}", length):
        raise ValueError("no length")
    if int(length) > most:
        raise Refusal("body_too_large")
    return int(length)
