"""Monitor the speed of a training run on a CPU: adapt to other programs that use the cores, and warn if training is slow."""

from __future__ import annotations

from collections.abc import Callable

from tinylm.cpu_load import MIN_CPU_SHARE, cpu_share
from tinylm.training.metrics import Observer, StepEvent
from tinylm.wait_policy import WaitPolicy

BUSY_NOTE = "other programs use the CPU"

FAR_BELOW = 0.5
"""Warn if the speed is below this fraction of the estimate. On processors that the estimates were fitted to, they are accurate to
within 20%."""
CHANGED = 0.75
"""Measure the load again if the speed falls below this fraction of the speed after the last measurement, or rises by the inverse
factor."""
SECONDS_BETWEEN_MEASUREMENTS = 5.0
"""Minimum time between measurements. Each measurement takes 0.06 s."""
SECONDS_UNTIL_IDLE_CHECK = 30.0
"""On a busy machine, time until the load is measured again to find out whether the machine has become idle."""
SECONDS_UNTIL_WARNING = 5.0
"""Training time before the speed is first compared with the estimate."""


class SpeedMonitor(Observer):
    """Adapts `policy` to the load on the machine. `note` receives a message about each change, and at most one warning.

    `estimate` returns the tokens/s of this training run on an idle machine, or None if there is no estimate. It is called at most
    once. `measure` returns the fraction of time for which a thread has a core.
    """

    def __init__(
        self,
        policy: WaitPolicy,
        note: Callable[[str], None],
        estimate: Callable[[], float | None],
        measure: Callable[[], float] = cpu_share,
    ) -> None:
        self._policy, self._note, self._estimate, self._measure = policy, note, estimate, measure
        self._start: float | None = None
        self._measured_at = 0.0
        self._reference: float | None = None
        self._expected: float | None = None
        self._compares = True
        self._slow_events = 0

    def step(self, event: StepEvent) -> None:
        if self._start is None:  # the first step includes warm-up
            self._start = self._measured_at = event.seconds
            return
        if self._measurement_due(event):
            self._measured_at, self._reference = event.seconds, None
            self._choose_policy()
        elif self._reference is None:
            self._reference = event.tokens_per_second
        if self._compares and event.seconds - self._start >= SECONDS_UNTIL_WARNING:
            self._compare(event.tokens_per_second)

    def _measurement_due(self, event: StepEvent) -> bool:
        since = event.seconds - self._measured_at
        if self._policy.current == "sleep" and since >= SECONDS_UNTIL_IDLE_CHECK:
            return True
        if self._reference is None or since < SECONDS_BETWEEN_MEASUREMENTS:
            return False
        return not CHANGED * self._reference <= event.tokens_per_second <= self._reference / CHANGED

    def _choose_policy(self) -> None:
        before, after = self._policy.current, self._policy.choose()
        if (before, after) == ("spin", "sleep"):
            self._note(f"{BUSY_NOTE}, so idle threads now sleep instead of spinning")
        elif (before, after) == ("sleep", "spin"):
            self._note("other programs no longer use the CPU, so idle threads spin again")

    def _compare(self, speed: float) -> None:
        """Warn if the speed is far below the estimate twice in a row. A single slow interval may be a temporary disturbance."""
        if self._expected is None:
            self._expected = self._estimate()
            self._compares = self._expected is not None
        if self._expected is None:
            return
        self._slow_events = self._slow_events + 1 if speed < FAR_BELOW * self._expected else 0
        if self._slow_events < 2:
            return
        share = self._measure()
        cause = (
            f"{BUSY_NOTE} (a thread has a core for {share:.0%} of the time)"
            if share < MIN_CPU_SHARE
            else "no other program uses the CPU, so the estimate may be wrong for this processor"
        )
        factor = self._expected / speed
        self._note(
            f"warning: training is slow: {speed:,.0f} tokens/s instead of the {self._expected:,.0f} expected on this machine "
            f"when it is idle; {cause}; at this speed, training takes {factor:.2g} times as long"
        )
        self._compares = False
