"""The HTTP server: `/v1/completions` and `/v1/models` for OpenAI clients, `/health`, and a web page at `/`.

Limits apply to body size, tokens, queue length and time. The server accepts only JSON bodies and its own host names, which prevents
other websites in the user's browser from using the model.
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
from tinylm.model.state import DecodingModel
from tinylm.serving import api
from tinylm.serving.api import ParsedRequest, RequestError
from tinylm.serving.worker import Event, Job, QueueFull, Unavailable, Worker
from tinylm.tokenizer import Tokenizer

_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"
)
_DISCONNECT_POLL_SECONDS = 0.5
"""Time between checks whether the client of a non-streaming request has disconnected."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server. `timeout` (seconds) counts from a request's arrival to its last token."""

    max_body_bytes: int = 1 << 20
    max_tokens: int = 2048
    rows: int = 16
    """Samples generated at the same time."""
    queue_size: int = 256
    """Samples that may wait for a free row."""
    timeout: float = 120.0


def create_app(
    decoder: DecodingModel[Any],
    tokenizer: Tokenizer,
    name: str,
    *,
    limits: Limits = Limits(),
    hosts: Sequence[str] = ("*",),
) -> Starlette:
    """Return the ASGI application. `name`: the model's name in the API; `hosts`: accepted values of the `Host` header."""
    worker = Worker(decoder, tokenizer, rows=limits.rows, queue_size=limits.queue_size, timeout=limits.timeout)
    page = (
        resources.files("tinylm.serving").joinpath("page.html").read_text(encoding="utf-8").replace("{{MODEL}}", html.escape(name))
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    async def completions(request: Request) -> Response:
        body = await _read_body(request, limits.max_body_bytes)
        parsed = await asyncio.to_thread(api.parse_request, body, tokenizer, name, limits.max_tokens)
        completion = _RunningCompletion(worker, parsed)
        if parsed.body.stream:
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(completion.stream(tokenizer), media_type="text/event-stream", headers=headers)
        return JSONResponse(api.completion(parsed, await completion.samples(request), tokenizer))

    async def models(_: Request) -> Response:
        model = {"id": name, "object": "model", "created": 0, "owned_by": "tinylm"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(_: Request) -> Response:
        running, queued = worker.load()
        return JSONResponse({"status": "ok", "writing": running, "waiting": queued})

    async def home(_: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _CONTENT_SECURITY_POLICY})

    return Starlette(
        routes=[
            Route("/", home),
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={
            RequestError: _on_request_error,
            HTTPException: _on_http_exception,
            ClientDisconnect: _on_client_disconnect,
            Exception: _on_internal_error,
        },
        lifespan=lifespan,
    )


async def _read_body(request: Request, max_bytes: int) -> bytes:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RequestError(415, "the content type must be application/json")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > max_bytes:
            raise RequestError(413, f"the body must not exceed {max_bytes} bytes")
    return bytes(data)


class _RunningCompletion:
    """The jobs of one request, and their events, which are passed from the worker's thread to the event loop."""

    def __init__(self, worker: Worker, parsed: ParsedRequest) -> None:
        self._worker, self._parsed = worker, parsed
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listener(index: int) -> Any:
            return lambda event: loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        try:
            self._jobs: list[Job] = worker.submit(
                [(request, ids, listener(index)) for index, (request, ids) in enumerate(parsed.requests)]
            )
        except QueueFull:
            raise RequestError(429, "too many requests are waiting; try again later") from None
        except Unavailable as error:
            raise _to_request_error(error) from None

    async def samples(self, request: Request) -> list[Sample]:
        """Wait for all samples. Raises `ClientDisconnect` if the client disconnects first."""
        samples: dict[int, Sample] = {}
        try:
            while len(samples) < len(self._jobs):
                try:
                    index, event = await asyncio.wait_for(self._events.get(), _DISCONNECT_POLL_SECONDS)
                except asyncio.TimeoutError:
                    if await request.is_disconnected():
                        raise ClientDisconnect from None
                    continue
                if isinstance(event, Exception):
                    raise _to_request_error(event)
                if isinstance(event, Sample):
                    samples[index] = event
        finally:
            self._worker.cancel(self._jobs)
        return [samples[index] for index in range(len(self._jobs))]

    async def stream(self, tokenizer: Tokenizer) -> AsyncIterator[bytes]:
        """Yield server-sent events. If the client disconnects, the generator is closed and the jobs are canceled."""
        finished: dict[int, Sample] = {}
        tokens: dict[int, list[TokenChoice]] = {index: [] for index in range(len(self._jobs))}
        offsets = dict.fromkeys(tokens, 0)
        try:
            while len(finished) < len(self._jobs):
                index, event = await self._events.get()
                if isinstance(event, Exception):
                    yield _server_sent_event(_to_request_error(event).as_dict())
                    return
                if isinstance(event, TokenChoice):
                    tokens[index].append(event)
                    continue
                text, sample = ("", event) if isinstance(event, Sample) else (event, None)
                chunk = api.completion_chunk(self._parsed, index, text, tokens[index], offsets[index], sample, tokenizer)
                yield _server_sent_event(chunk)
                offsets[index] += sum(len(tokenizer.decode([choice.id])) for choice in tokens[index])
                tokens[index] = []
                if sample is not None:
                    finished[index] = sample
            options = self._parsed.body.stream_options
            if options is not None and options.include_usage:
                yield _server_sent_event(api.usage_chunk(self._parsed, list(finished.values())))
            yield b"data: [DONE]\n\n"
        finally:
            self._worker.cancel(self._jobs)


def _server_sent_event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


def _to_request_error(error: Exception) -> RequestError:
    if isinstance(error, Unavailable):
        return RequestError(503, str(error))
    if isinstance(error, InputError):
        return RequestError(400, str(error))
    return RequestError(500, f"internal error: {type(error).__name__}")


async def _on_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.as_dict(), error.status, headers=headers)


async def _on_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(RequestError(error.status_code, error.detail).as_dict(), error.status_code, headers=error.headers)


async def _on_client_disconnect(_: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _on_internal_error(_: Request, error: Exception) -> Response:
    return JSONResponse(RequestError(500, f"internal error: {type(error).__name__}").as_dict(), 500)
