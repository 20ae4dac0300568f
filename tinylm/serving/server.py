"""The HTTP side: `/v1/completions` and `/v1/models` as OpenAI's clients expect them, `/health`, and a page at `/`.

Bodies, tokens, waiting requests and time are limited. Only JSON is accepted, and only for this host's own names, so that a page
from elsewhere, open in the same browser, cannot use the model.
"""

from __future__ import annotations

import asyncio
import html
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tinylm.errors import InputError
from tinylm.generation.engine import Sample, TokenChoice
from tinylm.model.decoder import Decoder
from tinylm.serving import api
from tinylm.serving.api import Refused, Wanted
from tinylm.serving.worker import Event, Full, Ticket, TooLate, Worker
from tinylm.tokenizer import Tokenizer

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"
_LOOK_AROUND = 0.5
"""Seconds between looks at whether a client who gets no stream is still there."""


@dataclass(frozen=True)
class Limits:
    """What one server does for its clients at most. `seconds`: from a request's arrival to its last token."""

    body_bytes: int = 1 << 20
    tokens: int = 2048
    rows: int = 16
    waiting: int = 256
    seconds: float = 120.0


def application(
    decoder: Decoder,
    tokenizer: Tokenizer,
    name: str,
    *,
    limits: Limits = Limits(),
    hosts: Sequence[str] = ("*",),
) -> Starlette:
    """The ASGI application. `name`: what the model is called; `hosts`: names by which the server may be addressed."""
    worker = Worker(decoder, tokenizer, rows=limits.rows, waiting=limits.waiting, seconds=limits.seconds)
    page = (
        resources.files("tinylm.serving").joinpath("page.html").read_text(encoding="utf-8").replace("{{MODEL}}", html.escape(name))
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    async def completions(request: Request) -> Response:
        wanted = await asyncio.to_thread(api.read, await _body(request, limits.body_bytes), tokenizer, name, limits.tokens)
        heard = _Heard(worker, wanted)
        if wanted.body.stream:
            return StreamingResponse(heard.stream(tokenizer), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return JSONResponse(api.completion(wanted, await heard.samples(request), tokenizer))

    async def models(_: Request) -> Response:
        listed = {"id": name, "object": "model", "created": 0, "owned_by": "tinylm"}
        return JSONResponse({"object": "list", "data": [listed]})

    async def health(_: Request) -> Response:
        writing, waiting = worker.load()
        return JSONResponse({"status": "ok", "writing": writing, "waiting": waiting})

    async def home(_: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    return Starlette(
        routes=[
            Route("/", home),
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={Refused: _refused, HTTPException: _http, ClientDisconnect: _gone, Exception: _fault},
        lifespan=lifespan,
    )


async def _body(request: Request, most: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "the body must be application/json")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise Refused(413, f"the body has more than {most} bytes")
    return bytes(data)


class _Heard:
    """What the worker says about one request, brought from its thread into this one."""

    def __init__(self, worker: Worker, wanted: Wanted) -> None:
        self._worker, self._wanted = worker, wanted
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listener(index: int) -> Any:
            return lambda event: loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        try:
            self._tickets: list[Ticket] = worker.submit(
                [(request, ids, listener(index)) for index, (request, ids) in enumerate(wanted.requests)]
            )
        except Full:
            raise Refused(429, "too many requests are waiting; try again soon") from None

    async def samples(self, request: Request) -> list[Sample]:
        """All of them, or whatever a client who left has no use for."""
        found: dict[int, Sample] = {}
        try:
            while len(found) < len(self._tickets):
                try:
                    index, event = await asyncio.wait_for(self._events.get(), _LOOK_AROUND)
                except asyncio.TimeoutError:
                    if await request.is_disconnected():
                        raise ClientDisconnect from None
                    continue
                if isinstance(event, Exception):
                    raise _as_refusal(event)
                if isinstance(event, Sample):
                    found[index] = event
        finally:
            self._worker.give_up(self._tickets)
        return [found[index] for index in range(len(self._tickets))]

    async def stream(self, tokenizer: Tokenizer) -> AsyncIterator[bytes]:
        """Server-sent events; a client who leaves ends this, and the tickets with it."""
        done: dict[int, Sample] = {}
        tokens: dict[int, list[TokenChoice]] = {index: [] for index in range(len(self._tickets))}
        offsets = dict.fromkeys(tokens, 0)
        try:
            while len(done) < len(self._tickets):
                index, event = await self._events.get()
                if isinstance(event, Exception):
                    yield _event(_as_refusal(event).as_dict())
                    return
                if isinstance(event, TokenChoice):
                    tokens[index].append(event)
                    continue
                text, sample = ("", event) if isinstance(event, Sample) else (event, None)
                yield _event(api.chunk(self._wanted, index, text, tokens[index], offsets[index], sample, tokenizer))
                offsets[index] += sum(len(tokenizer.decode([choice.id])) for choice in tokens[index])
                tokens[index] = []
                if sample is not None:
                    done[index] = sample
            options = self._wanted.body.stream_options
            if options is not None and options.include_usage:
                yield _event(api.last_chunk(self._wanted, list(done.values())))
            yield b"data: [DONE]\n\n"
        finally:
            self._worker.give_up(self._tickets)


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


def _as_refusal(error: Exception) -> Refused:
    if isinstance(error, TooLate):
        return Refused(503, str(error))
    if isinstance(error, InputError):
        return Refused(400, str(error))
    return Refused(500, f"a mistake in tinylm: {type(error).__name__}")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.as_dict(), error.status, headers=headers)


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(Refused(error.status_code, error.detail).as_dict(), error.status_code, headers=error.headers)


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _fault(_: Request, error: Exception) -> Response:
    return JSONResponse(Refused(500, f"a mistake in tinylm: {type(error).__name__}").as_dict(), 500)
