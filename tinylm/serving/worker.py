"""One thread that writes for everybody: requests wait in line, join the engine's rows as these become free, and are heard as they
are written. Whoever gives up, or runs out of time, frees a place at the next token.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tinylm.errors import InputError
from tinylm.generation.engine import Engine, Request, Sample, SequenceState, TokenChoice
from tinylm.model.decoder import Decoder
from tinylm.tokenizer import Tokenizer

Event = TokenChoice | str | Sample | Exception
"""A token (when its probability was asked for), text that is certain, and at the end the sample or what went wrong."""
Listener = Callable[[Event], None]


class Full(Exception):
    """Too many requests are waiting already."""


class TooLate(Exception):
    """The time for a request was over before its turn came."""


@dataclass(eq=False)
class Ticket:
    """A request on its way. `listen` is called from the worker's thread."""

    request: Request
    ids: Sequence[int]
    listen: Listener
    deadline: float
    given_up: bool = False
    writer: SequenceState | None = field(default=None, repr=False)


class Worker:
    """`rows` samples are written together, and at most `waiting` more wait; each has `seconds` from its arrival to its end."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, *, rows: int, waiting: int, seconds: float) -> None:
        self._engine = Engine(decoder, tokenizer, rows)
        self._most, self._seconds = waiting, seconds
        self._line: deque[Ticket] = deque()
        self._going: list[Ticket] = []
        self._news = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="tinylm-worker", daemon=True)
        self._thread.start()

    def submit(self, wanted: Sequence[tuple[Request, Sequence[int], Listener]]) -> list[Ticket]:
        """Put requests in line, all of them or none. Raises `Full`."""
        deadline = time.monotonic() + self._seconds
        tickets = [
            Ticket(replace(request, on_text=listen, on_token=listen), ids, listen, deadline) for request, ids, listen in wanted
        ]
        with self._news:
            if len(self._line) + len(tickets) > self._most:
                raise Full
            self._line.extend(tickets)
            self._news.notify()
        return tickets

    def give_up(self, tickets: Sequence[Ticket]) -> None:
        """Nobody listens to these any more; those that are done already do not mind."""
        with self._news:
            for ticket in tickets:
                ticket.given_up = True
            self._news.notify()

    def load(self) -> tuple[int, int]:
        """How many are being written, and how many wait."""
        with self._news:
            return len(self._going), len(self._line)

    def close(self) -> None:
        """Stop after the current token; who is not done hears an error."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._news:
                while not (self._closed or self._line or self._going):
                    self._news.wait()
                if self._closed:
                    break
            try:
                self._leave()
                self._join()
                self._engine.step()
                self._tell_who_is_done()
            except Exception as error:  # a fault of ours must not leave everybody waiting
                for ticket in self._going:
                    ticket.listen(error)
                    if ticket.writer is not None:
                        self._engine.drop(ticket.writer)
                self._going.clear()
        for ticket in (*self._going, *self._line):
            ticket.listen(TooLate("the server is stopping"))

    def _leave(self) -> None:
        """Who gave up or ran out of time goes; in time means with what is written so far."""
        now = time.monotonic()
        for ticket in [one for one in self._going if one.given_up or now > one.deadline]:
            self._going.remove(ticket)
            if ticket.writer is not None:
                self._engine.drop(ticket.writer)
                if not ticket.given_up:
                    ticket.writer.stop()
                    ticket.listen(ticket.writer.sample)
        with self._news:
            late = [one for one in self._line if not one.given_up and now > one.deadline]
            self._line = deque(one for one in self._line if not one.given_up and one not in late)
        for ticket in late:
            ticket.listen(TooLate("no free place in time"))

    def _join(self) -> None:
        """Fill free rows from the line; equal prompts next to each other are read once."""
        while self._engine.free:
            with self._news:
                same: list[Ticket] = []
                while self._line and len(same) < self._engine.free and (not same or self._line[0].ids == same[0].ids):
                    same.append(self._line.popleft())
            if not same:
                return
            try:
                writers = self._engine.add([ticket.request for ticket in same], same[0].ids)
            except InputError as error:
                for ticket in same:
                    ticket.listen(error)
                continue
            for ticket, writer in zip(same, writers, strict=True):
                ticket.writer = writer
                self._going.append(ticket)

    def _tell_who_is_done(self) -> None:
        for ticket in [one for one in self._going if one.writer is not None and one.writer.done]:
            self._going.remove(ticket)
            assert ticket.writer is not None
            ticket.listen(ticket.writer.sample)
