"""A training run adapts to other programs that use the CPU, and warns once if it is far slower than estimated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from tinylm.training.metrics import StepEvent
from tinylm.training.speed import SpeedMonitor
from tinylm.wait_policy import Policy, WaitPolicy


class FakePolicy:
    """A policy that returns each of `choices` once and then repeats the last one."""

    def __init__(self, choices: Sequence[Policy]) -> None:
        self.current: Policy = "spin"
        self.choices = list(choices)
        self.calls = 0

    def choose(self) -> Policy:
        self.calls += 1
        self.current = self.choices.pop(0) if self.choices else self.current
        return self.current


def run(speeds: Sequence[float], *, choices: Sequence[Policy] = (), expected: float | None = None, share: float = 0.5) -> tuple:  # type: ignore[type-arg]
    """Send a step event for each of `speeds` (tokens/s), ten seconds apart. Return the notes and the policy."""
    policy, notes = FakePolicy(choices), list[str]()
    monitor = SpeedMonitor(cast(WaitPolicy, policy), notes.append, lambda: expected, lambda: share)
    for number, speed in enumerate(speeds, 1):
        monitor.step(StepEvent(number, 100 * number, 2.0, 1e-3, 1.0, speed, None, 10.0 * number, number / 100))
    return notes, policy


def test_the_load_is_not_measured_at_a_steady_speed() -> None:
    notes, policy = run([500, 1000, 1050, 950, 1010])
    assert (notes, policy.calls) == ([], 0)


def test_threads_sleep_after_a_slowdown_and_spin_after_a_speedup() -> None:
    notes, policy = run([500, 1000, 1000, 400, 550, 550, 1000], choices=["sleep", "spin"])
    assert policy.current == "spin"
    assert ["sleep instead of spinning" in notes[0], "spin again" in notes[1], len(notes)] == [True, True, 2]


def test_the_load_of_a_busy_machine_is_measured_regularly() -> None:
    _, policy = run([500, 1000, 400, *[550] * 8], choices=["sleep"])
    assert policy.calls == 3  # The load is measured at the slowdown, and again 30 and 60 seconds later.


def test_a_slow_run_causes_one_warning_that_states_the_cause() -> None:
    notes, _ = run([100] * 6, expected=1000)
    assert len(notes) == 1
    assert "100 tokens/s instead of the 1,000" in notes[0]
    assert "other programs use the CPU (a thread has a core for 50% of the time)" in notes[0]
    assert "10 times as long" in notes[0]
    quiet, _ = run([100] * 6, expected=1000, share=0.99)
    assert "the estimate may be wrong for this processor" in quiet[0]


def test_brief_slowdowns_normal_speeds_and_missing_estimates_cause_no_warning() -> None:
    assert run([1000, 1000, 400, 1000, 400, 1000], expected=1000)[0] == []
    assert run([600] * 6, expected=1000)[0] == []
    assert run([1] * 6, expected=None)[0] == []
