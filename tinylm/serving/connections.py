"""HTTP connections with deadlines and a limit on their number, so that slow or idle clients cannot block others."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_PROBE_SECONDS = 1.0
"""Seconds between checks whether a client that closed its side of the connection is still waiting for the response."""
_RESERVED_FILES = 48
"""Number of file descriptors that are reserved for purposes other than connections."""
_LOG_INTERVAL = 60.0


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on connections. If there are more than `maximum`, the connection that has waited longest for a request is closed.

    `headers`, `body` and `reading` are timeouts in seconds: for receiving a request's headers, for receiving its body, and for
    clients that stop reading the response.
    """

    maximum: int = 1000
    headers: float = 10.0
    body: float = 30.0
    reading: float = 30.0


@dataclass
class Connections:
    """The open connections of a server."""

    limits: ConnectionLimits
    open: int = 0
    waiting: dict[LimitedProtocol, None] = field(default_factory=dict)
    """Connections that have not sent a complete request, in the order in which they began to wait."""

    def protocol(self, *arguments: Any, **options: Any) -> LimitedProtocol:
        """Create the protocol of a new connection. Pass this method to uvicorn as `http`."""
        return LimitedProtocol(self, *arguments, **options)


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with deadlines. It also answers clients that close their side of the connection after a request."""

    def __init__(self, shared: Connections, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._shared, self._limits = shared, shared.limits
        self._receiving: asyncio.TimerHandle | None = None
        self._in_body = False
        self._stalled: asyncio.TimerHandle | None = None
        self._probe: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for the headers of the first request."""
        super().connection_made(transport)
        self._shared.open += 1
        if self._shared.open > self._limits.maximum:
            oldest = next(iter(self._shared.waiting), self)
            self._shared.waiting.pop(oldest, None)
            oldest.transport.abort()
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        super().connection_lost(exc)
        self._shared.open -= 1
        self._request_is_complete()
        for timer in (self._stalled, self._probe):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Process data. Start the deadline for the body after the headers, and cancel it after the last byte."""
        super().data_received(data)
        self._update_deadline()

    def _update_deadline(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            return
        if not self.cycle.more_body:
            self._request_is_complete()
        elif not self._in_body:
            self._in_body = True
            self._start_deadline(self._limits.body)

    def on_response_complete(self) -> None:
        """Wait for the next request. uvicorn closes the connection if none arrives within its keep-alive timeout."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_unless_read()
        else:
            self._await_request()
            self._update_deadline()  # the next request may already have been received

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        super().timeout_keep_alive_handler()
        self._abort_unless_read()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open while a response is pending, because the client may have closed only its own side."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        self._probe = self.loop.call_later(_PROBE_SECONDS, self._probe_client)
        return True

    def _probe_client(self) -> None:
        """Send an interim response, which fails if the client is gone."""
        if self.cycle.response_complete or self.transport.is_closing():
            return
        if not self.cycle.response_started and self.conn.their_http_version == b"1.1":
            self.transport.write(self.conn.send(h11.InformationalResponse(status_code=102, headers=[], reason=b"Processing")))
        self._probe = self.loop.call_later(_PROBE_SECONDS, self._probe_client)

    def pause_writing(self) -> None:
        """Start the deadline after which a connection is closed if the client does not read."""
        super().pause_writing()
        self._abort_unless_read()

    def resume_writing(self) -> None:
        """Cancel the deadline, because the client is reading again."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _await_request(self) -> None:
        self._shared.waiting[self] = None
        self._in_body = False
        self._start_deadline(self._limits.headers)

    def _request_is_complete(self) -> None:
        self._shared.waiting.pop(self, None)
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _start_deadline(self, seconds: float) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
        self._receiving = self.loop.call_later(seconds, self._timed_out)

    def _timed_out(self) -> None:
        """Close the connection, with status 408 if the client has sent part of a request."""
        if self._in_body or self.conn.trailing_data[0]:
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()
        self._abort_unless_read()

    def _abort_unless_read(self) -> None:
        """Close the connection after a while if the client has not read what was sent. asyncio would wait for it forever."""
        self._stalled = self._stalled or self.loop.call_later(self._limits.reading, self.transport.abort)


def connection_limit(wanted: int) -> int:
    """Return `wanted`, or a smaller number if the limit on open files is too low. Raises the soft limit if needed."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _RESERVED_FILES))


class RepeatFilter(logging.Filter):
    """Drops messages that were logged less than a minute ago, and errors from requests that a shutdown canceled."""

    def __init__(self) -> None:
        super().__init__()
        self._logged: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a message. Messages that differ only in their arguments are considered equal."""
        error = record.exc_info[0] if record.exc_info else None
        if error is asyncio.CancelledError:
            return False
        first_line = str(record.msg).partition("\n")[0]  # asyncio's messages continue with details that differ each time
        now, message = time.monotonic(), f"{first_line[:200]} {error}"
        if now - self._logged.get(message, -_LOG_INTERVAL) < _LOG_INTERVAL:
            return False
        if len(self._logged) >= 1000:
            self._logged.clear()
        self._logged[message] = now
        return True
