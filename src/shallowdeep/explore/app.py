"""The server's few addresses: the page, test images to pick, and one image through the network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import anyio
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from jaxtyping import UInt8
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from shallowdeep.errors import DataError, ShallowDeepError
from shallowdeep.explore.evolution import Event, as_json, evolve
from shallowdeep.explore.guard import Guard, names_of
from shallowdeep.explore.page import render, style
from shallowdeep.explore.setting import Setting
from shallowdeep.explore.uploads import Refused, read_upload, too_large
from shallowdeep.report.missing import Missing

SCRIPT = Path(__file__).parent / "templates" / "page.js"
MOST_SHOWN = 60
DRAINED = 2**28
"""Bytes of a refused upload that are read and thrown away: whoever is still sending hears no answer."""


@dataclass(frozen=True)
class Desk:
    """What answers requests; one image at a time, for there is one network.

    Attributes:
        setting: what the page is about.
        max_upload_mb: largest upload, in MB of 1,000,000 bytes.
        turn: whose turn it is.
    """

    setting: Setting
    max_upload_mb: float
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def read(self, request: Request) -> bytes:
        """The body, which is never held beyond the limit.

        Raises:
            Refused: it is longer.
        """
        parts, size, most = [], 0, int(1e6 * self.max_upload_mb)
        async for part in request.stream():
            size += len(part)
            if size <= most:
                parts.append(part)
                continue
            parts.clear()
            if size > most + DRAINED:
                break
        if size > most:
            raise too_large(self.max_upload_mb)
        return b"".join(parts)

    def open_upload(self, content: bytes) -> tuple[UInt8[Tensor, "c h w"], str]:
        """An upload as the network sees it, and what it was."""
        image, (_, height, width) = read_upload(content), self.setting.preparation.shape
        pixels = self.setting.preparation.pixels(image)
        was = f"your image, {image.width} × {image.height} pixels"
        same = (image.width, image.height) == (width, height)
        return pixels, was if same else f"{was}, as the network sees it: {width} × {height}"

    def open_sample(self, id: int) -> tuple[UInt8[Tensor, "c h w"], str, int]:
        """A test image, what it is, and its true class."""
        shelf = self.setting.shelf
        if isinstance(shelf, Missing):
            raise DataError(f"There are no test images to pick. {shelf.reason}")
        return shelf.pixels(id), f"test image {id}", shelf.label(id)

    async def lines(self, events: Iterator[Event]) -> AsyncIterator[bytes]:
        """Events as lines of JSON, each as soon as it is there; the last one says that nothing is missing."""
        told: asyncio.Queue[bytes | None] = asyncio.Queue()
        wanted = anyio.CancelScope()
        work = asyncio.create_task(self._work(events, told.put_nowait, wanted))
        try:
            while (line := await told.get()) is not None:
                yield line
        finally:
            wanted.cancel()  # nobody reads on: the network stops at its next exit
            with anyio.CancelScope(shield=True):
                await work

    async def _work(
        self, events: Iterator[Event], tell: Callable[[bytes | None], None], wanted: anyio.CancelScope
    ) -> None:
        """Work events off in one's turn, however slowly they are read; then tell that there are no more."""
        try:
            with wanted:
                async with self.turn:
                    try:
                        async for event in iterate_in_threadpool(events):
                            tell(_line(as_json(event)))
                        tell(_line({"event": "done"}))
                    except ShallowDeepError as error:
                        tell(_line({"event": "failed", "error": str(error)}))
                    finally:
                        with anyio.CancelScope(shield=True):
                            await run_in_threadpool(events.close)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            tell(None)


def make_app(setting: Setting, *, max_upload_mb: float = 10.0, host: str = "127.0.0.1") -> FastAPI:
    """The page about a run, as an ASGI application.

    Args:
        setting: what it is about, of ``open_setting``.
        max_upload_mb: largest upload, in MB.
        host: that it is served on; requests under other names are refused, addresses are not.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # those pages load scripts from elsewhere
    app.add_middleware(Guard, names=names_of(host))
    desk = Desk(setting, max_upload_mb)
    page, css = render(setting, too_large=str(too_large(max_upload_mb)), max_upload_mb=max_upload_mb), style()

    @app.get("/", response_class=HTMLResponse)
    def _page() -> str:
        return page

    @app.get("/page.css")
    def _style() -> Response:
        return Response(css, media_type="text/css")

    @app.get("/page.js")
    def _script() -> Response:
        return Response(SCRIPT.read_text(encoding="utf-8"), media_type="text/javascript")

    @app.get("/samples")
    def _samples(
        group: str = "all",
        start: Annotated[int, Query(ge=0)] = 0,
        count: Annotated[int, Query(ge=1, le=MOST_SHOWN)] = 24,
    ) -> dict[str, Any]:
        if isinstance(setting.shelf, Missing):
            raise DataError(setting.shelf.reason)
        return setting.shelf.show(group, start, count)

    @app.post("/evolve")
    async def _evolve(request: Request, sample: int | None = None) -> Response:
        if sample is not None:
            pixels, words, label = await run_in_threadpool(desk.open_sample, sample)
        else:
            try:
                content, label = await desk.read(request), None
            except ClientDisconnect:  # another image was chosen before this one was sent
                return Response(status_code=400)
            async with desk.turn:  # one large image in memory, not many
                pixels, words = await run_in_threadpool(desk.open_upload, content)
        events = evolve(setting, pixels, words, label)
        return StreamingResponse(desk.lines(events), media_type="application/x-ndjson")

    app.add_exception_handler(ShallowDeepError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(Exception, _stumble)
    return app


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """One sentence, whatever was wrong."""
    if isinstance(error, RequestValidationError):
        problem = error.errors()[0]
        return JSONResponse({"error": f"{problem['loc'][-1]}: {problem['msg'].lower()}."}, 422)
    if isinstance(error, HTTPException):
        return JSONResponse({"error": f"{error.detail}."}, error.status_code)
    return JSONResponse({"error": str(error)}, error.status if isinstance(error, Refused) else 422)


async def _stumble(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": "The server stumbled over this; its terminal says where."}, 500)


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, allow_nan=False, separators=(",", ":")).encode() + b"\n"
