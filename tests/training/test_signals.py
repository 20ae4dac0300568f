"""Ctrl-C and SIGTERM: the first asks, the second insists."""

from __future__ import annotations

import signal
import threading

import pytest

from tinylm.training.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_the_first_signal_is_noted_and_the_second_stops_at_once(number: signal.Signals) -> None:
    heard: list[int] = []
    with StopRequest(lambda: heard.append(1)) as request:
        assert request.signal_number is None
        signal.raise_signal(number)
        assert request.signal_number == number
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as ending:
            signal.raise_signal(number)
        assert number == signal.SIGINT or ending.value.code == 128 + number
    assert heard == [1]
    assert request.signal_number == number


def test_in_another_thread_it_leaves_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def elsewhere() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]
