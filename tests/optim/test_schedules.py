"""Compare learning-rate schedules with values computed by hand."""

from __future__ import annotations

import math

import pytest

from tinylm.optim.schedules import lr_multiplier
from tinylm.recipe.schema import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule, WsdSchedule


def _rates(schedule: Schedule, steps: int) -> list[float]:
    return [lr_multiplier(schedule, step / steps, 1 / steps) for step in range(steps)]


def test_constant_warms_up_and_stays_at_the_peak() -> None:
    assert _rates(ConstantSchedule(name="constant", warmup=4), 10) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_linear_decays_to_its_floor() -> None:
    rates = _rates(LinearSchedule(name="linear", warmup=2, floor=0.1), 10)
    expected = [0.5, 1.0] + [0.1 + 0.9 * (1 - step / 8) for step in range(8)]
    assert rates == pytest.approx(expected)


def test_wsd_warms_up_stays_at_the_peak_and_cools_down() -> None:
    rates = _rates(WsdSchedule(name="wsd", warmup=0.2, cooldown=0.5, floor=0.0), 10)
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_wsd_cools_down_to_its_floor_and_without_a_cooldown_stays_at_the_peak() -> None:
    assert _rates(WsdSchedule(name="wsd", warmup=0, cooldown=0.4, floor=0.5), 5) == pytest.approx([1, 1, 1, 1, 0.75])
    assert _rates(WsdSchedule(name="wsd", warmup=0, cooldown=0.0), 5) == [1.0] * 5


def test_cosine_matches_nanogpt_after_the_warmup() -> None:
    """nanoGPT, train.py: min_lr + 0.5 (1 + cos(pi (it - warmup) / (decay - warmup))) (lr - min_lr)."""
    steps, warmup, floor = 40, 8, 0.1
    rates = _rates(CosineSchedule(name="cosine", warmup=warmup, floor=floor), steps)
    assert rates[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    for step in range(warmup, steps):
        decay = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        assert rates[step] == pytest.approx(floor + decay * (1 - floor))
    assert rates[24] == pytest.approx(0.55)  # halfway down


@pytest.mark.parametrize(
    "schedule",
    [
        WsdSchedule(name="wsd", warmup=0.1, floor=0.2),
        CosineSchedule(name="cosine", warmup=0.1, floor=0.2),
        LinearSchedule(name="linear", warmup=0.1, floor=0.2),
    ],
    ids=lambda schedule: schedule.name,
)
def test_a_schedule_peaks_at_one_and_ends_at_its_floor(schedule: Schedule) -> None:
    assert lr_multiplier(schedule, 1.0, 0.001) == pytest.approx(0.2)
    assert lr_multiplier(schedule, 1.2, 0.001) == pytest.approx(0.2)  # a run with a time limit can exceed the limit
    assert lr_multiplier(schedule, 0.1, 0.001) == pytest.approx(1.0)
    rates = _rates(schedule, 500)
    assert max(rates) == 1.0
    assert min(rates[50:]) >= 0.2
    assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize("steps", [3, 7, 10, 49, 1000])
@pytest.mark.parametrize("warmup", [1, 2, 3])
def test_a_warmup_of_n_steps_takes_n_steps(steps: int, warmup: int) -> None:
    rates = _rates(LinearSchedule(name="linear", warmup=warmup), steps)
    assert rates[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert all(later < earlier + 1e-12 for earlier, later in zip(rates[warmup:], rates[warmup + 1 :], strict=False))


def test_without_warmup_a_schedule_starts_at_the_peak() -> None:
    assert lr_multiplier(CosineSchedule(name="cosine", warmup=0), 0.0, 0.1) == 1.0
