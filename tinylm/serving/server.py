"""The HTTP server: `/v1/completions` and `/v1/models` for OpenAI clients, and a web page at `/`.

`/tokenize`, `/detokenize` and `/tokenizer_info` follow vLLM, `/metrics` is for Prometheus, and `/health` reports whether requests
make progress. Limits apply to body size, tokens, queue length, connections and time. The server accepts only JSON bodies and its
own host names, which prevents other websites in the user's browser from using the model.
"""

from __future__ import annotations

import asyncio
import html
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tinylm.errors import InputError
from tinylm.model.state import DecodingModel
from tinylm.serving import api, responses
from tinylm.serving.api import ParsedRequest, RequestError, ServedModel
from tinylm.serving.background import BackgroundThreads
from tinylm.serving.chat_api import parse_chat_request
from tinylm.serving.completions import RunningCompletion, as_request_error
from tinylm.serving.connections import ConnectionLimits, Connections
from tinylm.serving.constraints import ConstraintCompiler
from tinylm.serving.metrics import CONTENT_TYPE, Metrics
from tinylm.serving.middleware import CountResponses, RequireKey
from tinylm.serving.worker import QueueFull, Worker
from tinylm.tokenizer import Tokenizer
from tinylm.tokenizer.chat_template import ChatEncoder

_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"
)
_PARSING_THREADS = 2
_STALLED_SECONDS = 30.0
"""`/health` reports a server as stalled if there was work but no progress for this many seconds."""
_PUBLIC_PATHS = frozenset(("/", "/health"))
_DEFAULT_EXAMPLES = ("The", "Once upon a time")
_DEFAULT_MESSAGES = ("Hello!", "What can you do?")
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Server limits. `timeout` is the time in seconds from a request's arrival to its last token."""

    max_body_bytes: int = 1 << 20
    max_tokens: int = 2048
    rows: int = 16
    """Maximum number of samples generated at the same time."""
    queue_size: int = 256
    """Maximum number of samples waiting to be generated."""
    timeout: float = 120.0
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)


@dataclass(frozen=True)
class Access:
    """Access control: the accepted values of the `Host` header, and the API key that requests must send, if any."""

    hosts: Sequence[str] = ("*",)
    api_key: str | None = None


def create_app(
    decoder: DecodingModel[Any],
    tokenizer: Tokenizer,
    name: str,
    *,
    limits: Limits = Limits(),
    access: Access = Access(),
    examples: Sequence[str] = (),
    chat: ChatEncoder | None = None,
) -> Starlette:
    """Return the ASGI application. `name`: the model's name in the API. `examples`: prompts that the web page offers.

    `chat` encodes conversations, if the model was trained on them. To enforce the connection limits, pass
    `app.state.connections.protocol` to uvicorn as `http`.
    """
    return _Service(ServedModel(name, tokenizer, decoder.capacity, chat), decoder, limits, examples).app(access)


