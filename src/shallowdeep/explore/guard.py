"""Who may ask: only pages of this server itself, under a name that no other site can take."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Refuses requests of other sites, and tells the browser to load nothing from elsewhere.

    A site that points its own name at this machine (DNS rebinding) comes with that name as Host; addresses cannot be
    taken that way. Another site's script comes with its own Origin.

    Args:
        app: what is guarded.
        names: under which the server may be called, beside addresses.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]):
        self.app = app
        self.names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 403."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        why = None
        if not self._known(host):
            why = f"This server is not called '{host[:80]}'. Open the address that it printed when it started."
        elif origin is not None and _site(origin) != host.lower():
            why = "Only this server's own page may ask. Open the address that it printed when it started."

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        app = self.app if why is None else JSONResponse({"error": why}, 403)
        await app(scope, receive, send_with_headers)

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or _is_address(name)


def _site(origin: str) -> str:
    """Host and port of an origin; empty where it is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def names_of(host: str) -> frozenset[str]:
    """The names of a server that listens on a host."""
    own = {socket.gethostname()} if is_open(host) else set()
    return frozenset({"localhost", host, *own})


def is_open(host: str) -> bool:
    """Whether others than this machine reach a server that listens there.

    >>> is_open("127.0.0.1"), is_open("localhost"), is_open("0.0.0.0")
    (False, False, True)
    """
    return not (host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
