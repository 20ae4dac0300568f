"""Server middleware that counts responses and requires an API key."""

from __future__ import annotations

import hmac
import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinylm.serving.api import RequestError
from tinylm.serving.metrics import Metrics

_OTHER = "other"


class CountResponses:
    """Counts responses by route and status. All paths outside `routes` are counted as one route."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            route = scope["path"] if scope["path"] in self._routes else _OTHER
            self._metrics.count_response(route, status, time.perf_counter() - start)


class RequireKey:
    """Rejects requests without the API key with status 401, except requests for public paths."""

    def __init__(self, app: ASGIApp, key: str, public: frozenset[str]) -> None:
        self._app, self._expected, self._public = app, b"Bearer " + key.encode(), public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._public:
            sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(sent, self._expected):
                problem = "wrong or missing API key; send the header `Authorization: Bearer KEY`"
                response = JSONResponse(RequestError(401, problem).as_dict(), 401, {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
