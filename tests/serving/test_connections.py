"""The log filter and the limit on connections, which depends on the limit on open files."""

from __future__ import annotations

import asyncio
import logging
import resource

import pytest

connections = pytest.importorskip("tinylm.serving.connections")


def _record(message: str, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    exc_info = None if error is None else (type(error), error, None)
    return logging.LogRecord("asyncio", logging.ERROR, __file__, 1, message, arguments, exc_info)


def test_a_repeated_message_is_logged_once() -> None:
    repeats = connections.RepeatFilter()
    assert [repeats.filter(_record("accept failed: %s", number)) for number in range(1000)] == [True] + [False] * 999
    assert [repeats.filter(_record(f"failed\nhandle: {number}")) for number in range(3)] == [True, False, False]
    assert repeats.filter(_record("another message"))
    assert repeats.filter(_record("accept failed: %s", 1, error=OSError())), "the same message with an error is new"


def test_errors_of_canceled_requests_are_not_logged() -> None:
    assert not connections.RepeatFilter().filter(_record("exception", error=asyncio.CancelledError()))


def test_the_number_of_connections_leaves_file_descriptors_for_everything_else() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        assert connections.connection_limit(100) == 100
        assert connections.connection_limit(300) == 300, "the soft limit is increased"
        assert 300 < resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
