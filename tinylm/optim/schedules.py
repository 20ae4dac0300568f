"""Learning-rate schedules as a function of how much of the training is done; a pure function, so resuming needs no state."""

from __future__ import annotations

import math

from tinylm.recipe.schema import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule


def multiplier(schedule: Schedule, done: float, step: float) -> float:
    """The share of the peak rate for an update.

    `done` is the share of the training that lies before this update, in [0, 1]; `step` the share that one update is (so
    that `done + step` is 1 for the last). A warm-up of 1 or more counts updates, below 1 it is a share.
    """
    warmup = schedule.warmup * step if schedule.warmup >= 1 else schedule.warmup
    if done < warmup:
        return min(1.0, (done + step) / warmup)
    if isinstance(schedule, ConstantSchedule):
        return 1.0
    after_warmup = min(1.0, (done - warmup) / (1 - warmup)) if warmup < 1 else 1.0
    if isinstance(schedule, CosineSchedule):
        falling = 0.5 * (1 + math.cos(math.pi * after_warmup))
    elif isinstance(schedule, LinearSchedule):
        falling = 1 - after_warmup
    else:
        falling = min(1.0, (1 - done) / schedule.cooldown) if schedule.cooldown else 1.0
    return schedule.floor + (1 - schedule.floor) * max(0.0, falling)
