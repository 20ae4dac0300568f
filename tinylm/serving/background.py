"""Run blocking functions for requests in a few daemon threads.

If a function runs past its deadline, its request fails but its thread keeps running. Unlike the threads of `asyncio.to_thread`,
daemon threads do not keep the server from exiting.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _Task:
    function: Callable[[], Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    deadline: float


class BackgroundThreads:
    """Runs functions on `threads` threads in the order of submission. Deadlines are `time.monotonic()` times."""

    def __init__(self, threads: int, name: str) -> None:
        self._tasks: deque[_Task] = deque()
        self._running = 0
        self._last_progress = time.monotonic()
        self._wakeup = threading.Condition()
        for _ in range(threads):
            threading.Thread(target=self._run_tasks, name=name, daemon=True).start()

    @property
    def pending(self) -> int:
        """Number of functions that are running or waiting."""
        with self._wakeup:
            return self._running + len(self._tasks)

    @property
    def idle_seconds(self) -> float:
        """Seconds for which no function has ended although at least one is running or waiting, or else 0."""
        with self._wakeup:
            return time.monotonic() - self._last_progress if self._running or self._tasks else 0.0

    async def run(self, function: Callable[[], T], deadline: float) -> T:
        """Run the function and return its result. Raises its error, or `asyncio.TimeoutError` after the deadline."""
        loop = asyncio.get_running_loop()
        task = _Task(function, loop.create_future(), loop, deadline)
        with self._wakeup:
            if not self._running and not self._tasks:
                self._last_progress = time.monotonic()
            self._tasks.append(task)
            self._wakeup.notify()
        result: T = await asyncio.wait_for(task.future, max(0.0, deadline - time.monotonic()))
        return result

    def _run_tasks(self) -> None:
        while True:
            with self._wakeup:
                while not self._tasks:
                    self._wakeup.wait()
                task = self._tasks.popleft()
                self._running += 1
            if not task.future.cancelled() and time.monotonic() < task.deadline:
                self._run_task(task)
            with self._wakeup:
                self._running -= 1
                self._last_progress = time.monotonic()

    def _run_task(self, task: _Task) -> None:
        try:
            result, error = task.function(), None
        except Exception as raised:
            result, error = None, raised

        def finish() -> None:
            if task.future.done():
                return
            if error is None:
                task.future.set_result(result)
            else:
                task.future.set_exception(error)

        if not task.loop.is_closed():
            task.loop.call_soon_threadsafe(finish)
