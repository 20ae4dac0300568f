"""The HTTP server for translation models: `/v1/translate`, `/v1/models`, `/health`, and a web page at `/`.

All translation runs in one thread. Request limits and access rules are the same as in the completions server.
"""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from tinylm.errors import InputError
from tinylm.serving import api
from tinylm.serving.api import RequestBody, RequestError
from tinylm.serving.background import BackgroundThreads
from tinylm.serving.connections import Connections
from tinylm.serving.middleware import RequireKey
from tinylm.serving.server import Access, Limits, exception_handlers, read_json_body
from tinylm.translation.search import SearchOptions
from tinylm.translation.translator import Translation, Translator

_MAX_BEAMS = 32
_MAX_SENTENCES = 256
_PUBLIC_PATHS = frozenset(("/", "/health"))
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"
)


class TranslateRequest(RequestBody):
    """The JSON body of `/v1/translate`."""

    model: str | None = None
    text: str | list[str]
    """One sentence, or a list of sentences."""
    beams: int = 5
    length_penalty: float = 1.0
    n: int = 1
    to: str = ""
    """The target language, if the model has several."""

    def sentences(self) -> list[str]:
        """Return the sentences as a list. Raises `RequestError` if there are too many."""
        sentences = [self.text] if isinstance(self.text, str) else self.text
        if len(sentences) > _MAX_SENTENCES:
            raise RequestError(400, f"at most {_MAX_SENTENCES} sentences are allowed", "text")
        return sentences

    def options(self) -> SearchOptions:
        """Return the search options. Raises `RequestError` if a value is out of range."""
        if self.beams > _MAX_BEAMS:
            raise RequestError(400, f"at most {_MAX_BEAMS} beams are allowed", "beams")
        options = SearchOptions(beams=self.beams, length_penalty=self.length_penalty, n_best=self.n)
        try:
            options.check()
        except InputError as error:
            raise RequestError.of(error) from None
        return options


def create_app(translator: Translator, name: str, *, limits: Limits = Limits(), access: Access = Access()) -> Starlette:
    """Return the ASGI application. `name` is the model's name in the API."""
    return _Service(translator, name, limits).app(access)


class _Service:
    def __init__(self, translator: Translator, name: str, limits: Limits) -> None:
        self._translator, self._name, self._limits = translator, name, limits
        self._worker = BackgroundThreads(1, "tinylm-translate")
        self._connections = Connections(limits.connections)

    def app(self, access: Access) -> Starlette:
        middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(access.hosts))]
        if access.api_key is not None:
            middleware.append(Middleware(RequireKey, key=access.api_key, public=_PUBLIC_PATHS))
        routes = [
            Route("/", self.home),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/translate", self.translate, methods=["POST"]),
        ]
        app = Starlette(routes=routes, middleware=middleware, exception_handlers=exception_handlers(), lifespan=self._lifespan)
        app.state.connections = self._connections
        return app

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield

    async def translate(self, request: Request) -> Response:
        """Translate the sentences in a request."""
        deadline = time.monotonic() + self._limits.timeout
        body = await read_json_body(request, self._limits.max_body_bytes)
        parsed = api.parse_body(body, TranslateRequest, self._name)
        sentences, options = parsed.sentences(), parsed.options()
        if self._worker.pending > self._limits.queue_size:
            raise RequestError(429, "too many requests are waiting")
        try:
            found = await self._worker.run(lambda: self._translator.translate(sentences, options, language=parsed.to), deadline)
        except asyncio.TimeoutError:
            raise RequestError(503, "timed out") from None
        except InputError as error:
            raise RequestError.of(error) from None
        return JSONResponse({"object": "translations", "model": self._name, "data": [_document(each) for each in found]})

    async def models(self, _: Request) -> Response:
        document = {"id": self._name, "object": "model", "owned_by": "tinylm", "created": 0}
        return JSONResponse({"object": "list", "data": [document]})

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": self._worker.pending})

    async def home(self, _: Request) -> Response:
        page = resources.files("tinylm.serving").joinpath("translate.html").read_text(encoding="utf-8")
        headers = {"Content-Security-Policy": _CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff"}
        options = "".join(f"<option>{html.escape(language)}</option>" for language in self._translator.framing.languages)
        languages = f'<label>Target language <select id="to">{options}</select></label>\n  ' if options else ""
        page = page.replace("{{languages}}", languages).replace("{{model}}", html.escape(self._name))
        return HTMLResponse(page, headers=headers)


def _document(translation: Translation) -> dict[str, Any]:
    document: dict[str, Any] = {"source": translation.source, "translations": [asdict(each) for each in translation.translations]}
    return document if translation.note is None else {**document, "note": translation.note}