class _Service:
    """The state of a server and the functions that answer its routes."""

    def __init__(self, served: ServedModel, decoder: DecodingModel[Any], limits: Limits, examples: Sequence[str]) -> None:
        self._served, self._limits, tokenizer = served, limits, served.tokenizer
        self._worker = Worker(decoder, tokenizer, rows=limits.rows, queue_size=limits.queue_size)
        self._constraints = ConstraintCompiler(tokenizer)
        self._parsing = BackgroundThreads(_PARSING_THREADS, "tinylm-parsing")
        self._connections = Connections(limits.connections)
        self._metrics = Metrics(self._worker.load, lambda: self._connections.open)
        self._page = _page(served, examples)

    def app(self, access: Access) -> Starlette:
        """Build the application with its routes and middleware."""
        routes = [
            Route("/", self.home),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"] if self._served.chat is not None else ["GET", "POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
        ]
        middleware = [
            Middleware(TrustedHostMiddleware, allowed_hosts=list(access.hosts)),
            Middleware(CountResponses, metrics=self._metrics, routes=frozenset(route.path for route in routes)),
        ]
        if access.api_key is not None:
            middleware.append(Middleware(RequireKey, key=access.api_key, public=_PUBLIC_PATHS))
        app = Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers=exception_handlers(),
            lifespan=self._lifespan,
        )
        app.state.connections = self._connections
        return app

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self._worker.close()

    async def completions(self, request: Request) -> Response:
        """Generate text."""
        deadline = time.monotonic() + self._limits.timeout
        body = await self._read_body(request)
        parsed = await self._parse(partial(api.parse_request, body, self._served, self._limits.max_tokens), deadline)
        if parsed.body.regex is not None or parsed.body.choice is not None:
            try:
                constraint = await self._constraints.compile(parsed.body.regex, parsed.body.choice, deadline)
            except (InputError, QueueFull) as error:
                raise as_request_error(error) from None
            parsed = parsed.constrained(constraint)
        return await self._respond(request, parsed, deadline)

    async def _respond(self, request: Request, parsed: ParsedRequest, deadline: float) -> Response:
        """Generate the samples of a request, and stream or return them."""
        tokenizer = self._served.tokenizer
        completion = RunningCompletion(self._worker, parsed, deadline)
        self._metrics.count_prompt(parsed.prompt_tokens)
        if parsed.body.stream:
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(completion.stream(tokenizer), media_type="text/event-stream", headers=headers)
        build = responses.chat_completion if parsed.chat else responses.completion
        return JSONResponse(build(parsed, await completion.samples(request), tokenizer))

    async def chat(self, request: Request) -> Response:
        """Answer the last message of a conversation. Rejects the request if the model was not trained on conversations."""
        if self._served.chat is None:
            raise RequestError(404, api.NO_CHAT)
        deadline = time.monotonic() + self._limits.timeout
        body = await self._read_body(request)
        parsed = await self._parse(partial(parse_chat_request, body, self._served, self._limits.max_tokens), deadline)
        return await self._respond(request, parsed, deadline)

    async def models(self, _: Request) -> Response:
        """List the served model."""
        return JSONResponse({"object": "list", "data": [self._model_document()]})

    async def model(self, request: Request) -> Response:
        """Describe the served model."""
        id = request.path_params["id"]
        if id != self._served.name:
            raise RequestError(404, f"unknown model {id[:100]!r}; this server serves {self._served.name!r}", "model")
        return JSONResponse(self._model_document())

    def _model_document(self) -> dict[str, Any]:
        return {"id": self._served.name, "object": "model", "created": 0, "owned_by": "tinylm"}

    async def tokenize(self, request: Request) -> Response:
        """Encode a text."""
        deadline, body = time.monotonic() + self._limits.timeout, await self._read_body(request)

        def ids() -> list[int]:
            return api.parse_body(body, api.TokenizeRequest, self._served.name).ids(self._served.tokenizer)

        tokens = await self._parse(ids, deadline)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self._served.capacity})

    async def detokenize(self, request: Request) -> Response:
        """Decode token ids."""
        deadline, body = time.monotonic() + self._limits.timeout, await self._read_body(request)

        def text() -> str:
            parsed = api.parse_body(body, api.DetokenizeRequest, self._served.name)
            return api.decode(parsed.tokens, self._served.tokenizer, "tokens")

        return JSONResponse({"prompt": await self._parse(text, deadline)})

    async def tokenizer_info(self, _: Request) -> Response:
        """Describe the tokenizer."""
        tokenizer = self._served.tokenizer
        names = {"eos_token": api.end_of_text_name(tokenizer), "bos_token": None, "pad_token": None}
        template = None if self._served.chat is None else self._served.chat.jinja()
        info = {"tokenizer_class": tokenizer.kind, "vocab_size": tokenizer.vocab_size, **names, "chat_template": template}
        return JSONResponse(info)

    async def health(self, _: Request) -> Response:
        """Report whether completions make progress."""
        load = self._worker.load()
        idle_seconds = max(load.idle_seconds, self._parsing.idle_seconds)
        status = "stopped" if load.stopped else "stalled" if idle_seconds > _STALLED_SECONDS else "ok"
        document = {
            "status": status,
            "generating": load.generating,
            "waiting": load.waiting,
            "parsing": self._parsing.pending,
            "compiling": self._constraints.pending,
            "generated_tokens": load.generated_tokens,
            "seconds_without_progress": round(idle_seconds, 3),
        }
        return JSONResponse(document, 200 if status == "ok" else 503)

    async def metrics(self, _: Request) -> Response:
        """Return the metrics for Prometheus."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def home(self, _: Request) -> Response:
        """Return the web page."""
        return HTMLResponse(self._page, headers={"Content-Security-Policy": _CONTENT_SECURITY_POLICY})

    async def _parse(self, function: Callable[[], T], deadline: float) -> T:
        try:
            return await self._parsing.run(function, deadline)
        except asyncio.TimeoutError:
            raise RequestError(503, "timed out before the request was read") from None

    async def _read_body(self, request: Request) -> bytes:
        return await read_json_body(request, self._limits.max_body_bytes)


async def read_json_body(request: Request, max_bytes: int) -> bytes:
    """Read a request's body. Raises `RequestError` if the content type is not JSON or the body is too long."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RequestError(415, "the content type must be application/json")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > max_bytes:
            raise RequestError(413, f"the body must not exceed {max_bytes} bytes")
    return bytes(data)


def exception_handlers() -> dict[Any, Any]:
    """Return the functions that convert exceptions to error responses, by exception class."""
    return {
        RequestError: _on_request_error,
        HTTPException: _on_http_exception,
        ClientDisconnect: _on_client_disconnect,
        Exception: _on_internal_error,
    }


def _page(served: ServedModel, examples: Sequence[str]) -> str:
    """Return the web page for chat or for text completion. Empty, long and repeated examples are omitted."""
    file, name = "page.html" if served.chat is None else "chat_page.html", served.name
    page = resources.files("tinylm.serving").joinpath(file).read_text(encoding="utf-8")
    defaults = _DEFAULT_EXAMPLES if served.chat is None else _DEFAULT_MESSAGES
    offered = [text for text in dict.fromkeys(examples) if text.strip() and len(text) <= 200] or defaults
    encoded = html.escape(json.dumps(offered), quote=True)
    return page.replace("{{EXAMPLES}}", encoded).replace("{{MODEL}}", html.escape(name))


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
