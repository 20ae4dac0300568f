"""Run the generation engine for all requests in one thread.

Jobs wait in a queue, start as the engine's rows become free, and report events while they are generated. A job that is canceled or
times out frees its row after the current token. Every job ends with an event, unless it is canceled first.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tinylm.errors import InputError
from tinylm.generation.engine import Engine, Request, Sample, SequenceState, TokenChoice
from tinylm.model.state import DecodingModel
from tinylm.tokenizer import Tokenizer

Event = TokenChoice | str | Sample | Exception
"""A token (if logprobs were requested), a piece of final text, or the last event of a job: its sample or an error."""
Listener = Callable[[Event], None]
"""Receives the events of a job, in the worker's thread. It must not raise."""
_STOPPED = "the server has stopped generating"


class QueueFull(Exception):
    """Too many jobs are waiting."""


class Unavailable(Exception):
    """A job cannot be generated: it timed out in the queue, or the worker has stopped."""


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


class Worker:
    """Generates up to `rows` samples at once and queues up to `queue_size` more.

    A job has `timeout` seconds from submission to its last token. If it times out while it runs, the text so far is returned.
    """

    def __init__(self, decoder: DecodingModel[Any], tokenizer: Tokenizer, *, rows: int, queue_size: int, timeout: float) -> None:
        self._engine = Engine(decoder, tokenizer, rows)
        self._queue_size, self._timeout = queue_size, timeout
        # A job stays in `_queue` or `_running` until its last event has been sent, so that `_run` can report any error to it.
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._wakeup = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tinylm-worker", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[tuple[Request, Sequence[int], Listener]]) -> list[Job]:
        """Queue all of the requests or none. Raises `QueueFull`, or `Unavailable` if the worker has stopped."""
        deadline = time.monotonic() + self._timeout
        jobs = [
            Job(replace(request, on_text=listener, on_token=listener), ids, listener, deadline)
            for request, ids, listener in requests
        ]
        with self._wakeup:
            if self._closed:
                raise Unavailable(_STOPPED)
            if len(self._queue) + len(jobs) > self._queue_size:
                raise QueueFull
            self._queue.extend(jobs)
            self._wakeup.notify()
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Stop generating these jobs and send no last event. Has no effect on finished jobs."""
        with self._wakeup:
            for job in jobs:
                job.canceled = True
            self._wakeup.notify()

    def load(self) -> tuple[int, int]:
        """Return the numbers of running and queued jobs."""
        with self._wakeup:
            return len(self._running), len(self._queue)

    def close(self) -> None:
        """Stop after the current token. Unfinished jobs get an `Unavailable` error."""
        with self._wakeup:
            self._closed = True
            self._wakeup.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_jobs():
                try:
                    self._remove_canceled_and_expired()
                    self._start_queued()
                    self._engine.step()
                    self._report_finished()
                except Exception as error:  # a bug must not leave all clients waiting forever
                    failed, self._running = self._running, []
                    for job in failed:
                        job.listener(error)
                    for job in failed:
                        self._evict(job)
        finally:  # also if the engine fails for good, as it does after a CUDA error
            with self._wakeup:
                self._closed = True
            for job in (*self._running, *self._queue):
                job.listener(Unavailable(_STOPPED))

    def _wait_for_jobs(self) -> bool:
        """Wait until there is a job. Returns False once the worker is closed."""
        with self._wakeup:
            while not (self._closed or self._queue or self._running):
                self._wakeup.wait()
            return not self._closed

    def _remove_canceled_and_expired(self) -> None:
        """Free the rows of canceled and expired jobs. An expired job returns its text so far, or an error if still queued."""
        now = time.monotonic()
        for job in [job for job in self._running if job.canceled or now > job.deadline]:
            self._evict(job)
            if job.sequence is not None and not job.canceled:
                job.sequence.finish_early()
                job.listener(job.sequence.sample)
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
            except InputError as error:
                for job in batch:
                    job.listener(error)
                    self._running.remove(job)
                continue
            for job, sequence in zip(batch, sequences, strict=True):
                job.sequence = sequence

    def _report_finished(self) -> None:
        for job in [job for job in self._running if job.sequence is not None and job.sequence.done]:
            assert job.sequence is not None
            job.listener(job.sequence.sample)
            self._running.remove(job)

    def _evict(self, job: Job) -> None:
        """Free the row of a job, if it has one."""
        if job.sequence is not None:
            self._engine.evict(job.sequence)
