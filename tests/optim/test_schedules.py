"""Learning-rate schedules by hand, at their corners."""

from __future__ import annotations

import math

import pytest

from tinylm.optim.schedules import multiplier
from tinylm.recipe.schema import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule, WsdSchedule


def _rates(schedule: Schedule, steps: int) -> list[float]:
    return [multiplier(schedule, step / steps, 1 / steps) for step in range(steps)]


def test_constant_warms_up_and_stays() -> None:
    assert _rates(ConstantSchedule(name="constant", warmup=4), 10) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_linear_falls_to_its_floor() -> None:
    rates = _rates(LinearSchedule(name="linear", warmup=2, floor=0.1), 10)
    expected = [0.5, 1.0] + [0.1 + 0.9 * (1 - step / 8) for step in range(8)]
    assert rates == pytest.approx(expected)


def test_wsd_warms_up_stays_and_cools_down() -> None:
    rates = _rates(WsdSchedule(name="wsd", warmup=0.2, cooldown=0.5, floor=0.0), 10)
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_wsd_with_a_floor_and_without_a_cool_down() -> None:
    assert _rates(WsdSchedule(name="wsd", warmup=0, cooldown=0.4, floor=0.5), 5) == pytest.approx([1, 1, 1, 1, 0.75])
    assert _rates(WsdSchedule(name="wsd", warmup=0, cooldown=0.0), 5) == [1.0] * 5


def test_cosine_is_nanogpts_after_its_warm_up() -> None:
    """nanoGPT, train.py: min_lr + 0.5 (1 + cos(pi (it - warmup) / (decay - warmup))) (lr - min_lr)."""
    steps, warmup, floor = 40, 8, 0.1
    rates = _rates(CosineSchedule(name="cosine", warmup=warmup, floor=floor), steps)
    assert rates[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    for step in range(warmup, steps):
        falling = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        assert rates[step] == pytest.approx(floor + falling * (1 - floor))
    assert rates[24] == pytest.approx(0.55)  # half of the way down


@pytest.mark.parametrize(
    "schedule",
    [
        WsdSchedule(name="wsd", warmup=0.1, floor=0.2),
        CosineSchedule(name="cosine", warmup=0.1, floor=0.2),
        LinearSchedule(name="linear", warmup=0.1, floor=0.2),
    ],
    ids=lambda schedule: schedule.name,
)
def test_the_end_is_the_floor_and_the_peak_is_one(schedule: Schedule) -> None:
    assert multiplier(schedule, 1.0, 0.001) == pytest.approx(0.2)
    assert multiplier(schedule, 1.2, 0.001) == pytest.approx(0.2)  # a clock may run over
    assert multiplier(schedule, 0.1, 0.001) == pytest.approx(1.0)
    rates = _rates(schedule, 500)
    assert max(rates) == 1.0
    assert min(rates[50:]) >= 0.2
    assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize("steps", [3, 7, 10, 49, 1000])
@pytest.mark.parametrize("warmup", [1, 2, 3])
def test_a_warm_up_in_steps_takes_that_many(steps: int, warmup: int) -> None:
    rates = _rates(LinearSchedule(name="linear", warmup=warmup), steps)
    assert rates[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert all(later < earlier + 1e-12 for earlier, later in zip(rates[warmup:], rates[warmup + 1 :], strict=False))


def test_no_warm_up_starts_at_the_peak() -> None:
    assert multiplier(CosineSchedule(name="cosine", warmup=0), 0.0, 0.1) == 1.0
