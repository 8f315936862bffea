"""Serve the page about a run, on this machine alone unless told otherwise."""

from __future__ import annotations

import errno
import socket
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress

from shallowdeep.errors import ConfigError, require
from shallowdeep.runs.run import Run

MOST_AT_ONCE = 32
"""Connections; each may hold one upload in memory."""


def serve(
    run: Run,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_upload_mb: float = 10.0,
    open_browser: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Serve the page about a run until Ctrl-C.

    Args:
        run: trained; recorded, for all that the page can show.
        host: to listen on; ``"0.0.0.0"``: everywhere, so that others may reach it.
        port: 0: any free one.
        max_upload_mb: largest upload, in MB.
        open_browser: open the page there.
        say: told the address, what cannot be shown, and a warning where others can reach the page.

    Raises:
        ConfigError: the address cannot be listened on, the limit is not above 0, or the run is about text.
        FileFormatError: the run has no network, or it is damaged.
        DataError: nothing says how images are prepared.
        MissingExtra: a library is not installed.
    """
    uvicorn = require("uvicorn", extra="explore")
    for module in ("fastapi", "jinja2", "PIL.Image"):
        require(module, extra="explore")
    from shallowdeep.explore.app import make_app
    from shallowdeep.explore.guard import is_open
    from shallowdeep.explore.setting import open_setting

    if not 0 < max_upload_mb <= 1000:
        raise ConfigError(f"the largest upload is {max_upload_mb:g} MB. Give more than 0, and 1000 at most.")
    with listen(host, port) as door:
        setting = open_setting(run)
        app = make_app(setting, max_upload_mb=max_upload_mb, host=host)
        for note in setting.notes:
            say(f"not shown: {note}")
        if is_open(host):
            say(f"warning: anyone who reaches this machine can use the page, for it listens on {host}.")
        address = address_of(door)
        say(f"{run.folder} is at {address} (Ctrl-C ends it)")
        config = uvicorn.Config(
            app,
            log_level="warning",
            ws="none",
            limit_concurrency=MOST_AT_ONCE,
            timeout_graceful_shutdown=2,
            server_header=False,
        )
        if open_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()  # some wait for an answer
        with suppress(KeyboardInterrupt):  # asyncio does not always raise it again
            uvicorn.Server(config).run(sockets=[door])
        say("ended")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the port is taken or not allowed, or there is no such host here.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"no port {port}: ports are 0 (any free one) to 65535.")
    if not host:
        raise ConfigError("no host to listen on. Take --host 127.0.0.1, or 0.0.0.0 for everybody.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.getaddrinfo(host, port, family)  # refuses names that no host can have before a socket is there
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is in use. Choose another: --port 0") from None
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {host}, port {port} ({why}). Choose others: --host 127.0.0.1 --port 0"
        ) from None


def address_of(door: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = door.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(host), str(host))
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
