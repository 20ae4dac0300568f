"""Run the jobs of one completion request, and pass their events from the worker thread to the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request

from tinylm.errors import InputError, TinylmError
from tinylm.generation.engine import Sample
from tinylm.generation.token_choice import TokenChoice
from tinylm.serving import responses
from tinylm.serving.api import ParsedRequest, RequestError
from tinylm.serving.worker import Event, QueueFull, Unavailable, Worker
from tinylm.tokenizer import Tokenizer

_DISCONNECT_POLL_SECONDS = 0.5
"""Seconds between checks for a disconnected client during a non-streaming request."""


class RunningCompletion:
    """Submits the jobs of a request. `deadline` is a `time.monotonic()` time. Raises `RequestError` if the queue is full."""

    def __init__(self, worker: Worker, parsed: ParsedRequest, deadline: float) -> None:
        if len(parsed.requests) > worker.capacity:
            problem = f"n: the number of prompts times n must be at most {worker.capacity}, the capacity of this server"
            raise RequestError(400, problem, "n")
        self._worker, self._parsed = worker, parsed
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listener(index: int) -> Callable[[Event], None]:
            return lambda event: None if loop.is_closed() else _call(loop, self._events, index, event)

        requests = [(request, ids, listener(index)) for index, (request, ids) in enumerate(parsed.requests)]
        try:
            self._jobs = worker.submit(requests, deadline, stream=parsed.body.stream)
        except (QueueFull, Unavailable) as error:
            raise as_request_error(error) from None

    async def samples(self, request: Request) -> list[Sample]:
        """Wait for all samples. Raises `ClientDisconnect` if the client disconnects first."""
        samples: dict[int, Sample] = {}
        try:
            while len(samples) < len(self._jobs):
                try:
                    index, event = await asyncio.wait_for(self._events.get(), _DISCONNECT_POLL_SECONDS)
                except asyncio.TimeoutError:
                    if await request.is_disconnected():
                        raise ClientDisconnect from None
                    continue
                if isinstance(event, Exception):
                    raise as_request_error(event)
                if isinstance(event, Sample):
                    samples[index] = event
        finally:
            self._worker.cancel(self._jobs)
        return [samples[index] for index in range(len(self._jobs))]

    async def stream(self, tokenizer: Tokenizer) -> AsyncIterator[bytes]:
        """Yield server-sent events. If the client disconnects, the generator is closed and the jobs are canceled."""
        finished: dict[int, Sample] = {}
        choices = [_StreamedChoice(self._parsed, index, tokenizer) for index in range(len(self._jobs))]
        try:
            while len(finished) < len(self._jobs):
                index, event = await self._events.get()
                if isinstance(event, Exception):
                    yield _server_sent_event(as_request_error(event).as_dict())
                    return
                if isinstance(event, TokenChoice):
                    choices[index].tokens.append(event)
                    continue
                sequence = self._jobs[index].sequence
                assert sequence is not None  # a job with text has started
                if isinstance(event, Sample):
                    finished[index] = event
                yield _server_sent_event(choices[index].chunk(event, sequence.sample))
            options = self._parsed.body.stream_options
            if options is not None and options.include_usage:
                yield _server_sent_event(responses.usage_chunk(self._parsed, list(finished.values())))
            yield b"data: [DONE]\n\n"
        finally:
            self._worker.cancel(self._jobs)


class _StreamedChoice:
    """One choice in a streamed response. Collects the tokens since its last event and tracks what was sent."""

    def __init__(self, parsed: ParsedRequest, index: int, tokenizer: Tokenizer) -> None:
        self._parsed, self._index = parsed, index
        self._tokens = responses.Tokens(parsed, index, tokenizer)
        self._started = False
        self.tokens: list[TokenChoice | int] = []

    def chunk(self, event: str | Sample, sample: Sample) -> dict[str, Any]:
        """Return an event with new text, or the last event with the complete sample. `sample` contains the prompt's choices."""
        complete = event if isinstance(event, Sample) else None
        text, tokens = ("" if isinstance(event, Sample) else event), self.tokens
        first = not self._started
        if first:
            text, tokens = self._tokens.echoed_text + text, [*self._tokens.prompt(sample), *tokens]
            self._started = True
        if complete is not None:
            tokens = [*tokens, *self._tokens.end(complete)]
        self.tokens = []
        return responses.completion_chunk(self._parsed, self._index, text, self._tokens.logprobs(tokens), complete, first=first)


def _call(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[tuple[int, Event]], index: int, event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, (index, event))


def _server_sent_event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


def as_request_error(error: Exception) -> RequestError:
    """Convert an error from the worker or from a sample to an error response."""
    if isinstance(error, QueueFull):
        return RequestError(429, "too many requests are waiting; try again later")
    if isinstance(error, Unavailable):
        return RequestError(503, str(error))
    if isinstance(error, InputError):
        return RequestError.of(error)
    return RequestError(500, str(error) if isinstance(error, TinylmError) else f"internal error: {type(error).__name__}")
