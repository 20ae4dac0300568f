"""Test that the plotted training loss is smooth in long runs and does not lag behind the held-out loss."""

from __future__ import annotations

import math
import statistics

import pytest
from tinylm_cli.smoothing import smoothed


def falling(steps: int) -> list[float]:
    """Return a loss curve that starts at 8 and falls as in a real run."""
    return [2 + 6 * (1 + 30 * step / steps) ** -0.6 for step in range(steps)]


@pytest.mark.parametrize("steps", [40, 150, 450, 5000])
@pytest.mark.parametrize("done", [0.125, 0.5, 1.0])
def test_a_higher_held_out_loss_is_drawn_above_the_training_loss(steps: int, done: float) -> None:
    """The held-out loss is 2% above the training loss. In the first half of a short run, the mean of past losses exceeds both."""
    losses = falling(steps)[: int(done * steps)]
    assert all(value < 1.02 * loss for value, loss in zip(smoothed(losses, done), losses, strict=True))


def test_the_losses_of_a_short_run_are_not_smoothed() -> None:
    assert smoothed([3.0, 1.0, 2.0], 1.0) == [3.0, 1.0, 2.0]


def test_each_value_is_the_mean_of_its_window() -> None:
    losses = [float(7 * index % 11) for index in range(300)]
    values = smoothed(losses, 1.0)
    assert values[0] == losses[0]
    assert values[-1] == losses[-1]
    assert values[1] == pytest.approx(statistics.mean(losses[:3]))
    assert values[150] == pytest.approx(statistics.mean(losses[147:154]))


def test_nan_does_not_spread_to_other_values() -> None:
    values = smoothed([2.0] * 150 + [math.nan] + [2.0] * 150, 1.0)
    assert math.isnan(values[150])
    assert [value for value in values if not math.isnan(value)] == pytest.approx([2.0] * 300)
