"""Treat the first Ctrl-C or SIGTERM as a request to stop after the current step. The second one exits immediately.

Under torchrun, only the first one counts. torchrun passes signals on to its processes, which may have received them already, for
example from Slurm. It also kills processes that do not end in time.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopRequest:
    """A context manager that handles SIGINT and SIGTERM, and restores the previous handlers on exit.

    `signal_number` is None until the first signal arrives. The signal handler sets it and calls `on_request`. Outside the main
    thread, the context manager does nothing, because Python does not allow signal handlers there.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self._on_request = on_request
        self.signal_number: int | None = None
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                return
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.signal_number = number
        self._on_request()
