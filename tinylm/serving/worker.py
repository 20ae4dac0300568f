"""Run the generation engine for all requests in one thread.

Jobs wait in a queue, start when rows of the engine become free, and send events while they run. A job that is canceled or times out
frees its row after the current token. Every job sends a last event, unless it is canceled first.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tinylm.generation.engine import Engine, Request, Sample, SequenceState
from tinylm.generation.token_choice import TokenChoice
from tinylm.model.state import DecodingModel
from tinylm.tokenizer import Tokenizer

Event = TokenChoice | str | Sample | Exception
"""A token (if logprobs were requested), a piece of final text, or the last event of a job, which is its sample or an error."""
Listener = Callable[[Event], None]
"""Receives the events of a job in the worker's thread. It must not raise."""
_STOPPED = "the server has stopped generating"
_CLOSE_SECONDS = 3.0
"""Seconds that `close` waits for the current token."""


class QueueFull(Exception):
    """Too many jobs are waiting."""


class Unavailable(Exception):
    """A job cannot run, because it timed out in the queue or the worker has stopped."""


@dataclass(eq=False)
class Job:
    """A queued or running request for one sample."""

    request: Request
    ids: Sequence[int]
    listener: Listener
    deadline: float
    canceled: bool = False
    sequence: SequenceState | None = field(default=None, repr=False)
    """The sequence in the engine, once the job has started."""


@dataclass(frozen=True)
class Load:
    """The load of a worker. `idle_seconds` is the time without progress while jobs are unfinished, and 0 if there are none."""

    generating: int
    waiting: int
    generated_tokens: int
    idle_seconds: float
    stopped: bool


class Worker:
    """Generates up to `rows` samples at once and queues up to `queue_size` more.

    A running job that passes its deadline returns the text generated so far.
    """

    def __init__(self, decoder: DecodingModel[Any], tokenizer: Tokenizer, *, rows: int, queue_size: int) -> None:
        self._engine = Engine(decoder, tokenizer, rows)
        self.capacity = rows + queue_size
        """Maximum number of unfinished jobs."""
        self._last_progress = time.monotonic()
        self._generated_tokens = 0
        # A job stays in `_queue` or `_running` until its last event has been sent, so that `_run` can report any error to it.
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._wakeup = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tinylm-worker", daemon=True)
        self._thread.start()

    def submit(
        self, requests: Sequence[tuple[Request, Sequence[int], Listener]], deadline: float, *, stream: bool = False
    ) -> list[Job]:
        """Queue all requests, or none if they do not fit. `deadline` is a `time.monotonic()` timestamp.

        Without `stream`, a job sends only its last event.

        Raises `QueueFull`, or `Unavailable` if the worker has stopped.
        """
        jobs = [
            Job(replace(request, on_text=listener, on_token=listener) if stream else request, ids, listener, deadline)
            for request, ids, listener in requests
        ]
        with self._wakeup:
            if self._closed:
                raise Unavailable(_STOPPED)
            if len(self._queue) + len(self._running) + len(jobs) > self.capacity:
                raise QueueFull
            self._queue.extend(jobs)
            self._wakeup.notify()
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Stop these jobs without sending a last event. Finished jobs are not affected."""
        with self._wakeup:
            for job in jobs:
                job.canceled = True
            self._wakeup.notify()

    def load(self) -> Load:
        """Return the current load."""
        with self._wakeup:
            generating, waiting = len(self._running), len(self._queue)
            idle_seconds = time.monotonic() - self._last_progress if generating or waiting else 0.0
            return Load(generating, waiting, self._generated_tokens, idle_seconds, self._closed)

    def close(self) -> None:
        """Stop after the current token. Unfinished jobs receive an `Unavailable` error.

        If the token takes longer than a few seconds, the thread keeps running until the process exits.
        """
        with self._wakeup:
            self._closed = True
            self._wakeup.notify()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            while self._wait_for_jobs():
                try:
                    self._remove_canceled_and_expired()
                    self._start_queued()
                    self._engine.step()
                    self._count_progress()
                    self._report_finished()
                except Exception as error:  # otherwise, a bug would leave all clients waiting forever
                    failed, self._running = self._running, []
                    for job in failed:
                        job.listener(error)
                    for job in failed:
                        self._evict(job)
        finally:  # also when the engine fails permanently, for example after a CUDA error
            with self._wakeup:
                self._closed = True
            for job in (*self._running, *self._queue):
                job.listener(Unavailable(_STOPPED))

    def _wait_for_jobs(self) -> bool:
        """Wait until there is a job. Return False if the worker is closed."""
        with self._wakeup:
            while not (self._closed or self._queue or self._running):
                self._wakeup.wait()
                self._last_progress = time.monotonic()
            return not self._closed

    def _count_progress(self) -> None:
        with self._wakeup:
            self._last_progress = time.monotonic()
            self._generated_tokens += sum(job.sequence is not None for job in self._running)

    def _remove_canceled_and_expired(self) -> None:
        """Free the rows of canceled and expired jobs. An expired job returns its text so far, or an error if it is still queued."""
        now = time.monotonic()
        for job in [job for job in self._running if job.canceled or now > job.deadline]:
            self._evict(job)
            if job.sequence is not None and not job.canceled:
                job.sequence.finish_early()
                job.listener(job.sequence.sample)
            with self._wakeup:
                self._running.remove(job)
        with self._wakeup:
            for job in self._queue:
                if now > job.deadline and not job.canceled:
                    job.listener(Unavailable("timed out in the queue"))
            self._queue = deque(job for job in self._queue if not job.canceled and now <= job.deadline)

    def _start_queued(self) -> None:
        """Fill free rows from the queue. Adjacent jobs with the same prompt share one prefill."""
        while self._engine.free_rows:
            with self._wakeup:
                batch: list[Job] = []
                while self._queue and len(batch) < self._engine.free_rows and (not batch or self._queue[0].ids == batch[0].ids):
                    batch.append(self._queue.popleft())
                self._running += batch
            if not batch:
                return
            try:
                sequences = self._engine.add([job.request for job in batch], batch[0].ids)
            except Exception as error:  # an error during the prefill of one prompt does not affect the other jobs
                for job in batch:
                    self._end(job, error)
                continue
            for job, sequence in zip(batch, sequences, strict=True):
                job.sequence = sequence

    def _report_finished(self) -> None:
        for job in [job for job in self._running if job.sequence is not None and job.sequence.done]:
            assert job.sequence is not None
            self._end(job, job.sequence.error or job.sequence.sample)

    def _end(self, job: Job, event: Sample | Exception) -> None:
        """Send the last event of a job that no longer has a row."""
        job.listener(event)
        with self._wakeup:
            self._running.remove(job)

    def _evict(self, job: Job) -> None:
        """Free the row of a job, if it has one."""
        if job.sequence is not None:
            self._engine.evict(job.sequence)
