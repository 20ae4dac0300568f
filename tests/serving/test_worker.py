"""The server's worker thread: every job that is not canceled receives a final event, even if generation fails."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tinylm.generation.engine import Engine, Request, Sample, SequenceState
from tinylm.generation.sampling import SamplingOptions
from tinylm.model.decoder import Decoder
from tinylm.serving.worker import Event, Unavailable, Worker
from tinylm.tokenizer import Tokenizer

ENDLESS = 10**9
"""A token limit that is never reached."""


class Client:
    """Submits a job and collects its events."""

    def __init__(self, worker: Worker, tokenizer: Tokenizer, *, max_new_tokens: int, timeout: float = 60.0) -> None:
        end_of_text = tokenizer.end_of_text
        assert end_of_text is not None
        options = SamplingOptions(max_new_tokens, logit_bias=((end_of_text, float("-inf")),))
        self._events: queue.Queue[Event] = queue.Queue()
        requests = [(Request("x", options), tokenizer.encode("x"), self._events.put)]
        self.jobs = worker.submit(requests, time.monotonic() + timeout, stream=True)

    def next_event(self) -> Event:
        return self._events.get(timeout=600)

    def last_event(self) -> Sample | Exception:
        """Wait for the last event. Raise `queue.Empty` if no event arrives for 600 seconds."""
        while True:
            event = self.next_event()
            if isinstance(event, (Sample, Exception)):
                return event


@contextmanager
def running_worker(decoder: Decoder, tokenizer: Tokenizer, **limits: Any) -> Iterator[Worker]:
    worker = Worker(decoder, tokenizer, **{"rows": 1, "queue_size": 8, **limits})
    try:
        yield worker
    finally:
        worker.close()


def fail(*arguments: Any) -> Any:
    raise RuntimeError("injected failure")


def check_that_the_worker_still_generates(worker: Worker, tokenizer: Tokenizer) -> None:
    sample = Client(worker, tokenizer, max_new_tokens=3).last_event()
    assert isinstance(sample, Sample)
    assert len(sample.token_ids) == 3


def test_a_failure_while_finishing_a_timed_out_sample_is_reported_to_its_client(
    decoder: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SequenceState, "finish_early", fail)
    with running_worker(decoder, tokenizer) as worker:
        assert isinstance(Client(worker, tokenizer, max_new_tokens=ENDLESS, timeout=1.0).last_event(), RuntimeError)


def test_a_failure_during_prefill_is_reported_to_its_client(
    decoder: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_worker(decoder, tokenizer) as worker:
        with monkeypatch.context() as patched:
            patched.setattr(Engine, "add", fail)
            assert isinstance(Client(worker, tokenizer, max_new_tokens=3).last_event(), RuntimeError)
        check_that_the_worker_still_generates(worker, tokenizer)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_all_jobs_receive_an_error_if_the_engine_fails_permanently(
    decoder: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_worker(decoder, tokenizer) as worker:
        running = Client(worker, tokenizer, max_new_tokens=ENDLESS)
        running.next_event()
        queued = Client(worker, tokenizer, max_new_tokens=3)
        monkeypatch.setattr(Engine, "evict", fail)
        monkeypatch.setattr(Engine, "step", fail)
        assert isinstance(running.last_event(), RuntimeError)
        assert isinstance(queued.last_event(), Unavailable)
        with pytest.raises(Unavailable, match="has stopped generating"):
            Client(worker, tokenizer, max_new_tokens=3)


def test_closing_the_worker_aborts_running_and_queued_jobs(decoder: Decoder, tokenizer: Tokenizer) -> None:
    with running_worker(decoder, tokenizer) as worker:
        clients = [Client(worker, tokenizer, max_new_tokens=ENDLESS) for _ in range(2)]
        clients[0].next_event()
    assert all(isinstance(client.last_event(), Unavailable) for client in clients)
    with pytest.raises(Unavailable, match="has stopped generating"):
        Client(worker, tokenizer, max_new_tokens=3)


def test_a_canceled_job_frees_its_batch_slot_for_the_next_job(decoder: Decoder, tokenizer: Tokenizer) -> None:
    with running_worker(decoder, tokenizer) as worker:
        endless = Client(worker, tokenizer, max_new_tokens=ENDLESS)
        endless.next_event()
        worker.cancel(endless.jobs)
        check_that_the_worker_still_generates(worker, tokenizer)
