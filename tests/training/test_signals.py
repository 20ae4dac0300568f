"""The first Ctrl-C or SIGTERM requests a stop, and the second one exits immediately."""

from __future__ import annotations

import signal
import threading

import pytest

from tinylm.training.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_the_first_signal_is_recorded_and_the_second_exits_immediately(number: signal.Signals) -> None:
    calls: list[int] = []
    with StopRequest(lambda: calls.append(1)) as request:
        assert request.signal_number is None
        signal.raise_signal(number)
        assert request.signal_number == number
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as caught:
            signal.raise_signal(number)
        assert number == signal.SIGINT or caught.value.code == 128 + number
    assert calls == [1]
    assert request.signal_number == number


def test_under_torchrun_repeated_signals_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    calls: list[int] = []
    with StopRequest(lambda: calls.append(1)) as request:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
    assert (calls, request.signal_number) == ([1], signal.SIGTERM)


def test_signal_handlers_are_not_changed_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGINT)
    handlers: list[object] = []

    def enter_in_thread() -> None:
        with StopRequest():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter_in_thread)
    thread.start()
    thread.join()
    assert handlers == [before]
